"""Real weights on real photographs, where development and CI have them: nothing is lost on the way."""

import hashlib
import os
import threading

import numpy as np
import pytest

from exporter.backends import eager
from exporter.data import images
from tests import once
from tests.conftest import needs_bf16, shared, type_command

PARSING = threading.Lock()
"""Python 3.11 cannot run `ast`, which parses the headers of arrays, in two threads at once."""
EAGER_TOP1 = {"convnext_atto": 70.6, "convnextv2_atto": 71.25}  # of all 2,000


@pytest.fixture(scope="module", autouse=True)
def eager_answers_once(tmp_path_factory):
    """The same network gives the same answers to the same images: they are computed for the first test that asks, in
    whichever process."""
    real, folder = eager.EagerSession.__call__, once.shared_folder(tmp_path_factory, "answers")

    def remembered(session, images):
        weights = b"".join(value[:1].numpy().tobytes() for value in session.model.state_dict().values())
        path = folder / f"{hashlib.sha256(weights + images.tobytes()).hexdigest()}.npz"
        with once.locked(path):
            if not path.exists():
                np.savez(path, *real(session, images))
        with PARSING, np.load(path) as answers:
            return tuple(answers.values())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eager.EagerSession, "__call__", remembered)
        yield


@pytest.fixture(scope="module", autouse=True)
def photographs_once(tmp_path_factory):
    """A photograph is decoded and preprocessed for the first test that asks, in whichever process."""
    real, folder = images.read, once.shared_folder(tmp_path_factory, "photographs")

    def remembered(file, recipe):
        path = folder / f"{hashlib.sha256(f'{file} {recipe}'.encode()).hexdigest()}.npy"
        if not path.exists():
            part = path.with_suffix(f".{os.getpid()}.npy")
            np.save(part, real(file, recipe))
            part.replace(path)
        with PARSING:
            return np.load(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "read", remembered)
        yield


@pytest.fixture(scope="module", autouse=True)
def statistics_once(tmp_path_factory):
    """All tests of this module share one cache of calibration statistics."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(once.shared_folder(tmp_path_factory, "cache-of-photographs")))
        yield


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """Every second of the 2,000 photographs."""

    def link(folder):
        for path in sorted(shared("data", "images", "val").glob("*/*"))[::2]:
            (folder / path.parent.name).mkdir(exist_ok=True)
            (folder / path.parent.name / path.name).symlink_to(path)

    return once.written(once.shared_folder(tmp_path_factory, "half"), link)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("photographs")

    def build(model, verb, precision):
        weights = shared("data", "weights", f"{model}_imagenette.safetensors")
        words = [verb, "--weights", weights, "--imgsz", 112, "--precision", precision, "-o", out, "--json"]
        result = type_command(*words)
        assert result.code == 0, result.err
        return result.json["artifact"]["path"]

    return build


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "verb", "precision"),
    [
        ("convnext_atto", "onnx", "fp32"),
        ("convnext_atto", "openvino", "fp16"),
        ("convnext_atto", "openvino", "bf16"),
        ("convnextv2_atto", "onnx", "fp16"),
    ],
)
def test_top1_stays_within_a_tenth_of_a_point(model, verb, precision, built, half):
    needs_bf16(verb, precision)
    path = built(model, verb, precision)
    every = precision == "fp32"
    data = shared("data", "images", "val") if every else half
    result = type_command("verify", path, "--data", data, "--threads", 1, "--json")
    assert result.code == 0, result.err
    found = {finding["metric"]: finding["value"] for finding in result.json["findings"]}
    assert found["images"] == (2000 if every else 1000)
    assert found["top1_eager"] == pytest.approx(EAGER_TOP1[model], abs=0.051 if every else 1)
    assert abs(found["top1"] - found["top1_eager"]) <= 0.1 + 1e-9
    assert found["cosine"] >= {"fp32": 0.99999, "fp16": 0.9999, "bf16": 0.999}[precision]


@pytest.fixture(scope="module")
def outliers(tmp_path_factory):
    """The V1 model with three channels of every block's LayerNorm 40 times as large and `pwconv1` divided by it: the
    same function."""
    from safetensors.torch import load_file, save_file

    state = load_file(shared("data", "weights", "convnext_atto_imagenette.safetensors"))
    for norm in [key for key in state if key.startswith("stages") and key.endswith("norm.weight")]:
        block = norm.removesuffix("norm.weight")
        state[norm][:3] *= 40
        state[f"{block}norm.bias"][:3] *= 40
        state[f"{block}pwconv1.weight"][:, :3] /= 40
    path = tmp_path_factory.mktemp("outliers") / "convnext_atto_outliers.safetensors"
    save_file(state, path)
    return path


LIMITS = {
    # agreement, cosine, points lost, share of MACs in int8; with and without VNNI
    ("convnext_atto", "openvino", "synthetic"): (99.2, 0.9999, 0.2, 90),
    ("outliers", "onnx", "photographs"): (99.5, 0.9999, 0.2, 85),
    ("convnextv2_atto", "onnx", "photographs"): (99.2, 0.9999, 0.2, 85),
    ("convnextv2_atto", "trt", "photographs"): (98.5, 0.999, 0.5, 85),
}


@pytest.mark.slow
@pytest.mark.parametrize(("model", "verb", "calib"), LIMITS)
def test_int8_loses_next_to_nothing(model, verb, calib, outliers, half, tmp_path, monkeypatch):
    from exporter.build.int8 import speed

    monkeypatch.setattr(speed, "SECONDS_EACH", 0.3)
    weights = outliers if model == "outliers" else shared("data", "weights", f"{model}_imagenette.safetensors")
    source = shared("data", "images", "calib") if calib == "photographs" else calib
    words = ("--imgsz", 112, "--calib", source, "--calib-size", 128, "--data", half)
    result = type_command(verb, "--int8", "--weights", weights, *words, "-o", tmp_path, "--json")
    assert result.code == 0, result.err
    found = {finding["metric"]: finding for finding in result.json["report"]["findings"]}
    agreement, cosine, drop, in_int8 = LIMITS[model, verb, calib]
    assert result.json["artifact"]["quantization"]["kept"] == []
    assert found["images"]["value"] == 1000
    assert found["top1_agreement"]["value"] >= agreement
    assert found["cosine"]["value"] >= cosine
    assert found["top1_drop"]["value"] <= drop + 1e-9
    assert found["quantized_macs_pct"]["value"] >= in_int8
    assert (calib == "synthetic") == ("synthetic_cost" in found)
    if calib == "synthetic":  # in points of agreement lost, calibrated on the photographs in place of generated images
        assert found["synthetic_cost"]["value"] <= 0.3
