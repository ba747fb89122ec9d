"""Converts a graph to fp16 or bf16.

Statistics stay in fp32. A LayerNormalization or RMSNormalization node computes its own in fp32 (its `stash_type`).
Norms made of elementary operators, GRN and all pooling sum squares or whole images; such sums exceed 65,504 and would
make every output constant, so these modules stay in fp32 between two casts. So do softmax and sigmoid of the outputs.
Inputs and outputs keep their types.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from exporter.artifact import Artifact, file_name, publish
from exporter.errors import some
from exporter.graph import files
from exporter.model import structure
from exporter.progress import note

if TYPE_CHECKING:
    import onnx_ir as ir

HALVES = {"fp16": "FLOAT16", "bf16": "BFLOAT16"}
FP16_MAX = float(np.finfo(np.float16).max)
MAX_FP16_ERROR = 0.01  # of a weight's norm: ordinary rounding is 0.0002, and what is below 6e-8 becomes nothing


@dataclass
class _Halving:
    """State of one conversion: the values already cast, so that none is cast twice."""

    graph: ir.Graph
    half: ir.DataType
    beyond: frozenset[ir.Node] = frozenset()
    parts: Collection[str] = ()
    cast: dict[tuple[str, str], ir.Value] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)


def lower(artifact: Artifact, wanted: str, out: Path, form: str = "", keep: Sequence[str] = ()) -> Artifact:
    """Convert an fp32 ONNX artifact to another precision, as a new artifact.

    Args:
        artifact: fp32 ONNX.
        wanted: fp16 or bf16.
        out: the folder to write to.
        form: name of the form, for intermediate ONNX files (`custom_nchw_fp16.onnx`).
        keep: parts of the network that stay in fp32.
    """
    import onnx_ir as ir

    model = ir.load(artifact.path)
    tell(to_half(model, wanted, artifact.sidecar.beyond_fp16, keep))
    sidecar = artifact.sidecar.derived(precision=wanted).keeping(keep)
    target = out / file_name(sidecar, ".onnx", form)
    return publish(target, sidecar, lambda file: files.save(model, file, sidecar.facts()))


def tell(kept: list[str]) -> None:
    """Print a note with the weights and modules that stay in fp32."""
    if kept:
        note(f"{len(kept)} weights or modules do not fit fp16 (65,504; lost below 6e-8) and stay in fp32: {some(kept)}")


def to_half(
    model: ir.Model, wanted: str = "fp16", beyond: Collection[str] = (), keep: Collection[str] = ()
) -> list[str]:
    """Convert a graph from fp32 to fp16 or bf16, in place. Q and DQ nodes keep their types.

    Args:
        model: in fp32.
        wanted: fp16 or bf16.
        beyond: modules whose activations fp16 cannot hold, which stay in fp32 there.
        keep: parts of the network that stay in fp32.

    Returns: names of what stays in fp32, with the nodes that use it: the modules of `beyond`, weights beyond ±65,504,
        and weights so small that their relative error in fp16 exceeds `MAX_FP16_ERROR`.
    """
    import onnx_ir as ir

    work = _Halving(model.graph, ir.DataType[HALVES[wanted]], parts=keep)
    if wanted == "fp16":
        work.beyond = frozenset(node for node in model.graph if _touches(node, beyond))
        work.kept += sorted(beyond)
    outputs = [(value, value.dtype) for value in model.graph.outputs]
    for node in list(model.graph):
        target = ir.DataType.FLOAT if _stays(node, work) else work.half
        for index, value in enumerate(node.inputs):
            if value is not None and _is_float(value) and value.dtype != target:
                node.replace_input_with(index, _as(work, value, target, node))
        if node.op_type == "Cast" and _is_float(node.outputs[0]):
            node.attributes["to"] = ir.AttrInt64("to", target.value)
        for value in node.outputs:
            if _is_float(value):
                value.dtype = target
    for index, (value, dtype) in enumerate(outputs):
        _keep_type(model.graph, index, value, dtype)
    files.drop_unused(model.graph)
    return work.kept


def round_results(model: ir.Model) -> None:
    """Insert nodes, in place, so that a runtime which computes fp16 in fp32 rounds every result to fp16.

    ONNX Runtime on CPUs is such a runtime. It removes casts between two operators, but keeps a Max of one value, which
    returns its input, in fp16.
    """
    import onnx_ir as ir

    for node in list(model.graph):
        value = node.outputs[0]
        if value.dtype != ir.DataType.FLOAT16 or node.op_type == "Cast":
            continue
        uses = list(value.uses())
        rounded = ir.node("Max", [value], name=f"{node.name}/Max_rounded")
        rounded.metadata_props["module"] = node.metadata_props.get("module", "")
        output = rounded.outputs[0]
        output.name, output.dtype, output.shape = f"{value.name}_rounded", value.dtype, value.shape
        for use in uses:
            use.node.replace_input_with(use.idx, output)
        model.graph.insert_after(node, rounded)


def _is_float(value: ir.Value) -> bool:
    import onnx_ir as ir

    return value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _touches(node: ir.Node, modules: Collection[str]) -> bool:
    """Whether a node belongs to these modules or is next to one; functions between modules belong to none."""
    givers = (value.producer() for value in node.inputs if value is not None)
    takers = (use.node for value in node.outputs for use in value.uses())
    near = (one.metadata_props.get("module", "") for one in (node, *givers, *takers) if one is not None)
    return any(module in modules for module in near)


def _stays(node: ir.Node, work: _Halving) -> bool:
    module = node.metadata_props.get("module", "")
    sums = structure.is_response_norm(module) or structure.is_spatial(module)
    whole = structure.is_picture(module) or sums or structure.is_in(module, work.parts)
    if whole or node.op_type.startswith("Reduce"):
        return True
    if not module and node.op_type in ("Softmax", "Sigmoid", "TopK"):
        return True
    no_sums = ("Conv", "LayerNormalization", "RMSNormalization", "Transpose")  # or sums that runtimes compute in fp32
    if structure.is_norm(module) and node.op_type not in no_sums:
        return True
    if node in work.beyond:
        return True
    misfits = [v.name or "" for v in node.inputs if v is not None and not _fits(v, work.half.name)]
    if module:  # functions of outputs have constants, not weights
        work.kept += [name for name in misfits if name not in work.kept]
    return bool(misfits)


def _fits(value: ir.Value, half: str) -> bool:
    tensor = value.const_value
    if tensor is None or not _is_float(value) or half != "FLOAT16":
        return True  # bf16 has the range of fp32
    array = tensor.numpy().astype(np.float32)
    if np.abs(array).max(initial=0.0) > FP16_MAX:
        return False
    lost = np.linalg.norm(array - array.astype(np.float16).astype(np.float32))
    return bool(lost <= MAX_FP16_ERROR * np.linalg.norm(array))


def _as(work: _Halving, value: ir.Value, target: ir.DataType, before: ir.Node) -> ir.Value:
    """The value at another precision: a converted weight, or a Cast in front of the node that uses it."""
    import onnx_ir as ir

    key = (value.name or "", target.name)
    if key not in work.cast:
        name = f"{value.name}_{'fp32' if target == ir.DataType.FLOAT else 'half'}"
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


def _keep_type(graph: ir.Graph, index: int, value: ir.Value, dtype: ir.DataType | None) -> None:
    """Cast an output of the graph back to the type that it had."""
    import onnx_ir as ir

    if value.dtype == dtype or dtype is None:
        return
    name, producer = value.name, value.producer()
    value.name = f"{name}_half"
    cast = ir.node("Cast", [value], attributes={"to": dtype}, name=f"{name}/Cast")
    cast.outputs[0].name, cast.outputs[0].dtype, cast.outputs[0].shape = name, dtype, value.shape
    assert producer is not None
    graph.insert_after(producer, cast)
    graph.outputs[index] = cast.outputs[0]
