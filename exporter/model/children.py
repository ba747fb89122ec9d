"""Names of networks that were taken apart: a Sequential of `model.children()`, of `model.features` or of a part of it
numbers the parts of a network."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

_COMPILED = "_orig_mod."  # torch.compile puts it in front of what a compiled module has


class _Parts(NamedTuple):
    """The parts of a library's network in their order.

    names: the last takes whatever follows in the Sequential.
    first: the number of the part that has the first block, where the Sequential begins with the network.
    block: the first block's depthwise weight in this part, as an expression.
    """

    names: tuple[str, ...]
    first: int
    block: str


_HUGGINGFACE = _Parts(("embeddings", "encoder", "layernorm", "classifier"), 1, r"stages\.0\.layers\.0\.dwconv\.weight")
_OTHERS = (
    _Parts(("stem", "stages", "norm_pre", "head"), 1, r"0\.blocks\.0\.conv_dw\.weight"),  # timm
    _Parts(("features", "avgpool", "classifier"), 0, r"1\.0\.block\.0\.weight"),  # torchvision
    _Parts((*(f"features.{i}" for i in range(8)), "classifier"), 1, r"0\.block\.0\.weight"),  # torchvision's features
    _Parts(("stem", *(f"stages.{i}" for i in range(4)), "head"), 1, r"blocks\.0\.conv_dw\.weight"),  # timm's stages
    _Parts(("downsample_layers", "stages", "norm", "head"), 1, r"0\.0\.dwconv\.weight"),  # facebookresearch
)


def named(keys: Iterable[str], is_known: bool) -> dict[str, str]:
    """The names that libraries give to numbered parts, by the names in the file; {} where none is numbered.

    `0.1.0.block.0.weight` is torchvision's `features.1.0.block.0.weight`. Numbers beyond the last part are layers of
    the classifier: `3.weight` is `classifier.3.weight`.

    Args:
        keys: the names in the file.
        is_known: whether a library's own names are among them.
    """
    names = {key: key.replace(_COMPILED, "") for key in keys}
    for library in (_HUGGINGFACE,) if is_known else (_HUGGINGFACE, *_OTHERS):
        pattern = re.compile(rf"((?:[^.]+\.)*?)([0-9]{{1,3}})\.{library.block}")
        offsets: dict[str, int] = {}  # of each network in the file, by its prefix
        for found in filter(None, map(pattern.fullmatch, names.values())):
            offset = int(found[2]) - library.first
            offsets[found[1]] = min(offset, offsets.get(found[1], offset))
        for prefix, offset in offsets.items():
            _rename(names, prefix, library.names, offset)
        if offsets:
            break
    return {key: name for key, name in names.items() if name != key}


def _rename(names: dict[str, str], prefix: str, parts: tuple[str, ...], offset: int) -> None:
    """Give the numbered parts behind a prefix their names; the first has the number `offset`."""
    for key, name in names.items():
        number, _, rest = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and re.fullmatch("[0-9]{1,3}", number) and int(number) >= offset >= 0:
            place, last = int(number) - offset, len(parts) - 1
            beyond = place > last or (place == last and "." not in rest)  # a layer, not a module of the library
            names[key] = f"{prefix}{parts[last]}.{number}.{rest}" if beyond else f"{prefix}{parts[place]}.{rest}"
