"""Images as artifacts and networks take them, and outputs as sessions return them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.artifact.sidecar import Preprocessing
from exporter.data.images import preprocess_pictures

Array = NDArray[np.float32]
Outputs = tuple[Array, ...]


def as_taken(images: Array, preprocessing: Preprocessing) -> NDArray[Any]:
    """Images as an artifact takes them, from those that a session gets: normalised images (N, C, H, W), or the pixels
    that they were made from, with its order of channels, axes and type; or a picture (1, H, W, C) without its first
    axis."""
    taken: NDArray[Any] = images
    if preprocessing.input == "image":
        return np.ascontiguousarray(taken[0, ..., ::-1] if preprocessing.color == "BGR" else taken[0])
    if preprocessing.input != "normalized":
        mean, std = (
            np.asarray(values, np.float32)[:, None, None] for values in (preprocessing.mean, preprocessing.std)
        )
        pixels = images * std + mean
        taken = np.rint(pixels * 255).clip(0, 255).astype(np.uint8) if preprocessing.input == "uint8" else pixels
    if preprocessing.color == "BGR":
        taken = taken[:, ::-1]
    if preprocessing.dtype == "float16" and preprocessing.input != "uint8":
        taken = taken.astype(np.float16)
    return np.ascontiguousarray(np.moveaxis(taken, 1, -1) if preprocessing.layout == "NHWC" else taken)


def rounded(images: Array, preprocessing: Preprocessing) -> Array:
    """Normalised images (N, C, H, W), or the pixels that they were made from, rounded to fp16 and back where an
    artifact takes fp16: what its network gets."""
    if preprocessing.dtype != "float16" or preprocessing.input in ("uint8", "image"):
        return images
    if preprocessing.input == "normalized":
        return images.astype(np.float16).astype(np.float32)
    mean, std = (np.asarray(values, np.float32)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    halves: Array = (images * std + mean).astype(np.float16).astype(np.float32)
    return (halves - mean) / std


def as_fp32(outputs: Iterable[NDArray[Any]]) -> Outputs:
    """Outputs in fp32; those that are already so are not copied."""
    return tuple(np.asarray(output, np.float32) for output in outputs)


def as_network_takes(images: Array, preprocessing: Preprocessing) -> Array:
    """Images as the network takes them, from those that a session gets: normalised images, or pictures."""
    return preprocess_pictures(images, preprocessing) if preprocessing.input == "image" else images
