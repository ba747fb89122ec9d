"""Exact rewrites of the network before tracing: the same function in a form that a runtime runs faster.

Each rewrite replaces modules and creates new weights; the old weights are not changed. A form is a set of rewrites:

* `plain` is the network as in the papers;
* `linear` folds what can be folded (see `fold_norms`, `fold_layer_scale`, `fold_response`) and leaves the pointwise
  layers matrix products over the last axis;
* `conv` folds too, and replaces them by 1×1 convolutions; the norm is one operator between two transposes;
* `nchw` does the same, and computes the norm over the channels by elementary operators, without transposes.

Every form but `plain` computes the largest convolution of UPerNet's head, over resized maps, at the maps' own sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, TypeVar, cast

import torch
import torch.nn.functional as F
from msgspec.structs import replace
from torch import Tensor, nn

from exporter.artifact.sidecar import Preprocessing
from exporter.errors import BadRequest, nearest
from exporter.model import FORMS, structure
from exporter.model.convnext import GRN, Block, ConvNeXt, Norm
from exporter.model.multiscale import MultiscaleConv, SplitMultiscaleConv
from exporter.model.picture import Picture
from exporter.model.upernet import UPerNet

Layout = Literal["last", "transposed", "first"]
_LAYOUTS: dict[str, Layout] = {"linear": "last", "conv": "transposed", "nchw": "first"}
M = TypeVar("M", bound=nn.Module)
Pointwise = TypeVar("Pointwise", nn.Linear, nn.Conv2d)


class Standardise(nn.Module):
    """A norm without its scale and shift, over the channels; or with the scale (C,) of smoothing.

    `layout` says where these are: `last`; or axis 1, to be `transposed` to the last and back, so that LayerNorm is
    one operator; or axis 1, and the norm written in parts there (`first`).
    """

    def __init__(self, norm: Norm, layout: Layout) -> None:
        super().__init__()
        self.kind, self.eps, self.layout = norm.kind, norm.eps, layout
        self.scale: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) to the same for `last`, (N, C, H, W) to the same for the others."""
        if self.layout == "transposed":
            return self._over(x.permute(0, 2, 3, 1), -1).permute(0, 3, 1, 2)
        return self._over(x, 1 if self.layout == "first" else -1)

    def _over(self, x: Tensor, axis: int) -> Tensor:
        if self.kind == "layer" and axis == -1:
            return F.layer_norm(x, x.shape[-1:], self.scale, eps=self.eps)
        centred = x if self.kind == "rms" else x - x.mean(axis, keepdim=True)
        spread = (centred * centred).mean(axis, keepdim=True)
        if self.kind == "simple":  # the unbiased variance, and a mean that is not subtracted
            spread = spread * (x.shape[axis] / (x.shape[axis] - 1))
        y = x if self.kind == "simple" else centred
        if self.scale is not None:
            # Not behind the norm: OpenVINO would fuse it into the FakeQuantize there, which then rounds worse.
            y = y * (self.scale if axis == -1 else self.scale[:, None, None])
        return y * torch.rsqrt(spread + self.eps)


