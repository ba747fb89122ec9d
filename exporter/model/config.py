"""`config.json` beside the weights: labels and preprocessing, as Hugging Face and timm write them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from exporter.artifact import Preprocessing
from exporter.errors import BadRequest

_INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL.Image.Resampling


@dataclass(frozen=True)
class Config:
    """What the files beside the weights say; empty where they say nothing."""

    labels: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None


def read_config(folder: Path) -> Config:
    """Labels and preprocessing from `config.json` and `preprocessor_config.json` of a folder, if it has them.

    Raises: BadRequest when one of them is there but cannot be understood.
    """
    path = folder / "config.json"
    if not path.is_file():
        return Config()
    config = _read(path)
    if (act := config.get("hidden_act", "gelu")) != "gelu":
        raise BadRequest(f"{path}: hidden_act is {act!r}; a ConvNeXt has 'gelu', and no other is supported")
    try:
        if "pretrained_cfg" in config:
            return Config(_timm_labels(config), _timm_preprocessing(config["pretrained_cfg"]))
        beside = folder / "preprocessor_config.json"
        recipe = _hf_preprocessing(_read(beside)) if beside.is_file() else None
        return Config(_hf_labels(config), recipe)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise BadRequest(f"{path}: cannot be understood ({type(error).__name__}: {error}); mend or remove it") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OSError) as error:
        raise BadRequest(f"{path}: no JSON object ({error}); mend or remove it") from None


def _hf_labels(config: dict[str, Any]) -> tuple[str, ...]:
    names = {int(index): str(name) for index, name in config.get("id2label", {}).items()}
    if sorted(names) != list(range(len(names))):
        raise ValueError("id2label does not count from 0")
    return tuple(names[index] for index in range(len(names)))


def _hf_preprocessing(config: dict[str, Any]) -> Preprocessing:
    """ConvNextImageProcessor: below 384 pixels it resizes to size / crop_pct and crops, from 384 on it squashes."""
    size = config["size"]
    edge = int(size["shortest_edge"] if isinstance(size, dict) else size)
    squash = edge >= 384
    return _checked(
        size=edge,
        resize=edge if squash else int(edge / config.get("crop_pct", 224 / 256)),
        crop="squash" if squash else "center",
        interpolation=_INTERPOLATIONS[config.get("resample", 3)],
        mean=config["image_mean"],
        std=config["image_std"],
    )


def _timm_labels(config: dict[str, Any]) -> tuple[str, ...]:
    names = config.get("label_names") or config["pretrained_cfg"].get("label_names") or ()
    return tuple(str(name) for name in names)


def _timm_preprocessing(config: dict[str, Any]) -> Preprocessing:
    edge = int(config["input_size"][-1])
    squash = config.get("crop_mode") == "squash"
    if config.get("crop_mode", "center") not in ("center", "squash"):
        raise ValueError(f"crop_mode {config['crop_mode']!r}, expected 'center' or 'squash'")
    return _checked(
        size=edge,
        resize=edge if squash else int(edge / config.get("crop_pct", 0.875)),
        crop="squash" if squash else "center",
        interpolation=config.get("interpolation", "bicubic"),
        mean=config["mean"],
        std=config["std"],
    )


def _checked(**fields: Any) -> Preprocessing:
    return msgspec.convert(fields, Preprocessing)
