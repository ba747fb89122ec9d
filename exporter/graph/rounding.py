"""How the layers of a ConvNeXt are rounded to int8: which there are, and the numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
KINDS = {
    "pwconv1": r"stages\.\d+\.\d+\.pwconv1",
    "pwconv2": r"stages\.\d+\.\d+\.pwconv2",
    "downsampling": r"downsample_layers\.[1-9]\d*\.\d+",
}


@dataclass(frozen=True)
class Rounding:
    """How one layer is rounded.

    scale, zero_point: of its input: x ≈ scale · (q − zero_point), with q from 0 to 255, or −127 to 127 where
    `symmetric`.
    shift: what is added to its bias (out,).
    """

    scale: float
    zero_point: int
    symmetric: bool
    shift: Floats


Plan = dict[str, Rounding]
"""By the name of the layer's module."""


def kind(module: str) -> str | None:
    """Which kind of layer a module's name is of: `pwconv1`, `pwconv2`, `downsampling`, or None for none of these."""
    return next((name for name, pattern in KINDS.items() if re.fullmatch(pattern, module)), None)


def part(module: str) -> str:
    """The part of the network that a layer is kept back with: its block (`stages.2.0`) or downsampling layer."""
    return module.rpartition(".")[0]


def round_weights(weight: Floats, axis: int) -> tuple[NDArray[np.int8], Floats]:
    """Weights as int8, symmetric with a scale for each output channel: w ≈ scale · q.

    Args:
        weight: float32.
        axis: of the output channels.

    Returns: (q of the same shape, scales (out,)).
    """
    others = tuple(a for a in range(weight.ndim) if a != axis)
    scale = np.maximum(np.abs(weight).max(axis=others) / 127, np.float32(1e-12)).astype(np.float32)
    shape = [-1 if a == axis else 1 for a in range(weight.ndim)]
    return np.rint(weight / scale.reshape(shape)).astype(np.int8), scale
