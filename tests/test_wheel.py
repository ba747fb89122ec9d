"""The built distributions: a wheel from the source distribution, installed in an environment of its own."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The source distribution, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", "--target", folder / "hatch", "hatchling"], check=True)
    environment = {**os.environ, "PYTHONPATH": str(folder / "hatch")}
    build = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder]
    subprocess.run(build, cwd=ROOT, env=environment, check=True, capture_output=True)
    (source,) = folder.glob("*.tar.gz")
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source]
    subprocess.run(wheel, env=environment, check=True)
    (built,) = folder.glob("*.whl")
    return source, built


@pytest.fixture(scope="module")
def typed(distributions, tmp_path_factory):
    """Run a command of the wheel in an empty folder, with an environment that has the other packages of this one."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder / "env", symlinks=True)
    python = folder / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--python", python]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", distributions[1]], check=True)
    (site,) = (folder / "env" / "lib").glob("python3*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_paths()["purelib"])  # an editable install in it is not followed
    (folder / "desk").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*words):
        command = [folder / "env" / "bin" / "convnext-export", *words]
        done = subprocess.run(command, cwd=folder / "desk", env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = subprocess.run(
        [python, "-c", "import exporter; print(exporter.__file__)"], cwd=folder / "desk", env=environment,
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert where.strip() == str(site / "exporter" / "__init__.py")
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "desk" / "photo.png")
    return run


def test_distributions_have_the_license_and_what_the_program_reads(distributions):
    source, wheel = distributions
    inside = set(zipfile.ZipFile(wheel).namelist())
    for name in ("exporter/py.typed", "exporter/recipes/recipe.schema.json", "exporter/calibration/digits-256.tsv"):
        assert name in inside
    assert any(name.endswith("licenses/LICENSE") for name in inside)
    assert not [name for name in inside if name.startswith(("tests/", "benchmarks/"))]
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "exporter/__init__.py"} <= names


@pytest.mark.slow
def test_a_wheel_in_an_environment_of_its_own_does_its_work(typed):
    assert "verify" in typed("--help")
    assert "onnxruntime" in typed("doctor")
    assert "onnxruntime/tiny_int8" in typed("recipes")
    assert "atto_fp32.onnx" in typed("onnx", "--variant", "atto", "--weights", "random", "--imgsz", "64")
    assert "cosine" in typed("verify", "build/atto_fp32.onnx", "--samples", "2")
    assert "photo.png" in typed("predict", "build/atto_fp32.onnx", "photo.png")
