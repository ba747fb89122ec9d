"""Images with natural statistics from a seed, for when there is no data. Every report says when they were used."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

NAME = "dead leaves 1"  # and a number that rises when any image changes
KEPT = 320  # images: a calibration set of 256 is gone through three times, and drawing one takes 40 ms


@lru_cache(KEPT)
def dead_leaves(size: int, seed: int) -> NDArray[np.uint8]:
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
