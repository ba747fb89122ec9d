"""Q and DQ stand where the placement says, the graph is sound, and stock ONNX Runtime loads it."""

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from exporter import backends
from exporter.errors import CheckFailed
from exporter.model.structure import part
from exporter.quantize.placement import faults, pair_sums, quantize
from exporter.quantize.rounding import LARGEST, MAX_PAIR, Rounding, largest_pair, round_weights
from tests.conftest import prepared, recipe_of

BACKENDS = ("onnxruntime", "openvino")
OPERATORS = ("QuantizeLinear", "DequantizeLinear")


@pytest.fixture(scope="module", params=BACKENDS)
def ready(request, tiny):
    recipe = recipe_of(request.param, "int8", weights=str(tiny), calib_size=8)
    with tempfile.TemporaryDirectory() as folder:
        yield prepared(recipe, Path(folder))


def _is_dequantized(value):
    return value.producer() is not None and value.producer().op_type == "DequantizeLinear"


def quantized(ready, kept=()):
    return quantize(ready.graph, ready.plan, ready.placement, kept)


def test_every_layer_of_the_plan_and_no_other(ready):
    model = quantized(ready)
    rounded = {
        node.metadata_props["module"]
        for node in model.graph
        if node.op_type in ("Conv", "MatMul") and _is_dequantized(node.inputs[0])
    }
    assert rounded == set(ready.plan)
    kinds = {"pwconv1", "pwconv2"} | ({"1"} if "downsampling" in ready.placement.kinds else set())
    assert {name.rpartition(".")[2] for name in rounded} == kinds
    assert faults(model, ready.placement) == []


def test_a_quantised_layer_is_one_q_and_two_dqs(ready):
    counts = Counter(node.op_type for node in quantized(ready).graph if node.op_type in OPERATORS)
    layers = len(ready.plan)
    assert counts == {"QuantizeLinear": layers, "DequantizeLinear": 2 * layers}


def test_the_fp32_graph_stays_as_it_was(ready):
    before = ir.serde.serialize_model(ready.graph).SerializeToString(deterministic=True)
    quantized(ready)
    assert ir.serde.serialize_model(ready.graph).SerializeToString(deterministic=True) == before


def test_what_is_kept_back_is_left_alone(ready):
    model = quantized(ready, kept=("stages.2.1",))
    names = {node.metadata_props["module"] for node in model.graph if node.op_type in OPERATORS}
    assert not any(part(name) == "stages.2.1" for name in names)
    assert {part(name) for name in names} == set(map(part, ready.plan)) - {"stages.2.1"}


def test_stock_onnx_runtime_runs_it(ready, tmp_path):
    import onnxruntime

    ready.make((), tmp_path)
    (path,) = tmp_path.glob("*int8.onnx")
    model = onnx.load(path)
    assert {opset.domain for opset in model.opset_import} == {""}, "no operators of anybody's own"
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = [name for name in stored if name.endswith("weight_int8")]
    assert len(weights) == len(ready.plan)
    assert all(stored[name].data_type == onnx.TensorProto.INT8 for name in weights)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": np.zeros((2, 3, 64, 64), np.float32)})
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda q, dq: setattr(q.inputs[1], "const_value", ir.tensor(np.float32(np.nan))), "no scale that is finite"),
        (lambda q, dq: setattr(q.inputs[1], "const_value", ir.tensor(np.float32(-1))), "no scale that is finite"),
        (lambda q, dq: setattr(q.inputs[2], "const_value", ir.tensor(np.int8(3))), "does not quantize to uint8"),
        (lambda q, dq: dq.outputs[0].replace_all_uses_with(q.inputs[0]), "feeds nothing"),
        (lambda q, dq: dq.outputs[0].replace_all_uses_with(q.outputs[0]), "expected DequantizeLinear"),
    ],
)
def test_faults_are_found(ready, spoil, said):
    model = quantized(ready)
    q = next(node for node in model.graph if node.op_type == "QuantizeLinear")
    dq = next(use.node for use in q.outputs[0].uses())
    spoil(q, dq)
    assert any(said in fault for fault in faults(model, ready.placement))


