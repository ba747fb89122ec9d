"""UPerNet on ConvNeXt, for semantic segmentation.

Xiao et al., "Unified Perceptual Parsing for Scene Understanding", arXiv 1807.10221, section 3.1: a pyramid of pooled
maps behind the last stage (Zhao et al., arXiv 1612.01105), and a feature pyramid (Lin et al., arXiv 1612.03144) over
all stages. Names are those of mmsegmentation and transformers (`psp_modules`, `lateral_convs`). Batch norms are folded
into the convolutions when weights are loaded (`exporter.model.decoder`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from exporter.artifact.sidecar import OutputSpec
from exporter.model.convnext import ConvNeXt
from exporter.model.multiscale import ConvReLU, MultiscaleConv, resize
from exporter.model.variants import Architecture, Decoder


class GridPool(nn.Module):
    """Adaptive average pooling to a grid of `cells` × `cells`, as two matrix products.

    ONNX has no such operator, and an export of PyTorch's own holds the indices of the traced size.
    """

    def __init__(self, cells: int) -> None:
        super().__init__()
        self.cells = cells

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, cells, cells)."""
        rows, columns = (cell_weights(side, self.cells, x.dtype) for side in x.shape[-2:])
        return rows @ x @ columns.transpose(0, 1)


def cell_weights(side: int, cells: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight of each of `side` positions in the mean of each cell, (cells, side).

    Cell i has the positions k with ⌊i·side/cells⌋ ≤ k < ⌈(i+1)·side/cells⌉, as `torch.nn.AdaptiveAvgPool2d`; for whole
    numbers that is i·side < (k+1)·cells and k·cells < (i+1)·side.
    """
    cell, position = torch.arange(cells)[:, None], torch.arange(side)
    inside = torch.logical_and(cell * side < (position + 1) * cells, position * cells < (cell + 1) * side)
    weights: Tensor = torch.ops.aten._to_copy.default(inside, dtype=torch.float32)  # has an ONNX function
    weights = weights / weights.sum(1, keepdim=True)
    if dtype == torch.float32:  # `weights.to` has no ONNX function, so that every trace would have to be decomposed
        return weights
    rounded: Tensor = torch.ops.aten._to_copy.default(weights, dtype=dtype)
    return rounded


class Head(nn.Module):
    """The head of UPerNet: pooled maps behind the last stage, and a pyramid over all stages."""

    def __init__(self, decoder: Decoder, dims: Sequence[int]) -> None:
        super().__init__()
        width, *finer, last = decoder.width, *dims
        self.pools = nn.ModuleList(GridPool(cells) for cells in decoder.scales)
        self.psp_modules = nn.ModuleList(ConvReLU(last, width, 1) for _ in decoder.scales)
        self.bottleneck = MultiscaleConv([last, *(width for _ in decoder.scales)], width)
        self.lateral_convs = nn.ModuleList(ConvReLU(dim, width, 1) for dim in finer)
        self.fpn_convs = nn.ModuleList(ConvReLU(width, width, 3) for _ in finer)
        self.fpn_bottleneck: nn.Module = MultiscaleConv([width for _ in dims], width)
        self.classifier = nn.Conv2d(width, decoder.classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """The maps of two or more stages, (N, C, H/s, W/s) each, to logits (N, classes, H/s, W/s) of the first s."""
        *finer, last = maps
        pooled = [conv(pool(last)) for pool, conv in zip(self.pools, self.psp_modules, strict=True)]
        x = self.bottleneck([last, *pooled])
        levels = [x]
        for lateral, conv, stage in reversed([*zip(self.lateral_convs, self.fpn_convs, finer, strict=True)]):
            x = lateral(stage) + resize(x, stage.shape[-2:])
            levels.append(conv(x))
        logits: Tensor = self.classifier(self.fpn_bottleneck(levels[::-1]))
        return logits


def pixel_answers(logits: Tensor, size: Sequence[int], answer: str) -> tuple[Tensor, ...]:
    """Logits (N, classes, H/s, W/s) as they are returned for an image of `size` pixels: as they are (`logits4`),
    resized to (N, classes, H, W) (`logits`), or the class of each pixel (N, H, W) uint8 (`labels`), with `scores` also
    its probability (N, H, W) by the softmax of the resized logits."""
    if answer == "logits4":
        return (logits,)
    logits = resize(logits, size)
    if answer == "logits":
        return (logits,)
    labels: Tensor = torch.ops.aten._to_copy.default(logits.argmax(1), dtype=torch.uint8)
    return (labels, logits.softmax(1).amax(1)) if answer == "scores" else (labels,)


class UPerNet(ConvNeXt):
    """A ConvNeXt with the head of UPerNet in place of a classifier.

    Attributes:
        channels_last: whether the input is (N, H, W, C).
    """

    def __init__(self, arch: Architecture) -> None:
        super().__init__(arch, 1)
        assert arch.decoder is not None
        self.head, self.levels, self.channels_last = None, arch.decoder.levels, False
        self.decode_head: Head | None = Head(arch.decoder, [arch.dims[level] for level in self.levels])

    def outputs(self, images: Tensor) -> tuple[Tensor, ...]:
        """(N, C, H, W) to the output for each pixel, or the outputs of other tasks."""
        maps = self.forward_features(images)
        if self.decode_head is None:
            return self.finish(maps)
        normalized = self.normalized(maps)
        logits = self.decode_head([normalized[level] for level in self.levels])
        size = images.shape[1:3] if self.channels_last else images.shape[2:]
        return pixel_answers(logits, size, self.spec.answer)

    def select(self, spec: OutputSpec) -> UPerNet:
        """The same network with other outputs, in place."""
        super().select(spec)
        if "segment" not in spec.tasks:
            self.decode_head = None
        elif spec.tasks == ("segment",):
            count = self.levels[-1] + 1  # of stages: the head may not take the last ones
            self.stages, self.downsample_layers = self.stages[:count], self.downsample_layers[:count]
        return self
