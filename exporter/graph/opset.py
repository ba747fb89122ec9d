"""Writes a traced graph in the operators of another opset, for older and newer runtimes.

A graph is traced at one opset, `TRACED`. Its operators are the same in every later one. For an earlier one those that
did not exist yet are written in parts, and arguments that were inputs become attributes. Versions of operators:
github.com/onnx/onnx/blob/main/docs/Changelog.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from exporter.errors import BadRequest
from exporter.graph import files

if TYPE_CHECKING:
    import onnx_ir as ir

TRACED = 20
FP8, FP16_SCALES, BF16 = 19, 19, 18
"""The first opset of graphs in fp8, of Q and DQ with fp16 scales, and of graphs in bf16."""


def least_ir_version(opset: int) -> int:
    """The oldest version of the file format that was published with an opset: 7 for 13, 8 for 15, 9 for 19, …"""
    from onnx import helper

    return int(helper.find_min_ir_version_for([helper.make_opsetid("", opset)]))


def check(opset: int, ir_version: int | None, precision: str, rest: str) -> None:
    """Refuse a graph that an opset cannot hold.

    Args:
        opset, ir_version: of the file; None is the oldest version of the opset.
        precision: of the ONNX graph.
        rest: precision of the layers that are not quantized.

    Raises: BadRequest, with the opset that is needed.
    """
    reasons = [
        (precision == "fp8", FP8, "8-bit floats exist from there on"),
        (precision in ("int8", "fp8") and rest == "fp16", FP16_SCALES, "Q and DQ take fp16 scales from there on"),
        (precision == "bf16", BF16, "reductions and norms of bf16 graphs are written for it"),
    ]
    for applies, needed, reason in reasons:
        if applies and opset < needed:
            raise BadRequest(
                f"--opset {opset}: a graph in {precision} needs opset {needed}: {reason}; leave --opset out"
            )
    if ir_version is not None and ir_version < (least := least_ir_version(opset)):
        raise BadRequest(
            f"--ir-version {ir_version}: opset {opset} needs {least} or above; lower --opset, or leave it out"
        )


def convert(model: ir.Model, opset: int) -> ir.Model:
    """Write a graph of opset `TRACED` in the operators of another, in place; its outputs stay the same."""
    for node in list(model.graph):
        if opset < 20 and node.op_type == "Gelu":
            _replace(model.graph, node, _gelu)
        elif opset < 17 and node.op_type == "LayerNormalization":
            _replace(model.graph, node, _layer_norm)
        elif opset < 15 and node.op_type == "Shape" and node.attributes:
            _replace(model.graph, node, _shape)
        elif opset < 18 and node.op_type.startswith("Reduce") and node.op_type != "ReduceSum":
            _axes_to_attribute(node)
        elif opset < 14 and node.op_type == "Reshape":
            node.attributes.pop("allowzero", None)  # no axis of an image or a feature map is empty
    files.drop_unused(model.graph)
    model.graph.opset_imports[""] = opset
    return model


class _Parts:
    """The operators that stand for one node, in its module."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph, self.node, self.nodes = graph, node, 0

    def add(self, operator: str, *inputs: ir.Value | float | Sequence[int], **attributes: Any) -> ir.Value:
        """An operator in front of the node; numbers become constants."""
        import onnx_ir as ir

        self.nodes += 1
        name = f"{self.node.name}/{operator}_{self.nodes}"
        values = [
            one if isinstance(one, ir.Value) else self._constant(f"{name}_{i}", one) for i, one in enumerate(inputs)
        ]
        part = ir.node(operator, values, attributes=attributes, name=name)
        part.metadata_props["module"] = self.node.metadata_props.get("module", "")
        output, dtype = part.outputs[0], self.node.outputs[0].dtype
        output.name, output.type = name, None if dtype is None else ir.TensorType(dtype)
        self.graph.insert_before(self.node, part)
        return output

    def _constant(self, name: str, number: float | Sequence[int]) -> ir.Value:
        import onnx_ir as ir

        array = np.asarray(number, np.float32 if isinstance(number, float) else np.int64)
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        self.graph.register_initializer(value)
        return value


def _replace(graph: ir.Graph, node: ir.Node, write: Callable[[_Parts, ir.Node], ir.Value]) -> None:
    """Put the parts of a node in its place; the last of them takes over the output and its name."""
    result, whole = write(_Parts(graph, node), node), node.outputs[0]
    name, result.shape = whole.name, whole.shape
    whole.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    result.name = name


def _gelu(parts: _Parts, node: ir.Node) -> ir.Value:
    """The product x · Φ(x), with the error function or its tanh approximation (arXiv 1606.08415, section 2)."""
    x = node.inputs[0]
    assert x is not None
    if node.attributes.get_string("approximate", "none") == "tanh":
        cube = parts.add("Mul", parts.add("Mul", x, x), x)
        inner = parts.add("Add", x, parts.add("Mul", cube, 0.044715))
        bend = parts.add("Tanh", parts.add("Mul", inner, math.sqrt(2 / math.pi)))
    else:
        bend = parts.add("Erf", parts.add("Div", x, math.sqrt(2)))
    return parts.add("Mul", parts.add("Mul", x, parts.add("Add", bend, 1.0)), 0.5)


def _layer_norm(parts: _Parts, node: ir.Node) -> ir.Value:
    """(x − mean) / √(variance + ε) · scale + shift, over the axes from `axis` on."""
    x, scale, *shift = node.inputs
    assert x is not None
    assert x.shape is not None
    axis = node.attributes.get_int("axis", -1)
    rank = len(x.shape)
    axes = list(range(axis % rank - rank, 0))
    centred = parts.add("Sub", x, parts.add("ReduceMean", x, axes=axes, keepdims=1))
    variance = parts.add("ReduceMean", parts.add("Mul", centred, centred), axes=axes, keepdims=1)
    spread = parts.add("Sqrt", parts.add("Add", variance, node.attributes.get_float("epsilon", 1e-5)))
    assert scale is not None
    y = parts.add("Mul", parts.add("Div", centred, spread), scale)
    return y if not shift or shift[0] is None else parts.add("Add", y, shift[0])


def _shape(parts: _Parts, node: ir.Node) -> ir.Value:
    """Some axes of a shape, cut out of all."""
    x = node.inputs[0]
    assert x is not None
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", 2**31 - 1)
    return parts.add("Slice", parts.add("Shape", x), [start], [end])


def _axes_to_attribute(node: ir.Node) -> None:
    """Turn the second input of a reduction, a constant, into the attribute that it was before opset 18."""
    import onnx_ir as ir

    axes = node.inputs[1] if len(node.inputs) > 1 else None
    node.attributes.pop("noop_with_empty_axes", None)
    if axes is not None:
        assert axes.const_value is not None
        node.attributes["axes"] = ir.AttrInt64s("axes", axes.const_value.numpy().tolist())
        node.resize_inputs(1)
