"""Names of networks that were taken apart: `nn.Sequential(*model.children())` numbers the parts of a network."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple


class _Parts(NamedTuple):
    """The parts of a library's network in their order; the last takes whatever follows in the Sequential.

    block: the first block's depthwise weight behind the Sequential's own name, as an expression.
    """

    names: tuple[str, ...]
    block: str


_LIBRARIES = (
    _Parts(("stem", "stages", "norm_pre", "head"), r"1\.0\.blocks\.0\.conv_dw\.weight"),  # timm
    _Parts(("features", "avgpool", "classifier"), r"0\.1\.0\.block\.0\.weight"),  # torchvision
    _Parts(("embeddings", "encoder", "layernorm", "classifier"), r"1\.stages\.0\.layers\.0\.dwconv\.weight"),
    _Parts(("downsample_layers", "stages", "norm", "head"), r"1\.0\.0\.dwconv\.weight"),  # facebookresearch
)


def named(keys: Iterable[str]) -> dict[str, str]:
    """The names that libraries give to numbered parts, by the names in the file; {} where no part is numbered.

    `0.1.0.block.0.weight` is torchvision's `features.1.0.block.0.weight`. Numbers beyond the last part are layers of
    the classifier: `3.weight` is `classifier.3.weight`.
    """
    keys = list(keys)
    names: dict[str, str] = {}
    for library in _LIBRARIES:
        for key in keys:
            if found := re.fullmatch(rf"((?:[^.]+\.)*?){library.block}", key):
                names |= _renamed(keys, found[1], library.names)
    return names


def _renamed(keys: Iterable[str], prefix: str, names: tuple[str, ...]) -> dict[str, str]:
    renamed = {}
    for key in keys:
        number, _, rest = key.removeprefix(prefix).partition(".")
        if key.startswith(prefix) and re.fullmatch("[0-9]{1,3}", number):
            beyond = int(number) >= len(names)
            renamed[key] = f"{prefix}{names[-1]}.{number}.{rest}" if beyond else f"{prefix}{names[int(number)]}.{rest}"
    return renamed
