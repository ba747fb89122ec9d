"""The traced graph is the model, for every task, size, batch and opset on offer."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from exporter import artifact, backends
from exporter.artifact.sidecar import OutputSpec
from exporter.model import weights
from tests.conftest import build, tiny_architecture, tiny_state, trace_options, write_tiny

SPREAD = 1e-4
SIZES = r"a whole number from 32 to 4096, two of these \(height, width\), dynamic or null"


def outputs(made, images):
    backend = backends.runtime("onnxruntime")
    with backend.open(made, backend.options()) as session:
        return session(images.numpy())


def eager(source, task, images):
    with torch.inference_mode():
        answers = weights.load(str(source)).model(OutputSpec(tasks=(task,)))(images)
    return [x.numpy() for x in (answers if isinstance(answers, tuple) else (answers,))]


def agree(made, source, task, *shape):
    images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for a, b in zip(eager(source, task, images), outputs(made, images), strict=True):
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= SPREAD * a.std()


VARIETIES = {
    "v1": {},
    "v2": {"grn": True, "layer_scale": False},
    "rms": {"norm": "rms"},
    "simple_overlap_act": {"norm": "simple", "stem": "overlap_act"},
    "overlap": {"stem": "overlap"},
    "overlap_tiered": {"stem": "overlap_tiered"},
    "head_norm_first": {"head_norm_first": True},
    "head_hidden": {"head_layers": ("linear:40", "gelu")},
    "max pooling, silu, 1 stage of kernel 3": {"pool": "max", "act": "silu", "kernels": (3, 7, 7, 7)},
    "both pools": {"pool": "catavgmax", "head_norm_first": True, "act": "quick_gelu"},
    "stride 8": {"output_stride": 8},
    "patch 2": {"patch": 2, "stem_downsample": True},
}


OF_OPEN_SIZE = {"v2", "overlap", "overlap_tiered", "both pools", "stride 8", "patch 2"}
"""Varieties that are traced for every height and width, which takes longer; the others differ in no axis of images."""


def network(variety):
    from exporter.model.convnext import ConvNeXt

    model = ConvNeXt(tiny_architecture(**VARIETIES[variety]), 10)
    model.load_state_dict(tiny_state(**VARIETIES[variety]))
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("variety", VARIETIES)
def test_every_published_difference_survives_tracing(variety, tmp_path):
    from exporter.graph import trace

    model, arch = network(variety), tiny_architecture(**VARIETIES[variety])
    is_open = variety in OF_OPEN_SIZE
    graph = trace.trace(model, trace_options(imgsz=None if is_open else 64, strides=arch.strides))
    ir.save(graph, tmp_path / "graph.onnx")
    import onnxruntime

    images = torch.randn(3, 3, 64, 96 if is_open else 64)
    session = onnxruntime.InferenceSession(tmp_path / "graph.onnx")
    (got,) = session.run(None, {"images": images.numpy()})
    with torch.inference_mode():
        expected = model(images).numpy()
    assert np.abs(got - expected).max() <= SPREAD * expected.std()


def shape_of(graph):
    """Everything of a graph but the names that the exporter numbers: operators, attributes, edges and weights."""
    names = {out.name: f"{i}.{j}" for i, node in enumerate(graph) for j, out in enumerate(node.outputs)}
    names |= {name: value.const_value.numpy().tobytes() for name, value in graph.initializers.items()}
    nodes = [
        (node.op_type, str(sorted(node.attributes.items())), [value and names.get(value.name) for value in node.inputs])
        for node in graph
    ]
    return nodes, [names[value.name] for value in graph.outputs]


@pytest.mark.parametrize(
    ("variety", "options"),
    [
        ("v1", {"imgsz": 64}),
        ("v2", {"imgsz": 64, "batch": 1, "dtype": "uint8"}),
        ("overlap", {"imgsz": 64, "batch": 1}),
        ("v1", {}),
    ],
)
def test_it_is_the_graph_that_the_exporter_makes_of_the_decomposed_program(variety, options, traced_anew):
    from exporter.data.images import Preprocessing
    from exporter.graph import trace
    from exporter.model import forms

    model = network(variety)
    if "dtype" in options:
        forms.take_input(model, Preprocessing(input="uint8"))
    options = trace_options(**options)
    example = torch.zeros(2, 3, 64, 64, dtype=getattr(torch, options.dtype))
    shapes = (trace._dynamic_axes(options),)
    plain = torch.onnx.export(
        model, (example,), dynamo=True, opset_version=trace.TRACED, dynamic_shapes=shapes, verbose=False
    )
    assert shape_of(trace.trace(model, options).graph) == shape_of(plain.model.graph)


def test_an_operator_that_mixes_types_gets_them_promoted(traced_anew):
    """PyTorch multiplies whole numbers with fp32; ONNX does not."""
    from exporter.graph import trace

    class Mixed(torch.nn.Module):
        def forward(self, images):
            return images.mean((2, 3)) * torch.arange(1, 4)

    graph = trace.trace(Mixed().eval(), trace_options(imgsz=32, batch=2))
    images = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    (outputs,) = ReferenceEvaluator(ir.serde.serialize_model(graph)).run(None, {trace.INPUT: images})
    assert np.allclose(outputs, images.mean((2, 3)) * np.arange(1, 4), atol=1e-6)
    onnx.checker.check_model(ir.serde.serialize_model(graph), full_check=True)


def test_a_last_stride_of_64_leaves_the_size_open():
    from exporter.graph import trace
    from exporter.model.convnext import ConvNeXt

    arch = tiny_architecture(patch=8)
    graph = trace.trace(ConvNeXt(arch, 10).eval(), trace_options(strides=arch.strides)).graph
    assert [str(dim) for dim in graph.inputs[0].shape] == ["batch", "3", "height", "width"]


def test_one_dynamic_graph_serves_any_multiple_of_32_and_any_batch(tiny, tmp_path):
    made = build(tiny, tmp_path, imgsz="dynamic")
    assert made.sidecar.inputs[0].shape == ("batch", 3, "height", "width")
    for shape in [(1, 3, 32, 32), (2, 3, 64, 64), (5, 3, 96, 160), (1, 3, 224, 32)]:
        agree(made, tiny, "classify", *shape)


def test_features_are_the_four_stages(tiny_v2, tmp_path):
    made = build(tiny_v2, tmp_path, task="features", imgsz="dynamic")
    assert made.path.name == "v2_custom_features_fp32.onnx"
    assert [(t.name, t.shape[1:]) for t in made.sidecar.outputs] == [
        ("stage1", (16, "height/4", "width/4")),
        ("stage2", (24, "height/8", "width/8")),
        ("stage3", (32, "height/16", "width/16")),
        ("stage4", (48, "height/32", "width/32")),
    ]
    agree(made, tiny_v2, "features", 2, 3, 64, 128)


@pytest.mark.parametrize(("opset", "ir_version", "written"), [(13, None, 7), (17, 10, 10), (22, None, 10)])
def test_an_artifact_has_the_opset_and_format_that_were_asked_for(opset, ir_version, written, tiny, tmp_path):
    made = build(tiny, tmp_path, opset=opset, ir_version=ir_version)
    model = onnx.load(made.path)
    assert (model.opset_import[0].version, model.ir_version) == (opset, written)
    agree(made, tiny, "classify", 2, 3, 64, 64)


def test_a_size_with_two_sides(tiny, tmp_path):
    made = build(tiny, tmp_path, imgsz=(64, 96))
    assert made.sidecar.inputs[0].shape == ("batch", 3, 64, 96)
    assert (made.sidecar.preprocessing.size, made.sidecar.preprocessing.resize) == ((64, 96), (64, 96))
    agree(made, tiny, "classify", 2, 3, 64, 96)
    square = build(tiny, tmp_path / "square", imgsz=64).sidecar
    assert 2 * made.sidecar.macs - 3 * square.macs == 2 * 480 - 3 * 480  # all but the head grows with the area


def test_several_heads_are_outputs_by_their_names(tmp_path, run):
    from safetensors.torch import save_file

    state = tiny_state()
    weight, bias = state.pop("head.weight"), state.pop("head.bias")
    for name, rows in (("color", slice(0, 6)), ("shape", slice(6, 10))):
        state |= {f"{name}.weight": weight[rows].clone(), f"{name}.bias": bias[rows].clone()}
    save_file(state, tmp_path / "w.safetensors")
    made = build(tmp_path / "w.safetensors", tmp_path, imgsz=64, head="color,shape")
    assert [(t.name, t.shape) for t in made.sidecar.outputs] == [("color", ("batch", 6)), ("shape", ("batch", 4))]
    assert run("verify", made.path, "--samples", 4).code == 0


def test_a_fixed_batch_is_fixed(tiny, tmp_path):
    made = build(tiny, tmp_path, batch=1)
    assert made.sidecar.inputs[0].shape == (1, 3, 64, 64)
    agree(made, tiny, "classify", 1, 3, 64, 64)


def test_a_size_that_is_no_multiple_of_32_can_be_fixed(tiny, tmp_path):
    made = build(tiny, tmp_path, imgsz=112)
    assert made.sidecar.preprocessing.size == 112
    agree(made, tiny, "classify", 2, 3, 112, 112)


def test_nodes_and_weights_have_the_models_own_names(artifacts):
    graph = ir.load(artifacts["onnxruntime", "fp32"].path).graph
    names = [node.name for node in graph]
    assert len(set(names)) == len(names)
    assert {"stages.2.1.pwconv1/Conv", "stages.0.0.dwconv/Conv", "norm/LayerNormalization"} <= set(names)
    assert {"stages.2.1.pwconv1.weight", "downsample_layers.0.0.weight", "head.bias"} <= set(graph.initializers)
    assert not [
        name for name in graph.initializers if name.startswith("val_") and graph.initializers[name].shape.rank() > 1
    ]
    block = [node for node in graph if node.name == "stages.2.1.pwconv1/Conv"]
    assert block[0].metadata_props["module"] == "stages.2.1.pwconv1"


@pytest.mark.parametrize("form", ["plain", "linear"])
def test_matrix_products_and_their_weights_too(form, tiny, tmp_path):
    """The exporter transposes the weights of a Linear, and calls them val_7."""
    graph = ir.load(build(tiny, tmp_path, form=form).path).graph
    node = next(node for node in graph if node.name == "stages.2.1.pwconv1/MatMul")
    assert node.metadata_props["module"] == "stages.2.1.pwconv1"
    assert node.inputs[1].name == "stages.2.1.pwconv1.weight"


def test_operators_that_matter_stay_whole(artifacts):
    operators = [node.op_type for node in ir.load(artifacts["onnxruntime", "fp32"].path).graph]
    assert operators.count("Gelu") == 5
    assert operators.count("LayerNormalization") == 10  # 5 blocks, stem, 3 downsamplings, head


def test_the_model_carries_its_facts(artifacts):
    made = artifacts["onnxruntime", "fp32"]
    from exporter.graph import files

    metadata = ir.load(made.path).metadata_props
    assert {key.removeprefix(files.PREFIX): value for key, value in metadata.items()} == made.sidecar.facts()
    assert '"resize":64' in made.sidecar.facts()["preprocessing"]


def test_above_the_limit_of_protobuf_weights_go_beside_the_graph(tiny, tmp_path, monkeypatch):
    from exporter.graph import files

    monkeypatch.setattr(files, "MAX_PROTO_BYTES", 1000)
    made = build(tiny, tmp_path)
    assert [path.name for path in made.files] == ["custom_fp32.onnx", "custom_fp32.onnx.data"]
    assert made.files[0].stat().st_size < made.files[1].stat().st_size
    agree(artifact.load(made.path), tiny, "classify", 2, 3, 64, 64)
    lowered = build(tiny, tmp_path, "onnxruntime", "fp16")
    assert lowered.sidecar.bytes < made.sidecar.bytes * 0.7


def test_a_graph_that_is_not_the_model_is_refused(tiny, tmp_path, monkeypatch):
    """The exporter has been silently wrong before (pytorch#169178)."""
    from exporter.errors import CheckFailed
    from exporter.graph import trace

    honest = trace.trace

    def wrong(*args):
        graph = honest(*args)
        gelu = next(node for node in graph.graph if node.op_type == "Gelu")
        gelu.attributes["approximate"] = ir.AttrString("approximate", "tanh")
        return graph

    monkeypatch.setattr(trace, "trace", wrong)
    with pytest.raises(CheckFailed, match="the traced graph is not the model: logits differs"):
        build(tiny, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"opset": 12}, "export.opset: expected a whole number from 13 to 23, found 12"),
        ({"ir_version": 6}, "export.ir_version: expected a whole number from 7 to 13 or null, found 6"),
        ({"opset": 19, "ir_version": 8}, "--ir-version 8: opset 19 needs 9 or above; lower --opset, or leave it out"),
        ({"imgsz": 31}, f"export.imgsz: expected {SIZES}, found 31"),
        ({"imgsz": 99999}, f"export.imgsz: expected {SIZES}, found 99999"),
        ({"imgsz": (64, 31)}, rf"export.imgsz: expected {SIZES}, found \(64, 31\)"),
        ({"imgsz": (64, 64, 64)}, rf"export.imgsz: expected {SIZES}, found \(64, 64, 64\)"),
        ({"batch": 0}, "export.batch: expected a whole number from 1 to 1024 or dynamic, found 0"),
        ({"batch": 1_000_000}, "export.batch: expected a whole number from 1 to 1024 or dynamic, found 1000000"),
    ],
)
def test_what_cannot_be_traced_is_refused_before_weights_are_read(told, message, tmp_path):
    from exporter.errors import BadRequest

    with pytest.raises(BadRequest, match=message):
        build("never-read.pth", tmp_path / "out", **told)
    assert not (tmp_path / "out").exists()


