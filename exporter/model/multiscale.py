"""A 3×3 convolution over maps of several sizes, as written and in a form with fewer multiply-accumulates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvReLU(nn.Conv2d):
    """A convolution that keeps height and width, and ReLU."""

    def __init__(self, before: int, after: int, side: int) -> None:
        super().__init__(before, after, side, padding=side // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, D, H, W)."""
        return F.relu(super().forward(x))


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """(N, C, …) to (N, C, *size), bilinear, with the centres of pixels at halves."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class MultiscaleConv(ConvReLU):
    """A 3×3 convolution over maps that are resized to the size of the first and concatenated, and ReLU."""

    def __init__(self, widths: Sequence[int], after: int) -> None:
        super().__init__(sum(widths), after, 3)
        self.widths = widths

    def forward(self, maps: Sequence[Tensor]) -> Tensor:  # type: ignore[override]
        """The maps (N, C, H, W), of any C, H and W, to (N, D, H, W) of the first."""
        first, *others = maps
        return super().forward(torch.cat([first, *(resize(other, first.shape[-2:]) for other in others)], 1))


class SplitMultiscaleConv(nn.Module):
    """The same function: the products of each map at its own size, which are resized and shifted behind them.

    Products of channels and the resize, which acts on rows and columns, commute. So the nine products of the weights'
    positions with a map are one 1×1 convolution, and the resize and the shifts by one row or column are one matrix for
    each axis (`shifted`). For a map of half the size that is a quarter of the multiply-accumulates of the convolution.
    """

    def __init__(self, conv: MultiscaleConv) -> None:
        super().__init__()
        assert conv.bias is not None
        own, *weights = torch.split(conv.weight, list(conv.widths), 1)
        with torch.device("meta"):
            self.own = nn.Conv2d(own.shape[1], len(own), 3, padding=1)
            self.products = nn.ModuleList(nn.Conv2d(one.shape[1], 9 * len(one), 1, bias=False) for one in weights)
        self.own.weight, self.own.bias = nn.Parameter(own.contiguous()), conv.bias
        for product, one in zip(self.products, weights, strict=True):  # (D, C, rows, columns) to (D·columns·rows, C)
            product.weight = nn.Parameter(one.permute(0, 3, 2, 1).reshape(-1, one.shape[1], 1, 1))
        self.matrix = ShiftedResize()

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """As `MultiscaleConv`."""
        first, *others = maps
        y = self.own(first)
        (count, width), (height, columns) = y.shape[:2], y.shape[2:]
        for product, other in zip(self.products, others, strict=True):
            h, w = other.shape[-2:]
            z = self.matrix(h, height, other) @ product(other).reshape(count, 3 * width, 3 * h, w)
            z = z.reshape(count, width, 3, height, w).transpose(2, 3).reshape(count, width, height, 3 * w)
            y = y + z @ self.matrix(w, columns, other).transpose(0, 1)
        return F.relu(y)


class ShiftedResize(nn.Module):
    """The matrix of a bilinear resize along one axis, shifted by one position down, by none and up, side by side."""

    def forward(self, before: int, after: int, like: Tensor) -> Tensor:
        """(after, 3·before), of the type of `like`.

        Row i of the part for the shift d has the weights of position i + d, which lies at
        ((2·(i + d) + 1)·before − after)/(2·after) between the old ones, and zeros beyond the border. Numbers are whole
        up to the last division, so that weights are exact.
        """
        place = torch.arange(after)[:, None] + torch.arange(-1, 2)
        at = (place * 2 + 1) * before - after
        steps = torch.arange(before) * (2 * after)
        at = torch.minimum(at.clamp(min=0), steps[-1])
        away = torch.ops.aten._to_copy.default((at[..., None] - steps).abs(), dtype=like.dtype)
        weights = F.relu(away / (-2 * after) + 1)  # unlike `1 - …` an addition has an ONNX function
        outside = torch.logical_or(place < 0, place >= after)[..., None]
        return weights.masked_fill(outside, 0).flatten(1)
