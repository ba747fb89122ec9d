"""Finds the head of UPerNet beside a network, as transformers and mmsegmentation name it, and folds its batch norms.

facebookresearch trained with mmsegmentation, so its checkpoints have the same head. The heads of other segmenters are
recognised by name, to refuse them by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

from exporter.errors import BadRequest, some
from exporter.model.head import BATCH_NORM_EPS
from exporter.model.shapes import numbered
from exporter.model.variants import Architecture, Decoder

if TYPE_CHECKING:
    from torch import Tensor

    from exporter.model.layouts import Converted

HEAD = "decode_head."
AUXILIARY = "auxiliary_head."
SCALES = (1, 2, 3, 6)  # of transformers, mmsegmentation and all published weights
_LAYER = r"(?P<layer>psp_modules\.\d+|lateral_convs\.\d+|fpn_convs\.\d+|bottleneck|fpn_bottleneck)"
_CONV = re.compile(rf"{_LAYER}(\.1)?(\.conv)?\.(?P<leaf>weight|bias)")
_NORM = re.compile(rf"{_LAYER}(\.1)?\.(batch_norm|bn)\.(?P<leaf>weight|bias|running_mean|running_var)")
_CLASSIFIER = re.compile(r"(?P<layer>classifier|conv_seg)\.(?P<leaf>weight|bias)")
_OTHERS = {
    "Mask2Former": r"(decode_head|panoptic_head|transformer_module)\.(.*\.)?level_embed|.*transformer_feat_level|"
    r".*pixel_decoder\.(encoder|adapter|level)",
    "OneFormer": r".*(task_encoder|text_mapper)",
    "MaskFormer": r".*(transformer_decoder|transformer_module|mask_embed)",
    "SegFormer": r"(decode_head\.)(linear_c|linear_fuse|fusion_conv)",
    "DPT": r"(neck\.reassemble|decode_head\.reassemble)",
    "Semantic FPN": r"decode_head\.scale_heads",
    "DeepLab": r"decode_head\.(aspp_modules|image_pool)",
    "PSPNet": r"decode_head\.(psp_modules|psp)",
    "FCN": r"decode_head\.convs",
}
"""Other heads of segmenters: what their tensors are named, the more special first."""


def take(converted: Converted, rest: dict[str, Tensor]) -> None:
    """Move UPerNet's head from the rest into the network, with its batch norms folded.

    Args:
        converted: the network; its state, modules, notes and `other_head` are changed.
        rest: the tensors that are not the network's, by the names of the file; those of the head are removed.

    Raises: BadRequest for a head of UPerNet with missing or unexpected tensors.
    """
    place = _place(rest, converted.prefix)
    if place is None:
        converted.other_head = _other_head(rest)
        return
    tensors = {key.removeprefix(place): rest.pop(key) for key in [key for key in rest if key.startswith(place)]}
    convs, norms = _sorted(tensors)
    for layer, (path, leaves) in convs.items():
        converted.state |= {
            f"{HEAD}{layer}.{leaf}": tensor for leaf, tensor in _folded(layer, leaves, norms.get(layer)).items()
        }
        converted.modules[f"{HEAD}{layer}"] = f"{place}{path}"
    auxiliary = place.removesuffix(HEAD) + AUXILIARY
    dropped = [key for key in rest if key.startswith(auxiliary)]
    for key in dropped:
        del rest[key]
    if dropped:
        converted.notes.append(f"dropped {auxiliary.rstrip('.')} ({len(dropped)} tensors): it is only used in training")


def _place(rest: Mapping[str, Tensor], prefix: str) -> str | None:
    """What the names of UPerNet's head begin with, or None where there is none."""
    parts = prefix.split(".")[:-1]
    for count in range(len(parts), -1, -1):
        place = "".join(f"{part}." for part in parts[:count]) + HEAD
        if any(key.startswith(f"{place}fpn_bottleneck.") for key in rest):
            return place
    return None


def _other_head(rest: Mapping[str, Tensor]) -> str:
    """The name of the segmenter whose head lies beside the network, or ""."""
    for name, pattern in _OTHERS.items():
        if any(re.search(rf"(^|\.){pattern}", key) for key in rest):
            return name
    return "unknown" if any(re.search(rf"(^|\.){re.escape(HEAD)}", key) for key in rest) else ""


Layers = dict[str, tuple[str, dict[str, "Tensor"]]]


