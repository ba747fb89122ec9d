"""The error of each part of an artifact: its output against that of the reference model for the same input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from exporter.backends import Array, Layer
from exporter.bisect.network import Chain
from exporter.graph.half import HALVES
from exporter.verify.blocks import belongs

# (a, b): the limit of a part's error is a · rms(update) + b · rms(output), where the update of a block is its output
# minus its input, and that of another part its output. Largest errors measured on trained networks (V1 and V2 atto,
# ONNX Runtime and OpenVINO), as shares of the update and of the output: fp32 7e-7 and 5e-7; fp16 2e-3 and 5e-4, the
# latter from rounding the sum; int8 3e-2 and 1e-2. GELU's tanh form gives 1e-4 of the update, which only fp32 shows.
TOLERANCES = {
    "fp32": (2e-5, 2e-6),
    "fp16": (4e-3, 2e-3),
    "bf16": (3e-2, 1.6e-2),
    "int8": (0.1, 0.01),
    "fp8": (0.2, 0.02),
}


@dataclass(frozen=True)
class Part:
    """A part of the network, or several between which the artifact shows no output.

    name: of its module; of the first and the last one; or of an output.
    precisions: of its products, as `TOLERANCES` names them.
    place: of the output among those of the network, for the tail.
    x, y: its input and output in the artifact, (N, C, H, W), or (N, C) behind the head.
    expected: the output of the reference model for `x`.
    error: root mean square of `y - expected` over that of the update, infinite where `y` is not finite.
    limit: the largest `error` that passes.
    accumulated: root mean square of `y` minus the output of the reference model for the images, over the standard
        deviation of that output.
    """

    name: str
    precisions: frozenset[str]
    x: Array
    y: Array
    expected: Array
    error: float
    limit: float
    accumulated: float
    place: int = 0

    @property
    def passed(self) -> bool:
        """Whether the error is within its limit."""
        return self.error <= self.limit


def rms(x: Array) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def share_of_deviation(y: Array, reference: Array) -> float:
    """Root mean square of the difference, over the standard deviation of the reference."""
    with np.errstate(invalid="ignore", over="ignore"):
        return rms(y - reference) / (float(reference.std()) or 1.0)


@dataclass(frozen=True)
class Precisions:
    """The precisions of the products of an artifact, part by part; those of the artifact where no layers are known."""

    layers: Sequence[Layer]
    artifact: str

    def of(self, names: Sequence[str]) -> frozenset[str]:
        """The precisions of the products of these parts."""
        every = {layer.precision for layer in self.layers for name in names if belongs(layer, name)}
        known = {"int8" if word == "uint8" else word for word in every} & TOLERANCES.keys()
        # A part kept in fp32 takes its input rounded to fp16, or not, where the runtime removes the rounding.
        is_kept = known == {"fp32"} and self.artifact in HALVES
        return frozenset({*known, self.artifact} if is_kept or not known else known)


def measure(
    chain: Chain,
    block_outputs: Mapping[str, Array],
    images: Array,
    outputs: Mapping[str, Array],
    precisions: Precisions,
) -> Iterator[Part]:
    """The parts in order, up to the first whose output is not finite.

    Args:
        chain: the reference model.
        block_outputs: of the artifact for the images, by the name of the part; parts may be missing.
        images: (N, C, H, W).
        outputs: of the artifact for the images, by name.
        precisions: of the artifact's products.
    """
    x, reference, hidden = images, images, list[str]()
    stages: list[tuple[Array, Array]] = []
    for name in chain.names:
        reference = chain.run(name, reference)
        hidden.append(name)
        if name in block_outputs:
            y, expected = block_outputs[name], chain.run_all(hidden, x)
            update = expected - x if len(hidden) == 1 and chain.is_block(name) else expected
            label = " … ".join(dict.fromkeys((hidden[0], name)))
            yield _part(label, precisions.of(hidden), x, y, expected, update, reference)
            if not np.isfinite(y).all():
                return
            x, hidden = y, []
        if chain.ends_stage(name):
            stages.append((chain.run_all(hidden, x), reference))
    label = chain.tail_name(hidden)
    both = chain.finish([own for own, _ in stages]), chain.finish([whole for _, whole in stages])
    for place, ((output, y), expected, whole) in enumerate(zip(outputs.items(), *both, strict=True)):
        if expected.dtype.kind == "i":  # numbers of classes, which their probabilities judge
            continue
        name = label if len(outputs) == 1 else f"{label} ({output})"
        yield replace(_part(name, precisions.of([*hidden, "head"]), x, y, expected, expected, whole), place=place)


def _part(
    name: str, precisions: frozenset[str], x: Array, y: Array, expected: Array, update: Array, reference: Array
) -> Part:
    of_update, of_output = max(TOLERANCES[precision] for precision in precisions)
    size = rms(update) or 1.0
    with np.errstate(invalid="ignore", over="ignore"):
        error = rms(y - expected) / size
    limit = of_update + of_output * rms(expected) / size
    error = error if np.isfinite(error) else np.inf
    return Part(name, precisions, x, y, expected, error, limit, share_of_deviation(y, reference))
