"""Moves scale from activations into weights, exactly: x·W = (x∘1/s)·(s∘W).

SmoothQuant (Xiao et al., ICML 2023, eq. 4) balances the largest of each channel: s = max|x|^α / max|w|^(1−α). In a
folded ConvNeXt 1/s costs nothing: in front of `pwconv1` and of a downsampling convolution it becomes the scale of the
norm, in front of a V2 block's `pwconv2` it is folded into GRN. In V1 GELU precedes `pwconv2`; no scale passes it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from exporter.model.convnext import ConvNeXt
from exporter.model.forms import FoldedBlock, ResponseScale, Standardise
from exporter.model.structure import kind, order, part
from exporter.quantize.rounding import Floats

LEAST = 1e-5
Layer = nn.Linear | nn.Conv2d


def layers(model: ConvNeXt, kinds: frozenset[str]) -> dict[str, Layer]:
    """The layers of these kinds, by name, in the order they run."""
    by_name = {
        name: module
        for name, module in model.named_modules()
        if kind(name) in kinds and isinstance(module, nn.Linear | nn.Conv2d)
    }
    return {name: by_name[name] for name in sorted(by_name, key=order)}


def in_front(model: ConvNeXt, name: str) -> Standardise | ResponseScale | None:
    """The module that can absorb the scale of a layer's input, or None."""
    if kind(name) not in ("pwconv1", "pwconv2", "downsampling"):
        return None
    parent = model.get_submodule(part(name))
    if isinstance(parent, FoldedBlock):
        return parent.norm if kind(name) == "pwconv1" else parent.grn
    before = next(iter(parent.children()))
    return before if type(before) is Standardise else None  # a ScaledNorm adds its shift behind the scale


def factors(model: ConvNeXt, largest: Mapping[str, Floats], alpha: float) -> dict[str, Floats]:
    """The factor s of each layer whose input can be scaled (C,), with a geometric mean of one.

    Args:
        model: in a folded form.
        largest: of each layer, the largest |x| of every input channel (C,).
        alpha: share of the spread that moves into the weights; 0 gives no factors.
    """
    result: dict[str, Floats] = {}
    for name, seen in largest.items():
        if not alpha or in_front(model, name) is None:
            continue
        weight = _layer(model, name).weight.detach().double()  # the last bits of an fp32 logarithm depend on the CPU
        heavy = weight.abs().amax(dim=[0, *range(2, weight.ndim)]).numpy()
        log_s = alpha * np.log(np.maximum(seen, LEAST, dtype=np.float64))
        log_s -= (1 - alpha) * np.log(np.maximum(heavy, LEAST))
        result[name] = np.exp(log_s - log_s.mean()).astype(np.float32)
    return result


def smooth(model: ConvNeXt, scales: Mapping[str, Floats]) -> None:
    """Fold the factors into a network, in place; its function does not change."""
    for name, s in scales.items():
        layer, factor = _layer(model, name), torch.from_numpy(s).to(_layer(model, name).weight.dtype)
        layer.weight = nn.Parameter(layer.weight * factor.view(1, -1, *[1] * (layer.weight.ndim - 2)), False)
        before = in_front(model, name)
        if isinstance(before, Standardise):
            before.scale = _put(1 / factor)
        elif before is not None:
            inverse = (1 / factor).view(before.gamma.shape)
            before.gamma = nn.Parameter(before.gamma * inverse, False)
            before.scale = _put(inverse)


def _layer(model: ConvNeXt, name: str) -> Layer:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    return layer


def _put(scale: Tensor) -> nn.Parameter:
    return nn.Parameter(scale, requires_grad=False)
