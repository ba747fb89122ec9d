"""Thumbnails of the images whose answers differ most, drawn while the images are at hand.

No image is read twice, and sources without files (`.npz`, generators) have thumbnails too. They are drawn from the
input of the network, so they show the part of the image that it sees.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporter.artifact.sidecar import Preprocessing
from exporter.verify.checks import Rows

if TYPE_CHECKING:
    from PIL import Image

MOST = 12  # images of a report
SIDE = 96  # pixels of the longer side
MOST_BYTES = 3000
QUALITIES = (75, 60, 45, 30, 15)  # of a JPEG; the first one whose file is small enough
CHECK, RANKS, JPEG, SIZES = "differences", "ranks", "jpeg", "jpeg_sizes"


def leading(ranks: NDArray[np.float64]) -> NDArray[np.intp]:
    """The places of the largest ranks (N,) above 0, at most `MOST`, the largest first; of equal ones the first."""
    order = np.argsort(-ranks, kind="stable")[:MOST]
    return order[ranks[order] > 0]


class Thumbnails:
    """Draws the images that are among the `MOST` largest ranks when they are read."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing
        self.ranks: NDArray[np.float64] = np.zeros(0)

    def added(self, rows: Mapping[str, Rows], images: NDArray[Any]) -> dict[str, Rows]:
        """What the checks keep of a batch, with thumbnails where answers were compared.

        Args:
            rows: of all checks, by their names.
            images: of the batch, (N, C, H, W) float32 normalised, or a picture (1, H, W, C) uint8.
        """
        if CHECK not in rows:
            return dict(rows)
        ranks = np.concatenate([self.ranks, rows[CHECK][RANKS]])
        kept, before = leading(ranks), len(self.ranks)
        self.ranks = ranks[kept]
        files = [b""] * len(images)
        for place in kept[kept >= before] - before:
            files[place] = thumbnail(images[place], self.preprocessing)
        jpeg = {JPEG: np.frombuffer(b"".join(files), np.uint8), SIZES: np.array([len(file) for file in files])}
        return {**rows, CHECK: {**rows[CHECK], **jpeg}}


def pruned(batches: Sequence[Mapping[str, Rows]]) -> list[dict[str, Rows]]:
    """What the checks keep of several batches, without the thumbnails of images that are not among the `MOST` largest
    ranks of all of them."""
    ranks = np.concatenate([rows[CHECK][RANKS] for rows in batches if CHECK in rows] or [np.zeros(0)])
    kept, start, shorter = np.isin(np.arange(len(ranks)), leading(ranks)), 0, []
    for rows in batches:
        own, shorter_rows = rows.get(CHECK, {}), dict(rows)
        if SIZES in own:
            here = kept[start : start + len(own[SIZES])]
            start += len(here)
            jpeg = own[JPEG][np.repeat(here, own[SIZES])]
            shorter_rows[CHECK] = {**own, JPEG: jpeg, SIZES: own[SIZES] * here}
        shorter.append(shorter_rows)
    return shorter


def thumbnail(image: NDArray[Any], preprocessing: Preprocessing) -> bytes:
    """A JPEG of at most `MOST_BYTES` bytes, or of the lowest quality.

    Args:
        image: (C, H, W) float32 normalised, or (H, W, C) uint8 where the artifact takes pictures. Of two channels, or
            more than four, the first one is drawn.
        preprocessing: with mean and standard deviation.
    """
    small, content = _pixels(image, preprocessing), b""
    small.thumbnail((SIDE, SIDE))
    for quality in QUALITIES:
        file = io.BytesIO()
        small.save(file, "JPEG", quality=quality, optimize=True)
        content = file.getvalue()
        if len(content) <= MOST_BYTES:
            break
    return content


def _pixels(image: NDArray[Any], preprocessing: Preprocessing) -> Image.Image:
    from PIL import Image

    if preprocessing.input != "image":
        step = max(1, min(image.shape[1:]) // (2 * SIDE))  # a large input is thinned out first
        image = np.moveaxis(image[:, ::step, ::step], 0, -1)
        mean, std = (np.asarray(values, np.float32) for values in (preprocessing.mean, preprocessing.std))
        levels = 255 * (image * std + mean)
        image = np.rint(np.nan_to_num(levels)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(image[..., :3] if image.shape[-1] in (3, 4) else image[..., 0]))