def test_an_isotropic_network_has_one_feature_map(tmp_path):
    folder = write_tiny(tmp_path / "w", depths=(2,), dims=(32,), patch=16, stem_norm=False, layer_scale=False)
    made = build(folder, tmp_path / "out", task="features", imgsz="dynamic")
    assert [(t.name, t.shape[1:]) for t in made.sidecar.outputs] == [("stage1", (32, "height/16", "width/16"))]
    agree(made, folder, "features", 2, 3, 64, 128)


@pytest.mark.parametrize("installed", ["openvino", "none"])
def test_without_onnx_runtime_openvino_checks_the_graph_or_nothing_is_built(
    installed, tiny, tmp_path, monkeypatch, run
):
    from importlib import metadata

    honest = metadata.version

    def version(name):
        if name.startswith("onnxruntime") or (installed == "none" and name == "openvino"):
            raise metadata.PackageNotFoundError(name)
        return honest(name)

    monkeypatch.setattr(metadata, "version", version)
    verb = "openvino" if installed == "openvino" else "onnx"
    result = run(verb, "--weights", tiny, "-o", tmp_path / "out")
    if installed == "openvino":
        assert result.code == 0, result.err
        assert run("verify", tmp_path / "out" / "custom_fp32.xml", "--samples", 2).code == 0
    else:
        assert result.code == 3
        assert "pip install 'convnext-export[cpu]'" in result.err
        assert not (tmp_path / "out").exists()


def test_a_file_written_piece_by_piece_is_what_onnx_itself_would_write(artifacts, tmp_path, monkeypatch):
    import onnx

    from exporter.graph import files

    monkeypatch.setattr(files, "LARGE_BYTES", 100)
    model = ir.load(artifacts["onnxruntime", "fp32"].path)
    files.save(model, tmp_path / "pieces.onnx", {"said": "yes"})
    ours, theirs = onnx.load(tmp_path / "pieces.onnx"), ir.serde.serialize_model(model)
    for proto in (ours, theirs):
        weights = sorted(proto.graph.initializer, key=lambda tensor: tensor.name)
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(weights)
        del proto.graph.value_info[:]  # the large weights' types, which their tensors say too
    assert ours == theirs
    onnx.checker.check_model(tmp_path / "pieces.onnx", full_check=True)
