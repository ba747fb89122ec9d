"""Quantization of one layer: scales, rounding of weights, and the bound on sums of adjacent products."""

from __future__ import annotations

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
MAX_PAIR = 128
"""Limit for |q₀ + q₁| of two adjacent int8 weights: 255 · 128 = 32,640 fits a signed integer of 16 bits."""
MAX_SUM = 2**15 - 1
"""The largest signed integer of 16 bits."""


@dataclass(frozen=True)
class Rounding:
    """The quantization of one layer.

    scale, zero_point: of its input: x ≈ scale · (q − zero_point), with q from 0 to 255, or −127 to 127 where
    `symmetric`, or ±448 in fp8.
    shift: added to its bias (out,).
    inputs: whether its input is quantized, or its weights alone.
    half: whether scales are held in fp16.
    exact_pairs: whether |sum| ≤ `MAX_PAIR` holds for adjacent weights.
    """

    scale: float
    zero_point: int
    symmetric: bool
    shift: Floats
    grid: Grid = "int8"
    inputs: bool = True
    half: bool = False
    exact_pairs: bool = False


Plan = dict[str, Rounding]
"""By the name of the layer's module."""


def element(grid: Grid, symmetric: bool = True) -> np.dtype[Any]:
    """The element type of a grid."""
    if grid == "int8":
        return np.dtype(np.int8 if symmetric else np.uint8)
    import ml_dtypes

    fp8: np.dtype[Any] = np.dtype(ml_dtypes.float8_e4m3fn)
    return fp8


def round_weights(
    weight: Floats, axis: int, grid: Grid = "int8", half: bool = False, exact_pairs: bool = False
) -> tuple[NDArray[Any], Floats]:
    """Quantize weights symmetrically with one scale per output channel: w ≈ scale · q.

    x86 CPUs without VNNI multiply uint8 inputs by int8 weights with VPMADDUBSW, which adds the products of input
    channels 2k and 2k + 1 in 16 bits and saturates (Intel SDM, volume 2). With `exact_pairs` the scale of an output
    channel is widened, to twice as much at most, until no such sum can exceed 16 bits for any inputs.

    Args:
        weight: float32 (out, in, …) for `axis` 0, (in, out) for `axis` 1.
        axis: the axis of the output channels, 0 or 1.
        grid: the quantized type.
        half: whether the scales have to be representable in fp16.
        exact_pairs: whether |sum| ≤ `MAX_PAIR` has to hold for the weights of adjacent input channels; for int8.

    Returns: q of the same shape, and the scales (out,).
    """
    others = tuple(a for a in range(weight.ndim) if a != axis)
    scale = np.maximum(np.abs(weight).max(axis=others) / LARGEST[grid], np.float32(1e-12)).astype(np.float32)
    if exact_pairs:
        # Halved, so that the sum of two large floats does not overflow. A sum of 127.999 steps before rounding gains at
        # most 0.5 for each weight, so it is 128 at most.
        half_sums = np.abs(_adjacent_sums(weight / 2, axis)).max(axis=others)
        scale = np.maximum(scale, half_sums / np.float32(MAX_PAIR / 2 - 5e-4))
    if half:
        near = np.maximum(scale, LEAST_HALF[grid]).astype(np.float16)
        up = np.nextafter(near, np.float16(np.inf))  # a smaller scale would clip the largest weights
        scale = np.where(near >= scale, near, up).astype(np.float32)
    shape = [-1 if a == axis else 1 for a in range(weight.ndim)]
    steps = weight / scale.reshape(shape)
    return (np.rint(steps) if grid == "int8" else steps).astype(element(grid)), scale


def largest_pair(weight: NDArray[np.int8], axis: int) -> int:
    """The largest |x₀·q₀ + x₁·q₁| over adjacent int8 weights q and any uint8 inputs x.

    It also holds for int8 inputs: kernels add 128 and treat them as uint8.

    Args:
        weight: int8 (out, in, …) for `axis` 0, (in, out) for `axis` 1.
        axis: the axis of the output channels, 0 or 1.

    Returns: a number from 0 to 65,280; beyond `MAX_SUM` VPMADDUBSW saturates.
    """
    wide = weight.astype(np.int32)
    sums = (_adjacent_sums(sign * np.maximum(sign * wide, 0), axis) for sign in (1, -1))
    return 255 * max(int(np.abs(one).max(initial=0)) for one in sums)


def _adjacent_sums(weight: NDArray[Any], axis: int) -> NDArray[Any]:
    """Sums of the weights of adjacent input channels, at each kernel position: 2k and 2k + 1.

    oneDNN may split the input channels of a matrix product (385 = 193 + 192), so that the second part starts at an odd
    channel. Where their number is not a multiple of four, all neighbours k and k + 1 are therefore summed.
    """
    channels = np.moveaxis(weight, 1 - axis, 0)
    count = len(channels)
    step = 1 if count % 4 else 2
    # A single channel has no partner.
    sums = channels if count == 1 else channels[0 : count - 1 : step] + channels[1:count:step]
    return np.moveaxis(sums, 0, 1 - axis)
