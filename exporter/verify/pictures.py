"""Pictures of masks for the page of a report: the images whose classes differ most."""

from __future__ import annotations

import base64
import heapq
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.data.masks import colors
from exporter.errors import as_utf8
from exporter.report import Picture

MOST = 6
SIDE = 256  # pixels of the longer side; larger masks are thinned out
EQUAL_GREY, NO_CLASS_GREY = 38, 128  # levels: pixels without a difference, and without a class


class Worst:
    """The images whose classes differ most from their reference: masks, or without these eager PyTorch."""

    def __init__(self) -> None:
        self.reference = ""
        # By the negated agreement: the heap gives up the best first.
        self.heap: list[tuple[float, int, str, NDArray[np.int32], NDArray[np.int32]]] = []
        self.count = 0

    def add(self, names: Sequence[str], rows: Mapping[str, NDArray[Any]], source: str) -> None:
        """Look at one batch: what `compared` returned for it; `source` says what the reference is."""
        self.reference = source
        for index, (share, expected, classes) in enumerate(zip(*(rows[name] for name in COMPARED), strict=True)):
            name = names[index] if index < len(names) else f"image {self.count}"
            self.count += 1
            heapq.heappush(self.heap, (-float(share), self.count, name, expected, classes))
            if len(self.heap) > MOST:
                heapq.heappop(self.heap)

    def pictures(self) -> tuple[Picture, ...]:
        """The worst first."""
        return tuple(
            Picture(
                name=as_utf8(name),
                reference=self.reference,
                agreement=-100 * negated,
                images=(_png(_colored(expected)), _png(_colored(classes)), _png(_difference(expected, classes))),
            )
            for negated, _, name, expected, classes in sorted(self.heap, key=lambda one: (-one[0], one[1]))
        )


COMPARED = ("equal", "reference", "classes")


def compared(reference: NDArray[np.int64], got: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """For classes (N, H, W) of the reference, −1 for none, and of the artifact: the share of equal pixels (N,) of
    those with a class, and both thinned out, in the order of `COMPARED`."""
    known = reference >= 0
    count, equal = known.sum((1, 2)), ((reference == got) & known).sum((1, 2))
    shares = np.where(count > 0, equal / np.maximum(count, 1), 1.0)
    return dict(zip(COMPARED, (shares, _thinned(reference), _thinned(got)), strict=True))


def _thinned(classes: NDArray[np.int64]) -> NDArray[np.int32]:
    step = -(-max(classes.shape[1:]) // SIDE)
    return classes[:, ::step, ::step].astype(np.int32)


def _colored(classes: NDArray[np.int32]) -> NDArray[np.uint8]:
    table = colors()
    return np.where((classes < 0)[..., None], np.uint8(NO_CLASS_GREY), table[classes % len(table)])


def _difference(expected: NDArray[np.int32], classes: NDArray[np.int32]) -> NDArray[np.uint8]:
    """The colour of the artifact's class where it is another one than that of the reference."""
    differs = (expected >= 0) & (expected != classes)
    plain = np.where((expected < 0)[..., None], NO_CLASS_GREY, EQUAL_GREY)
    shown = np.maximum(_colored(classes), 90)  # class 0 is black
    return np.where(differs[..., None], shown, plain).astype(np.uint8)


def _png(pixels: NDArray[np.uint8]) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).quantize(256).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()
