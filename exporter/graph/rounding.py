"""How the layers of a ConvNeXt are rounded to eight bits: which there are, and the numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Grid = Literal["int8", "fp8"]
"""What eight bits stand for: whole numbers, or E4M3 (Micikevicius et al., "FP8 formats for deep learning", 2022)."""
LARGEST: dict[Grid, int] = {"int8": 127, "fp8": 448}
LEAST_HALF: dict[Grid, float] = {"int8": 2.0**-24, "fp8": 2.0**-14}
"""The smallest scale in fp16: above zero; where steps have an exponent of their own, one without lost digits too."""
KINDS = {
    "stem": r"downsample_layers\.0\.0",
    "depthwise": r"stages\.\d+\.\d+\.dwconv",
    "pwconv1": r"stages\.\d+\.\d+\.pwconv1",
    "pwconv2": r"stages\.\d+\.\d+\.pwconv2",
    "downsampling": r"downsample_layers\.[1-9]\d*\.\d+",
    "head": r"head",
}


@dataclass(frozen=True)
class Rounding:
    """How one layer is rounded.

    scale, zero_point: of its input: x ≈ scale · (q − zero_point), with q from 0 to 255, or −127 to 127 where
    `symmetric`, or ±448 in fp8.
    shift: what is added to its bias (out,).
    inputs: whether its input is rounded at all, or its weights alone.
    half: whether scales are held in fp16.
    """

    scale: float
    zero_point: int
    symmetric: bool
    shift: Floats
    grid: Grid = "int8"
    inputs: bool = True
    half: bool = False


Plan = dict[str, Rounding]
"""By the name of the layer's module."""


def kind(module: str) -> str | None:
    """Which of `KINDS` the layer with a module's name is of, or None for none of these."""
    return next((name for name, pattern in KINDS.items() if re.fullmatch(pattern, module)), None)


def part(module: str) -> str:
    """The part of the network that a layer is kept back with: its block (`stages.2.0`), downsampling layer or head."""
    return module.rpartition(".")[0] or module


def element(grid: Grid, symmetric: bool = True) -> np.dtype[Any]:
    """The element type of a grid."""
    if grid == "int8":
        return np.dtype(np.int8 if symmetric else np.uint8)
    import ml_dtypes

    fp8: np.dtype[Any] = np.dtype(ml_dtypes.float8_e4m3fn)
    return fp8


def round_weights(weight: Floats, axis: int, grid: Grid = "int8", half: bool = False) -> tuple[NDArray[Any], Floats]:
    """Weights in eight bits, symmetric with a scale for each output channel: w ≈ scale · q.

    Args:
        weight: float32.
        axis: of the output channels.
        grid: what the bits stand for.
        half: whether the scales have to be numbers of fp16: of small weights they would become others, or nothing.

    Returns: (q of the same shape, scales (out,)).
    """
    others = tuple(a for a in range(weight.ndim) if a != axis)
    scale = np.maximum(np.abs(weight).max(axis=others) / LARGEST[grid], np.float32(1e-12)).astype(np.float32)
    if half:
        near = np.maximum(scale, LEAST_HALF[grid]).astype(np.float16)
        up = np.nextafter(near, np.float16(np.inf))  # a smaller scale would clip the largest weights
        scale = np.where(near >= scale, near, up).astype(np.float32)
    shape = [-1 if a == axis else 1 for a in range(weight.ndim)]
    steps = weight / scale.reshape(shape)
    return (np.rint(steps) if grid == "int8" else steps).astype(element(grid)), scale
