"""Block by block: where an artifact begins to differ, and in what precision each block is computed."""

import numpy as np
import pytest

from exporter import backends
from exporter.backends import Blocks, Layer
from exporter.model.structure import last_operators
from exporter.verify.blocks import block_errors
from tests.conftest import PX, build, copy_artifact, needs_bf16

NAMES = [
    "downsample_layers.0", "stages.0.0", "downsample_layers.1", "stages.1.0", "downsample_layers.2",
    "stages.2.0", "stages.2.1", "downsample_layers.3", "stages.3.0",
]  # fmt: skip


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(2, 3, PX, PX)).astype(np.float32)


def errors(made, images):
    runtime, eager = backends.runtime(made.sidecar.backend), backends.runtime("eager")
    layers = runtime.layers(made, runtime.options())
    with eager.blocks(made, eager.options()) as expected, runtime.blocks(made, runtime.options()) as given:
        return {finding.case: finding for finding in block_errors(expected, given, layers, images)}


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_every_block_of_a_faithful_artifact_agrees(backend, artifacts, images):
    found = errors(artifacts[backend, "fp32"], images)
    assert list(found) == NAMES
    assert max(finding.value for finding in found.values()) < 1e-5
    assert {finding.detail for finding in found.values()} == {"fp32"}


def test_precision_is_told(artifacts, images):
    assert {f.detail for f in errors(artifacts["onnxruntime", "fp16"], images).values()} == {"fp16"}


def test_bf16_is_told_where_it_is_computed(artifacts, images):
    needs_bf16("openvino", "bf16")
    assert "bf16" in errors(artifacts["openvino", "bf16"], images)["stages.2.0"].detail


def test_the_block_that_was_spoilt_is_where_it_begins(artifacts, images, tmp_path):
    import onnx_ir as ir

    made = copy_artifact(artifacts["onnxruntime", "fp32"], tmp_path)
    model = ir.load(made.path)
    node = next(node for node in model.graph if node.name == "stages.2.1.pwconv1/Conv")
    weight = node.inputs[1]
    weight.const_value = ir.tensor(weight.const_value.numpy() * 1.1, name=weight.name)
    ir.save(model, made.path)
    found = errors(made, images)
    assert max(found[name].value for name in NAMES[:6]) < 1e-5
    assert min(found[name].value for name in NAMES[6:]) > 1e-3


def test_a_block_of_no_numbers_fails():
    ones = np.ones((1, 2))
    expected = Blocks(("stages.0.0",), lambda images: (ones * [1, 2],))
    for bad in (ones * np.nan, np.ones((1, 3))):
        given = Blocks(("stages.0.0",), lambda images, bad=bad: (bad,))
        (finding,) = block_errors(expected, given, [], ones)
        assert not finding.passed
        assert finding.value is None


def test_only_the_operators_that_do_the_work_count():
    layers = [
        Layer(name="a", module="stages.0.1.pwconv1", operator="MatMul", precision="int8"),
        Layer(name="b", module="stages.0.1", operator="Add", precision="fp32"),
        Layer(name="c", module="stages.0.10.pwconv1", operator="MatMul", precision="fp16"),
    ]
    same = Blocks(("stages.0.1",), lambda images: (images,))
    (finding,) = block_errors(same, same, layers, np.ones((1, 2)))
    assert finding.detail == "int8"


def test_the_last_operator_of_a_block_is_its_end():
    names = ["stages.0.1/Add", "stages.0.10/Add", "stages.0.1.norm/LayerNormalization", "head/Gemm", "stages.0.1/Add_2"]
    assert last_operators(names) == {"stages.0.1": "stages.0.1/Add_2", "stages.0.10": "stages.0.10/Add"}


def test_blocks_are_refused_beside_a_model_with_other_modules(onnx_copy, refused):
    said = refused(2, "verify", onnx_copy.path, "--blocks", "--reference", "timm")
    assert "timm has modules of its own; build the artifact with --reference timm" in said


def test_verify_tells_them_when_asked(onnx_copy, run):
    result = run("verify", onnx_copy.path, "--samples", "2", "--blocks", "--json")
    assert result.code == 0
    assert [f["case"] for f in result.json["findings"] if f["metric"] == "block_error"] == NAMES
    result = run("verify", onnx_copy.path, "--samples", "2")
    assert "block_error" not in result.out


def test_blocks_of_an_artifact_for_more_images_than_there_are(tiny, tmp_path, run):
    artifact = build(tiny, tmp_path, batch=4)
    result = run("verify", artifact.path, "--samples", "2", "--blocks", "--json")
    assert result.code == 0, result.err
    errors = [f["value"] for f in result.json["findings"] if f["metric"] == "block_error"]
    assert len(errors) == len(NAMES)
    assert max(errors) < 1e-5
