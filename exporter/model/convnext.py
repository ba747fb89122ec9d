"""ConvNeXt as in the papers.

V1: Liu et al., "A ConvNet for the 2020s", arXiv 2201.03545, section 2 and appendix A.
V2: Woo et al., "ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders", arXiv 2301.00808.
Names are those of the original code (`dwconv`, `pwconv1`, `gamma`), and so are the keys of the state dict.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exporter.model.variants import Architecture


class Norm(nn.Module):
    """Normalize over the last axis, the channels: LayerNorm, RMSNorm, or the `simple` norm of zepto.

    `rms` divides by the root of the mean square (arXiv 1910.07467); `simple` divides by the standard deviation
    and, like RMSNorm, does not subtract the mean.
    """

    def __init__(self, dim: int, kind: str, eps: float) -> None:
        super().__init__()
        self.kind, self.eps = kind, eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim)) if kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) to (…, C)."""
        if self.kind == "layer":
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        if self.kind == "rms":
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight
        # x.var() would trace to a dozen shape operators.
        spread = (x - x.mean(-1, keepdim=True)).pow(2).sum(-1, keepdim=True) / (x.shape[-1] - 1)
        return x * torch.rsqrt(spread + self.eps) * self.weight


class Norm2d(Norm):
    """The same over the channels of an image."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W)."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GRN(nn.Module):
    """Global Response Normalisation (V2, section 3.3): channels compete by their norm over the image."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(dim))
        self.beta = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) to (N, H, W, C)."""
        norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        share = norm / (norm.mean(-1, keepdim=True) + 1e-6)
        return self.gamma * (x * share) + self.beta + x


class Block(nn.Module):
    """Depthwise 7×7, norm, pointwise up, GELU, (GRN,) pointwise down, layer scale, residual."""

    def __init__(self, dim: int, arch: Architecture) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = Norm(dim, arch.norm, arch.norm_eps)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.grn = GRN(4 * dim) if arch.grn else None
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.empty(dim)) if arch.layer_scale else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W)."""
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = F.gelu(self.pwconv1(y))
        if self.grn is not None:
            y = self.grn(y)
        y = self.pwconv2(y)
        if self.gamma is not None:
            y = self.gamma * y
        return x + y.permute(0, 3, 1, 2)


def stem(arch: Architecture) -> nn.Sequential:
    """The first layers: a patch of 4×4 (16×16 for isotropic), or two overlapping 3×3 of stride 2 (`_ols`)."""
    dim = arch.dims[0]
    if arch.isotropic:
        return nn.Sequential(nn.Conv2d(arch.in_chans, dim, kernel_size=16, stride=16))
    norm = Norm2d(dim, arch.norm, arch.norm_eps)
    if arch.stem == "patch":
        return nn.Sequential(nn.Conv2d(arch.in_chans, dim, kernel_size=4, stride=4), norm)
    middle = arch.stem_width
    first = nn.Conv2d(arch.in_chans, middle, kernel_size=3, stride=2, padding=1)
    second = nn.Conv2d(middle, dim, kernel_size=3, stride=2, padding=1)
    between = [nn.GELU()] if arch.stem == "overlap_act" else []
    return nn.Sequential(first, *between, second, norm)


class ConvNeXt(nn.Module):
    """The whole network.

    Args:
        arch: depths, widths and the published differences.
        num_classes: outputs of the head.
    """

    def __init__(self, arch: Architecture, num_classes: int = 1000) -> None:
        super().__init__()
        downsample = [
            nn.Sequential(Norm2d(before, arch.norm, arch.norm_eps), nn.Conv2d(before, after, 2, stride=2))
            for before, after in zip(arch.dims, arch.dims[1:], strict=False)
        ]
        self.downsample_layers = nn.ModuleList([stem(arch), *downsample])
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(dim, arch) for _ in range(depth)))
            for dim, depth in zip(arch.dims, arch.depths, strict=True)
        )
        last = arch.dims[-1]
        self.norm_pre = Norm2d(last, arch.norm, arch.norm_eps) if arch.head_norm_first else None
        self.norm = None if arch.head_norm_first else Norm(last, arch.norm, arch.norm_eps)
        self.head_hidden = nn.Linear(last, arch.head_hidden) if arch.head_hidden else None
        self.head = nn.Linear(arch.head_hidden or last, num_classes)

    def forward_features(self, images: Tensor) -> tuple[Tensor, ...]:
        """(N, in_chans, H, W) to the output of every stage, (N, C, H/s, W/s) for strides s of 4, 8, 16, 32."""
        maps = []
        x = images
        for downsample, blocks in zip(self.downsample_layers, self.stages, strict=True):
            x = blocks(downsample(x))
            maps.append(x)
        return tuple(maps)

    def forward(self, images: Tensor) -> Tensor:
        """(N, in_chans, H, W) to logits (N, classes)."""
        x = self.forward_features(images)[-1]
        if self.norm_pre is not None:
            x = self.norm_pre(x)
        x = x.mean((-2, -1))
        if self.norm is not None:
            x = self.norm(x)
        if self.head_hidden is not None:
            x = F.gelu(self.head_hidden(x))
        return self.head(x)


class Features(nn.Module):
    """The network as a backbone: its stages are the outputs, and it has no head."""

    def __init__(self, model: ConvNeXt) -> None:
        super().__init__()
        self.downsample_layers, self.stages = model.downsample_layers, model.stages

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(N, in_chans, H, W) to (N, C, H/s, W/s) for strides s of 4, 8, 16, 32."""
        return ConvNeXt.forward_features(self, images)  # type: ignore[arg-type]