def test_a_symmetric_target_gets_int8_around_zero(ready):
    import dataclasses

    placement = dataclasses.replace(ready.placement, symmetric=True)
    plan = {name: Rounding(0.05, 0, True, rounding.shift) for name, rounding in ready.plan.items()}
    model = quantize(ready.graph, plan, placement)
    assert faults(model, placement) == []
    assert faults(model, ready.placement), "uint8 was wanted"
    assert faults(quantized(ready), placement), "int8 was wanted"


def test_a_layer_that_is_not_there_is_an_error(ready):
    plan = {**ready.plan, "stages.9.9.pwconv1": next(iter(ready.plan.values()))}
    with pytest.raises(CheckFailed, match=r"no layer stages.9.9.pwconv1"):
        quantize(ready.graph, plan, ready.placement)


@pytest.mark.parametrize(("shape", "axis"), [((6, 5, 1, 1), 0), ((5, 6), 1), ((6, 5, 2, 2), 0)])
def test_weights_are_rounded_channel_by_channel_to_half_a_step(shape, axis):
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    weight *= np.logspace(-3, 3, 6, dtype=np.float32).reshape([-1 if a == axis else 1 for a in range(len(shape))])
    whole, scale = round_weights(weight, axis)
    assert whole.dtype == np.int8
    assert scale.shape == (6,)
    steps = scale.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    assert (np.abs(whole * steps - weight) <= 0.5001 * steps).all()
    assert (np.abs(whole).max(axis=tuple(a for a in range(len(shape)) if a != axis)) == 127).all()


@pytest.mark.parametrize("grid", ["int8", "fp8"])
def test_scales_that_are_held_in_fp16_are_the_ones_that_were_rounded_with(grid):
    """Small weights, as layer scale leaves them: their scales lose digits in fp16, or become nothing."""
    weight = np.random.default_rng(0).normal(size=(40, 64)).astype(np.float32)
    weight *= np.logspace(-9, 0, 40, dtype=np.float32)[:, None]
    whole, scale = round_weights(weight, 0, grid, half=True)
    assert (scale.astype(np.float16) == scale).all()
    assert (scale > 0).all()
    error = np.abs(whole.astype(np.float32) * scale[:, None] - weight)
    step = scale[:, None] if grid == "int8" else np.maximum(np.abs(weight) / 8, 2.0**-9 * scale[:, None])
    assert (error <= 0.5001 * step).all()


def test_a_channel_of_zeros_has_a_scale():
    whole, scale = round_weights(np.zeros((3, 2), np.float32), 0)
    assert not whole.any()
    assert (scale > 0).all()


def test_each_backend_has_its_own_placement():
    assert all(backends.target(name).placements for name in BACKENDS)


def neighbours(whole, axis):
    """Sums of input channels 2k and 2k + 1, of every two neighbours where their number is no multiple of four."""
    rows = np.moveaxis(whole.astype(int), 1 - axis, 0)
    step = 2 if len(rows) % 4 == 0 else 1
    return np.array([rows[k] + rows[k + 1] for k in range(0, len(rows) - 1, step)] or [rows * 0])


SHAPES = st.one_of(
    st.tuples(st.integers(1, 6), st.integers(1, 12)),
    st.tuples(st.integers(1, 4), st.integers(1, 9), st.just(2), st.just(2)),
)
WEIGHTS = SHAPES.flatmap(
    lambda shape: arrays.arrays(
        np.float32,
        shape,
        elements=st.floats(-4, 4, width=32, allow_subnormal=False) | st.sampled_from([1.0, 0.5, -1.0]),
    )
)


@settings(deadline=None, max_examples=300)
@given(WEIGHTS, st.sampled_from([0, 1]))
def test_adjacent_weights_sum_to_at_most_max_pair(weight, axis):
    if weight.ndim == 4:
        axis = 0
    whole, scale = round_weights(weight, axis, exact_pairs=True)
    assert np.abs(neighbours(whole, axis)).max() <= MAX_PAIR
    assert largest_pair(whole, axis) <= 255 * MAX_PAIR
    steps = scale.reshape([-1 if a == axis else 1 for a in range(weight.ndim)])
    assert (np.abs(whole * steps - weight) <= 0.5001 * steps).all(), "no weight is clipped"
    others = tuple(a for a in range(weight.ndim) if a != axis)
    plain = np.maximum(np.abs(weight).max(axis=others) / LARGEST["int8"], 1e-12)
    assert (scale <= plain * 2.02).all(), "the scale at most doubles"


