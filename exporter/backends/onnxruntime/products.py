"""Graphs of products alone, to measure ONNX Runtime's peak (`_peak`)."""

from __future__ import annotations

from typing import Any

import numpy as np

from exporter.backends._peak import PeakProduct
from exporter.quantize.placement import round_product


def peak_model(product: PeakProduct, precision: str) -> Any:
    """A graph of MatMul or Conv nodes in a row; in int8 their inputs and weights are quantized."""
    import onnx_ir as ir

    dtype = ir.DataType.FLOAT16 if precision == "fp16" else ir.DataType.FLOAT
    matrix, shape = product.matrix(), ir.Shape(product.input().shape)
    graph_input = ir.Value(name="input", type=ir.TensorType(ir.DataType.FLOAT), shape=shape)
    tensor = ir.Tensor(matrix.astype(dtype.numpy()), name="weight")
    weight = ir.Value(name="weight", type=ir.TensorType(dtype), shape=ir.Shape(matrix.shape), const_value=tensor)
    nodes = [ir.node("Cast", [graph_input], attributes={"to": dtype})]
    for number in range(product.count):
        node = ir.node("Conv" if product.convolution else "MatMul", [nodes[-1].outputs[0], weight])
        output = node.outputs[0]
        output.name, output.dtype, output.shape = f"product_{number}", dtype, shape
        nodes.append(node)
    graph = ir.Graph([graph_input], [output], nodes=nodes, initializers=[weight], opset_imports={"": 20}, name="peak")
    if precision == "int8":
        largest = float(np.abs(product.input()).max())
        for one in nodes[1:]:
            round_product(graph, one, largest)
        if product.convolution:
            _quantize_output(graph, node, np.float32(2 * largest / 255))
    return ir.Model(graph, ir_version=10)


def _quantize_output(graph: Any, node: Any, scale: np.float32) -> None:
    """Insert Q and DQ on the output of a convolution: without them it is computed in fp32."""
    import onnx_ir as ir

    values = []
    for name, array in (("output_scale", np.asarray(scale)), ("output_zero_point", np.asarray(128, np.uint8))):
        tensor = ir.Tensor(array, name=name)
        values.append(ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(()), const_value=tensor))
        graph.register_initializer(values[-1])
    quantize = ir.node("QuantizeLinear", [node.outputs[0], *values])
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], *values])
    dequantize.outputs[0].name, dequantize.outputs[0].dtype = "dequantized", ir.DataType.FLOAT
    dequantize.outputs[0].shape = node.outputs[0].shape
    graph.extend([quantize, dequantize])
    graph.outputs[:] = dequantize.outputs
