"""What the package says of itself, and what it needs from a system."""

import hashlib
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

APACHE = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"  # apache.org/licenses/LICENSE-2.0.txt


@pytest.fixture
def project():
    tomllib = pytest.importorskip("tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def test_the_license_is_the_one_that_the_package_names(project):
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE
    assert project["project"]["license"] == "Apache-2.0"
    assert project["project"]["license-files"] == ["LICENSE"]


IMPORT_ALL = """
import importlib, pkgutil, sys
for name in ("fcntl", "resource"):
    sys.modules[name] = None
import exporter
names = [module.name for module in pkgutil.walk_packages(exporter.__path__, "exporter.")]
for name in names:
    importlib.import_module(name)
print(*names)
"""


def test_every_module_can_be_imported_on_a_system_without_fcntl_and_resource():
    """Windows has neither."""
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    modules = {path for path in (ROOT / "exporter").rglob("*.py") if path != ROOT / "exporter" / "__init__.py"}
    assert len(done.stdout.split()) == len(modules)


def test_every_text_file_is_opened_with_its_encoding():
    """Without one, Windows reads and writes in the encoding of its language."""
    bare = re.compile(r"\b(read_text|write_text)\((?!\s*[\"'(\w].*utf|encoding)")
    system = {"machine.py"}  # which reads what the kernel of Linux writes
    sources = [path for path in (ROOT / "exporter").rglob("*.py") if path.name not in system]
    assert len(sources) > 60
    assert [path.name for path in sources if bare.search(path.read_text("utf-8"))] == []