def test_weights_whose_pairs_cancel_keep_their_scale():
    weight = np.array([[1.0, -1.0, 0.25, 0.5]], np.float32)
    assert np.array_equal(round_weights(weight, 0, exact_pairs=True)[1], round_weights(weight, 0)[1])
    wide = round_weights(np.abs(weight), 0, exact_pairs=True)[1]
    assert wide == pytest.approx(2 / MAX_PAIR, rel=1e-4)


@pytest.mark.parametrize(
    ("whole", "largest"),
    [
        ([[127, 127, 0, 0]], 64770),
        ([[127, -127, 0, 0]], 32385),
        ([[0, 127, 127, 0]], 32385),
        ([[0, 64, 64, 0, 0]], 32640),
        ([[-128, -128, 0, 0]], 65280),
        ([[5]], 1275),
    ],
)
def test_largest_pair_assumes_worst_case_inputs(whole, largest):
    assert largest_pair(np.array(whole, np.int8), 0) == largest
    assert largest_pair(np.array(whole, np.int8).T, 1) == largest


@pytest.mark.parametrize("shape", [(8, 12), (1, 8, 12), (2, 8, 12)])
def test_matmul_input_channels_are_the_second_to_last_axis(shape):
    from onnx import helper, numpy_helper

    whole = np.ones(shape, np.int8)
    whole[..., 0::2, :] = 127
    arrays = {"w": whole, "s": np.float32(1), "z": np.int8(0)}
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["d"]),
        helper.make_node("MatMul", ["x", "d"], ["y"], name="product"),
    ]
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in "xy")
    initializers = [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y], initializers))
    assert pair_sums(ir.serde.deserialize_model(model)) == {"product": 255 * 128}


def test_large_weights_have_a_finite_scale():
    whole, scale = round_weights(np.full((1, 4), 3e38, np.float32), 0, exact_pairs=True)
    assert np.isfinite(scale).all()
    assert (whole == 64).all()


@pytest.mark.parametrize("form", ["QDQ", "QOperator"])
def test_pair_sums_of_a_model_quantized_by_onnxruntime(form, tmp_path):
    """A Conv, a MatMul and a Gemm by ONNX Runtime's own tool; sums by hand from what it stored."""
    from onnx import TensorProto, helper, numpy_helper
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    rng = np.random.default_rng(0)
    numbers = {"c": (8, 4, 1, 1), "m": (8, 12), "g": (6, 12), "b": (6,)}
    nodes = [
        helper.make_node("Conv", ["x", "c"], ["y"], name="conv"),
        helper.make_node("GlobalAveragePool", ["y"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "m"], ["z"], name="matmul"),
        helper.make_node("Gemm", ["z", "g", "b"], ["out"], name="gemm", transB=1),
    ]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4, 5, 5])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [2, 6])],
        [numpy_helper.from_array(np.abs(rng.normal(size=shape)).astype(np.float32), k) for k, shape in numbers.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "f.onnx")

    class Images(CalibrationDataReader):
        left = iter([{"x": rng.normal(size=(2, 4, 5, 5)).astype(np.float32)}])

        def get_next(self):
            return next(self.left, None)

    quantize_static(
        tmp_path / "f.onnx", tmp_path / "q.onnx", Images(), quant_format=QuantFormat[form],
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, per_channel=False,
    )  # fmt: skip
    found = pair_sums(ir.load(tmp_path / "q.onnx"))
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "q.onnx").graph.initializer}
    axes = {"c": 0, "m": 1, "g": 0}
    expected = {k: 255 * int(np.abs(neighbours(stored[f"{k}_quantized"], axis)).max()) for k, axis in axes.items()}
    assert sorted(found.values()) == sorted(expected.values())
    assert min(found.values()) > 2**15 - 1, "weights of one sign, without a bound"
