"""What the outputs of an artifact hold: scores of classes or of labels, values of a regression, or features."""

from __future__ import annotations

from math import log
from typing import Literal

from exporter.artifact.sidecar import PROBABILITIES, Answer, Content, Sidecar
from exporter.errors import BadRequest
from exporter.recipe import Checks, OutputKind

Kind = Literal[
    "classes", "multilabel", "values", "top", "probabilities", "embedding", "features", "pixels", "pixel_classes"
]  # fmt: skip
"""Scores of classes or of labels; values of a regression; the numbers of the most probable classes, and their
probabilities; a feature vector an image; other features; or of each pixel scores of classes, or its class."""
PIXELS: tuple[Kind, ...] = ("pixels", "pixel_classes")
THRESHOLD = 0.5


def kinds(sidecar: Sidecar, wanted: OutputKind | None) -> tuple[Kind, ...]:
    """What each output of a traced artifact holds.

    Args:
        sidecar: with its outputs.
        wanted: `--outputs`; None takes an output of one number as a value, and one of several as scores of classes.
    """
    return tuple(_kind(tensor.holds, tensor.shape[-1], wanted) for tensor in sidecar.outputs)


def first(sidecar: Sidecar, wanted: OutputKind | None) -> Kind:
    """What the first output holds, with which labels of images are compared; the artifact need not be traced yet."""
    spec = sidecar.spec
    holds = next(iter(spec.named((), sidecar.architecture.get("depths", ()) or (1,)).values()))
    return _kind(holds, sidecar.weights.num_classes, wanted)


def has_classes(sidecar: Sidecar, wanted: OutputKind | None) -> bool:
    """Whether the first output holds scores of classes, or the most probable ones."""
    return first(sidecar, wanted) in ("classes", "top")


def has_labels(sidecar: Sidecar, wanted: OutputKind | None) -> bool:
    """Whether the first output can be compared with labels of images."""
    return first(sidecar, wanted) in ("classes", "top", "multilabel") or has_masks(sidecar)


def has_masks(sidecar: Sidecar) -> bool:
    """Whether the output can be compared with masks: it is of each pixel of the input, and of several classes."""
    is_whole = "segment" in sidecar.spec.tasks and sidecar.spec.answer != "logits4"
    return is_whole and sidecar.weights.num_classes != 1


def has_agreement(kind: Kind) -> bool:
    """Whether the answers of an output are equal to PyTorch's or not: classes, labels, or nearest neighbours."""
    return kind in ("classes", "top", "multilabel", "embedding", *PIXELS)


def has_one_class_of_pixels(sidecar: Sidecar, kind: Kind) -> bool:
    """Whether an output is of pixels and of one class: all pixels have it, whatever the logits are."""
    return kind in PIXELS and sidecar.weights.num_classes == 1


def is_centred(holds: Content, kind: Kind) -> bool:
    """Whether errors of an output are compared with its standard deviation. Values of a regression may all be alike,
    and probabilities of untrained heads are: errors of these are compared with the root mean square."""
    return kind != "values" and holds not in PROBABILITIES


def has_cosine(kind: Kind, width: int | str) -> bool:
    """Whether the cosine of an output says something: that of a single number is only its sign."""
    return kind not in ("values", "pixel_classes") and not (kind == "multilabel" and width == 1)


def decision(options: Checks, holds: Content) -> float:
    """The output from which an image has a label: the threshold of a probability, else its logit."""
    threshold = THRESHOLD if options.threshold is None else options.threshold
    return threshold if holds in PROBABILITIES else log(threshold / (1 - threshold))


def _kind(holds: Content, width: int | str, wanted: OutputKind | None) -> Kind:
    if holds == "logits":
        return wanted or ("values" if width == 1 else "classes")
    others: dict[Content, Kind] = {
        "softmax": "classes", "sigmoid": "multilabel", "classes": "top", "top5": "probabilities",
        "embedding": "embedding", "pixel_logits": "pixels", "labels": "pixel_classes",
    }  # fmt: skip
    return others.get(holds, "features")


def check_threshold(options: Checks, answer: Answer) -> None:
    """Raises: BadRequest for `--threshold` where the outputs are not scores of labels."""
    if options.threshold is not None and options.outputs != "multilabel" and answer != "sigmoid":
        raise BadRequest(
            f"--threshold {options.threshold}: only a multi-label head has a threshold; add --outputs multilabel, or "
            "leave it out"
        )


def check(sidecar: Sidecar, options: Checks) -> None:
    """Refuse `--outputs` where the outputs cannot be that, and `--threshold` where there is none.

    Raises: BadRequest for an artifact without a head, and for classes of a head with one output.
    """
    wanted, spec = options.outputs, sidecar.spec
    check_threshold(options, spec.answer if "classify" in spec.tasks else "logits")
    if wanted is not None and "classify" in spec.tasks and spec.answer != "logits":
        holds = "multilabel" if spec.answer == "sigmoid" else "classes"
        if wanted != holds:
            raise BadRequest(
                f"--outputs {wanted}: the artifact was built with --output {spec.answer}, which is of {holds}; leave "
                "it out"
            )
    if wanted is not None and "classify" not in spec.tasks:
        raise BadRequest(f"--outputs {wanted}: the outputs of task {sidecar.task} are features; leave it out")
    if wanted == "classes" and sidecar.weights.num_classes == 1:
        raise BadRequest(
            "--outputs classes: the head has one output, and a choice needs two; leave it out, or give --outputs "
            "multilabel if it is the score of one label"
        )


def refuse_limits(sidecar: Sidecar, options: Checks, labelled: bool) -> None:
    """Raises: BadRequest for limits of metrics that these outputs or images do not have."""
    every = kinds(sidecar, options.outputs)
    if (options.max_drop, options.min_agreement) != (None, None) and has_one_class_of_pixels(sidecar, every[0]):
        raise BadRequest(
            "--max-drop and --min-agreement: the network has one class, which every pixel has; give --min-cosine"
        )
    if options.max_drop is not None and not has_labels(sidecar, options.outputs):
        instead = "give --min-agreement" if every[0] == "embedding" else "leave it out"
        raise BadRequest(f"--max-drop: the outputs of {sidecar.variant} are {every[0]}, without a top-1; {instead}")
    if options.max_drop is not None and not labelled:
        raise BadRequest(f"--max-drop: {options.data} has no labels to measure a drop on; give labelled --data")
    # The agreement of neighbours is limited only where the feature vector is the first output.
    is_limited = has_agreement(every[0]) or any(has_agreement(kind) and kind != "embedding" for kind in every)
    if options.min_agreement is not None and not is_limited:
        raise BadRequest(f"--min-agreement: the outputs are {every[0]}, without a top-1; leave it out")
    regression = (options.max_relative_error, options.min_r2, options.min_spearman)
    if any(limit is not None for limit in regression) and "values" not in every:
        raise BadRequest(
            f"--max-relative-error, --min-r2 and --min-spearman are for a regression, and the outputs are {every[0]}; "
            "add --outputs values, or leave them out"
        )
    if options.atol is not None and set(every) <= {"top", "pixel_classes"}:
        raise BadRequest("--atol: numbers of classes have no largest error; give --min-agreement")
    widths = [tensor.shape[-1] for tensor in sidecar.outputs]
    if options.min_cosine is not None and not any(map(has_cosine, every, widths)):
        instead = "--min-r2" if every[0] == "values" else "--min-agreement"
        raise BadRequest(
            f"--min-cosine: the outputs are {every[0]}, and the cosine of one value is only its sign; use {instead}"
        )
