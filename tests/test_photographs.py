"""Real weights on real photographs, where development and CI have them: nothing is lost on the way."""

import pytest

from tests.conftest import has_bf16, shared, type_command

EAGER_TOP1 = {"convnext_atto": 70.6, "convnextv2_atto": 71.25}


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
def test_top1_stays_within_a_tenth_of_a_point(model, verb, precision, built):
    if precision == "bf16" and not has_bf16():
        pytest.skip("this CPU has no bf16")
    path = built(model, verb, precision)
    result = type_command("verify", path, "--data", shared("data", "images", "val"), "--threads", 1, "--json")
    assert result.code == 0, result.err
    found = {finding["metric"]: finding["value"] for finding in result.json["findings"]}
    assert found["images"] == 2000
    assert found["top1_eager"] == pytest.approx(EAGER_TOP1[model], abs=0.051)
    assert abs(found["top1"] - found["top1_eager"]) <= 0.1 + 1e-9
    assert found["cosine"] >= {"fp32": 0.99999, "fp16": 0.9999, "bf16": 0.999}[precision]
