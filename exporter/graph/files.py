"""Writes ONNX graphs: metadata, external data above 2 GB, and a check of the graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.artifact.sidecar import Tensor
from exporter.errors import ExporterError, first_line

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

PREFIX = "convnext_export."
LARGE_BYTES = 1 << 16
MAX_PROTO_BYTES = 2**31 - 2**24  # protobuf ends at 2 GiB; the graph itself needs a little of it


def save(model: ir.Model, path: Path, facts: Mapping[str, str]) -> None:
    """Check a graph, and write it with metadata.

    Above 2 GB the weights are written to `FILE.data`. Weights are written one at a time, so there is no second copy of
    them in memory.

    Raises: ExporterError when the graph is not valid ONNX.
    """
    import onnx
    import onnx_ir as ir

    for key, value in facts.items():
        model.metadata_props[PREFIX + key] = value
    skeleton = without_weights(model)
    try:
        onnx.checker.check_model(skeleton)
    except onnx.checker.ValidationError as error:
        raise ExporterError(f"{path.name}: not valid ONNX: {first_line(error)}") from error
    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    if weights < MAX_PROTO_BYTES:
        del skeleton.graph.input[len(model.graph.inputs) :]
        _write(skeleton, _large(model), path)
    else:
        ir.save(model, path, external_data=f"{path.name}.data")


def _write(skeleton: onnx.ModelProto, weights: Mapping[str, ir.Value], path: Path) -> None:
    """Write a graph, then its large weights after the other fields, one in memory at a time.

    Source of the encoding: protobuf.dev/programming-guides/encoding, length-delimited records.
    """
    import onnx
    import onnx_ir as ir

    def pieces() -> Iterator[bytes]:
        yield skeleton.graph.SerializeToString(deterministic=True)
        for name, value in weights.items():
            assert value.const_value is not None
            tensor = ir.serde.serialize_tensor(value.const_value)
            tensor.name = name
            content = tensor.SerializeToString(deterministic=True)
            yield _record(onnx.GraphProto.INITIALIZER_FIELD_NUMBER, len(content))
            yield content

    rest = onnx.ModelProto()
    rest.CopyFrom(skeleton)
    rest.ClearField("graph")
    with path.open("wb") as file:
        file.write(rest.SerializeToString(deterministic=True))
        file.write(_record(onnx.ModelProto.GRAPH_FIELD_NUMBER, sum(map(len, pieces()))))
        file.writelines(pieces())


def _record(field: int, length: int) -> bytes:
    """The head of a length-delimited record: its tag and length, both as varints."""
    head = bytearray()
    for number in (field << 3 | 2, length):
        while number > 0x7F:
            head.append(number & 0x7F | 0x80)
            number >>= 7
        head.append(number)
    return bytes(head)


def without_weights(model: ir.Model) -> onnx.ModelProto:
    """The model as a proto in which the large weights are inputs."""
    import onnx_ir as ir

    large = _large(model)
    tensors = {name: value.const_value for name, value in large.items()}
    for name, value in large.items():
        model.graph.initializers.pop(name)
        model.graph.inputs.append(value)
    try:
        return ir.serde.serialize_model(model)
    finally:
        for name, value in large.items():
            model.graph.inputs.remove(value)
            value.const_value = tensors[name]
            model.graph.initializers[name] = value


def _large(model: ir.Model) -> dict[str, ir.Value]:
    initializers = model.graph.initializers.items()
    return {name: v for name, v in initializers if v.const_value is not None and v.const_value.nbytes >= LARGE_BYTES}


def drop_unused(graph: ir.Graph) -> None:
    """Remove weights that no node uses."""
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            graph.initializers.pop(name)


def signature(model: ir.Model) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Inputs and outputs, as a sidecar stores them."""
    inputs, outputs = model.graph.inputs, model.graph.outputs
    return tuple(map(_tensor, inputs)), tuple(map(_tensor, outputs))


def _tensor(value: ir.Value) -> Tensor:
    assert value.name is not None
    assert value.shape is not None
    assert value.dtype is not None
    shape = tuple(dim if isinstance(dim, int) else str(dim) for dim in value.shape)
    return Tensor(name=value.name, shape=shape, dtype=value.dtype.numpy().name)
