"""The architecture of weights in the layout of this tool, from their names and shapes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from msgspec.structs import replace

from exporter.errors import BadRequest
from exporter.model.head import Head
from exporter.model.variants import VARIANTS, Architecture

if TYPE_CHECKING:
    from torch import Tensor


def architecture(state: Mapping[str, Tensor], head: Head, norm: str = "") -> Architecture:
    """Derive the architecture from names and shapes of weights in the layout of this tool.

    Args:
        state: the weights.
        head: what stands behind the pooling.
        norm: kind of the norms where these have no bias; "" to look it up.

    Raises: BadRequest when required weights are missing, or the kind of the norm is not known.
    """
    try:
        depths = block_counts(state)
        stages = range(len(depths))
        blocks = [state[f"stages.{stage}.0.dwconv.weight"] for stage in stages]
        first = state["downsample_layers.0.0.weight"]
        stem = _stem(state)
        kernels = tuple(int(weight.shape[-1]) for weight in blocks)
        arch = Architecture(
            depths=depths,
            dims=tuple(int(weight.shape[0]) for weight in blocks),
            in_chans=int(first.shape[1]),
            stem=stem,  # type: ignore[arg-type]
            patch=int(first.shape[-1]) if stem == "patch" else 4,
            stem_norm=any(f"downsample_layers.0.{i}.weight" in state for i in (1, 2, 3)),
            stem_downsample=stem == "patch" and "downsample_layers.0.3.weight" in state,
            kernels=() if set(kernels) == {7} else kernels,
            layer_scale="stages.0.0.gamma" in state,
            grn="stages.0.0.grn.gamma" in state,
            norm="layer" if "stages.0.0.norm.bias" in state else "rms",
            head_norm={"norm.weight", "norm_pre.weight"} & state.keys() != set(),
            head_norm_first="norm_pre.weight" in state,
            head_layers=head.layers,
            heads=head.heads,
            projection=head.projection,
            pool="catavgmax"
            if "norm_pre.weight" in state and _head_width(state, head) == 2 * len(blocks[-1])
            else "avg",
            stage_norms=tuple(stage for stage in stages if f"stage_norms.{stage}.weight" in state),
        )
    except (KeyError, IndexError) as error:
        raise BadRequest(f"incomplete ConvNeXt weights: no {error.args[0]}; save the whole state dict") from None
    if any(side % 2 == 0 for side in kernels):
        raise BadRequest(f"depthwise kernels of {kernels} pixels: expected odd ones, as feature maps keep their size")
    return _with_norm(arch, norm)


def block_counts(state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Blocks of each stage.

    Raises: BadRequest when stages or blocks are missing.
    """
    blocks = {(int(m[1]), int(m[2])) for key in state if (m := re.match(r"stages\.(\d{1,4})\.(\d{1,4})\.", key))}
    counts = Counter(stage for stage, _ in blocks)
    depths = tuple(counts[stage] for stage in range(len(counts)))
    last = {stage: max(block for of, block in blocks if of == stage) for stage, _ in blocks}
    whole = {(stage, block) for stage in range(max(last, default=0) + 1) for block in range(last.get(stage, 0) + 1)}
    if missing := sorted(whole - blocks):
        stage, block = missing[0]
        raise BadRequest(
            f"the weights have no block {block} of stage {stage} (counted from 0); save the whole state dict"
        )
    return depths


def numbered(state: Mapping[str, Tensor], layers: str) -> list[Tensor]:
    """The weights of `layers.0`, `layers.1` and so on.

    Raises: BadRequest for a number that is missing before the last.
    """
    pattern = re.compile(rf"{re.escape(layers)}\.(\d+)\.weight")
    weights = {int(match[1]): state[key] for key in state if (match := pattern.fullmatch(key))}
    if missing := [number for number in range(max(weights, default=0)) if number not in weights]:
        raise BadRequest(
            f"{layers}.{missing[0]} is missing, although {layers}.{max(weights)} is there; save the whole model"
        )
    return [weights[number] for number in sorted(weights)]


def _head_width(state: Mapping[str, Tensor], head: Head) -> int:
    """Inputs of the head, 0 for a backbone."""
    name = "head_layers.0.weight" if head.layers else "head.weight"
    return int(state[name].shape[-1]) if name in state else 0


def _stem(state: Mapping[str, Tensor]) -> str:
    first, fourth = state["downsample_layers.0.0.weight"], state.get("downsample_layers.0.3.weight")
    second = state.get("downsample_layers.0.1.weight")
    if second is not None and second.ndim == 4:
        return "overlap" if first.shape[0] == state["stages.0.0.dwconv.weight"].shape[0] else "overlap_tiered"
    return "overlap_act" if fourth is not None and fourth.ndim == 1 else "patch"


def _with_norm(arch: Architecture, norm: str) -> Architecture:
    """Take the kind of a norm without bias and its epsilon from the table of variants: shapes do not show them.

    Raises: BadRequest where the table has no network of this shape.
    """
    if arch.norm != "layer" and norm:
        return replace(arch, norm=norm)
    shape = (arch.depths, arch.dims, arch.stem, arch.grn)
    for variant in VARIANTS.values():
        known = variant.architecture
        if (known.depths, known.dims, known.stem, known.grn) == shape and (known.norm == "layer") == (
            arch.norm == "layer"
        ):
            return replace(arch, norm=known.norm, norm_eps=known.norm_eps)
    if arch.norm != "layer":
        raise BadRequest("the norms have no bias: RMSNorm (--norm rms) or timm's SimpleNorm (--norm simple)? give one")
    return arch
