"""Inserts Q and DQ around the layers of a placement, and checks the quantized graph."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporter.errors import CheckFailed, some
from exporter.graph import files
from exporter.model.structure import is_in
from exporter.quantize.rounding import Grid, Plan, Rounding, element, largest_pair, round_weights

if TYPE_CHECKING:
    import onnx_ir as ir

PRODUCTS = ("Conv", "MatMul", "Gemm")


@dataclass(frozen=True)
class Placement:
    """The layers that a backend quantizes, and how.

    kinds: kinds of the layers whose input and weights are quantized (`structure.KINDS`).
    forms: the forms that a network may have, the best first.
    symmetric: activations are int8 around zero, else uint8 with a zero point.
    rest: the precision of all other layers.
    inputs: whether the inputs of these layers are quantized, or their weights alone.
    exact_pairs: whether adjacent weights are bounded, so that sums of two products fit 16 bits.
    on_arm: whether the runtime computes it in int8 on Arm CPUs.
    """

    kinds: frozenset[str]
    forms: tuple[str, ...]
    symmetric: bool = False
    rest: str = "fp32"
    inputs: bool = True
    exact_pairs: bool = False
    on_arm: bool = False


def quantize(model: ir.Model, plan: Plan, placement: Placement, kept: Collection[str] = ()) -> ir.Model:
    """A copy of an fp32 graph with Q and DQ. The graph itself is not changed, and weights are shared.

    Args:
        model: in one of the placement's forms, its nodes named after modules.
        plan: the quantization of each layer.
        placement: the backend's.
        kept: parts (`stages.2.0`) that are not quantized.

    Raises: CheckFailed when the graph lacks a layer of the plan.
    """
    copy = model.clone()
    left = {name for name in plan if not is_in(name, kept)}
    for node in list(copy.graph):
        name = node.metadata_props.get("module", "")
        if node.op_type in PRODUCTS and name in left:
            rounded = _Rounded(copy.graph, node, name, plan[name])
            rounded.put()
            rounded.shift_bias()
            left.discard(name)
    if left:
        raise CheckFailed(f"the graph has no layer {', '.join(sorted(left))} to quantize")
    files.drop_unused(copy.graph)
    return copy


def round_product(graph: ir.Graph, node: ir.Node, largest: float) -> None:
    """Insert Q and DQ around one matrix product without a bias, in place."""
    rounding = Rounding(2 * largest / 255, 128, False, np.zeros(0, np.float32), exact_pairs=True)
    _Rounded(graph, node, str(node.outputs[0].name), rounding).put()


class _Rounded:
    """One layer during quantization."""

    def __init__(self, graph: ir.Graph, node: ir.Node, name: str, rounding: Rounding) -> None:
        self.graph, self.node, self.name, self.rounding = graph, node, name, rounding

    def put(self) -> None:
        """Insert Q and DQ on the input, and DQ on the weights."""
        if self.rounding.inputs:
            self._put_on_input()
        weight = self.node.inputs[1]
        assert weight is not None
        assert weight.const_value is not None
        axis, grid = self._output_axis(), self.rounding.grid
        whole, scales = round_weights(
            weight.const_value.numpy(), axis, grid, self.rounding.half, self.rounding.exact_pairs
        )
        weights = [self._constant(f"weight_{grid}", whole), self._constant("weight_scale", scales)]
        weights.append(self._constant("weight_zero_point", np.zeros(len(scales), element(grid))))
        rounded = self._node("DequantizeLinear", weights, "weight_dequantized", weight.shape, axis=axis)
        self.node.replace_input_with(1, rounded)

    def _put_on_input(self) -> None:
        rounding, source = self.rounding, self.node.inputs[0]
        assert source is not None
        dtype = element(rounding.grid, rounding.symmetric)
        scale = self._constant("input_scale", np.asarray(rounding.scale, np.float32))
        zero = self._constant("input_zero_point", np.asarray(rounding.zero_point, dtype))
        q = self._node("QuantizeLinear", [source, scale, zero], f"input_{rounding.grid}", source.shape, dtype)
        self.node.replace_input_with(
            0, self._node("DequantizeLinear", [q, scale, zero], "input_dequantized", source.shape)
        )

    def _output_axis(self) -> int:
        """The axis of the output channels in the weights."""
        transposed = self.node.op_type == "Gemm" and self.node.attributes.get_int("transB", False)
        return 0 if self.node.op_type == "Conv" or transposed else 1

    def shift_bias(self) -> None:
        """Add the shift of the bias correction to the bias, in fp32.

        The bias of a matrix product gets four axes: ONNX Runtime would fuse a bias of one axis into a Gemm, which in
        int8 is slower than the product followed by an Add.
        """
        node, index = _bias_of(self.node) or self._new_bias()
        number = _number(node, index)
        shift = self.rounding.shift.ravel()
        shifted = (shift if number is None else number + shift.reshape(number.shape)).astype(np.float32)
        shape = (-1,) if node is self.node else (1, 1, 1, -1)
        node.replace_input_with(index, self._constant("bias_shifted", shifted.reshape(shape)))

    def _new_bias(self) -> tuple[ir.Node, int]:
        """The node and input for the bias of a layer without one: the simplifier removes a bias of zeros."""
        import onnx_ir as ir

        if self.node.op_type in ("Conv", "Gemm"):
            self.node.resize_inputs(3)
            return self.node, 2
        product = self.node.outputs[0]
        add = ir.node("Add", [product, None], name=f"{self.name}/Add_bias")
        add.metadata_props["module"] = self.name
        total = add.outputs[0]
        total.shape, total.type = product.shape, product.type
        total.name, product.name = product.name, f"{self.name}.product"
        ir.convenience.replace_all_uses_with(product, total, replace_graph_outputs=True)
        add.replace_input_with(0, product)
        self.graph.insert_after(self.node, add)
        return add, 1

    def _constant(self, what: str, array: NDArray[Any]) -> ir.Value:
        import onnx_ir as ir

        tensor = ir.tensor(array, name=f"{self.name}.{what}")
        value = ir.Value(
            name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value

    def _node(
        self, operator: str, given: list[ir.Value], what: str, shape: Any, dtype: Any = np.float32, **attributes: int
    ) -> ir.Value:
        import onnx_ir as ir

        node = ir.node(operator, given, attributes=attributes, name=f"{self.name}/{operator}_{what}")
        node.metadata_props["module"] = self.name
        value = node.outputs[0]
        value.name, value.shape, value.dtype = f"{self.name}.{what}", shape, ir.DataType.from_numpy(np.dtype(dtype))
        self.graph.insert_before(self.node, node)
        return value


def _bias_of(node: ir.Node) -> tuple[ir.Node, int] | None:
    """The node and input that are a layer's bias: the third of a convolution or Gemm, or the Add of a constant behind a
    product; None for a layer without bias."""
    if node.op_type in ("Conv", "Gemm"):
        return (node, 2) if _number(node, 2) is not None else None
    uses = list(node.outputs[0].uses())
    if len(uses) == 1 and uses[0].node.op_type == "Add" and _number(uses[0].node, 1 - uses[0].idx) is not None:
        return uses[0].node, 1 - uses[0].idx
    return None


def faults(model: ir.Model, placement: Placement, grid: Grid = "int8") -> list[str]:
    """Errors of a quantized graph, as messages.

    Every Q must feed a DQ and every DQ a node. Scales must be finite and positive, and types those of the placement.
    """
    return [said for node in model.graph for said in _faults(node, placement, grid)]


def _faults(node: ir.Node, placement: Placement, grid: Grid) -> Iterator[str]:
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        return
    users = [use.node.op_type for use in node.outputs[0].uses()]
    if not users and not node.outputs[0].is_graph_output():
        yield f"{node.name} feeds nothing"
    if node.op_type == "QuantizeLinear" and set(users) - {"DequantizeLinear"}:
        yield f"{node.name} feeds {some(users)}, expected DequantizeLinear"
    scale = _number(node, 1)
    if scale is None or not (np.isfinite(scale).all() and (scale > 0).all()):
        yield f"{node.name} has no scale that is finite and positive"
    if node.op_type == "QuantizeLinear":
        zero = _number(node, 2)
        expected = element(grid, placement.symmetric)
        if zero is None or zero.dtype != expected or (placement.symmetric and zero.any()):
            yield f"{node.name} does not quantize to {expected.name}, which this target needs"


def _number(node: ir.Node, index: int) -> NDArray[Any] | None:
    value = node.inputs[index] if len(node.inputs) > index else None
    return None if value is None or value.const_value is None else value.const_value.numpy()


_INTEGER_WEIGHTS = {
    "QLinearConv": 3, "QLinearMatMul": 3, "QGemm": 3, "ConvInteger": 1, "MatMulInteger": 1, "MatMulIntegerToFloat": 1,
    "DynamicQuantizeMatMul": 1,
}  # fmt: skip
"""Integer operators of ONNX and ONNX Runtime, with the index of the input that holds the weights."""


def pair_sums(model: ir.Model) -> dict[str, int]:
    """The largest sum of two adjacent products, 0 to 65,280 (`rounding.largest_pair`), by the name of each node with
    constant int8 weights; nodes of one name share the largest."""
    sums: dict[str, int] = {}
    for node in model.graph:
        whole = _int8_weights(node)
        if whole is not None and whole.ndim >= 2:
            if "Conv" not in node.op_type and not node.attributes.get_int("transB", False):
                whole = np.swapaxes(whole, -1, -2)
            if "Conv" not in node.op_type:  # (…, out, in)
                whole = whole.reshape(-1, whole.shape[-1])
            name = node.name or ""
            sums[name] = max(sums.get(name, 0), largest_pair(whole, 0))
    return sums


def _int8_weights(node: ir.Node) -> NDArray[np.int8] | None:
    """The int8 weights of a product, its own or those of the DequantizeLinear that feeds it; None if there are none."""
    value = None
    if node.op_type in _INTEGER_WEIGHTS:
        value = node.inputs[_INTEGER_WEIGHTS[node.op_type]]
    elif node.op_type in PRODUCTS and (second := node.inputs[1]) is not None:
        producer = second.producer()
        value = producer.inputs[0] if producer is not None and producer.op_type == "DequantizeLinear" else None
    if value is None or value.const_value is None:
        return None
    whole = value.const_value.numpy()
    return whole if whole.dtype == np.int8 else None
