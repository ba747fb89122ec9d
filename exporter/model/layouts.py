"""The four public key layouts of ConvNeXt weights, and detection of layout and architecture from keys and shapes.

The layout of this tool is facebookresearch's, with flat vectors in GRN, `norm_pre` for a norm before the pooling and
`head_hidden` for the hidden layer of a head.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from exporter.errors import BadRequest, some
from exporter.model.variants import VARIANTS, Architecture

if TYPE_CHECKING:
    from torch import Tensor

Rules = tuple[tuple[str, str], ...]

_FACEBOOK: Rules = (
    (r"stem\.", r"downsample_layers.0.0."),
    (r"blocks\.", r"stages.0."),
    (r"(downsample_layers|stages|norm|norm_pre|head|head_hidden)\.", r"\1."),
)
_TIMM: Rules = (
    (r"stem\.", r"downsample_layers.0."),
    (r"stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
    (r"stages\.(\d+)\.blocks\.(\d+)\.conv_dw\.", r"stages.\1.\2.dwconv."),
    (r"stages\.(\d+)\.blocks\.(\d+)\.mlp\.fc([12])\.", r"stages.\1.\2.pwconv\3."),
    (r"stages\.(\d+)\.blocks\.(\d+)\.mlp\.grn\.weight$", r"stages.\1.\2.grn.gamma"),
    (r"stages\.(\d+)\.blocks\.(\d+)\.mlp\.grn\.bias$", r"stages.\1.\2.grn.beta"),
    (r"stages\.(\d+)\.blocks\.(\d+)\.", r"stages.\1.\2."),
    (r"norm_pre\.", r"norm_pre."),
    (r"head\.norm\.", r"norm."),
    (r"head\.pre_logits\.fc\.", r"head_hidden."),
    (r"head\.fc\.", r"head."),
)
_TORCHVISION: Rules = (
    (r"features\.0\.", r"downsample_layers.0."),
    (r"features\.(\d+)\.(\d+)\.block\.0\.", r"@stages.\1.\2.dwconv."),
    (r"features\.(\d+)\.(\d+)\.block\.2\.", r"@stages.\1.\2.norm."),
    (r"features\.(\d+)\.(\d+)\.block\.3\.", r"@stages.\1.\2.pwconv1."),
    (r"features\.(\d+)\.(\d+)\.block\.5\.", r"@stages.\1.\2.pwconv2."),
    (r"features\.(\d+)\.(\d+)\.layer_scale$", r"@stages.\1.\2.gamma"),
    (r"features\.(\d+)\.", r"@downsample_layers.\1."),
    (r"classifier\.0\.", r"norm."),
    (r"classifier\.2\.", r"head."),
)
_HF_BLOCK = r"(?:encoder\.)?stages\.(\d+)\.layers\.(\d+)\."
_HUGGINGFACE: Rules = (
    (r"embeddings\.patch_embeddings\.", r"downsample_layers.0.0."),
    (r"embeddings\.layernorm\.", r"downsample_layers.0.1."),
    (_HF_BLOCK + r"layer_scale_parameter$", r"stages.\1.\2.gamma"),
    (_HF_BLOCK + r"layernorm\.", r"stages.\1.\2.norm."),
    (_HF_BLOCK + r"grn\.weight$", r"stages.\1.\2.grn.gamma"),
    (_HF_BLOCK + r"grn\.bias$", r"stages.\1.\2.grn.beta"),
    (_HF_BLOCK, r"stages.\1.\2."),
    (r"(?:encoder\.)?stages\.(\d+)\.downsampling_layer\.", r"downsample_layers.\1."),
    (r"layernorm\.", r"norm."),
    (r"classifier\.", r"head."),
)
# The key that only this layout has, and how its keys become ours.
LAYOUTS: dict[str, tuple[str, Rules]] = {
    "huggingface": (r"(convnext(v2)?\.)?embeddings\.patch_embeddings\.weight", _HUGGINGFACE),
    "torchvision": (r"features\.0\.0\.weight", _TORCHVISION),
    "timm": (r"stages\.0\.blocks\.0\.conv_dw\.weight", _TIMM),
    "facebookresearch": (r"(stages\.0\.0|blocks\.0)\.dwconv\.weight", _FACEBOOK),
}


def recognise(keys: list[str]) -> str:
    """Detect the layout of these keys.

    Raises: BadRequest, with the first keys, when they match no layout.
    """
    for layout, (mark, _) in LAYOUTS.items():
        if any(re.fullmatch(mark, key) for key in keys):
            return layout
    raise BadRequest(
        f"no ConvNeXt weights: {len(keys)} keys ({some(keys)}), none of the layouts {', '.join(sorted(LAYOUTS))}; "
        "convert the checkpoint or check the file"
    )


def to_ours(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Convert a state dict to the layout of this tool; return it with the name of its old layout. Tensors are views.

    Raises: BadRequest for unexpected keys.
    """
    layout = recognise(list(state))
    ours: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in state.items():
        name = _rename(key, LAYOUTS[layout][1], layout)
        if name is None or name in ours:
            unknown.append(key)
        else:
            ours[name] = _reshape(name, tensor)
    if unknown:
        raise BadRequest(f"unexpected keys in {layout} weights: {len(unknown)} ({some(unknown)})")
    return ours, layout


