"""The feature pyramid (FPN) of detectors on ConvNeXt: Mask R-CNN, Cascade Mask R-CNN, RetinaNet.

Lin et al., "Feature Pyramid Networks for Object Detection", arXiv 1612.03144, section 3 and footnote 2 (P6); the
further levels of RetinaNet are those of arXiv 1708.02002, footnote 2. Names are those of mmdet (`neck.lateral_convs`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from exporter.artifact.sidecar import OutputSpec
from exporter.model.convnext import ConvNeXt
from exporter.model.levels import Pyramid
from exporter.model.variants import Architecture


class FPN(nn.Module):
    """The maps of neighbouring stages, each joined with what the deeper ones see.

    Args:
        pyramid: its width, and the levels beyond the stages.
        dims: channels of the maps that it takes.
    """

    def __init__(self, pyramid: Pyramid, dims: Sequence[int]) -> None:
        super().__init__()
        width, first = pyramid.width, dims[-1] if pyramid.extra == "input" else pyramid.width
        self.lateral_convs = nn.ModuleList(nn.Conv2d(dim, width, 1) for dim in dims)
        self.fpn_convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in dims)
        for index in range(pyramid.convolutions):
            self.fpn_convs.append(nn.Conv2d(width if index else first, width, 3, stride=2, padding=1))
        self.outputs, self.extra, self.relu = pyramid.outputs, pyramid.extra, pyramid.relu

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The maps of the stages, (N, C, H/s, W/s) each, to those of the levels, (N, width, H/s, W/s) each."""
        laterals = [conv(stage) for conv, stage in zip(self.lateral_convs, maps, strict=True)]
        joined = laterals[-1:]
        for lateral in reversed(laterals[:-1]):
            joined.insert(0, lateral + F.interpolate(joined[0], size=lateral.shape[-2:], mode="nearest"))
        levels = [conv(x) for conv, x in zip(self.fpn_convs, joined, strict=False)]
        x = {"input": maps[-1], "lateral": laterals[-1]}.get(self.extra, levels[-1])
        for index in range(len(maps), self.outputs):
            if self.extra == "pool":
                x = F.max_pool2d(levels[-1], 1, stride=2)
            else:
                x = self.fpn_convs[index](F.relu(x) if self.relu and index > len(maps) else x)
            levels.append(x)
        return levels


class PyramidNetwork(ConvNeXt):
    """A ConvNeXt with a feature pyramid in place of a classifier."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__(arch, 1)
        assert arch.pyramid is not None
        self.head, self.taken = None, arch.pyramid.stages
        self.neck: FPN | None = FPN(arch.pyramid, [arch.dims[stage] for stage in self.taken])

    def outputs(self, images: Tensor) -> tuple[Tensor, ...]:
        """(N, C, H, W) to the maps of the pyramid, or the outputs of other tasks."""
        maps = self.forward_features(images)
        if self.neck is None:
            return self.finish(maps)
        normalized = self.normalized(maps)
        return tuple(self.neck([normalized[stage] for stage in self.taken]))

    def select(self, spec: OutputSpec) -> PyramidNetwork:
        """The same network with other outputs, in place."""
        super().select(spec)
        if "pyramid" not in spec.tasks:
            self.neck = None
        return self
