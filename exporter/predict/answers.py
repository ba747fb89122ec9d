"""From the outputs of a batch to answers: classes with their probabilities, values or feature vectors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.artifact.sidecar import PROBABILITIES, Content, Sidecar
from exporter.backends import Array, Outputs
from exporter.errors import BadRequest
from exporter.recipe import Checks
from exporter.verify import outputs
from exporter.verify.outputs import Kind

Arrays = dict[str, NDArray[Any]]
VECTORS = ("values", "embedding", "features", *outputs.PIXELS)
"""Kinds of outputs that are kept as they are."""
MOST_RETURNED = 5


@dataclass(frozen=True)
class Output:
    """One output of an artifact: its name, what it holds, the size of its last axis, and the names of its classes, if
    they are known. `place` is its number among the artifact's outputs, `is_map` says whether it has more axes than
    (N, width)."""

    name: str
    place: int
    holds: Content
    kind: Kind
    width: int
    labels: tuple[str, ...]
    is_map: bool = False

    def named(self, number: int) -> dict[str, str]:
        """The name of a class under `label`, if it is known."""
        return {"label": self.labels[number]} if self.labels else {}

    def label(self, number: int) -> str:
        """The name of a class, or its number as text."""
        return self.labels[number] if self.labels else str(number)


@dataclass(frozen=True)
class Answers:
    """What is kept of the outputs of a batch.

    outputs: of the artifact.
    top: how many classes of each image.
    checks: with the probability at or above which an image has a label of a multi-label head.
    whole: whether outputs are kept as they are, for `.npz` files.
    """

    outputs: tuple[Output, ...]
    top: int
    checks: Checks
    whole: bool = False

    def of(self, values: Outputs) -> Arrays:
        """The arrays (N, …) that are kept of the outputs of N images, by name."""
        kept: Arrays = {}
        for output in self.outputs:
            array = values[output.place]
            if self.whole or output.kind in VECTORS:
                kept[output.name] = array
                continue
            if output.kind == "top":
                order, probabilities = array[:, : self.top].astype(np.int32), values[output.place + 1][:, : self.top]
            else:
                order = np.argsort(-array, axis=1, kind="stable")[:, : self.top].astype(np.int32)
                probabilities = np.take_along_axis(_probabilities(array, output), order, axis=1)
            kept[f"{output.name}.classes"], kept[f"{output.name}.probabilities"] = order, probabilities
            if output.kind == "multilabel":
                kept[f"{output.name}.decided"] = array >= outputs.decision(self.checks, output.holds)
        return kept

    def records(self, arrays: Mapping[str, NDArray[Any]], count: int) -> Iterator[dict[str, Any]]:
        """For each of `count` images a dictionary of its answers, by the name of the output where there are several."""
        for row in range(count):
            answers = {output.name: self._record(output, arrays, row) for output in self.outputs}
            yield answers if len(self.outputs) > 1 else next(iter(answers.values()))

    def _record(self, output: Output, arrays: Mapping[str, NDArray[Any]], row: int) -> dict[str, Any]:
        if output.kind in VECTORS:
            word = "values" if output.kind == "values" else "embedding"
            return {word: arrays[output.name][row].tolist()}
        numbers = arrays[f"{output.name}.classes"][row].tolist()
        probabilities = arrays[f"{output.name}.probabilities"][row].tolist()
        first = [
            {"class": number, **output.named(number), "probability": round(probability, 6)}
            for number, probability in zip(numbers, probabilities, strict=True)
        ]
        if output.kind != "multilabel":
            return {"predictions": first}
        decided = np.flatnonzero(arrays[f"{output.name}.decided"][row]).tolist()
        return {"labels": [output.label(number) for number in decided], "predictions": first}


def answers_of(sidecar: Sidecar, checks: Checks, top: int, whole: bool) -> Answers:
    """What is kept of the outputs of an artifact.

    Raises: BadRequest for `--outputs` that the artifact does not have, `--threshold` without labels, and more classes
        than the artifact returns.
    """
    outputs.check(sidecar, checks)
    every: list[Output] = []
    kinds = outputs.kinds(sidecar, checks.outputs)
    of_first_head = next((place for place, kind in enumerate(kinds) if kind not in ("embedding", "features")), None)
    for place, kind in enumerate(kinds):
        tensor = sidecar.outputs[place]
        width = int(tensor.shape[-1]) if kind not in ("embedding", "features", *outputs.PIXELS) else 0
        if kind == "top" and top > max(width, MOST_RETURNED):
            raise BadRequest(f"--top {top}: the artifact returns the {width} most probable classes (--output top5)")
        if kind == "probabilities" and not whole:
            continue  # they are with their classes
        # Of numbers of classes the width is five.
        classes = sidecar.weights.num_classes if kind in ("top", *outputs.PIXELS) else width
        labels = sidecar.labels if place == of_first_head and len(sidecar.labels) == classes else ()
        every.append(Output(tensor.name, place, tensor.holds, kind, width, labels, len(tensor.shape) > 2))
    return Answers(tuple(every), top, checks, whole)


def check_top(top: int | None, every: Sequence[Output]) -> None:
    """Raises: BadRequest for more classes than an artifact has, or for one without classes."""
    if top is None:
        return
    classes = [output.width for output in every if output.kind in ("classes", "multilabel")]
    if all(output.kind in VECTORS for output in every):
        raise BadRequest(f"--top {top}: it is for scores of classes, and there are none; leave it out")
    if classes and top > max(classes):
        raise BadRequest(f"--top {top}: the artifact has {max(classes)} classes; give at most {max(classes)}")


def _probabilities(array: Array, output: Output) -> Array:
    """Softmax over the classes (N, C), or the sigmoid of each label; computed in fp64. Probabilities stay as they
    are."""
    if output.holds in PROBABILITIES:
        return array
    wide = array.astype(np.float64)
    if output.kind == "multilabel":
        return (0.5 + 0.5 * np.tanh(wide / 2)).astype(np.float32)  # the sigmoid, without overflow
    powers = np.exp(wide - wide.max(axis=1, keepdims=True))
    probabilities: Array = (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)
    return probabilities
