"""Thumbnails of the images whose answers differ most, drawn when a batch is measured.

So no image is read twice, and sources without files (`.npz`, generators) have thumbnails too. A thumbnail is drawn from
the input of the network: it shows the part of the image that the network gets.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporter.artifact.sidecar import Preprocessing
from exporter.data.inputs import as_network_takes
from exporter.report import MOST_DIFFERENCES
from exporter.verify.checks import Rows

if TYPE_CHECKING:
    from PIL import Image

SIDE = 96  # pixels of the longer side
MOST_BYTES = 3000
QUALITIES = (75, 60, 45, 30, 15)  # of a JPEG; the first one whose file is small enough
DIFFERENCES, RANKS, JPEG_KEY, SIZES_KEY = "differences", "ranks", "jpeg", "jpeg_sizes"


def leading(ranks: NDArray[np.float64]) -> NDArray[np.intp]:
    """The places of the largest ranks (N,) above 0, at most `MOST_DIFFERENCES`, the largest first; of equal ones the
    first."""
    order = np.argsort(-ranks, kind="stable")[:MOST_DIFFERENCES]
    return order[ranks[order] > 0]


class Thumbnails:
    """Draws the images that are among the `MOST_DIFFERENCES` largest ranks when they are read."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing
        self.ranks: NDArray[np.float64] = np.zeros(0)

    def with_thumbnails(self, rows: Mapping[str, Rows], images: NDArray[Any]) -> dict[str, Rows]:
        """What the checks keep of a batch, with thumbnails where answers were compared.

        Args:
            rows: of all checks, by their names.
            images: of the batch, (N, C, H, W) float32 normalised, or a picture (1, H, W, C) uint8.
        """
        if DIFFERENCES not in rows:
            return dict(rows)
        ranks = np.concatenate([self.ranks, rows[DIFFERENCES][RANKS]])
        kept, before = leading(ranks), len(self.ranks)
        self.ranks = ranks[kept]
        files = [b""] * len(images)
        for place in kept[kept >= before] - before:
            files[place] = thumbnail(images[place], self.preprocessing)
        jpeg = {JPEG_KEY: np.frombuffer(b"".join(files), np.uint8), SIZES_KEY: np.array([len(file) for file in files])}
        return {**rows, DIFFERENCES: {**rows[DIFFERENCES], **jpeg}}


def drop_unused_thumbnails(batches: Sequence[Mapping[str, Rows]]) -> list[dict[str, Rows]]:
    """What the checks keep of several batches, without the thumbnails of images that are not among the
    `MOST_DIFFERENCES` largest ranks of all of them."""
    ranks = np.concatenate([rows[DIFFERENCES][RANKS] for rows in batches if DIFFERENCES in rows] or [np.zeros(0)])
    is_kept = np.isin(np.arange(len(ranks)), leading(ranks))
    start = 0  # of the batch, among the images of all batches
    pruned = []
    for rows in batches:
        stored, pruned_rows = rows.get(DIFFERENCES, {}), dict(rows)
        if SIZES_KEY in stored:
            kept_in_batch = is_kept[start : start + len(stored[SIZES_KEY])]
            start += len(kept_in_batch)
            jpeg = stored[JPEG_KEY][np.repeat(kept_in_batch, stored[SIZES_KEY])]
            pruned_rows[DIFFERENCES] = {**stored, JPEG_KEY: jpeg, SIZES_KEY: stored[SIZES_KEY] * kept_in_batch}
        pruned.append(pruned_rows)
    return pruned


def thumbnail(image: NDArray[Any], preprocessing: Preprocessing) -> bytes:
    """A JPEG of the network's input of at most `MOST_BYTES` bytes, or of the lowest quality.

    Args:
        image: (C, H, W) float32 normalised, or (H, W, C) uint8 where the artifact takes pictures, which is resized and
            cropped first. Of two channels, or more than four, the first one is drawn.
        preprocessing: with mean and standard deviation.
    """
    small, content = _pixels(as_network_takes(image[None], preprocessing)[0], preprocessing), b""
    small.thumbnail((SIDE, SIDE))
    for quality in QUALITIES:
        file = io.BytesIO()
        small.save(file, "JPEG", quality=quality, optimize=True)
        content = file.getvalue()
        if len(content) <= MOST_BYTES:
            break
    return content


def _pixels(image: NDArray[Any], preprocessing: Preprocessing) -> Image.Image:
    """The input of the network (C, H, W) as an image, before normalisation."""
    from PIL import Image

    step = max(1, min(image.shape[1:]) // (2 * SIDE))  # a large input is thinned out first
    image = np.moveaxis(image[:, ::step, ::step], 0, -1)
    mean, std = (np.asarray(values, np.float32) for values in (preprocessing.mean, preprocessing.std))
    levels = 255 * (image * std + mean)
    image = np.rint(np.nan_to_num(levels)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(image[..., :3] if image.shape[-1] in (3, 4) else image[..., 0]))