class ScaledNorm(Standardise):
    """A norm over axis 1 that keeps its scale and shift: the stem's, which no layer behind it can absorb."""

    def __init__(self, norm: Norm) -> None:
        super().__init__(norm, "first")
        self.weight = nn.Parameter(norm.weight[:, None, None])
        self.bias = None if norm.bias is None else nn.Parameter(norm.bias[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W)."""
        y = super().forward(x) * self.weight
        return y if self.bias is None else y + self.bias


class ResponseScale(nn.Module):
    """Global Response Normalisation as one factor per channel and image: 1 + γ·share (or a scale s: s + s·γ·share).

    y·(1 + γ·share) + β is GRN with two operators over the image instead of four; β goes into the next layer. Only
    this module computes squares and sums over an image, and it returns (N, C) values: it alone has to stay in fp32.
    """

    def __init__(self, grn: GRN, layout: Layout) -> None:
        super().__init__()
        self.axes = (1, 2) if layout == "last" else (2, 3)
        self.channels = -1 if layout == "last" else 1
        self.gamma = nn.Parameter(grn.gamma if layout == "last" else grn.gamma[:, None, None])
        self.scale: Tensor | None = None

    def forward(self, y: Tensor) -> Tensor:
        """(N, H, W, C) to (N, 1, 1, C), or (N, C, H, W) to (N, C, 1, 1)."""
        if self.channels == -1:
            # The sum of squares as a product: where channels are last, ONNX Runtime reduces slowly.
            z = y.flatten(1, 2)
            norm = torch.sqrt(y.new_ones(1, z.shape[1]) @ (z * z))[:, None]
        else:
            norm = torch.linalg.vector_norm(y, dim=self.axes, keepdim=True)
        share = norm / (norm.mean(self.channels, keepdim=True) + 1e-6)
        return self.gamma * share + (1 if self.scale is None else self.scale)


class FoldedBlock(nn.Module):
    """A block whose scales and shifts are folded: depthwise, norm, pointwise, activation, (response,) pointwise,
    residual."""

    def __init__(self, block: Block, layout: Layout) -> None:
        super().__init__()
        fold_layer_scale(block)
        fold_response(block)
        self.channels_last = layout == "last"
        self.dwconv = block.dwconv
        pwconv1 = folded(block.norm, block.pwconv1)
        self.norm = Standardise(block.norm, layout)
        self.pwconv1 = pwconv1 if self.channels_last else as_conv(pwconv1)
        self.act = block.act
        self.grn = None if block.grn is None else ResponseScale(block.grn, layout)
        self.pwconv2 = block.pwconv2 if self.channels_last else as_conv(block.pwconv2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W)."""
        y = self.dwconv(x)
        if self.channels_last:
            y = y.permute(0, 2, 3, 1)
        y = self.act(self.pwconv1(self.norm(y)))
        if self.grn is not None:
            y = y * self.grn(y)
        y = self.pwconv2(y)
        return x + (y.permute(0, 3, 1, 2) if self.channels_last else y)


class InputConv(nn.Conv2d):
    """The first convolution, on the artifact's input instead of the network's.

    The scale of pixels is folded into its weights, and so is the mean if the convolution does not pad. With padding the
    mean is subtracted first, because the padding must be zero after normalization. For BGR the weights of red and blue
    change places.
    """

    def __init__(self, conv: nn.Conv2d, recipe: Preprocessing) -> None:
        super().__init__(conv.in_channels, conv.out_channels, _pair(conv.kernel_size), _pair(conv.stride))
        self.padding, self.channels_last = conv.padding, recipe.layout == "NHWC"
        assert conv.bias is not None
        weight, bias, mean = conv.weight, conv.bias, None
        if recipe.input != "normalized":
            top = 255 if recipe.input == "uint8" else 1
            mean, std = (
                torch.tensor(values, dtype=weight.dtype)[:, None, None] for values in (recipe.mean, recipe.std)
            )
            if not any(int(side) for side in conv.padding):
                bias = nn.Parameter((bias.double() - _exact_sum(weight * (mean / std))).to(bias.dtype))
                mean = None
            weight, mean = nn.Parameter(weight / (std * top)), None if mean is None else mean * top
        if recipe.color == "BGR":
            weight, mean = nn.Parameter(weight.flip(1)), None if mean is None else mean.flip(0)
        self.weight, self.bias = weight, bias
        self.mean: Tensor | None
        self.register_buffer("mean", mean)

    def forward(self, x: Tensor) -> Tensor:
        """The artifact's input, (N, in_chans, H, W) or (N, H, W, in_chans) of any type, to (N, C, H/s, W/s)."""
        if x.dtype != self.weight.dtype:
            x = torch.ops.aten._to_copy.default(x, dtype=self.weight.dtype)  # unlike `x.to`, it has an ONNX function
        if self.channels_last:
            x = x.permute(0, 3, 1, 2)
        return super().forward(x if self.mean is None else x - self.mean)


def rewrite(model: ConvNeXt, form: str) -> ConvNeXt:
    """Rewrite a network or a backbone to a form, in place.

    Args:
        model: in eval mode.
        form: one of `FORMS`.

    Raises: BadRequest for another form.
    """
    if form not in FORMS:
        raise BadRequest(f"unknown form {form!r}; {nearest(form, (*FORMS, 'auto'))}")
    if form != "plain":
        layout = _LAYOUTS[form]
        for index, blocks in enumerate(model.stages):
            model.stages[index] = _sequence(FoldedBlock(block, layout) for block in _parts(blocks, Block))
        fold_norms(model, layout)
        if isinstance(model, UPerNet) and model.decode_head is not None:
            head = model.decode_head
            head.fpn_bottleneck = SplitMultiscaleConv(cast("MultiscaleConv", head.fpn_bottleneck))
    return model.eval().requires_grad_(False)


def fold_norms(model: ConvNeXt, layout: Layout) -> None:
    """Fold scale and shift of the norms outside the blocks into the layers behind them: of each downsampling layer
    into its convolution, of the last norm into the head. What stands before a mean over the image may go behind it.
    The stem's norm is in front of a residual, and stays; so does one in front of a padded convolution.
    """
    around: Layout = "first" if layout == "first" else "transposed"
    for index, layer in enumerate(model.downsample_layers):
        parts = _parts(layer, nn.Module)
        for at, part in enumerate(parts):
            behind = parts[at + 1] if at + 1 < len(parts) else None
            if isinstance(part, Norm) and isinstance(behind, nn.Conv2d) and behind.padding == (0, 0):
                parts[at : at + 2] = [Standardise(part, around), folded(part, behind)]
            elif isinstance(part, Norm) and layout == "first":
                parts[at] = ScaledNorm(part)
        model.downsample_layers[index] = _sequence(parts)
    if layout == "first":
        for name, norm in model.stage_norms.items():
            model.stage_norms[name] = ScaledNorm(cast("Norm", norm))
    _fold_last_norm(model, layout, around)


def _fold_last_norm(model: ConvNeXt, layout: Layout, around: Layout) -> None:
    """Fold the last norm into the first linear layer behind it, if nothing else takes its output."""
    name = "norm" if model.norm_pre is None else "norm_pre"
    norm = getattr(model, name)
    layers = model.head_layers
    first = (layers[0] if layers else model.head) if model.norm_feeds_head_only else None
    if norm is None:
        return
    if isinstance(first, nn.Linear) and (name == "norm" or model.pool == "avg"):
        if layers:
            layers[0] = folded(norm, first)
        else:
            model.head = folded(norm, first)
        setattr(model, name, Standardise(norm, "last" if name == "norm" else around))
    elif name == "norm_pre" and layout == "first":
        setattr(model, name, ScaledNorm(norm))


def folded(norm: Norm, layer: Pointwise) -> Pointwise:
    """A layer that takes in the scale w and shift b of the norm in front of it: W·(w∘x + b) + c = (W∘w)·x + (W·b + c).

    The layer must not be a padded convolution: the padding would lack the shift.
    """
    assert layer.bias is not None
    shape = (1, -1, *[1] * (layer.weight.ndim - 2))
    bias: Tensor = layer.bias
    if norm.bias is not None:
        bias = (bias.double() + _exact_sum(layer.weight * norm.bias.view(shape))).to(bias.dtype)
    return _with(layer, layer.weight * norm.weight.view(shape), bias)


def fold_layer_scale(block: Block) -> None:
    """Fold layer scale into the second pointwise layer: γ∘(W·x + c) = (γ∘W)·x + γ∘c."""
    if block.gamma is not None:
        layer = block.pwconv2
        block.pwconv2 = _with(layer, layer.weight * block.gamma[:, None], layer.bias * block.gamma)
        block.gamma = None


def fold_response(block: Block) -> None:
    """Fold GRN's shift into the second pointwise layer: W·(y + β) + c = W·y + (W·β + c)."""
    if block.grn is not None:
        layer = block.pwconv2
        bias = (layer.bias.double() + _exact_sum(layer.weight * block.grn.beta)).to(layer.bias.dtype)
        block.pwconv2 = _with(layer, layer.weight, bias)
        block.grn.beta = nn.Parameter(torch.zeros_like(block.grn.beta))


def as_conv(layer: nn.Linear) -> nn.Conv2d:
    """A pointwise layer as a convolution of 1×1, over axis 1 instead of the last."""
    with torch.device("meta"):
        conv = nn.Conv2d(layer.in_features, layer.out_features, 1)
    return _with(conv, layer.weight[:, :, None, None], layer.bias)


def take_input(model: ConvNeXt, recipe: Preprocessing) -> Callable[[], None]:
    """Change a network, in place, to take the artifact's input: pixels as in `recipe.input`, `layout` and `color`.

    Returns: a function that changes it back.
    """
    stem = model.downsample_layers[0]
    if recipe.is_of_network:
        return lambda: None
    if isinstance(model, UPerNet):
        model.channels_last = recipe.layout == "NHWC" and recipe.input != "image"
    hook = None
    if recipe.input == "image":
        model.add_module(structure.PICTURE, Picture(recipe))
        hook = model.register_forward_pre_hook(_resize)
        recipe = replace(recipe, input="uint8", layout="NCHW")
    first, *others = _parts(stem, nn.Module)
    assert isinstance(first, nn.Conv2d)
    model.downsample_layers[0] = _sequence([InputConv(first, recipe), *others])

    def change_back() -> None:
        model.downsample_layers[0] = stem
        if isinstance(model, UPerNet):
            model.channels_last = False
        if hook is not None:
            hook.remove()
            del model.picture

    return change_back


def _resize(network: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """The input of the network for a picture: a hook that runs before it."""
    assert isinstance(network.picture, Picture)
    return network.picture(inputs[0])


def _parts(sequence: nn.Module, kind: type[M]) -> list[M]:
    """The modules of a sequence, which all have one type."""
    parts = list(sequence.children())
    assert all(isinstance(part, kind) for part in parts)
    return cast("list[M]", parts)


def _sequence(parts: Iterable[nn.Module]) -> nn.Sequential:
    return nn.Sequential(*parts)


def _with(layer: Pointwise, weight: Tensor, bias: Tensor) -> Pointwise:
    """A copy of a layer with other weights."""
    with torch.device("meta"):
        copy = (
            nn.Linear(layer.in_features, layer.out_features)
            if isinstance(layer, nn.Linear)
            else nn.Conv2d(layer.in_channels, layer.out_channels, _pair(layer.kernel_size), _pair(layer.stride))
        )
    copy.weight, copy.bias = nn.Parameter(weight), nn.Parameter(bias)
    return copy


def _exact_sum(products: Tensor) -> Tensor:
    """The sum over all axes but the first, in double precision, rounded once at the end."""
    return products.flatten(1).sum(1, dtype=torch.float64)


def _pair(sides: tuple[int, ...]) -> tuple[int, int]:
    return sides[0], sides[1]
