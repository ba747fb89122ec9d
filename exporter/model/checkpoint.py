"""Reads one checkpoint: safetensors, a PyTorch file, whose code never runs, a Keras file, or several with an index."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from exporter.errors import BadRequest, first_line, some
from exporter.model import keras, parts, pytorch
from exporter.model.pickled import Pointer
from exporter.model.unpickler import Stub

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".h5", ".keras")
INDEX = ".index.json"
SHARD = re.compile(r"-\d{5}-of-\d{5}\.\w+$")
_MOST_INDEX_BYTES = 2**25
# Of batch norms, a whole number even where it was converted with the weights; and what thop counts in every module.
_COUNTERS = ("num_batches_tracked", "total_ops", "total_params")
_SHARED = 4  # tensors may be so many times larger than their file: tied weights are one storage with several names

_ADAPTER = re.compile(r"(^|[._])(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|hada_w\d|lokr_w\d)($|[._])")
_QUANTIZED = re.compile(
    r"(_packed_params|\.quant_state\.|\.absmax|\.quant_map|\.nested_absmax|\.SCB|\.qweight|\.qzeros|\.g_idx|"
    r"\.weight_scale(_inv)?|\.zero_point|activation_post_process\.\S*|fake_quant\S*)$|"
    r"_packed_params\.|\.quant_state\.|activation_post_process|fake_quant|parametrizations\.\S*quant"
)
_QUANTIZED_OBJECTS = ("torchao.", "bitsandbytes.", "torch.ao.", "torch.quantization.", "torch._utils._rebuild_qtensor",
                      "__torch__.torch.classes.quantized", "quanto.", "optimum.quanto.")  # fmt: skip


@dataclass(frozen=True)
class Content:
    """What one checkpoint holds.

    tensors: by the names in the file, prefixes and all; floating point, strided and not empty.
    beside: plain values that lie beside the state dict, such as `args`, `class_to_idx` or `hyper_parameters`.
    notes: sentences for the user: which part was taken and what was left out.
    """

    tensors: dict[str, Tensor]
    beside: dict[str, Any]
    notes: tuple[str, ...]


def read(path: Path, part: str = "") -> Content:
    """Read the weights of a checkpoint and what lies beside them.

    Args:
        path: a file of one of SUFFIXES, or the index (`model.safetensors.index.json`) of several.
        part: the path of keys to the state dict to take (`model_ema`, `a/b`); "" takes the preferred one.

    Raises: BadRequest for a file that is missing, damaged, carries code, or holds no weights that can be used;
        Unavailable for a Keras file without h5py.
    """
    if not path.is_file():
        raise BadRequest(f"{path}: no such checkpoint")
    if path.name.endswith(INDEX):
        if part:
            raise BadRequest(f"{path}: no part {part!r}; weights in several files have none")
        return _sharded(path)
    if path.suffix not in SUFFIXES:
        raise BadRequest(
            f"{path}: expected a file of weights ({', '.join(SUFFIXES)}); save the state dict: "
            "torch.save(model.state_dict(), 'weights.pth')"
        )
    if (shard := SHARD.search(path.name)) and not shard[0].startswith("-00001-of-00001"):
        if [*path.parent.glob(f"*{INDEX}")]:
            raise BadRequest(f"{path}: one of several files; give the folder, which has their index")
        raise BadRequest(
            f"{path}: one of several files, and their index (*{INDEX}) is missing; download it to the same folder, and "
            "give that"
        )
    if path.name.startswith("adapter_model."):
        raise adapter(path)
    return _read(path, part)[0]


def files(path: Path) -> tuple[Path, ...]:
    """Every file that `read` reads of a checkpoint: itself, and those that an index names.

    Raises: BadRequest for an index that cannot be used.
    """
    if not path.name.endswith(INDEX):
        return (path,)
    return (path, *sorted({path.parent / name for name in _weight_map(path).values()}))


def adapter(path: Path) -> BadRequest:
    """The refusal of a LoRA adapter."""
    return BadRequest(
        f"{path}: a LoRA adapter, not a whole network; merge it into its model first and save that: "
        "model.merge_and_unload().save_pretrained(FOLDER)"
    )


def _read(path: Path, part: str) -> tuple[Content, list[str]]:
    """The content of one file, and the names of the tensors that it drops."""
    if path.suffix in (".h5", ".keras"):
        if part:
            raise BadRequest(f"{path}: no part {part!r}; a Keras file has none")
        return Content(*keras.read(path)), []
    if path.suffix == ".safetensors":
        tensors = _safetensors(path)
        if not tensors:
            raise BadRequest(f"{path}: no tensors in it")
        return _content(path, parts.take(path, tensors, part), lambda tensor: tensor)
    with pytorch.open_file(path) as file:
        return _content(path, parts.take(path, file.content, part), file.tensor)


def _safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, ValueError, OSError, LookupError, AttributeError, RuntimeError) as error:
        raise BadRequest(f"{path}: truncated or no safetensors file ({first_line(error)}); fetch it again") from None


def _content(path: Path, part: parts.Part, tensor: Callable[[Any], Tensor]) -> tuple[Content, list[str]]:
    _refuse_other_kinds(path, part.state)
    held = {key: value for key, value in part.state.items() if isinstance(key, str) and parts.is_tensor(value)}
    dropped = [key for key, value in held.items() if not _is_weight(value) or key.endswith(_COUNTERS)]
    weights = {key: value for key, value in held.items() if key not in set(dropped)}
    claimed = sum(value.reach for value in weights.values() if isinstance(value, Pointer))
    if claimed > _SHARED * path.stat().st_size:
        raise BadRequest(
            f"{path}: refused, its tensors claim {claimed} elements, more than its {path.stat().st_size} bytes"
        )
    tensors = {key: tensor(value).detach() for key, value in weights.items()}
    if not any(tensor.ndim for tensor in tensors.values()):
        if "ds_version" in part.beside:
            raise BadRequest(
                f"{path}: DeepSpeed keeps the weights in other files (ZeRO stage 3); run zero_to_fp32.py of the "
                "checkpoint's folder, and give the file that it writes"
            )
        raise BadRequest(
            f"{path}: no weights in it: {len(held)} tensors ({some(list(held))}), none with floating point and axes"
        )
    notes = part.notes
    if dropped:
        notes = (*notes, f"dropped {len(dropped)} tensors that are no weights: {some(dropped)}")
    return Content(tensors, {key: value for key, value in part.beside.items() if key not in tensors}, notes), dropped


def _is_weight(value: Any) -> bool:
    """Whether a tensor has elements and floating point: counts and indices do not take part in inference."""
    if isinstance(value, Pointer):
        return value.is_floating_point and value.elements > 0
    return bool(value.is_floating_point()) and value.numel() > 0


def _refuse_other_kinds(path: Path, state: Mapping[Any, Any]) -> None:
    """Refuse adapters, quantized weights, and tensors that have no plain numbers.

    Raises: BadRequest.
    """
    keys = [key for key in state if isinstance(key, str)]
    if any(_ADAPTER.search(key) for key in keys):
        raise adapter(path)
    objects = {key: value.name for key, value in state.items() if isinstance(key, str) and isinstance(value, Stub)}
    quantized = [key for key in keys if _QUANTIZED.search(key)]
    quantized += [key for key, name in objects.items() if name.startswith(_QUANTIZED_OBJECTS)]
    if quantized:
        raise BadRequest(
            f"{path}: quantized weights ({some(quantized)}); load the float weights that they were made from, and save "
            "those: torch.save(model.state_dict(), 'weights.pth')"
        )
    sparse = [key for key, name in objects.items() if "_rebuild_" in name or name.startswith("torch.Tensor ")]
    if sparse:
        raise BadRequest(
            f"{path}: {len(sparse)} tensors are sparse, without values or of a subclass ({some(sparse)}); save them as "
            "plain ones: torch.save({k: v.to_dense() for k, v in model.state_dict().items()}, 'weights.pth')"
        )


def _sharded(index: Path) -> Content:
    where = _weight_map(index)
    tensors: dict[str, Tensor] = {}
    notes: list[str] = []
    extra: list[str] = []
    dropped: list[str] = []
    for name in sorted(set(where.values())):
        shard = index.parent / name
        if not shard.is_file():
            raise BadRequest(f"{index}: names {name}, which is not there; fetch it again")
        content, without = _read(shard, "")
        dropped += without
        listed = {key for key, file in where.items() if file == name}
        notes += content.notes
        extra += content.tensors.keys() - listed
        tensors |= {key: tensor for key, tensor in content.tensors.items() if key in listed}
    if missing := sorted(where.keys() - tensors.keys() - set(dropped)):
        raise BadRequest(f"{index}: lists {len(missing)} tensors that its files do not have ({some(missing)})")
    if extra:
        notes.append(f"left out {len(extra)} tensors that {index.name} does not list: {some(sorted(extra))}")
    return Content(tensors, {}, tuple(dict.fromkeys(notes)))


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor, from an index.

    Raises: BadRequest.
    """
    try:
        if index.stat().st_size > _MOST_INDEX_BYTES:
            raise ValueError("too large")
        where = json.loads(index.read_bytes())["weight_map"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise BadRequest(f"{index}: no index of weights ({first_line(error)}); fetch it again") from None
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise BadRequest(f"{index}: no index of weights (weight_map); fetch it again")
    for name in set(where.values()):
        if PurePosixPath(name).name != name or "\\" in name or "\0" in name or len(name) > 255:
            raise BadRequest(f"{index}: refused, it names {name[:80]!r}, which leads out of its folder")
        if Path(name).suffix not in (".safetensors", ".bin", ".pt", ".pth"):
            raise BadRequest(f"{index}: names {name[:80]!r}, which is no file of weights")
    return where
