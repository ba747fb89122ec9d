"""Images from folders, manifests, arrays or generators, as preprocessed batches in constant memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Batch:
    """Preprocessed images (N, C, H, W) float32, or one picture (1, H, W, C) uint8; their names, and their classes (N,),
    −1 where unknown, for a multi-label head 0 or 1 for each label (N, L), or of masks the class of each pixel
    (N, H, W)."""

    images: NDArray[Any]
    labels: NDArray[np.int64]
    names: tuple[str, ...]
