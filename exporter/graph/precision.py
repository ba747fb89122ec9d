"""A graph at a lower precision.

fp16 follows what breaks in ConvNeXt: statistics. A LayerNormalization or RMSNormalization node keeps its own in fp32
(its `stash_type`); norms written out in parts, GRN and the pooling sum squares or whole images, pass 65,504 and turn
every output into one constant, so these modules stay in fp32 between two casts. Inputs and outputs stay what they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from exporter.graph import files

if TYPE_CHECKING:
    import onnx_ir as ir

FP16_MAX = float(np.finfo(np.float16).max)


@dataclass
class _Halving:
    """The work in hand: what was already cast, so that nothing is cast twice."""

    graph: ir.Graph
    cast: dict[tuple[str, str], ir.Value] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)


def to_fp16(model: ir.Model) -> list[str]:
    """Lower a graph from fp32 to fp16, in place.

    Returns: the weights that do not fit fp16 (beyond ±65,504) and stay in fp32 with the nodes that use them.
    """
    import onnx_ir as ir

    work = _Halving(model.graph)
    outputs = list(model.graph.outputs)
    for node in list(model.graph):
        target = ir.DataType.FLOAT if _stays(node, work) else ir.DataType.FLOAT16
        for index, value in enumerate(node.inputs):
            if value is not None and _is_float(value) and value.dtype != target:
                node.replace_input_with(index, _as(work, value, target, node))
        if node.op_type == "Cast" and _is_float(node.outputs[0]):
            node.attributes["to"] = ir.AttrInt64("to", target.value)
        for value in node.outputs:
            if _is_float(value):
                value.dtype = target
    for index, value in enumerate(outputs):
        _fp32_output(model.graph, index, value)
    files.drop_unused(model.graph)
    return work.kept


def _is_float(value: ir.Value) -> bool:
    import onnx_ir as ir

    return value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def _stays(node: ir.Node, work: _Halving) -> bool:
    module = node.metadata_props.get("module", "")
    last = module.rpartition(".")[2]
    if last == "grn" or node.op_type.startswith("Reduce"):
        return True
    in_norm = last.startswith("norm") or _is_norm_of_downsampling(module)
    if in_norm and node.op_type not in ("LayerNormalization", "RMSNormalization", "Transpose"):
        return True
    too_large = [v.name or "" for v in node.inputs if v is not None and not _fits(v)]
    work.kept += [name for name in too_large if name not in work.kept]
    return bool(too_large)


def _is_norm_of_downsampling(module: str) -> bool:
    """`downsample_layers.2.0` is a norm; in the stem it is the last layer, after a convolution."""
    parts = module.split(".")
    return parts[0] == "downsample_layers" and len(parts) == 3 and (parts[1] == "0") == (parts[2] != "0")


def _fits(value: ir.Value) -> bool:
    tensor = value.const_value
    if tensor is None or not _is_float(value):
        return True
    array = tensor.numpy()
    return bool(np.abs(array).max(initial=0.0) <= FP16_MAX)


def _as(work: _Halving, value: ir.Value, target: ir.DataType, before: ir.Node) -> ir.Value:
    """The value at another precision: a converted weight, or a Cast in front of the node that wants it."""
    import onnx_ir as ir

    key = (value.name or "", target.name)
    if key not in work.cast:
        name = f"{value.name}_{'fp16' if target == ir.DataType.FLOAT16 else 'fp32'}"
        if value.is_initializer():
            assert value.const_value is not None
            tensor = ir.Tensor(value.const_value.numpy().astype(target.numpy()), name=name)
            work.cast[key] = ir.Value(name=name, type=ir.TensorType(target), shape=value.shape, const_value=tensor)
            work.graph.register_initializer(work.cast[key])
        else:
            cast = ir.node("Cast", [value], attributes={"to": target}, name=f"{before.name}/Cast_{value.name}")
            cast.metadata_props["module"] = before.metadata_props.get("module", "")
            cast.outputs[0].name, cast.outputs[0].dtype, cast.outputs[0].shape = name, target, value.shape
            work.graph.insert_before(before, cast)
            work.cast[key] = cast.outputs[0]
    return work.cast[key]


def _fp32_output(graph: ir.Graph, index: int, value: ir.Value) -> None:
    import onnx_ir as ir

    if value.dtype != ir.DataType.FLOAT16:
        return
    name, producer = value.name, value.producer()
    value.name = f"{name}_fp16"
    cast = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT}, name=f"{name}/Cast")
    cast.outputs[0].name, cast.outputs[0].dtype, cast.outputs[0].shape = name, ir.DataType.FLOAT, value.shape
    assert producer is not None
    graph.insert_after(producer, cast)
    graph.outputs[index] = cast.outputs[0]
