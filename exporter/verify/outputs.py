"""What the outputs of an artifact hold: scores of classes or of labels, values of a regression, or features."""

from __future__ import annotations

from math import log
from typing import Literal

from exporter.artifact.sidecar import Sidecar
from exporter.errors import BadRequest
from exporter.recipe import Checks, OutputKind

Kind = Literal["classes", "multilabel", "values", "features"]
THRESHOLD = 0.5


def kinds(sidecar: Sidecar, wanted: OutputKind | None) -> tuple[Kind, ...]:
    """What each output of a traced artifact holds.

    Args:
        sidecar: with its outputs.
        wanted: `--outputs`; None takes an output of one number as a value, and one of several as scores of classes.
    """
    widths = [tensor.shape[-1] for tensor in sidecar.outputs]
    return tuple(_kind(sidecar.task, width, wanted) for width in widths)


def first(sidecar: Sidecar, wanted: OutputKind | None) -> Kind:
    """What the first output holds, with which labels of images are compared; the artifact need not be traced yet."""
    return _kind(sidecar.task, sidecar.weights.num_classes, wanted)


def has_classes(sidecar: Sidecar, wanted: OutputKind | None) -> bool:
    """Whether the first output holds scores of classes."""
    return first(sidecar, wanted) == "classes"


def has_budget(sidecar: Sidecar, wanted: OutputKind | None) -> bool:
    """Whether a loss of accuracy, or of agreement, can be measured in points."""
    return first(sidecar, wanted) in ("classes", "multilabel")


def has_cosine(kind: Kind, width: int | str) -> bool:
    """Whether the cosine of an output says something: that of a single number is only its sign."""
    return kind != "values" and not (kind == "multilabel" and width == 1)


def decision_logit(options: Checks) -> float:
    """The output from which an image has a label: the logit of `--threshold`. The last layer of every head is linear,
    so outputs are logits, never probabilities."""
    threshold = THRESHOLD if options.threshold is None else options.threshold
    return log(threshold / (1 - threshold))


def _kind(task: str, width: int | str, wanted: OutputKind | None) -> Kind:
    if task != "classify":
        return "features"
    return wanted or ("values" if width == 1 else "classes")


def check_threshold(options: Checks) -> None:
    """Raises: BadRequest for `--threshold` without `--outputs multilabel`."""
    if options.threshold is not None and options.outputs != "multilabel":
        raise BadRequest(
            f"--threshold {options.threshold}: only a multi-label head has a threshold; add --outputs multilabel, or "
            "leave it out"
        )


def check(sidecar: Sidecar, options: Checks) -> None:
    """Refuse `--outputs` where the outputs cannot be that, and `--threshold` where there is none.

    Raises: BadRequest for an artifact without a head, and for classes of a head with one output.
    """
    wanted = options.outputs
    check_threshold(options)
    if wanted is not None and sidecar.task != "classify":
        raise BadRequest(f"--outputs {wanted}: the outputs of task {sidecar.task} are features; leave it out")
    if wanted == "classes" and sidecar.weights.num_classes == 1:
        raise BadRequest(
            "--outputs classes: the head has one output, and a choice needs two; leave it out, or give --outputs "
            "multilabel if it is the score of one label"
        )
