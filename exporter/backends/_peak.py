"""The peak of a runtime: the speed of the product that it computes fastest. Other speeds are given as a share of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache

import numpy as np

from exporter.backends import Array, Bound, Outputs, Session

MAP_SIDE = 32  # height and width of the feature map of a convolution
ROWS = MAP_SIDE**2  # of the input of a matrix product
PEAK_RUNS = 8  # of each product; the shortest counts


@dataclass(frozen=True)
class PeakProduct:
    """A matrix product of `ROWS` rows, or a 1×1 convolution on as many pixels, with as many channels in as out."""

    channels: int
    convolution: bool

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one product."""
        return ROWS * self.channels**2

    def __str__(self) -> str:
        side = self.channels
        if self.convolution:
            return f"1×1 convolution of {side} to {side} channels on {MAP_SIDE} × {MAP_SIDE} pixels"
        return f"{ROWS} × {side} × {side} matrix product"

    def input(self) -> Array:
        """The input, float32: (rows, channels) of a matrix product, (1, channels, H, W) of a convolution."""
        shape = (1, self.channels, MAP_SIDE, MAP_SIDE) if self.convolution else (ROWS, self.channels)
        return _normal(shape, 0)

    def matrix(self) -> Array:
        """The weights, float32: (in, out) of a matrix product, (out, in, 1, 1) of a convolution."""
        shape = (self.channels, self.channels, 1, 1) if self.convolution else (self.channels, self.channels)
        return _normal(shape, 1)


@cache
def _normal(shape: tuple[int, ...], seed: int) -> Array:
    """Normal numbers, made once in a process: several runtimes and precisions take the same products."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


PRODUCTS = tuple(PeakProduct(channels, convolution) for channels in (512, 1024) for convolution in (False, True))
"""Candidates for the peak of a runtime."""
LARGE_PRODUCTS = tuple(PeakProduct(4096, convolution) for convolution in (False, True))
"""More candidates, for devices that the others do not occupy."""
SHORT_S = 2e-3
"""Seconds. If each of `PRODUCTS` takes less, they are too small to reach the peak, and the large ones are timed too."""


class Product:
    """A product on a runtime, as a session, so that it is timed as a ConvNeXt is."""

    def __init__(self, session: Session, weights: PeakProduct) -> None:
        self.session, self.weights, self.streams = session, weights, session.streams
        self.facts = {**session.facts, "product": str(weights), "macs": str(weights.macs)}

    def __call__(self, images: Array) -> Outputs:
        """The product; the images are not looked at."""
        del images
        return self.session(self.weights.input())

    def bind(self, batches: Sequence[Array]) -> Bound:
        """The product, whatever the batches are."""
        del batches
        return self.session.bind([self.weights.input()])


OpenProduct = Callable[[PeakProduct], AbstractContextManager[Session]]


@contextmanager
def fastest_product(open_product: OpenProduct) -> Iterator[Product]:
    """Time the products on a runtime, and open the one with the most multiply-accumulates a second."""
    seconds = {weights: _least_seconds(open_product, weights) for weights in PRODUCTS}
    if max(seconds.values()) < SHORT_S:
        seconds |= {weights: _least_seconds(open_product, weights) for weights in LARGE_PRODUCTS}
    best = min(seconds, key=lambda weights: seconds[weights] / weights.macs)
    with open_product(best) as session:
        yield Product(session, best)


def _least_seconds(open_product: OpenProduct, weights: PeakProduct) -> float:
    """The seconds of the fastest run of a product."""
    taken = []
    with open_product(weights) as session:
        bound = session.bind([weights.input()])
        for _ in range(PEAK_RUNS):
            begin = time.perf_counter()
            bound.run()
            taken.append(time.perf_counter() - begin)
    return min(taken)
