"""The resize and crop of a picture of any size as part of the network: the pixels that Pillow gives.

Pillow resizes rows, rounds them to bytes, and then resizes columns, or columns first. Both passes are matrix products
here, with weights that are computed from the size of the picture. So the graph has all of Pillow's continuous filters,
and needs only elementary operators. Source of the formulas: Pillow, `src/libImaging/Resample.c`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from exporter.artifact.sidecar import Preprocessing, sides
from exporter.machine import may_begin_with_columns

Number = TypeVar("Number", int, float)
UPPER_BITS, LOWER_BITS = 12, 10


def _sinc(x: Tensor) -> Tensor:
    angle = math.pi * torch.where(x == 0, 1.0, x)
    return torch.where(x == 0, 1.0, torch.sin(angle) / angle)


def _hamming(x: Tensor) -> Tensor:
    return torch.where(x < 1, _sinc(x) * (0.54 + 0.46 * torch.cos(math.pi * x)), 0.0)


def _bicubic(x: Tensor) -> Tensor:
    """Keys' cubic with a = −0.5."""
    return torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, torch.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0.0))


def _lanczos(x: Tensor) -> Tensor:
    return torch.where(x < 3, _sinc(x) * _sinc(x / 3), 0.0)


FILTERS: dict[str, Callable[[Tensor], Tensor]] = {
    "hamming": _hamming,
    "bicubic": _bicubic,
    "lanczos": _lanczos,
}
"""Filters by name, but `bilinear` (`_bilinear_bits`): the weight of a pixel at a distance of 0 and above, in pixels of
the smaller of both sizes."""


