"""What the outputs of an artifact hold: scores of classes, values of a regression, or features."""

from __future__ import annotations

from typing import Literal

from exporter.artifact.sidecar import Sidecar
from exporter.errors import BadRequest
from exporter.recipe import OutputKind

Kind = Literal["classes", "values", "features"]


def kinds(sidecar: Sidecar, wanted: OutputKind | None) -> tuple[Kind, ...]:
    """What each output of a traced artifact holds.

    Args:
        sidecar: with its outputs.
        wanted: `--outputs`; None takes an output of one number as a value, and one of several as scores of classes.
    """
    widths = [tensor.shape[-1] for tensor in sidecar.outputs]
    return tuple(_kind(sidecar.task, width, wanted) for width in widths)


def has_classes(sidecar: Sidecar, wanted: OutputKind | None) -> bool:
    """Whether labels can be compared with the first output; the artifact need not be traced yet."""
    return _kind(sidecar.task, sidecar.weights.num_classes, wanted) == "classes"


def _kind(task: str, width: int | str, wanted: OutputKind | None) -> Kind:
    if task != "classify":
        return "features"
    return wanted or ("values" if width == 1 else "classes")


def check(sidecar: Sidecar, wanted: OutputKind | None) -> None:
    """Refuse `--outputs` where the outputs cannot be that.

    Raises: BadRequest for an artifact without a head, and for classes of a head with one output.
    """
    if wanted is not None and sidecar.task != "classify":
        raise BadRequest(f"--outputs {wanted}: the outputs of task {sidecar.task} are features; leave it out")
    if wanted == "classes" and sidecar.weights.num_classes == 1:
        raise BadRequest("--outputs classes: the head has one output, and a choice needs two; leave it out")
