"""A Python for packages: it has numpy, Pillow and the runtimes, and neither PyTorch nor this tool."""

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

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


def execute(*words, folder):
    """Run a program in a folder without the environment of the tests."""
    environment = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(word) for word in words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
