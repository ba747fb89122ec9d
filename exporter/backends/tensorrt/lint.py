"""What TensorRT would reject in a quantised graph, or run badly, said before it is built and in the network's names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx_ir as ir

FP16_SCALES = 19  # the first opset whose Q and DQ take them
_TAKES_DQ = {"Conv", "MatMul", "Gemm", "Cast", "Transpose", "Reshape"}


def lint(model: ir.Model) -> list[str]:
    """What is wrong with the Q and DQ of a graph for TensorRT, each with the layer it is at; empty for a good one."""
    opset = model.graph.opset_imports.get("", 0)
    return list(dict.fromkeys(said for node in model.graph for said in _of_node(node, opset)))


def _of_node(node: ir.Node, opset: int) -> Iterator[str]:
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        return
    where = node.metadata_props.get("module") or node.name or "?"
    yield from _types(node, where)
    scale = node.inputs[1]
    if opset < FP16_SCALES and scale is not None and scale.dtype is not None and scale.dtype.name == "FLOAT16":
        yield f"{where}: fp16 scales need opset {FP16_SCALES}, this graph has {opset}; leave --opset out"
    if node.op_type == "DequantizeLinear":
        for use in node.outputs[0].uses():
            if use.node.op_type not in _TAKES_DQ:
                what = {"Add": "the residual or a bias", "LayerNormalization": "LayerNorm"}.get(use.node.op_type)
                yield (
                    f"{where}: DQ in front of {what or use.node.op_type}: TensorRT runs it as a separate kernel; "
                    "quantize only inputs of convolutions and matrix products"
                )


def _types(node: ir.Node, where: str) -> Iterator[str]:
    zero = _number(node, 2)
    whole = _number(node, 0) if node.op_type == "DequantizeLinear" else None
    if whole is not None and whole.dtype == np.int32:
        yield f"{where}: an int32 bias: TensorRT does not quantize biases; keep the bias in fp32 or fp16"
    elif zero is not None and zero.dtype == np.uint8:
        yield f"{where}: uint8: TensorRT quantizes to int8 only; quantize symmetrically to int8"
    elif zero is not None and zero.any():
        yield f"{where}: a zero point other than 0: TensorRT quantizes around zero only; quantize symmetrically"


def _number(node: ir.Node, index: int) -> NDArray[Any] | None:
    value = node.inputs[index] if len(node.inputs) > index else None
    return None if value is None or value.const_value is None else value.const_value.numpy()
