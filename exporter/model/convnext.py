"""ConvNeXt as in the papers.

V1: Liu et al., "A ConvNet for the 2020s", arXiv 2201.03545, section 2 and appendix A.
V2: Woo et al., "ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders", arXiv 2301.00808.
Names are those of the original code (`dwconv`, `pwconv1`, `gamma`), and so are the keys of the state dict.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exporter.artifact.outputs import DENSE
from exporter.artifact.sidecar import OutputSpec
from exporter.model.variants import Architecture, head_layer


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


def quick_gelu(x: Tensor) -> Tensor:
    """The approximation of GELU in OpenAI's CLIP: x·σ(1.702·x)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
}


class Activation(nn.Module):
    """An activation by its name in `ACTIVATIONS`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.function = ACTIVATIONS[kind]

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape."""
        return self.function(x)


class Affine(nn.Module):
    """A factor and a shift for each channel: batch norm as it is at inference."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(dim)), nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C) to (N, C)."""
        return x * self.weight + self.bias


class Block(nn.Module):
    """Depthwise convolution, norm, pointwise up, activation, (GRN,) pointwise down, layer scale, residual."""

    def __init__(self, arch: Architecture, stage: int) -> None:
        super().__init__()
        dim, kernel, dilation = arch.dims[stage], arch.kernel_sizes[stage], arch.steps[stage].block_dilation
        padding = dilation * (kernel // 2)
        self.dwconv = nn.Conv2d(dim, dim, kernel, padding=padding, dilation=dilation, groups=dim)
        self.norm = Norm(dim, arch.norm, arch.norm_eps)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = ACTIVATIONS[arch.act]
        self.grn = GRN(4 * dim) if arch.grn else None
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.empty(dim)) if arch.layer_scale else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W)."""
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.act(self.pwconv1(y))
        if self.grn is not None:
            y = self.grn(y)
        y = self.pwconv2(y)
        if self.gamma is not None:
            y = self.gamma * y
        return x + y.permute(0, 3, 1, 2)


def stem(arch: Architecture) -> nn.Sequential:
    """The first layers: one convolution of a patch, or two overlapping 3×3 of stride 2 (`_ols`)."""
    dim = arch.dims[0]
    if arch.stem == "patch":
        layers: list[nn.Module] = [nn.Conv2d(arch.in_chans, dim, kernel_size=arch.patch, stride=arch.patch)]
    else:
        middle = arch.stem_width
        first = nn.Conv2d(arch.in_chans, middle, kernel_size=3, stride=2, padding=1)
        second = nn.Conv2d(middle, dim, kernel_size=3, stride=2, padding=1)
        layers = [first, *([Activation(arch.act)] if arch.stem == "overlap_act" else []), second]
    if arch.stem_norm:
        layers.append(Norm2d(dim, arch.norm, arch.norm_eps))
    if arch.stem_downsample:
        layers += [Norm2d(dim, arch.norm, arch.norm_eps), nn.Conv2d(dim, dim, 2, stride=2)]
    return nn.Sequential(*layers)


def downsampling(arch: Architecture, stage: int) -> nn.Sequential:
    """A norm, and a convolution of 2×2 of stride 2, or a dilated one of stride 1."""
    before, after, step = arch.dims[stage - 1], arch.dims[stage], arch.steps[stage]
    padding = "same" if step.block_dilation > 1 else 0
    conv = nn.Conv2d(before, after, 2, stride=step.stride, dilation=step.dilation, padding=padding)
    return nn.Sequential(Norm2d(before, arch.norm, arch.norm_eps), conv)


def pooling(x: Tensor, kind: str) -> Tensor:
    """(N, C, H, W) to (N, C), or (N, 2C) for `catavgmax`."""
    if kind == "avg":
        return x.mean((-2, -1))
    if kind == "max":
        return x.amax((-2, -1))
    mean, largest = x.mean((-2, -1)), x.amax((-2, -1))
    return 0.5 * (mean + largest) if kind == "avgmax" else torch.cat([mean, largest], 1)


def head_layers(arch: Architecture, width: int) -> tuple[nn.Sequential, int]:
    """The layers between the last norm and the head, and the width behind them."""
    layers: list[nn.Module] = []
    for kind, size in map(head_layer, arch.head_layers):
        if kind == "linear":
            layers.append(nn.Linear(width, size))
            width = size
        elif kind == "affine":
            layers.append(Affine(size))
        elif kind == "layer":
            layers.append(Norm(size, "layer", 1e-5))  # what PyTorch's own LayerNorm has
        else:
            layers.append(nn.Tanh() if kind == "tanh" else Activation(kind))
    return nn.Sequential(*layers), width


def answers(logits: Tensor, answer: str) -> tuple[Tensor, ...]:
    """Logits (N, classes) as they are returned: themselves, their softmax or sigmoid, or the numbers and the
    probabilities of the five most probable classes, (N, 5) each; fewer where the head has fewer."""
    if answer == "logits":
        return (logits,)
    if answer == "sigmoid":
        return (torch.sigmoid(logits),)
    probabilities = torch.softmax(logits, -1)
    if answer == "softmax":
        return (probabilities,)
    largest, classes = torch.topk(probabilities, min(5, logits.shape[-1]))
    return classes, largest


def _half(values: Tensor) -> Tensor:
    """The values in fp16. Unlike `values.half` it has an ONNX function, so a trace need not be decomposed."""
    halved: Tensor = torch.ops.aten._to_copy.default(values, dtype=torch.float16)
    return halved


def unit_length(vectors: Tensor) -> Tensor:
    """Vectors (N, C) divided by their L2 norm."""
    # Not F.normalize, whose graph expands the norms to the shape of the vectors.
    return vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp_min(1e-12)


class ConvNeXt(nn.Module):
    """The whole network.

    Args:
        arch: depths, widths and the published differences.
        num_classes: outputs of the head.

    Attributes:
        spec: the outputs.
        half_outputs: whether they are in fp16.
    """

    def __init__(self, arch: Architecture, num_classes: int = 1000) -> None:
        super().__init__()
        stages = range(len(arch.depths))
        self.downsample_layers = nn.ModuleList([stem(arch), *(downsampling(arch, stage) for stage in stages[1:])])
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(arch, stage) for _ in range(arch.depths[stage]))) for stage in stages
        )
        stage_eps = 1e-6 if arch.stage_eps is None else arch.stage_eps
        self.stage_norms = nn.ModuleDict(
            {str(stage): Norm2d(arch.dims[stage], "layer", stage_eps) for stage in arch.stage_norms}
        )
        last, eps = arch.dims[-1], arch.norm_eps if arch.head_eps is None else arch.head_eps
        first = arch.head_norm_first
        self.norm_pre = Norm2d(last, arch.norm, eps) if arch.head_norm and first else None
        self.norm = Norm(last, arch.norm, eps) if arch.head_norm and not first else None
        self.pool, self.projection = arch.pool, arch.projection
        self.head_layers, width = head_layers(arch, last * (2 if arch.pool == "catavgmax" else 1))
        self.heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in map(head_layer, arch.heads)})
        self.head = None if arch.heads else nn.Linear(width, num_classes)
        self.spec, self.half_outputs = OutputSpec(), False

    def forward_features(self, images: Tensor) -> tuple[Tensor, ...]:
        """(N, C, H, W) to the output of every stage, (N, C, H/s, W/s) for the strides s of the architecture."""
        maps = []
        x = images
        for downsample, blocks in zip(self.downsample_layers, self.stages, strict=True):
            x = blocks(downsample(x))
            maps.append(x)
        return tuple(maps)

    def finish(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The outputs of every task for the outputs of the stages, (N, C, H/s, W/s) each."""
        tasks, last = self.spec.tasks, maps[-1]
        outputs: list[Tensor] = []
        if set(tasks) != {"features"}:
            last = last if self.norm_pre is None else self.norm_pre(last)
            pooled = pooling(last, self.pool)
            pooled = pooled if self.norm is None else self.norm(pooled)
        for task in tasks:
            if task == "classify":
                outputs += self.classify(pooled)
            elif task == "embed":
                outputs.append(self.embed(pooled))
            elif task == "tokens":
                outputs.append(self.tokens(pooled, last))
            else:
                outputs += self.normalized(maps)
        return tuple(outputs)

    def normalized(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The outputs of the stages, (N, C, H/s, W/s) each, through the norms that stages have."""
        norms = self.stage_norms
        return [norms[str(i)](x) if str(i) in norms else x for i, x in enumerate(maps)]

    def classify(self, pooled: Tensor) -> list[Tensor]:
        """Pooled features (N, C) to the outputs of each head: (N, classes), or of the first five (N, 5) twice."""
        x = self.head_layers(pooled)
        logits = [head(x) for head in self.heads.values()] if self.head is None else [self.head(x)]
        return [output for one in logits for output in answers(one, self.spec.answer)]

    def embed(self, pooled: Tensor) -> Tensor:
        """Pooled features (N, C) to the feature vector (N, C), or (N, E) of a CLIP tower's projection."""
        if self.projection:
            assert self.head is not None
            pooled = self.head(self.head_layers(pooled))
        return unit_length(pooled) if self.spec.l2 else pooled

    def tokens(self, pooled: Tensor, x: Tensor) -> Tensor:
        """Pooled features (N, C) and the last map (N, C, H, W) to normalized tokens (N, 1 + H·W, C), the pooled one
        first, as transformers' DINOv3 returns them."""
        patches = x.flatten(2).transpose(1, 2)
        return torch.cat([pooled[:, None], patches if self.norm is None else self.norm(patches)], 1)

    def outputs(self, images: Tensor) -> tuple[Tensor, ...]:
        """(N, C, H, W) to the outputs of every task."""
        return self.finish(self.forward_features(images))

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """(N, C, H, W) to the outputs of every task; a tuple if there are several."""
        outputs = self.outputs(images)
        if self.half_outputs:
            outputs = tuple(_half(output) if output.is_floating_point() else output for output in outputs)
        return outputs if len(outputs) > 1 else outputs[0]

    def select(self, spec: OutputSpec) -> ConvNeXt:
        """The same network with other outputs, in place; what these do not need is removed."""
        self.spec = spec
        if "classify" not in spec.tasks and not (self.projection and "embed" in spec.tasks):
            self.head, self.heads, self.head_layers = None, nn.ModuleDict(), nn.Sequential()
        of_stages = {"features", *DENSE}
        if of_stages.issuperset(spec.tasks):
            self.norm_pre = self.norm = None
        if of_stages.isdisjoint(spec.tasks):
            self.stage_norms = nn.ModuleDict()
        return self

    @property
    def norm_feeds_head_only(self) -> bool:
        """Whether only linear layers take the last norm's output."""
        return self.spec.tasks == ("classify",) or (self.projection and self.spec.tasks == ("embed",))


class Tail(nn.Module):
    """What follows the last stage of a network, as a module."""

    def __init__(self, model: ConvNeXt) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The output of the last stage (N, C, H, W) to the outputs of the network."""
        return self.model.finish([x])
