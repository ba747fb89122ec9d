"""The levels of a feature pyramid: what distinguishes one from another, its strides, and its multiply-accumulates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from exporter.artifact.sidecar import Record


class Pyramid(Record, frozen=True):
    """The feature pyramid (FPN) of a detector (`exporter.model.fpn`).

    width: channels of its maps.
    stages: those whose maps it takes, neighbours.
    outputs: number of its maps, one for each stage or more.
    extra: what the maps beyond the stages are computed from: `pool` is every second position of the last map; the
        others are convolutions of stride 2, the first of them of the last stage's map (`input`), of that behind its
        lateral convolution (`lateral`), or of the last map of the pyramid (`output`).
    relu: whether ReLU stands in front of the second and further of these convolutions.
    """

    width: int
    stages: tuple[int, ...]
    outputs: int
    extra: Literal["pool", "input", "lateral", "output"] = "pool"
    relu: bool = False

    def strides(self, of_stages: Sequence[int]) -> tuple[int, ...]:
        """Input pixels per pixel of each map, from the strides of all stages of the network."""
        first = of_stages[self.stages[0]]
        return tuple(first << level for level in range(self.outputs))

    @property
    def convolutions(self) -> int:
        """Number of the convolutions of stride 2 behind the last stage."""
        return 0 if self.extra == "pool" else self.outputs - len(self.stages)


def layers(pyramid: Pyramid, dims: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Each convolution as (weights, outputs per position, number of the map whose size it has)."""
    width, last = pyramid.width, dims[pyramid.stages[-1]]
    for level, stage in enumerate(pyramid.stages):
        yield dims[stage] * width, width, level
        yield 9 * width * width, width, level
    for index in range(pyramid.convolutions):
        before = last if pyramid.extra == "input" and not index else width
        yield 9 * before * width, width, len(pyramid.stages) + index


def count_macs(pyramid: Pyramid, dims: Sequence[int], sizes: Sequence[tuple[int, int]]) -> int:
    """Multiply-accumulates of one image.

    Args:
        pyramid: which one.
        dims: channels of all stages of the network.
        sizes: height and width of their maps.
    """
    maps = [sizes[stage] for stage in pyramid.stages]
    for _ in range(pyramid.convolutions):
        height, width = maps[-1]
        maps.append((-(-height // 2), -(-width // 2)))
    return sum(weights * maps[level][0] * maps[level][1] for weights, _, level in layers(pyramid, dims))


def macs_saved_by_split(width: int, sizes: Sequence[tuple[int, int]]) -> int:
    """How many multiply-accumulates `SplitMultiscaleConv` has less than the 3×3 convolution over all maps.

    Args:
        width: channels of each map, and of the output.
        sizes: (height, width) of the maps, the first of which has the size of the output.
    """
    (height, columns), *others = sizes
    of_convolution = 9 * width**2 * height * columns * len(others)
    of_products = sum(9 * width**2 * h * w for h, w in others)
    of_matrices = sum(9 * width * height * h * w + 3 * width * height * w * columns for h, w in others)
    return of_convolution - of_products - of_matrices
