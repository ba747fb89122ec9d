"""Reads one file of weights: safetensors, or a PyTorch file, whose code never runs."""

from __future__ import annotations

import re
import struct
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.errors import BadRequest, first_line, some
from exporter.progress import note

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
BOMB_BYTES = 2**20
WRAPPERS = ("model", "state_dict", "model_ema", "state_dict_ema", "module")

# What torch raises over damaged files of its two formats.
_DAMAGE = (
    *(RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError, OSError),
    *(struct.error, ArithmeticError, MemoryError),
)


@dataclass(frozen=True)
class Content:
    """What one checkpoint holds."""

    tensors: dict[str, Tensor]
    beside: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read(path: Path, part: str = "") -> Content:
    """Read the tensors of a checkpoint by name, without the usual wrappers (`model`, `state_dict`, …).

    Args:
        path: a `.safetensors`, `.pth`, `.pt` or `.bin` file.
        part: the wrapper to take (`model_ema`) when there are several; "" takes the first of WRAPPERS.

    Raises: BadRequest for a file that is missing, truncated, no checkpoint, or carries code.
    """
    if not path.is_file():
        raise BadRequest(f"{path}: no such checkpoint")
    if path.suffix not in SUFFIXES:
        raise BadRequest(f"{path}: expected a file of weights ({', '.join(SUFFIXES)})")
    content = _safetensors(path) if path.suffix == ".safetensors" else _torch(path)
    return Content(_tensors(path, _unwrap(path, content, part)))


def _safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, ValueError, OSError) as error:
        raise BadRequest(f"{path}: truncated or no safetensors file ({first_line(error)}); fetch it again") from None


def _torch(path: Path) -> Any:
    import pickle

    import torch

    _refuse_bomb(path)
    try:
        with torch.serialization.safe_globals(_allowed_types()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", str(error))
        if found:
            raise BadRequest(
                f"{path}: refused, it carries code ({found[1]}) and nothing of it was run; "
                "convert it to .safetensors where it is trusted"
            ) from None
        raise BadRequest(f"{path}: truncated or no PyTorch file ({first_line(error)}); fetch it again") from None
    except _DAMAGE as error:
        raise BadRequest(f"{path}: truncated or no PyTorch file ({first_line(error)}); fetch it again") from None


def _refuse_bomb(path: Path) -> None:
    """Refuse an archive that unpacks to more than its size: PyTorch does not compress tensors.

    Raises: BadRequest.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            whole = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
        return  # of the older format, or damaged: that is found when it is read
    size = path.stat().st_size
    if whole > size + BOMB_BYTES:
        raise BadRequest(f"{path}: refused, {size} bytes that unpack to {whole}; a checkpoint is not compressed")


def _allowed_types() -> list[Any]:
    """Types without code that training checkpoints hold beside tensors: parsed arguments, numpy numbers."""
    import numpy as np

    kinds = [type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")]
    return [Namespace, np.float64(0).__reduce__()[0], np.dtype, *kinds]


def _unwrap(path: Path, content: Any, part: str, depth: int = 0) -> Any:
    found = [name for name in WRAPPERS if isinstance(content, Mapping) and isinstance(content.get(name), Mapping)]
    if part and part not in found:
        raise BadRequest(f"{path}: no part {part!r}; it has {', '.join(found) or 'none'}")
    if not found or depth > len(WRAPPERS):
        return content
    if len(found) > 1 and not part:
        note(f"{path.name} holds {' and '.join(found)}; taking {found[0]} ({path.name}#{found[1]} takes the other)")
    return _unwrap(path, content[part or found[0]], "", depth + 1)


def _is_plain(value: Tensor) -> bool:
    import torch

    return value.is_floating_point() and value.numel() > 0 and value.layout == torch.strided and not value.is_meta


def _tensors(path: Path, content: Any) -> dict[str, Tensor]:
    import torch

    if not isinstance(content, Mapping) or not content:
        raise BadRequest(f"{path}: a {type(content).__name__}, expected a state dict")
    wrong = [str(key) for key, value in content.items() if not isinstance(value, torch.Tensor)]
    if wrong:
        raise BadRequest(f"{path}: not a state dict: {len(wrong)} entries are no tensors ({some(wrong)})")
    odd = [str(key) for key, value in content.items() if not _is_plain(value)]
    if odd:
        raise BadRequest(f"{path}: {len(odd)} tensors are empty, sparse or not floating point ({some(odd)})")
    tensors = {str(key): value.detach() for key, value in content.items()}
    if len(tensors) < len(content):
        raise BadRequest(
            f"{path}: {len(content) - len(tensors)} tensors have the name of another one but for 'module.'"
        )
    return tensors
