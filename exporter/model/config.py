"""`config.json` beside the weights: labels and preprocessing, as Hugging Face and timm write them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from exporter.artifact.sidecar import Preprocessing, sides
from exporter.errors import BadRequest

T = TypeVar("T")
_INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL.Image.Resampling
MAX_LICENSE = 60  # characters


@dataclass(frozen=True)
class Config:
    """Labels, preprocessing and license from the files beside the weights; empty where they are not given."""

    labels: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None
    license: str | None = None


def read_config(folder: Path) -> Config:
    """Labels and preprocessing from `config.json` and `preprocessor_config.json` of a folder, if it has them.

    Raises: BadRequest when one of them is there but cannot be understood.
    """
    path, beside = folder / "config.json", folder / "preprocessor_config.json"
    config = _read(path) if path.is_file() else {}
    if (act := config.get("hidden_act", "gelu")) != "gelu":
        raise BadRequest(f"{path}: hidden_act is {act!r}; a ConvNeXt has 'gelu', and no other is supported")
    if "pretrained_cfg" in config:
        return _understood(path, lambda: _timm_config(config))
    labels = _understood(path, lambda: _hf_labels(config))
    recipe = _understood(beside, lambda: _hf_preprocessing(_read(beside))) if beside.is_file() else None
    return Config(labels, recipe)


def _understood(path: Path, reading: Callable[[], T]) -> T:
    """The result of a reader, or one error that names the file."""
    try:
        return reading()
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
    off = [step for step in ("do_resize", "do_rescale", "do_normalize") if config.get(step, True) is not True]
    if off or abs(config.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-3:
        raise ValueError(f"{', '.join(off) or 'rescale_factor'} differs from ConvNeXt's preprocessing")
    size = config["size"] if isinstance(config["size"], dict) else {"shortest_edge": config["size"]}
    edge = int(size["shortest_edge"] if "shortest_edge" in size else size["height"])
    if size.get("width", edge) != edge:
        raise ValueError(f"size {size}, expected a square")
    squash = edge >= 384
    return _checked(
        size=edge,
        resize=edge if squash else int(edge / config.get("crop_pct", 224 / 256)),
        crop="squash" if squash else "center",
        interpolation=_INTERPOLATIONS[config.get("resample", 3)],
        mean=config["image_mean"],
        std=config["image_std"],
    )


def _timm_config(config: dict[str, Any]) -> Config:
    words = config["pretrained_cfg"].get("license")
    license_id = words.lower() if isinstance(words, str) and len(words) <= MAX_LICENSE else None
    return Config(_timm_labels(config), _timm_preprocessing(config["pretrained_cfg"]), license_id)


def _timm_labels(config: dict[str, Any]) -> tuple[str, ...]:
    names = config.get("label_names") or config["pretrained_cfg"].get("label_names") or ()
    return tuple(str(name) for name in names)


def _timm_preprocessing(config: dict[str, Any]) -> Preprocessing:
    edge = int(config["input_size"][-1])
    if int(config["input_size"][-2]) != edge:
        raise ValueError(f"input_size {config['input_size']}, expected a square")
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
    recipe = msgspec.convert(fields, Preprocessing)
    if not all(1 <= crop <= resized for crop, resized in zip(sides(recipe.size), sides(recipe.resize), strict=True)):
        raise ValueError(f"resize to {recipe.resize}, then crop {recipe.size}: expected 1 ≤ crop ≤ resize")
    if not all(0 < spread < 1e6 for spread in recipe.std) or not all(abs(mean) < 1e6 for mean in recipe.mean):
        raise ValueError(f"mean {recipe.mean}, std {recipe.std}: expected finite numbers, std above 0")
    return recipe
