"""Images with natural statistics from a seed, for when there is no data. Every report says when they were used."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from exporter.artifact.sidecar import Size, sides

NAME = "dead leaves 1"  # and a number that rises when any image changes
KEPT = 320  # images: a calibration set of 256 is gone through three times, and drawing one takes 40 ms


def dead_leaves(size: Size, seed: int, channels: int = 3) -> NDArray[np.uint8]:
    """One image (H, W, C) of a seed, not to be written to.

    It is cut from the middle of a square. One channel is the grey of the colours (ITU-R 601-2 luma); more than three
    are those of images of further seeds.
    """
    height, width = sides(size)
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
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
    and Huang, "Occlusion models for natural images", IJCV 2001); each disc is shaded by a linear gradient.
    """
    rng = np.random.default_rng(seed)
    smallest, largest = max(1.5, size / 100), size / 3
    image = np.broadcast_to(rng.uniform(0, 255, 3), (size, size, 3)).astype(np.float32)
    for _ in range(int(1200 * (size / 224) ** 0.5)):
        # The inverse of the cumulated r⁻³ between the two radii.
        u = rng.uniform()
        radius = (u * largest**-2 + (1 - u) * smallest**-2) ** -0.5
        x, y = rng.uniform(-radius, size + radius, 2)
        _paint(image, x, y, radius, rng)
    pixels = image.clip(0, 255).astype(np.uint8)
    pixels.flags.writeable = False
    return pixels


def _paint(image: NDArray[np.float32], x: float, y: float, radius: float, rng: np.random.Generator) -> None:
    size = image.shape[0]
    left, right = max(0, int(x - radius)), min(size, int(x + radius) + 1)
    top, bottom = max(0, int(y - radius)), min(size, int(y + radius) + 1)
    color, slope = rng.uniform(0, 255, 3), rng.normal(0, 20, 2)
    if left >= right or top >= bottom:
        return
    rows, columns = np.ogrid[top:bottom, left:right]
    inside = (columns - x) ** 2 + (rows - y) ** 2 <= radius**2
    shade = slope[0] * (columns - x) / radius + slope[1] * (rows - y) / radius
    patch = image[top:bottom, left:right]
    patch[inside] = (color + shade[..., None])[inside]
