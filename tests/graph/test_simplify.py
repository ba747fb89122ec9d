"""onnxsim's graph is kept only when it has earned it."""

import numpy as np
import onnx_ir as ir
import onnxsim
import pytest

from exporter.graph import files, simplify
from tests.conftest import build


@pytest.fixture
def graph(tiny, tmp_path):
    return ir.load(build(tiny, tmp_path / "plain", form="plain").path)


def with_identities(graph):
    """The same graph with a chain of Identity behind its input, for onnxsim to remove."""
    images = graph.graph.inputs[0]
    users = list(images.uses())
    first = ir.node("Identity", [images], name="Identity_1")
    second = ir.node("Identity", first.outputs, name="Identity_2")
    for node in (first, second):
        node.outputs[0].dtype, node.outputs[0].shape = images.dtype, images.shape
    graph.graph.insert_before(graph.graph[0], [first, second])
    for node, index in users:
        node.replace_input_with(index, second.outputs[0])
    return graph


def test_a_graph_that_got_smaller_is_kept_with_its_weights_and_names(graph):
    before = len(graph.graph)
    weights = {name: value.const_value.numpy() for name, value in graph.graph.initializers.items()}
    candidate, reason = simplify.simplify(with_identities(graph))
    assert reason == ""
    assert len(candidate.graph) == before
    assert [value.name for value in candidate.graph.inputs] == ["images"]
    assert str(candidate.graph.inputs[0].shape[0]) == "batch"
    found = {name: value.const_value.numpy() for name, value in candidate.graph.initializers.items()}
    assert all(np.array_equal(weights[name], found[name]) for name in weights if weights[name].ndim > 1)
    node = next(node for node in candidate.graph if node.name == "stages.0.0.pwconv1/MatMul")
    assert node.metadata_props["module"] == "stages.0.0.pwconv1"


def test_a_graph_in_which_nothing_can_be_simplified_stays_as_it_was(graph):
    kept, reason = simplify.simplify(graph)
    assert kept is graph
    assert reason == ""


def test_a_graph_that_got_bigger_is_not_kept(graph, monkeypatch):
    """With every pass on, onnxsim 0.8 turns each MatMul + Add into Reshape, Gemm, Reshape."""
    monkeypatch.setattr(simplify, "_HARMFUL_PASSES", [])
    monkeypatch.setattr(files, "LARGE_BYTES", 1 << 40)
    kept, reason = simplify.simplify(graph)
    assert kept is graph
    assert "nodes instead of" in reason


def test_a_graph_that_lost_its_dynamic_axis_is_not_kept(graph, monkeypatch):
    honest = onnxsim.simplify

    def freeze(model, **options):
        simplified, ok = honest(model, **options)
        simplified.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
        return simplified, ok

    monkeypatch.setattr(onnxsim, "simplify", freeze)
    kept, reason = simplify.simplify(with_identities(graph))
    assert kept is graph
    assert "images was [batch,3,64,64] and became images [2,3,64,64]" in reason


@pytest.mark.parametrize(("message", "said"), [("no such luck", "no such luck"), ("", "RuntimeError")])
def test_a_failure_of_onnxsim_is_told_and_the_plain_graph_kept(message, said, graph, monkeypatch):
    def fail(model, **options):
        raise RuntimeError(message)

    monkeypatch.setattr(onnxsim, "simplify", fail)
    kept, reason = simplify.simplify(graph)
    assert kept is graph
    assert reason == f"onnxsim failed (RuntimeError: {said})"
    assert all(value.const_value is not None for value in kept.graph.initializers.values())


def test_a_graph_with_other_numbers_is_not_kept(tiny, tmp_path, monkeypatch, run):
    honest = simplify.simplify

    def spoil(graph):
        candidate = ir.from_proto(ir.to_proto(graph))
        bias = candidate.graph.initializers["head.bias"]
        bias.const_value = ir.tensor(bias.const_value.numpy() + 1, name="head.bias")
        return candidate, ""

    monkeypatch.setattr(simplify, "simplify", spoil)
    result = run("onnx", "--weights", tiny, "-o", tmp_path)
    assert result.code == 0
    assert "onnxsim: logits differs by" in result.err
    monkeypatch.setattr(simplify, "simplify", honest)
    assert run("verify", tmp_path / "custom_fp32.onnx").code == 0


def test_no_simplify_leaves_onnxsim_alone(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(onnxsim, "simplify", lambda *a, **k: pytest.fail("it was called"))
    build(tiny, tmp_path, simplify=False)
