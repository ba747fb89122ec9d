"""Int8 sums of the runtimes are exact, with and without VNNI."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from exporter import machine
from tests.conftest import ROOT
from tests.quantize.kernels import differing

RUNTIMES = ("onnxruntime", "openvino")
QEMU = ("qemu-x86_64", "-cpu", "Haswell")  # ONNX Runtime reads CPUID; no setting restricts it


def without_vnni(runtime: str, *words: str) -> tuple[int, int]:
    """Run the cases without VNNI: natively, restricted by an environment variable, or under qemu: (cases, inexact)."""
    command, settings = [sys.executable, "-m", "tests.quantize.kernels", runtime, *words], dict(os.environ)
    if not machine.saturates():
        if "avx2" not in machine.cpu()[1]:
            pytest.skip("this CPU is not an x86 with AVX2")
        if runtime == "openvino":
            settings["ONEDNN_MAX_CPU_ISA"] = "AVX2"
        elif shutil.which(QEMU[0]):
            command = [*QEMU, *command]
        else:
            pytest.skip("this CPU has VNNI, and qemu-x86_64 is not installed (Debian: qemu-user)")
    done = subprocess.run(command, env=settings, cwd=ROOT, capture_output=True, text=True, timeout=600, check=True)
    counts = re.match(r"(\d+) cases, (\d+) differ", done.stdout)
    assert counts, done.stdout
    return int(counts[1]), int(counts[2])


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_sums_are_exact_on_this_cpu(runtime):
    count, wrong = differing(runtime, exact_pairs=True)
    assert count > 100
    assert wrong == []


@pytest.mark.slow
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_sums_are_exact_without_vnni(runtime):
    count, wrong = without_vnni(runtime)
    assert count > 100
    assert wrong == 0


@pytest.mark.slow
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_unbounded_weights_saturate_without_vnni(runtime):
    """Shows that the test above can fail."""
    count, wrong = without_vnni(runtime, "--any-weights")
    assert wrong > count / 2
