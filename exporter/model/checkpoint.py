"""Reading one file of weights: safetensors, or a PyTorch file whose code is never run."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.errors import BadRequest, some
from exporter.progress import note

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
WRAPPERS = ("model", "state_dict", "model_ema", "state_dict_ema", "module")


def read(path: Path, part: str = "") -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, out of the wrappers that occur.

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
    return _tensors(path, _unwrap(path, content, part))


def _safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, ValueError) as error:
        raise BadRequest(f"{path}: truncated or no safetensors file ({_first_line(error)}); fetch it again") from None


def _torch(path: Path) -> Any:
    import pickle

    import torch

    mend = "fetch it again"
    try:
        # Training checkpoints keep their command line in a Namespace, which only holds values.
        with torch.serialization.safe_globals([Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", str(error))
        if found:
            raise BadRequest(
                f"{path}: refused, it carries code ({found[1]}) and nothing of it was run; "
                "convert it to .safetensors where it is trusted"
            ) from None
        raise BadRequest(f"{path}: truncated or no PyTorch file ({_first_line(error)}); {mend}") from None
    except (
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        OSError,
    ) as error:
        raise BadRequest(f"{path}: truncated or no PyTorch file ({_first_line(error)}); {mend}") from None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:160]


def _unwrap(path: Path, content: Any, part: str) -> Any:
    found = [name for name in WRAPPERS if isinstance(content, Mapping) and isinstance(content.get(name), Mapping)]
    if part and part not in found:
        raise BadRequest(f"{path}: no part {part!r}; it has {', '.join(found) or 'none'}")
    if not found:
        return content
    if len(found) > 1 and not part:
        note(f"{path.name} holds {' and '.join(found)}; taking {found[0]} ({path.name}#{found[1]} takes the other)")
    return _unwrap(path, content[part or found[0]], "")


def _tensors(path: Path, content: Any) -> dict[str, Tensor]:
    import torch

    if not isinstance(content, Mapping) or not content:
        raise BadRequest(f"{path}: a {type(content).__name__}, expected a state dict")
    wrong = [str(key) for key, value in content.items() if not isinstance(value, torch.Tensor)]
    if wrong:
        raise BadRequest(f"{path}: not a state dict: {len(wrong)} entries are no tensors ({some(wrong)})")
    odd = [str(key) for key, value in content.items() if not value.is_floating_point() or not value.numel()]
    if odd:
        raise BadRequest(f"{path}: {len(odd)} tensors are empty or not floating point ({some(odd)})")
    return {str(key).removeprefix("module.").removeprefix("_orig_mod."): value for key, value in content.items()}
