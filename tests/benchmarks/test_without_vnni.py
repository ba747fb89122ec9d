"""A command runs with VNNI hidden."""

import subprocess
import sys

import pytest

from benchmarks import without_vnni
from tests.conftest import ROOT

SAY = """
import torch
from exporter import machine
print(machine.saturates(), torch.backends.cpu.get_cpu_capability())
"""


@pytest.mark.skipif(bool(without_vnni.missing()), reason=without_vnni.missing() or "-")
def test_the_command_sees_no_vnni_and_its_exit_code_is_returned():
    words = [sys.executable, "-m", "benchmarks.without_vnni", sys.executable, "-c"]
    done = subprocess.run([*words, SAY], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "AVX2"]
    failed = subprocess.run([*words, "raise SystemExit(5)"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert failed.returncode == 5
