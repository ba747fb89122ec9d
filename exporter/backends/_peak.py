"""The peak of a runtime: the speed of its fastest products. Other speeds are given as a share of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from exporter.backends import Array, Bound, Outputs, Session

MAP_SIDE = 32  # height and width of the feature map of a convolution
ROWS = MAP_SIDE**2  # of the input of a matrix product
PEAK_RUNS = 2, 8  # of each product, at least and at most; the shortest counts
ENOUGH_S = 0.1  # after so many seconds of runs, and at least two of them, products can be compared
IN_A_ROW = 8  # products below fp32: only the first converts its input from fp32, and only the last its output to it


@dataclass(frozen=True)
class PeakProduct:
    """A matrix product of `ROWS` rows, or a 1×1 convolution on as many pixels, with as many channels in as out; or
    `count` of them in a row, each of the output of the one before."""

    channels: int
    convolution: bool
    count: int = 1

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all of them."""
        return self.count * ROWS * self.channels**2

    def __str__(self) -> str:
        side, in_a_row = self.channels, f", {self.count} in a row" if self.count > 1 else ""
        if self.convolution:
            return f"1×1 convolution of {side} to {side} channels on {MAP_SIDE} × {MAP_SIDE} pixels{in_a_row}"
        return f"{ROWS} × {side} × {side} matrix product{in_a_row}"

    def input(self) -> Array:
        """The input, float32: (rows, channels) of a matrix product, (1, channels, H, W) of a convolution."""
        shape = (1, self.channels, MAP_SIDE, MAP_SIDE) if self.convolution else (ROWS, self.channels)
        return _normal(shape, 0)

    def matrix(self) -> Array:
        """The weights of each, float32: (in, out) of a matrix product, (out, in, 1, 1) of a convolution. Their scale
        gives outputs the variance of inputs."""
        shape = (self.channels, self.channels, 1, 1) if self.convolution else (self.channels, self.channels)
        return _normal(shape, 1) / np.float32(np.sqrt(self.channels))


@cache
def _normal(shape: tuple[int, ...], seed: int) -> Array:
    """Normal numbers, made once in a process: several runtimes and precisions take the same products."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


PRODUCTS = tuple(PeakProduct(channels, convolution) for channels in (512, 1024) for convolution in (False, True))
"""Candidates for the peak of a runtime."""
LARGE_PRODUCTS = tuple(PeakProduct(4096, convolution) for convolution in (False, True))
"""More candidates, for devices that the others do not occupy."""
SHORT_S = 2e-3
"""Seconds of one product. If each of `PRODUCTS` takes less, they are too small to reach the peak, and the large ones
are timed too."""


class Product:
    """A product on a runtime, as a session, so that it is timed as a ConvNeXt is."""

    def __init__(self, session: Session, product: PeakProduct) -> None:
        self.session, self.product, self.streams = session, product, session.streams
        self.facts = {**session.facts, "product": str(product), "macs": str(product.macs)}

    def __call__(self, images: Array) -> Outputs:
        """The product; the images are not looked at."""
        del images
        return self.session(self.product.input())

    def bind(self, batches: Sequence[Array]) -> Bound:
        """The product, whatever the batches are."""
        del batches
        return self.session.bind([self.product.input()])


OpenProduct = Callable[[PeakProduct], AbstractContextManager[Session]]


@contextmanager
def fastest_product(open_product: OpenProduct, precision: str, known: str = "") -> Iterator[Product]:
    """Time the products on a runtime, and open the one with the most multiply-accumulates a second.

    One product in a lower precision would also convert an fp32 input, and return fp32: `IN_A_ROW` are up to twice as
    fast.

    Args:
        open_product: opens one on a runtime.
        precision: of the products.
        known: the text of the fastest, from another process; then nothing is timed.
    """
    count = 1 if precision == "fp32" else IN_A_ROW
    small, large = ([replace(one, count=count) for one in products] for products in (PRODUCTS, LARGE_PRODUCTS))
    best = next((one for one in (*small, *large) if str(one) == known), None) or _fastest(open_product, small, large)
    with open_product(best) as session:
        yield Product(session, best)


def _fastest(open_product: OpenProduct, small: Sequence[PeakProduct], large: Sequence[PeakProduct]) -> PeakProduct:
    """The product with the most multiply-accumulates a second; large ones are timed where all small ones are short."""
    seconds = {product: _least_seconds(open_product, product) for product in small}
    if all(taken < SHORT_S * product.count for product, taken in seconds.items()):
        seconds |= {product: _least_seconds(open_product, product) for product in large}
    return min(seconds, key=lambda product: seconds[product] / product.macs)


def _least_seconds(open_product: OpenProduct, product: PeakProduct) -> float:
    """The seconds of the fastest run of a product."""
    least, most = PEAK_RUNS
    taken: list[float] = []
    with open_product(product) as session:
        bound = session.bind([product.input()])
        while len(taken) < least or (len(taken) < most and sum(taken) < ENOUGH_S):
            begin = time.perf_counter()
            bound.run()
            taken.append(time.perf_counter() - begin)
    return min(taken)
