"""The files beside the weights: labels, preprocessing, license and network, as transformers, timm and OpenCLIP write
them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from exporter.artifact.sidecar import Preprocessing
from exporter.errors import BadRequest
from exporter.model import labels, processors, stated, training
from exporter.model.processors import Read, Unclear

T = TypeVar("T")
MAX_LICENSE = 60  # characters
USUAL_SIZE = 224  # pixels, the default of transformers
CONFIG_FILES = ("config.json", "preprocessor_config.json", "open_clip_config.json", "processor_config.json")
_MALFORMED = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError)


@dataclass(frozen=True)
class Config:
    """What the files beside the weights state; empty where they state nothing.

    network: values by the names of `Architecture`'s fields.
    origins: for each value of the preprocessing and the network, where it stands.
    notes: about keys that have no effect.
    unclear: steps of the preprocessing that options must replace.
    share_below_384: as in `processors.Read`.
    image_size: height and width in `config.json` of transformers, which matter where nothing states a preprocessing.
    """

    labels: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None
    license: str | None = None
    network: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    unclear: tuple[Unclear, ...] = ()
    share_below_384: float | None = None
    image_size: int | None = None


def read_config(folder: Path, weights: Path | None = None) -> Config:
    """Read the `CONFIG_FILES` of a folder, as far as it has them.

    OpenCLIP's file is for weights that are named `open_clip…`, or where there is no `config.json`. As in transformers,
    `image_processor` of `processor_config.json` counts before `preprocessor_config.json`.

    Raises: BadRequest when one of them cannot be understood, contradicts itself, or states what is not supported.
    """
    path, beside, clip, processor = (folder / name for name in CONFIG_FILES)
    if clip.is_file() and (weights.name.startswith("open_clip") if weights else not path.is_file()):
        return _of_open_clip(clip)
    config = _read(path) if path.is_file() else {}
    if "pretrained_cfg" not in config and "input_size" in config and "architecture" in config:
        config = {"architecture": config["architecture"], "pretrained_cfg": config}  # as timm wrote it before 0.9
    statements = stated.Statements(str(path), path.name)
    _understood(path, lambda: _read_network(statements, config))
    reads = []
    if "pretrained_cfg" in config:
        reads.append(_understood(path, lambda: processors.read_timm_cfg(_timm_cfg(config), path.name)))
    inner = _read(processor).get("image_processor") if processor.is_file() else None
    if isinstance(inner, dict):
        reads.append(_understood(processor, lambda: processors.read_processor(inner, processor.name)))
    elif beside.is_file():
        reads.append(_understood(beside, lambda: processors.read_processor(_read(beside), beside.name)))
    of_backbone = "backbone_config" in config and config.get("model_type") != stated.UPERNET
    names = () if of_backbone else _understood(path, lambda: _labels(config, statements))
    if names:
        statements.origins["labels"] = path.name
    if len(reads) > 1:
        file = processor.name if isinstance(inner, dict) else beside.name
        _refuse_differing(folder, reads[0].preprocessing, reads[1].preprocessing, file)
    together = _together(statements, names, reads, _understood(path, lambda: _license(config)))
    return replace(together, image_size=_understood(path, lambda: _image_size(config)))


def _of_open_clip(path: Path) -> Config:
    config = _read(path)
    statements = stated.Statements(str(path), path.name)
    _understood(path, lambda: stated.read_open_clip(statements, config))
    read = _understood(path, lambda: processors.read_open_clip_preprocess(config, path.name))
    return _together(statements, (), [read])


def from_training(beside: dict[str, Any]) -> Config:
    """Read what a training checkpoint has beside the weights: arguments of scripts and names of classes.

    Raises: BadRequest for what makes no sense or is not supported.
    """
    statements = stated.Statements("the checkpoint", training.ORIGIN)
    try:
        names, read = training.read_training(beside, statements)
    except _MALFORMED as error:
        raise BadRequest(f"the checkpoint: its args cannot be understood ({error}); remove them") from None
    return _together(statements, names, [read] if read else [])


def together(files: Config, training: Config) -> Config:
    """What the files beside the weights state, and for the rest what the checkpoint states itself."""
    return Config(
        labels=files.labels or training.labels,
        preprocessing=files.preprocessing or training.preprocessing,
        license=files.license,
        network=training.network | files.network,
        origins=training.origins | files.origins,
        notes=(*files.notes, *training.notes),
        unclear=files.unclear if files.preprocessing else training.unclear,
        share_below_384=files.share_below_384 if files.preprocessing else training.share_below_384,
        image_size=files.image_size,
    )


def _image_size(config: dict[str, Any]) -> int | None:
    """The size that a model of transformers was made for; None for transformers' default, which nobody chose."""
    size = config.get("image_size")
    if isinstance(size, list) and len(set(size)) == 1:
        size = size[0]
    if "model_type" not in config or size in (None, USUAL_SIZE):
        return None
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"image_size {size!r}: expected a number of pixels")
    return size