def _sorted(tensors: Mapping[str, Tensor]) -> tuple[Layers, dict[str, dict[str, Tensor]]]:
    """The convolutions, each with the path of its module, and the batch norms behind them, by our name of the layer.

    Raises: BadRequest for other tensors, and for a convolution that has neither a batch norm nor a bias.
    """
    convs: Layers = {}
    norms: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        if match := _NORM.fullmatch(key):
            norms.setdefault(match["layer"], {})[match["leaf"]] = tensor
        elif match := _CONV.fullmatch(key) or _CLASSIFIER.fullmatch(key):
            layer = match["layer"].replace("conv_seg", "classifier")
            path = key.removesuffix(f".{match['leaf']}").removesuffix(".conv")
            convs.setdefault(layer, (path, {}))[1][match["leaf"]] = tensor
        else:
            unknown.append(f"{HEAD}{key}")
    if unknown:
        raise BadRequest(f"unexpected keys in UPerNet's head: {len(unknown)} ({some(unknown)})")
    if alone := sorted(norms.keys() - convs.keys()):
        raise BadRequest(f"UPerNet's head has batch norms without convolutions ({some(alone)}); save the whole model")
    without_either = sorted(
        layer for layer, (_, leaves) in convs.items() if layer not in norms and "bias" not in leaves
    )
    if without_either:
        raise BadRequest(
            f"UPerNet's head has neither a batch norm nor a bias in {some(without_either)}; save the whole model"
        )
    return convs, norms


def _folded(layer: str, conv: Mapping[str, Tensor], norm: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Weight and bias of a convolution with the batch norm behind it folded in, in double precision:
    γ·(W·x + b − μ)/√(σ² + ε) + β (Ioffe and Szegedy, arXiv 1502.03167, algorithm 2).

    Raises: BadRequest for missing tensors.
    """
    import torch

    missing = {"weight"} - conv.keys() | (
        {"weight", "bias", "running_mean", "running_var"} - norm.keys() if norm else set()
    )
    if missing:
        raise BadRequest(f"UPerNet's {layer} has no {some(sorted(missing))}; save the whole model")
    weight = conv["weight"].double()
    bias = conv["bias"].double() if "bias" in conv else weight.new_zeros(len(weight))
    if norm:
        scale = norm["weight"].double() / (norm["running_var"].double() + BATCH_NORM_EPS).sqrt()
        weight = weight * scale.view(-1, 1, 1, 1)
        bias = (bias - norm["running_mean"].double()) * scale + norm["bias"].double()
    return {"weight": weight.to(torch.float32), "bias": bias.to(torch.float32)}


def decoder_of(state: Mapping[str, Tensor], arch: Architecture, stated: Mapping[str, Any]) -> Decoder | None:
    """The head of weights in the layout of this tool, from their shapes and what a config states; None without one.

    Args:
        state: the weights.
        arch: the network in front of the head.
        stated: `decoder_width`, `decoder_levels`, `pool_scales` and `align_corners`, if they are stated.

    Raises: BadRequest for a head that does not fit the network or the config, and for pooling that is not known.
    """
    if f"{HEAD}fpn_bottleneck.weight" not in state:
        return None
    pooled = numbered(state, f"{HEAD}psp_modules")
    laterals = numbered(state, f"{HEAD}lateral_convs")
    if not pooled or not laterals or f"{HEAD}classifier.weight" not in state:
        raise BadRequest("UPerNet's head lacks psp_modules, lateral_convs or its classifier; save the whole model")
    if stated.get("align_corners"):
        raise BadRequest("the config says align_corners True for UPerNet's head; not supported")
    width = len(state[f"{HEAD}fpn_bottleneck.weight"])
    if stated.get("decoder_width", width) != width:
        raise BadRequest(
            f"the config says hidden_size {stated['decoder_width']}, but the weights have {width}; correct one of them"
        )
    scales = tuple(stated.get("pool_scales") or (SCALES if len(pooled) == len(SCALES) else ()))
    if len(scales) != len(pooled):
        said = f"pool_scales {list(scales)}" if scales else "no pool_scales"
        raise BadRequest(
            f"the config says {said}, but the weights have {len(pooled)} pooling branches, and do not contain their "
            "scales; correct pool_scales in the configuration (config.json, or meta of the checkpoint)"
        )
    dims = [int(weight.shape[1]) for weight in (*laterals, pooled[0])]
    classes, levels = len(state[f"{HEAD}classifier.weight"]), _levels(dims, arch)
    if stated.get("decoder_levels", levels) != levels:
        names = [[f"stage{level + 1}" for level in one] for one in (stated["decoder_levels"], levels)]
        raise BadRequest(f"the config says out_features {names[0]}, but the weights are of {names[1]}; correct one")
    return Decoder(classes=classes, width=width, levels=levels, scales=scales)


def _levels(dims: Sequence[int], arch: Architecture) -> tuple[int, ...]:
    """The stages whose maps have these widths; where several fit, those that have a norm of their own.

    Raises: BadRequest where none or several fit.
    """
    stages = range(len(arch.dims))
    fitting = [
        some_stages
        for some_stages in combinations(stages, len(dims))
        if [arch.dims[i] for i in some_stages] == list(dims)
    ]
    if len(fitting) > 1:
        fitting = [one for one in fitting if one == arch.stage_norms]
    if len(fitting) != 1:
        raise BadRequest(f"UPerNet's head takes maps of {dims} channels, and the stages have {list(arch.dims)}")
    return fitting[0]
