"""Images with natural statistics from a seed, for when there is no data. Every report says when they were used."""

from __future__ import annotations

from functools import lru_cache
from threading import Lock
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from exporter.artifact.sidecar import Size, sides

NAME = "dead leaves 2"  # and a number that rises when any image changes
DRAWING = Lock()  # one thread at a time: two at once take twice as long, because they wait for the interpreter
KEPT = 320  # images: a calibration set is gone through up to three times, and drawing one takes 60 ms


PICTURES = ((240, 320), (375, 500), (333, 250), (97, 211), (480, 360))
"""Heights and widths of pictures for artifacts that resize them."""


def picture_size(number: int) -> tuple[int, int]:
    """Height and width of a picture by its number."""
    return PICTURES[number % len(PICTURES)]


def dead_leaves(size: Size, seed: int, channels: int = 3) -> NDArray[np.uint8]:
    """One image (H, W, C) of a seed, not to be written to.

    It is cut from the middle of a square. One channel is the grey of the colours (ITU-R 601-2 luma); more than three
    are those of images of further seeds.
    """
    height, width = sides(size)
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    with DRAWING:
        colors = [_square(side, seed + (turn << 32)) for turn in range(-(-channels // 3))]
    image = colors[0] if len(colors) == 1 else np.concatenate(colors, axis=-1)
    if channels == 1:
        image = _grey(image)
    return image[top : top + height, left : left + width, :channels]


def _grey(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(H, W, 3) to (H, W, 1)."""
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).convert("L"))[..., None]


@lru_cache(KEPT)
def _square(size: int, seed: int) -> NDArray[np.uint8]:
    """One image (size, size, 3) of opaque discs that cover each other, not to be written to.

    Radii follow r⁻³, which gives the scale invariance and the 1/f² power spectrum of photographs (Lee, Mumford
    and Huang, "Occlusion models for natural images", IJCV 2001); each disc is shaded by a linear gradient. Colours are
    those of the image's palette.
    """
    rng = np.random.default_rng(seed)
    smallest, largest = max(1.5, size / 100), size / 3
    palette = _palette(rng)
    background = palette.colors(rng.standard_normal((1, 4)))
    discs = _discs(rng, int(1200 * (size / 224) ** 0.5), size, (smallest, largest), palette)
    image = np.broadcast_to(background, (size, size, 3)).astype(np.float32)
    free = np.ones((size, size), bool)  # not covered by a disc that is further in front
    for disc in reversed(discs):  # most of them are covered entirely
        _paint(image, free, disc)
    pixels = image.clip(0, 255).astype(np.uint8)
    pixels.flags.writeable = False
    return pixels


class _Palette(NamedTuple):
    """The colours of one image: their mean, the standard deviation of the brightness, which all channels share, and
    that of each channel on its own."""

    mean: NDArray[np.float64]
    luma: float
    chroma: float

    def colors(self, normal: NDArray[np.float64]) -> NDArray[np.float64]:
        """Colours (N, 3), each from four standard normal values (N, 4)."""
        return self.mean + self.luma * normal[:, :1] + self.chroma * normal[:, 1:]


def _palette(rng: np.random.Generator) -> _Palette:
    """The palette of an image, with a brightness, tint, contrast and saturation of its own.

    Photographs differ in all four, and the channels of one vary together (Ruderman, Cronin and Chiao, "Statistics of
    cone responses to natural images", JOSA A 1998). Without tints the ranges of a network with Global Response
    Normalization come out too small. Of 520 photographs of Imagenette the 5th and the 95th percentile are 66 and 179
    for the mean, 30 and 82 for the deviation of the grey image, and 3 and 29 for that of the channels around it; the
    mean of a channel deviates by 8 to 17 from the grey one.
    """
    mean = rng.uniform(60, 190) + rng.normal(0, 20, 3)
    return _Palette(mean, rng.uniform(15, 70), rng.uniform(3, 30))


class _Disc(NamedTuple):
    """A disc of the image: middle and radius in pixels, colour in its middle, and its slope along x and y."""

    x: float
    y: float
    radius: float
    color: NDArray[np.float64]
    slope: NDArray[np.float64]


def _discs(
    rng: np.random.Generator, count: int, size: int, radii: tuple[float, float], palette: _Palette
) -> list[_Disc]:
    """Random discs on a square image of `size` pixels; `radii` are the smallest and the largest."""
    uniform, normal = np.empty((count, 3)), np.empty((count, 6))
    for disc in range(count):  # disc by disc, so that a seed always gives the same image
        rng.random(out=uniform[disc])
        rng.standard_normal(out=normal[disc])
    smallest, largest = radii
    colors, slopes = palette.colors(normal[:, :4]), 20 * normal[:, 4:]
    discs = []
    for (u, *shares), color, slope in zip(uniform.tolist(), colors, slopes, strict=True):
        radius = (u * largest**-2 + (1 - u) * smallest**-2) ** -0.5  # the inverse of the cumulated r⁻³ between the two
        x, y = (-radius + (size + 2 * radius) * share for share in shares)
        discs.append(_Disc(x, y, radius, color, slope))
    return discs


def _paint(image: NDArray[np.float32], free: NDArray[np.bool_], disc: _Disc) -> None:
    """Paint what is free of a disc's pixels, and mark them."""
    size, (x, y, radius, color, slope) = len(image), disc
    left, right = max(0, int(x - radius)), min(size, int(x + radius) + 1)
    top, bottom = max(0, int(y - radius)), min(size, int(y + radius) + 1)
    left_free = free[top:bottom, left:right]
    if not left_free.any():
        return
    rows, columns = np.arange(top, bottom)[:, None] - y, np.arange(left, right) - x
    painted = (columns**2 + rows**2 <= radius**2) & left_free
    shade = slope[0] * columns / radius + slope[1] * rows / radius
    np.copyto(image[top:bottom, left:right], color + shade[..., None], where=painted[..., None], casting="same_kind")
    left_free &= ~painted