class Picture(nn.Module):
    """Resizes and crops a picture as `exporter.data.images` does, to whole numbers from 0 to 255."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.preprocessing, self.may_begin_with_columns = preprocessing, may_begin_with_columns()
        fill = torch.tensor([float(round(255 * mean)) for mean in preprocessing.mean])[:, None, None]
        self.register_buffer("fill", fill.flip(0) if preprocessing.color == "BGR" else fill)
        self.fill: Tensor

    @property
    def pads(self) -> bool:
        """Whether a resized picture may be smaller than the input, and is filled up with the mean colour."""
        sizes = zip(sides(self.preprocessing.resize), sides(self.preprocessing.size), strict=True)
        return self.preprocessing.crop == "border" or any(resized < wanted for resized, wanted in sizes)

    def forward(self, picture: Tensor) -> Tensor:
        """(H, W, C) uint8 to (1, C, height, width) float32."""
        height, width, _ = picture.shape
        rows, columns = resized(height, width, self.preprocessing)
        at_rows, at_columns = (
            self._cropped(rows, self.preprocessing.height),
            self._cropped(columns, self.preprocessing.width),
        )
        x = torch.ops.aten._to_copy.default(picture.permute(2, 0, 1), dtype=torch.float32)
        x = self._resize(
            _smaller(height - rows, height - rows - 2 * (width - columns)) > 0,
            (x, self._weights(at_rows, height, rows), self._weights(at_columns, width, columns).mT),
        )
        if self.pads:
            in_rows, in_columns = (at_rows >= 0) & (at_rows < rows), (at_columns >= 0) & (at_columns < columns)
            x = torch.where(in_rows[:, None] & in_columns, x, self.fill)
        return x[None]

    def _resize(self, tall: bool, parts: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """The resized picture, in Pillow's order; a branch of the graph where the size of the picture is dynamic."""
        if not self.may_begin_with_columns or tall is False:
            return _rows_first(*parts)
        if tall is True:
            return _columns_first(*parts)
        x: Tensor = torch.cond(tall, _columns_first, _rows_first, parts)
        return x

    def _cropped(self, side: int, wanted: int) -> Tensor:
        """The places of the input's pixels in the resized picture, on one axis; those to be filled up are outside."""
        spare, missing = _larger(side - wanted, 0), _larger(wanted - side, 0)
        odd = 0 if self.preprocessing.offset == "floor" else spare % 4 // 3  # 1.5 pixels are rounded to 2
        half = spare // 2 + odd
        return torch.arange(wanted, dtype=torch.float32) + (half - missing // 2)

    def _weights(self, at: Tensor, side: int, side_resized: int) -> Tensor:
        """The weight of each pixel of the picture (columns) for each place in the resized one (rows), on one axis:
        (1, 1, rows, columns).

        Of `bilinear`, whose sums are often exactly half a level, they are Pillow's own: whole numbers of 22 bits, whose
        upper 12 and lower 10 bits are two matrices, (2, 1, rows, columns).
        """
        at = at.clamp(0, side_resized - 1) if self.pads else at
        if self.preprocessing.interpolation == "bilinear":
            return _bilinear_bits(at, side, side_resized)[:, None]
        scale = side / side_resized
        distance = torch.arange(side, dtype=torch.float32) + 0.5 - (at[:, None] + 0.5) * scale
        weights = FILTERS[self.preprocessing.interpolation](distance.abs() / _larger(scale, 1.0))
        return (weights / weights.sum(1, keepdim=True))[None, None]


def _bilinear_bits(at: Tensor, side: int, side_resized: int) -> Tensor:
    """The weights of `bilinear` as their upper and their lower bits (2, rows, columns), exact in fp32.

    In units of half a pixel over the size, weights are whole numbers; each is divided by their sum bit by bit. A number
    minus a tensor has no ONNX function: PyTorch's exporter would decompose the whole network.
    """
    ends = 2 * _larger(side, side_resized)
    distance = (2 * torch.arange(side, dtype=torch.float32) + 1) * side_resized - (2 * at[:, None] + 1) * side
    rest = (-distance.abs() + ends).clamp(min=0)
    total, weights = rest.sum(1, keepdim=True), torch.zeros_like(rest)
    for bits in (8, 7, 7):
        rest = rest * 2**bits
        quotient = torch.floor(rest / total)
        quotient = torch.where(quotient * total > rest, quotient - 1, quotient)
        rest, weights = rest - quotient * total, weights * 2**bits + quotient
    weights = torch.where(2 * rest >= total, weights + 1, weights)
    upper = torch.floor(weights / 2**LOWER_BITS)
    return torch.stack([upper, weights - upper * 2**LOWER_BITS])


def resized(height: int, width: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """Height and width after resizing, in whole numbers: those of `exporter.data.images`, which divides floats.

    The two may differ by one where a quotient ends in exactly .5, for about one of 40,000 sizes.
    """
    rows, columns = sides(preprocessing.resize)
    if preprocessing.crop == "squash":
        return rows, columns
    if preprocessing.crop == "center" and isinstance(preprocessing.resize, int):
        short = _smaller(height, width)
        return preprocessing.resize * height // short, preprocessing.resize * width // short
    choose = _smaller if preprocessing.crop == "border" else _larger
    rows, columns = choose(rows, _divided(height * columns, width)), choose(columns, _divided(width * rows, height))
    return _larger(rows, 1), _larger(columns, 1)


def _smaller(a: int, b: int) -> int:
    """The smaller number; unlike `min` it is computed in the graph where the size of a picture is dynamic."""
    smaller: int = torch.sym_min(a, b)  # type: ignore[no-untyped-call]
    return smaller


def _larger(a: Number, b: Number) -> Number:
    """The larger number, as `_smaller`."""
    larger: Number = torch.sym_max(a, b)  # type: ignore[no-untyped-call]
    return larger


def _divided(number: int, by: int) -> int:
    """The quotient of whole numbers, rounded; halves to even."""
    return (2 * number + by - 1 + number // by % 2) // (2 * by)


def _rows_first(x: Tensor, of_rows: Tensor, of_columns: Tensor) -> Tensor:
    """Each row of a picture (C, H, W) resized, then each column."""
    return _as_bytes(of_rows @ _as_bytes(x @ of_columns))


def _columns_first(x: Tensor, of_rows: Tensor, of_columns: Tensor) -> Tensor:
    """Each column of a picture (C, H, W) resized, then each row."""
    return _as_bytes(_as_bytes(of_rows @ x) @ of_columns)


def _as_bytes(sums: Tensor) -> Tensor:
    """Rounded as Pillow does, halves up: sums (1, C, …), or of the upper and lower bits of weights (2, C, …)."""
    if len(sums) == 2:
        sums = (sums[:1] + torch.floor(sums[1:] / 2**LOWER_BITS)) / 2**UPPER_BITS
    return torch.floor(sums[0] + 0.5).clamp(0, 255)
