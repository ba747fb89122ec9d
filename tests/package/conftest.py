"""A Python for packages: it has numpy, Pillow and the runtimes, and neither PyTorch nor this tool."""

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from exporter.backends.onnxruntime.serving import WEB
from exporter.errors import Unavailable
from exporter.package import npm
from tests.conftest import ROOT

NEEDED = ("numpy", "numpy.libs", "PIL", "pillow.libs", "onnxruntime", "openvino", "flatbuffers", "google", "packaging")


@pytest.fixture(scope="session")
def bare(tmp_path_factory):
    """The path of a Python that imports what packages need and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    site = folder / "site"
    site.mkdir()
    installed = Path(importlib.util.find_spec("numpy").origin).parent.parent
    for name in NEEDED:
        if (installed / name).exists():
            (site / name).symlink_to(installed / name)
    program = folder / "python"
    words = f"PYTHONPATH={shlex.quote(str(site))} exec {shlex.quote(sys.executable)} -S"
    program.write_text(f'#!/bin/sh\n{words} "$@"\n')
    program.chmod(0o755)
    return program


@pytest.fixture
def runtime(monkeypatch):
    """Files of npm, downloaded once for all runs in this checkout; without npm or network the test is skipped."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(ROOT / "build"))
    try:
        return npm.folder_of(WEB)
    except Unavailable as error:
        pytest.skip(str(error))


def execute(*words, folder):
    """Run a program in a folder without the environment of the tests."""
    environment = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(word) for word in words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
