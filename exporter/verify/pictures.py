"""Pictures of masks for the page of a report: the images whose classes differ most."""

from __future__ import annotations

import base64
import heapq
import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from exporter.data.masks import colors
from exporter.report import Picture

MOST = 6
SIDE = 256  # pixels of the longer side; larger masks are thinned out
EQUAL_GREY, NO_CLASS_GREY = 38, 128  # levels: pixels without a difference, and without a class


class Worst:
    """The images whose classes differ most from their reference: masks, or without these eager PyTorch."""

    def __init__(self) -> None:
        self.reference = ""
        # By the negated agreement: the heap gives up the best first.
        self.heap: list[tuple[float, int, str, NDArray[np.int64], NDArray[np.int64]]] = []
        self.count = 0

    def see(self, names: Sequence[str], reference: NDArray[np.int64], got: NDArray[np.int64], source: str) -> None:
        """Look at one batch: classes (N, H, W) of the reference, −1 for none, and of the artifact; `source` says what
        the reference is."""
        self.reference = source
        for index, (expected, classes) in enumerate(zip(reference, got, strict=True)):
            known = expected >= 0
            share = float((expected == classes)[known].mean()) if known.any() else 1.0
            name = names[index] if index < len(names) else f"image {self.count}"
            self.count += 1
            heapq.heappush(self.heap, (-share, self.count, name, _thinned(expected), _thinned(classes)))
            if len(self.heap) > MOST:
                heapq.heappop(self.heap)

    def pictures(self) -> tuple[Picture, ...]:
        """The worst first."""
        return tuple(
            Picture(
                name=name,
                reference=self.reference,
                agreement=-100 * negated,
                images=(_png(_colored(expected)), _png(_colored(classes)), _png(_difference(expected, classes))),
            )
            for negated, _, name, expected, classes in sorted(self.heap, key=lambda one: (-one[0], one[1]))
        )


def _thinned(classes: NDArray[np.int64]) -> NDArray[np.int64]:
    step = -(-max(classes.shape) // SIDE)
    return classes[::step, ::step].copy()


def _colored(classes: NDArray[np.int64]) -> NDArray[np.uint8]:
    table = colors()
    return np.where((classes < 0)[..., None], np.uint8(NO_CLASS_GREY), table[classes % len(table)])


def _difference(expected: NDArray[np.int64], classes: NDArray[np.int64]) -> NDArray[np.uint8]:
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