def _together(
    statements: stated.Statements, names: tuple[str, ...], reads: list[Read], license_id: str | None = None
) -> Config:
    read = reads[0] if reads else None
    return Config(
        labels=names,
        preprocessing=read.preprocessing if read else None,
        license=license_id,
        network=statements.network,
        origins=statements.origins | (read.origins if read else {}),
        notes=(*statements.notes, *(read.notes if read else ())),
        unclear=tuple(unclear for one in reads for unclear in one.unclear),
        share_below_384=read.share_below_384 if read else None,
    )


def _refuse_differing(folder: Path, one: Preprocessing, two: Preprocessing, file: str) -> None:
    """Raises: BadRequest when timm's file and transformers' (`file`) ask for different preprocessing."""
    for key in ("size", "resize", "crop", "interpolation", "mean", "std"):
        if getattr(one, key) != getattr(two, key):
            raise BadRequest(
                f"{folder}: {key} is {getattr(one, key)} in config.json, but {getattr(two, key)} in {file}; "
                "remove the file that is wrong"
            )


def _read_network(statements: stated.Statements, config: dict[str, Any]) -> None:
    kind = config.get("model_type")
    if kind == "timm_wrapper" or config.keys() & {"pretrained_cfg", "architecture", "model_args"}:
        stated.read_timm_config(statements, config)
    elif "backbone_config" in config or config.get("use_timm_backbone"):
        stated.read_segmenter(statements, config)
    elif kind in (None, *stated.HF_TYPES):
        stated.read_transformers(statements, config)
    else:
        raise statements.refuse(
            "model_type", kind, f"expected {', '.join(stated.HF_TYPES)}, timm_wrapper or a backbone"
        )


def _timm_cfg(config: dict[str, Any]) -> dict[str, Any]:
    """The `pretrained_cfg`, with the channels that model_args ask for."""
    chans = (config.get("model_args") or {}).get("in_chans")
    cfg: dict[str, Any] = config["pretrained_cfg"]
    return cfg | {"input_size": [chans, *cfg["input_size"][1:]]} if chans and cfg.get("input_size") else cfg


def _labels(config: dict[str, Any], statements: stated.Statements) -> tuple[str, ...]:
    names = labels.from_config(config)
    count = statements.network.get("num_classes")
    if names and count is not None and count != len(names):
        raise ValueError(f"{statements.keys['num_classes']}, but there are {len(names)} labels")
    return names


def _license(config: dict[str, Any]) -> str | None:
    words = (config.get("pretrained_cfg") or {}).get("license")
    return words.lower() if isinstance(words, str) and len(words) <= MAX_LICENSE else None


def _understood(path: Path, reading: Callable[[], T]) -> T:
    """The result of a reader, or one error that names the file."""
    try:
        return reading()
    except _MALFORMED as error:
        reason = f"{type(error).__name__}: {error}"
        raise BadRequest(f"{path}: cannot be understood ({reason}); correct or remove it") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OSError) as error:
        raise BadRequest(f"{path}: no JSON object ({error}); correct or remove it") from None
