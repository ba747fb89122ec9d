"""Names of ConvNeXt's modules: the kind, part and order of a layer are derived from its name.

Modules are named as in the paper's code (facebookresearch/ConvNeXt, `models/convnext.py`): `downsample_layers.K` stands
in front of stage K and is the stem for K = 0; `stages.I.J` is block J of stage I. An operator of a graph is named
`MODULE/OPERATOR`. Only this file parses such names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Sequence
from itertools import chain

KINDS = {
    "stem": r"downsample_layers\.0\.\d+",
    "depthwise": r"stages\.\d+\.\d+\.dwconv",
    "pwconv1": r"stages\.\d+\.\d+\.pwconv1",
    "pwconv2": r"stages\.\d+\.\d+\.pwconv2",
    "downsampling": r"downsample_layers\.[1-9]\d*\.\d+",
    "head": r"head",
    "decoder": r"decode_head\.(?:(?:lateral|fpn)_convs\.\d+|fpn_bottleneck\.(?:own|products\.\d+))",
}
"""Kinds of layers with weights, each with the pattern of its modules' names."""
PICTURE = "picture"
_BLOCK = r"stages\.\d+\.\d+(?=[./]|$)"
_PART = rf"downsample_layers\.\d+(?=[./]|$)|{_BLOCK}"
_TAIL = r"norm_pre|norm|head_layers|heads|head|decode_head|neck"
_OUTERMOST = r"(?:stages|downsample_layers|stage_norms|norm_pre|norm|head_layers|head|decode_head|neck)[\w.]*(?=/)"
_DECODER = r"decode_head\.(?:\w+_convs\.\d+|\w+)(?=[./]|$)"
_SPATIAL = r"decode_head\.(pools\.\d+|\w+\.matrix)"


def kind(module: str) -> str | None:
    """The kind of a layer, one of `KINDS`, or None for another module."""
    return next((name for name, pattern in KINDS.items() if re.fullmatch(pattern, module)), None)


def kinds_of(name: str) -> frozenset[str]:
    """The kinds of the layers with weights in a part of the network (`parts`, `decoder_parts`)."""
    layers = ("dwconv", "pwconv1", "pwconv2") if block(name) else ("0", "1", "own")
    modules = [name, *(f"{name}.{layer}" for layer in layers)]
    return frozenset(found for module in modules if (found := kind(module)))


def part(module: str) -> str:
    """The part of the network that a layer belongs to: its block (`stages.2.0`), its downsampling layer, its
    convolution of UPerNet's head (`decode_head.fpn_convs.0`), or the head."""
    if found := re.match(_DECODER, module):
        return found[0]
    return module.rpartition(".")[0] or module


def block(name: str) -> str:
    """The block that a module or operator belongs to (`stages.2.0`), or ""."""
    found = re.match(_BLOCK, name)
    return found[0] if found else ""


def is_within(name: str, depths: Sequence[int]) -> bool:
    """Whether a network with `depths` blocks in its stages has this module or weight of a deeper network."""
    place = re.match(r"stages\.(\d+)\.(\d+)(?=[./]|$)", name)
    return place is None or int(place[2]) < depths[int(place[1])]


def group(module: str) -> str:
    """The block, downsampling layer, or outermost module that a module belongs to; "" for the name ""."""
    found = re.match(_PART, module)
    return found[0] if found else module.partition(".")[0]


def parts(depths: Sequence[int]) -> list[str]:
    """The parts of a network with `depths` blocks in its stages, in the order they run: downsampling layers, blocks,
    and `head` for all that follows the last block."""
    before = [[f"downsample_layers.{i}", *(f"stages.{i}.{j}" for j in range(depth))] for i, depth in enumerate(depths)]
    return [*chain.from_iterable(before), "head"]


def decoder_parts(levels: int) -> list[str]:
    """The parts of UPerNet's head over the maps of so many stages that can be quantized."""
    convolutions = [f"decode_head.{name}.{i}" for name in ("lateral_convs", "fpn_convs") for i in range(levels - 1)]
    return [*convolutions, "decode_head.fpn_bottleneck"]


def is_in(module: str, wanted: Collection[str]) -> bool:
    """Whether a module belongs to one of these parts (`parts`, `decoder_parts`)."""
    outermost = group(module)
    if outermost in wanted or part(module) in wanted:
        return True
    return "head" in wanted and re.fullmatch(_TAIL, outermost) is not None


def order(module: str) -> tuple[float, int, int, str]:
    """A key that sorts layers in the order they run: downsampling layer K before stage K, the head last."""
    first, *rest = module.split(".")
    if first not in ("stages", "downsample_layers"):
        return math.inf, int(first == "head"), 0, module
    return int(rest[0]), int(first == "stages"), int(rest[1]), module


def is_norm(module: str) -> bool:
    """Whether a module is a norm: by its name, the first of a downsampling layer, or in the stem any but the first,
    where some networks have a second convolution too."""
    if module.rpartition(".")[2].startswith("norm") or module.startswith("stage_norms."):
        return True
    found = re.fullmatch(r"downsample_layers\.(\d+)\.(\d+)", module)
    return found is not None and (found[1] == "0") == (found[2] != "0")


def is_response_norm(module: str) -> bool:
    """Whether a module is a Global Response Normalization."""
    return module.rpartition(".")[2] == "grn"


def is_spatial(module: str) -> bool:
    """Whether a module computes weights over the rows and columns of a map (`exporter.model.upernet.GridPool`,
    `exporter.model.multiscale.ShiftedResize`)."""
    return re.fullmatch(_SPATIAL, module) is not None


def is_picture(module: str) -> bool:
    """Whether a module resizes pictures in front of the network."""
    return module == PICTURE


def module_of(operators: str) -> str:
    """The module of the first operator in a text of one or more names, or "".

    The operator that computes an output has the name of the output, so `logits` belongs to the head.
    """
    if operators.startswith(("logits", "embedding")):
        return "head" if operators.startswith("logits") else "norm"
    found = re.search(_OUTERMOST, operators)
    return found[0] if found else ""


def last_operators(operators: Iterable[str]) -> dict[str, str]:
    """The last operator of each downsampling layer (`downsample_layers.1`) and block (`stages.2.0`), which computes its
    output.

    Args:
        operators: names, in the order they run.
    """
    found = ((re.match(_PART, name), name) for name in operators)
    return {match[0]: name for match, name in found if match}
