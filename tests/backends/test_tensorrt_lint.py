"""What TensorRT would reject is said beforehand, in the network's names."""

import numpy as np
import onnx_ir as ir
import pytest

from exporter.backends.tensorrt.lint import lint

LAYER = "stages.0.0.pwconv1"


@pytest.fixture
def lowered(artifacts):
    made = artifacts["tensorrt", "int8"]
    return ir.load(made.path.with_name("custom_linear_int8.onnx"))


def rounding(model, operator="QuantizeLinear"):
    return next(n for n in model.graph if n.op_type == operator and n.metadata_props.get("module") == LAYER)


def constant(model, node, index, array):
    name = f"{LAYER}.other{index}"
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    model.graph.register_initializer(value)
    node.replace_input_with(index, value)


def test_the_graph_that_is_built_has_no_faults(lowered):
    assert lint(lowered) == []


@pytest.mark.parametrize(
    ("zero", "said"),
    [(np.uint8(128), "uint8: TensorRT quantizes to int8 only"), (np.int8(3), "a zero point other than")],
)
def test_rounding_that_is_not_symmetric(lowered, zero, said):
    constant(lowered, rounding(lowered), 2, np.asarray(zero))
    (found,) = lint(lowered)
    assert found.startswith(f"{LAYER}: {said}")


def test_a_bias_in_int32(lowered):
    node = rounding(lowered, "DequantizeLinear")
    constant(lowered, node, 0, np.zeros(8, np.int32))
    assert any(said.startswith(f"{LAYER}: an int32 bias") for said in lint(lowered))


@pytest.mark.parametrize(("operator", "what"), [("Add", "the residual or a bias"), ("LayerNormalization", "LayerNorm")])
def test_rounding_what_no_product_reads(lowered, operator, what):
    node = rounding(lowered, "DequantizeLinear")
    node.outputs[0].uses()[0].node.op_type = operator
    assert any(said.startswith(f"{LAYER}: DQ in front of {what}") for said in lint(lowered))


def test_fp16_scales_below_opset_19(lowered, tiny, run, tmp_path):
    lowered.graph.opset_imports[""] = 18
    assert any("fp16 scales need opset 19, this graph has 18" in said for said in lint(lowered))
    done = run("trt", "--int8", "--opset", 18, "--calib-size", 8, "--weights", tiny, "-o", tmp_path)
    assert done.code == 2
    assert "opset 19" in done.err
    assert not list(tmp_path.glob("*.plan*"))
