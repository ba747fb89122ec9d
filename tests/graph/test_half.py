"""fp16 where it holds, fp32 where it does not."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from exporter.graph import half
from exporter.model import FORMS
from tests.conftest import build, write_tiny


def run_graph(model, images, tmp_path):
    ir.save(model, tmp_path / "graph.onnx")
    onnx.checker.check_model(str(tmp_path / "graph.onnx"), full_check=True)
    return onnxruntime.InferenceSession(tmp_path / "graph.onnx").run(None, {"images": images})[0]


@pytest.fixture(params=["tiny", "tiny_v2"])
def graph(request, tmp_path_factory):
    source = request.getfixturevalue(request.param)
    return ir.load(build(source, tmp_path_factory.mktemp("fp32"), form="plain").path)


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).numpy()


def test_the_graph_is_valid_half_as_large_and_close(graph, images, tmp_path):
    before = run_graph(graph, images, tmp_path)
    size = (tmp_path / "graph.onnx").stat().st_size
    assert half.to_half(graph) == []
    after = run_graph(graph, images, tmp_path)
    assert after.dtype == np.float32
    assert 0 < np.abs(after - before).max() < 0.01 * before.std()
    assert (tmp_path / "graph.onnx").stat().st_size < 0.65 * size


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("source", ["tiny", "tiny_v2"])
def test_in_every_form_the_graph_is_valid_and_close(form, source, request, images, tmp_path):
    graph = ir.load(build(request.getfixturevalue(source), tmp_path, form=form).path)
    before = run_graph(graph, images, tmp_path)
    half.to_half(graph)
    after = run_graph(graph, images, tmp_path)
    assert 0 < np.abs(after - before).max() < 0.01 * before.std()
    for node in graph.graph:
        if node.op_type.startswith("Reduce"):
            assert node.outputs[0].dtype == ir.DataType.FLOAT, node.name


@pytest.mark.parametrize("stem", ["overlap", "overlap_act"])
def test_both_convolutions_of_an_overlapping_stem_are_halved(stem, tmp_path):
    graph = ir.load(build(write_tiny(tmp_path / "weights", stem=stem), tmp_path, form="conv").path)
    half.to_half(graph)
    assert {node.outputs[0].dtype for node in graph.graph if node.op_type == "Conv"} == {ir.DataType.FLOAT16}


def test_of_grn_only_the_factor_per_channel_is_computed_in_fp32(tiny_v2, tmp_path):
    """The product with the image, four times as wide as any other tensor, is halved."""
    graph = ir.load(build(tiny_v2, tmp_path, form="conv").path)
    half.to_half(graph)
    products = [
        node for node in graph.graph if node.metadata_props.get("module") == "stages.1.0" and node.op_type == "Mul"
    ]
    assert [node.outputs[0].dtype for node in products] == [ir.DataType.FLOAT16]


def test_bytes_become_fp16_at_the_first_step(tiny, tmp_path):
    graph = ir.load(build(tiny, tmp_path, input="uint8").path)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64), dtype=np.uint8)
    before = run_graph(graph, pixels, tmp_path)
    half.to_half(graph)
    assert np.abs(run_graph(graph, pixels, tmp_path) - before).max() < 0.01 * before.std()
    assert graph.graph[0].op_type == "Cast"
    assert graph.graph[0].outputs[0].dtype == ir.DataType.FLOAT16


def test_statistics_stay_in_fp32(graph):
    half.to_half(graph)
    for node in graph.graph:
        module = node.metadata_props.get("module", "").rpartition(".")[2]
        if node.op_type.startswith("Reduce") or (module == "grn" and node.op_type != "Cast"):
            assert node.outputs[0].dtype == ir.DataType.FLOAT, node.name
        if node.op_type in ("MatMul", "Conv", "Gelu", "Gemm", "LayerNormalization"):
            assert node.outputs[0].dtype == ir.DataType.FLOAT16, node.name


@pytest.mark.parametrize("form", FORMS)
def test_activations_beyond_fp16_in_grn_do_not_overflow(form, tmp_path):
    """Scaled up 3,000 times, the squares of what GRN sums are beyond 65,504; GRN itself is blind to scale."""
    from exporter.graph import trace
    from exporter.model import forms
    from exporter.model.convnext import ConvNeXt
    from tests.conftest import tiny_architecture, tiny_state, trace_options

    differences = {"grn": True, "layer_scale": False}
    state = tiny_state(**differences)
    state["stages.0.0.pwconv1.weight"] *= 3000
    model = ConvNeXt(tiny_architecture(**differences), 10)
    model.load_state_dict(state)
    model.eval().requires_grad_(False)
    graph = trace.trace(forms.rewrite(model, form), trace_options(imgsz=64))
    images = np.random.default_rng(0).normal(size=(2, 3, 64, 64)).astype(np.float32)
    before = run_graph(graph, images, tmp_path)
    half.to_half(graph)
    after = run_graph(graph, images, tmp_path)
    assert np.isfinite(after).all()
    assert np.abs(after - before).max() < 0.05 * before.std()


def test_a_weight_beyond_fp16_stays_in_fp32_and_is_named(graph, images, tmp_path):
    value = graph.graph.initializers["stages.1.0.pwconv1.weight"]
    large = value.const_value.numpy().copy()
    large[0, 0] = 1e5
    value.const_value = ir.tensor(large, name=value.name)
    norm = graph.graph.initializers["stages.1.0.norm.weight"]  # so that activations stay within fp16
    norm.const_value = ir.tensor(
        norm.const_value.numpy() * np.where(np.arange(24) == 0, 1e-3, 1).astype("f4"), name=norm.name
    )
    before = run_graph(graph, images, tmp_path)
    assert half.to_half(graph) == ["stages.1.0.pwconv1.weight"]
    after = run_graph(graph, images, tmp_path)
    assert np.isfinite(after).all()
    assert np.abs(after - before).max() < 0.02 * before.std()


def test_a_weight_shared_by_fp16_and_fp32_nodes_is_valid_in_both(graph, images, tmp_path):
    """Equal tensors are one initializer after export; half of the users may need it in fp32."""
    nodes = [node for node in graph.graph if node.op_type == "LayerNormalization"]
    shared = nodes[0].inputs[1]
    first, image = graph.graph[0], graph.graph.inputs[0]
    keeper = ir.node("ReduceMax", [shared], attributes={"keepdims": 0}, name="keeper/ReduceMax")
    scaled = ir.node("Mul", [image, keeper.outputs[0]], name="keeper/Mul")
    keeper.outputs[0].dtype, keeper.outputs[0].shape = ir.DataType.FLOAT, ir.Shape([])
    scaled.outputs[0].dtype, scaled.outputs[0].shape = ir.DataType.FLOAT, image.shape
    graph.graph.insert_before(first, [keeper, scaled])
    first.replace_input_with(0, scaled.outputs[0])
    before = run_graph(graph, images, tmp_path)
    half.to_half(graph)
    assert np.abs(run_graph(graph, images, tmp_path) - before).max() < 0.02 * before.std()


def test_weights_that_fp16_would_lose_stay_in_fp32(tiny, tmp_path):
    graph = ir.load(build(tiny, tmp_path).path)
    value = next(v for v in graph.graph.initializers.values() if v.name == "stages.1.0.pwconv1.weight")
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1e-8), name=value.name)
    assert half.to_half(graph) == ["stages.1.0.pwconv1.weight"]


def test_bf16_has_the_range_of_fp32(tiny, tmp_path):
    graph = ir.load(build(tiny, tmp_path).path)
    value = next(v for v in graph.graph.initializers.values() if v.name == "stages.1.0.pwconv1.weight")
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1e9), name=value.name)
    assert half.to_half(graph, "bf16") == []
    halved = [v for v in graph.graph.initializers.values() if v.dtype == ir.DataType.BFLOAT16]
    assert len(halved) > 20
    assert not [v for v in graph.graph.initializers.values() if v.dtype == ir.DataType.FLOAT16]


def test_activations_beyond_fp16_are_found_while_tracing_and_stay_in_fp32(tmp_path):
    """One block's hidden channels reach 10⁵, which the layer behind it scales down again: fp16 alone gives infinity."""
    from safetensors.torch import load_file, save_file

    from tests.conftest import write_tiny

    source = write_tiny(tmp_path / "wide", layer_scale=False)
    state = load_file(source / "model.safetensors")
    names = [name for name in state if "stages.1.0" in name]
    assert names
    pw1, pw2 = (f"stages.1.0.pwconv{i}.weight" for i in (1, 2))
    state[pw1], state[pw2] = state[pw1] * 3e5, state[pw2] / 3e5
    save_file(state, source / "model.safetensors")
    made = build(source, tmp_path / "out")
    assert {"stages.1.0.pwconv1", "stages.1.0.pwconv2"} <= set(made.sidecar.beyond_fp16)
    assert not any(name.startswith(("stages.0", "stages.3")) for name in made.sidecar.beyond_fp16)
    graph = ir.load(half.lower(made, "fp16", tmp_path / "out").path)
    careless = ir.load(made.path)
    half.to_half(careless)
    for each in (graph, careless):  # else ONNX Runtime computes it all in fp32
        half.round_results(each)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).numpy()
    before = run_graph(ir.load(made.path), images, tmp_path)
    after = run_graph(graph, images, tmp_path)
    assert np.abs(after - before).max() < 0.02 * before.std()
    spoilt = run_graph(careless, images, tmp_path)
    assert not np.abs(spoilt - before).max() < 0.02 * before.std()


def test_an_ordinary_network_is_not_beyond_fp16(artifacts):
    assert artifacts["onnxruntime", "fp32"].sidecar.beyond_fp16 == ()
