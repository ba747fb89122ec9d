"""Checkpoints in the forms that people have, where development and CI have them: each gives its listed answer."""

from __future__ import annotations

import functools
import json
import runpy

import numpy as np
import pytest
import torch

from tests.conftest import SHARED, shared

CASES = SHARED / "checkpoints" / "make.py"


@functools.cache
def names():
    """The names of the cases, without writing them."""
    if not CASES.exists():
        return ["all"]
    script = runpy.run_path(str(CASES))
    files = [name for name, *_ in script["cases"]()]
    folders = [name for name, *_ in script["folders"]()]
    return [*(name.removesuffix("/model.safetensors").removesuffix("/adapter_model.safetensors") for name in files),
            *folders, "sharded"]  # fmt: skip


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """A folder of checkpoints, and what each must give."""
    shared("checkpoints", "make.py")
    folder = tmp_path_factory.mktemp("checkpoints")
    runpy.run_path(str(CASES))["write"](folder)
    return folder, json.loads((folder / "expected.json").read_text())


@pytest.mark.parametrize("name", names())
def test_a_checkpoint_gives_its_answer_or_the_word_of_its_refusal(name, cases, tmp_path, run):
    import onnxruntime

    folder, expected = cases
    case = expected[name]
    result = run("onnx", "--weights", folder / name, "--imgsz", 64, "--no-simplify", "-o", tmp_path, "--json")
    if isinstance(case["answer"], str):
        assert result.code == 2
        assert case["answer"] in result.err
        return
    assert result.code == 0, result.err
    artifact = result.json["artifact"]
    assert artifact["task"] == case["task"]
    channels = artifact["inputs"][0]["shape"][1]
    images = torch.randn(2, channels, 64, 64, generator=torch.Generator().manual_seed(0)).numpy()
    outputs = onnxruntime.InferenceSession(artifact["path"]).run(None, {"images": images})
    for got, listed in zip(outputs, case["answer"], strict=True):
        answer = np.array(listed, np.float32)
        assert np.abs(got - answer).max() <= 1e-4 * answer.std()


@pytest.mark.parametrize("name", names())
def test_the_sidecar_of_a_checkpoint_says_its_preprocessing_and_labels(name, cases):
    from exporter.model import weights

    folder, expected = cases
    for field, value in expected[name]["said"].items():
        checkpoint = weights.load(str(folder / name))
        found = list(checkpoint.labels) if field == "labels" else getattr(checkpoint.preprocessing, field)
        assert found == value
