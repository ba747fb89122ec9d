"""Generators of images. A manifest names the generator; each row has the number of an image and its digest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.artifact.sidecar import Preprocessing, Size
from exporter.data import images, synthetic
from exporter.errors import BadRequest, Unavailable, nearest

MAX_PIXELS = 1024  # of a side; a manifest may be a stranger's
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Generator:
    """`image` returns the pixels (H, W, C) of an image, by its number, size and channels.

    Images of a generator that is not `sized` have a fixed size and three channels. `synthetic` images show no real
    scene.
    """

    image: Callable[[int, Size, int], Pixels]
    sized: bool
    synthetic: bool

    def input(self, number: int, recipe: Preprocessing) -> NDArray[Any]:
        """An image as sessions get it: an input (C, H, W) float32, or a picture (H, W, C) uint8."""
        from PIL import Image

        if self.sized and recipe.input == "image":
            return self.image(number, synthetic.picture_size(number), recipe.channels)
        pixels = self.image(number, recipe.size, recipe.channels)
        if self.sized:
            return images.normalise(pixels, recipe)
        return images.prepared(images.in_color(Image.fromarray(pixels), recipe), recipe)

    def digest(self, number: int, size: int) -> str:
        """The sha256 of the pixels of an image, row by row, three bytes for each pixel."""
        return hashlib.sha256(self.image(number, size, 3).tobytes()).hexdigest()


@lru_cache(1)
def digits() -> tuple[Pixels, NDArray[np.int64]]:
    """scikit-learn's 1,797 handwritten digits (N, 8, 8) of 0…255, and their classes.

    Raises: Unavailable without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise Unavailable("these images are part of scikit-learn, which is missing; pip install scikit-learn") from None
    scans, labels = load_digits(return_X_y=True)
    return np.rint(scans.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8), labels.astype(np.int64)


def _digit(number: int, size: Size, channels: int) -> Pixels:
    del size, channels
    scans = digits()[0]
    if number >= len(scans):
        raise BadRequest(f"digit {number}: there are {len(scans)}, counted from 0")
    return np.repeat(scans[number][..., None], 3, axis=2)


def _dead_leaves(number: int, size: Size, channels: int) -> Pixels:
    return synthetic.dead_leaves(size, number, channels)


GENERATORS = {
    "sklearn.datasets.load_digits": Generator(_digit, sized=False, synthetic=False),
    synthetic.NAME: Generator(_dead_leaves, sized=True, synthetic=True),
}


def find(name: str, where: object) -> Generator:
    """The generator with the name in a manifest.

    Raises: BadRequest for an unknown name.
    """
    if name not in GENERATORS:
        raise BadRequest(f"{where}: no generator {name[:80]!r}; {nearest(name, GENERATORS)}")
    return GENERATORS[name]


def number(path: str, where: object) -> int:
    """The number of an image, from its row.

    Raises: BadRequest when it is not a number.
    """
    if not path.isdecimal() or not path.isascii() or len(path) > 9:
        raise BadRequest(f"{where}: {path[:40]!r} is no number of an image")
    return int(path)
