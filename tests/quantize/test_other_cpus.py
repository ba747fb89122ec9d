"""Int8 artifacts answer alike on other CPUs, which qemu emulates: an x86 without VNNI, and an Arm."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from exporter.data import images, synthetic
from exporter.precision import PRECISIONS
from tests.conftest import ROOT, build

AARCH64 = "CONVNEXT_EXPORT_AARCH64"  # the folder that tests/quantize/aarch64.sh made
PROGRAM = ROOT / "tests" / "quantize" / "answers.py"
COUNT = 8


def emulator(name: str) -> tuple[list[str], dict[str, str]]:
    """The command that runs Python on another CPU, and its environment."""
    if name == "haswell":
        if shutil.which("qemu-x86_64") is None:
            pytest.skip("qemu-x86_64 is not installed (Debian: qemu-user)")
        return ["qemu-x86_64", "-cpu", "Haswell", sys.executable], dict(os.environ)
    folder = os.environ.get(AARCH64)
    if folder is None or shutil.which("qemu-aarch64") is None:
        pytest.skip(f"{AARCH64} does not name a folder that tests/quantize/aarch64.sh made, or qemu-aarch64 is missing")
    root = Path(folder, "root")
    command = ["qemu-aarch64", "-cpu", "neoverse-n1", "-L", str(root), str(root / "usr/bin/python3.11")]
    return command, {"PYTHONPATH": str(Path(folder, "site"))}


def answers(model: Path, inputs: Path, outputs: Path, command: list[str], environment: dict[str, str]):
    """The outputs (N, classes) of a model in a process."""
    words = [*command, PROGRAM, model, inputs, outputs]
    done = subprocess.run([str(w) for w in words], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return np.load(outputs)


def cosine(a, b) -> float:
    """The smallest cosine between rows."""
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


@pytest.fixture(scope="module")
def compared(artifacts, tmp_path_factory):
    """A function from an int8 artifact and the name of a CPU to outputs: in fp32, in int8 here, and in int8 there."""
    recipe = artifacts["onnxruntime", "fp32"].sidecar.preprocessing
    pixels = [synthetic.dead_leaves(recipe.size, 500 + i, recipe.channels) for i in range(COUNT)]
    folder = tmp_path_factory.mktemp("compared")
    np.save(folder / "images.npy", images.normalise(np.stack(pixels), recipe))

    @functools.cache
    def outputs(path, name):
        where = emulator(name) if name else ([sys.executable], dict(os.environ))
        return answers(path, folder / "images.npy", folder / "outputs.npy", *where)

    def compare(quantized, name):
        exact = artifacts["onnxruntime", "fp32"].path
        return outputs(exact, ""), outputs(quantized.path, ""), outputs(quantized.path, name)

    return compare


@pytest.mark.slow
@pytest.mark.parametrize("name", ["haswell", "aarch64"])
def test_a_portable_artifact_answers_alike_on_other_cpus(name, artifacts, compared):
    exact, here, there = compared(artifacts["onnxruntime", "int8"], name)
    assert cosine(exact, there) > PRECISIONS["int8"].limits.cosine
    # The sums of products are equal, and norms and GELU differ in their last bits.
    assert np.abs(there - here).max() < 0.01 * np.abs(here - exact).max()


@pytest.mark.slow
def test_an_artifact_for_arm_answers_with_number_formats_of_its_own_there(tiny, artifacts, compared, tmp_path):
    exact, _, portable = compared(artifacts["onnxruntime", "int8"], "aarch64")
    _, _, for_arm = compared(build(tiny, tmp_path, precision="int8", cpu="arm"), "aarch64")
    assert cosine(exact, for_arm) > PRECISIONS["int8"].limits.cosine
    assert np.abs(for_arm - portable).max() > 0.1 * np.abs(portable - exact).max()


@pytest.mark.slow
def test_weights_without_a_bound_answer_otherwise_without_vnni(tiny, compared, tmp_path):
    """Shows that the first test can fail."""
    exact, _, there = compared(build(tiny, tmp_path, precision="int8", cpu="vnni"), "haswell")
    assert cosine(exact, there) < PRECISIONS["int8"].limits.cosine