def _rename(key: str, rules: Rules, layout: str) -> str | None:
    if layout == "huggingface":
        key = re.sub(r"^convnext(v2)?\.", "", key)
    for pattern, ours in rules:
        if re.match(pattern, key):
            return _halve(re.sub("^" + pattern, ours, key))
    return None


def _halve(key: str) -> str:
    """Torchvision counts stages and downsampling in one row: stage s is features[2s+1], downsampling s [2s]."""
    if not key.startswith("@"):
        return key
    kind, index, rest = key[1:].split(".", 2)
    return f"{kind}.{int(index) // 2}.{rest}"


def _reshape(name: str, tensor: Tensor) -> Tensor:
    if name.endswith((".gamma", ".beta")):  # (1, 1, 1, C) and (C, 1, 1) in some layouts
        return tensor.reshape(-1)
    if re.search(r"(pwconv[12]|head|head_hidden)\.weight$", name) and tensor.shape[2:] == (1, 1):
        return tensor[:, :, 0, 0]  # a 1×1 convolution in some
    return tensor


def architecture(state: Mapping[str, Tensor]) -> Architecture:
    """Derive the architecture from names and shapes of weights in the layout of this tool.

    Raises: BadRequest when required weights are missing.
    """
    try:
        depths = _depths(state)
        dims = tuple(int(state[f"stages.{stage}.0.dwconv.weight"].shape[0]) for stage in range(len(depths)))
        hidden = state.get("head_hidden.weight")
        arch = Architecture(
            depths=depths,
            dims=dims,
            stem=_stem(state),  # type: ignore[arg-type]
            layer_scale="stages.0.0.gamma" in state,
            grn="stages.0.0.grn.gamma" in state,
            norm="layer" if "stages.0.0.norm.bias" in state else "rms",
            head_norm_first="norm_pre.weight" in state,
            head_hidden=None if hidden is None else int(hidden.shape[0]),
            in_chans=int(state["downsample_layers.0.0.weight"].shape[1]),
        )
    except (KeyError, IndexError) as error:
        raise BadRequest(f"incomplete ConvNeXt weights: no {error.args[0]}") from None
    return _with_published_norm(arch)


def _depths(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Blocks of each stage.

    Raises: BadRequest when stages or blocks are missing, or there are not four stages (or one, isotropic).
    """
    blocks = {(int(m[1]), int(m[2])) for key in state if (m := re.match(r"stages\.(\d{1,4})\.(\d{1,4})\.", key))}
    counts = Counter(stage for stage, _ in blocks)
    depths = tuple(counts[stage] for stage in range(len(counts)))
    whole = {(stage, block) for stage, depth in enumerate(depths) for block in range(depth)}
    if blocks != whole or len(depths) not in (1, 4):
        raise BadRequest(f"a ConvNeXt has four whole stages, or one if isotropic; found blocks {depths}, some missing")
    return depths


def _stem(state: Mapping[str, Tensor]) -> str:
    first = state["downsample_layers.0.0.weight"]
    if first.shape[-1] != 3:
        return "patch"
    if "downsample_layers.0.3.weight" in state:
        return "overlap_act"
    return "overlap" if first.shape[0] == state["stages.0.0.dwconv.weight"].shape[0] else "overlap_tiered"


def _with_published_norm(arch: Architecture) -> Architecture:
    """Take the kind of a norm without bias and its epsilon from the table of variants: shapes do not show them."""
    from msgspec.structs import replace

    for variant in VARIANTS.values():
        known = variant.architecture
        hidden = {"norm": arch.norm, "norm_eps": arch.norm_eps, "layer_scale": arch.layer_scale}
        hidden |= {"in_chans": arch.in_chans}
        if replace(known, **hidden) == arch and (known.norm == "layer") == (arch.norm == "layer"):
            return replace(arch, norm=known.norm, norm_eps=known.norm_eps)
    return arch
