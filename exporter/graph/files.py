"""An ONNX graph and its file: facts in its metadata, external data above 2 GB, checked when written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.artifact import Tensor
from exporter.errors import ExporterError

if TYPE_CHECKING:
    import onnx_ir as ir

PREFIX = "convnext_export."
MAX_PROTO_BYTES = 2**31 - 2**24  # protobuf ends at 2 GiB; the graph itself needs a little of it


def save(model: ir.Model, path: Path, facts: Mapping[str, str]) -> None:
    """Write the graph with these facts in its metadata, and check what was written.

    Above 2 GB the weights go into `FILE.data` beside it, piece by piece.

    Raises: ExporterError when the written file is no valid ONNX.
    """
    import onnx
    import onnx_ir as ir

    for key, value in facts.items():
        model.metadata_props[PREFIX + key] = value
    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    if weights < MAX_PROTO_BYTES:
        ir.save(model, path)
    else:
        ir.save(model, path, external_data=f"{path.name}.data")
    try:
        onnx.checker.check_model(path)
    except onnx.checker.ValidationError as error:
        raise ExporterError(f"{path.name}: not valid ONNX: {str(error).splitlines()[0]}") from error


def drop_unused(graph: ir.Graph) -> None:
    """Forget the weights that no node uses any more."""
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            graph.initializers.pop(name)


def signature(model: ir.Model) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Inputs and outputs, as a sidecar says them."""
    inputs, outputs = model.graph.inputs, model.graph.outputs
    return tuple(map(_tensor, inputs)), tuple(map(_tensor, outputs))


def _tensor(value: ir.Value) -> Tensor:
    assert value.name is not None
    assert value.shape is not None
    assert value.dtype is not None
    shape = tuple(dim if isinstance(dim, int) else str(dim) for dim in value.shape)
    return Tensor(name=value.name, shape=shape, dtype=value.dtype.numpy().name)
