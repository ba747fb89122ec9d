"""Preprocessing as the image processors of transformers, timm and OpenCLIP do it, read from their configurations."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from exporter.artifact.sidecar import Preprocessing, as_size, sides
from exporter.errors import BadRequest

RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # PIL.Image.Resampling
SQUASHED_FROM = 384  # pixels; from here on ConvNeXt's published preprocessing squashes
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
# mmsegmentation scales and cuts windows of 512 pixels; transformers published the same weights with a stretched image.
UPERNET = Preprocessing(size=512, resize=512, crop="squash", interpolation="bilinear", offset="floor")
# mmdet resizes to a short side of 800 and a long one of at most 1333, and fills up to multiples of 32 on the right and
# below; here the size is fixed, and both sides are filled up.
DETECTOR = Preprocessing(size=(800, 1344), resize=(800, 1344), crop="border", interpolation="bilinear")
DINOV3 = Preprocessing(size=224, resize=224, crop="squash", interpolation="bilinear", offset="floor")
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Unclear:
    """A step that is not followed: why, and the options that replace it."""

    reason: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class Read:
    """Preprocessing from one file.

    origins: for each value, the file or "default of …".
    unclear: steps that the options of a build must replace.
    share_below_384: crop_pct of sizes below 384 pixels, where ConvNeXt's rule holds, which squashes from there on.
    """

    preprocessing: Preprocessing
    origins: dict[str, str]
    unclear: tuple[Unclear, ...] = ()
    share_below_384: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Processor:
    """Defaults of an image processor of transformers.

    `square`: a size that is one number stands for height and width, not for the short side.
    `crop_size`: pixels that are cut out by default; 0 is no crop. `crops`: whether do_center_crop is obeyed.
    `std_twice`: whether the values are divided by std again.
    """

    size: dict[str, int]
    resample: int
    colors: tuple[tuple[float, ...], tuple[float, ...]]
    square: bool = True
    crop_size: int = 0
    crops: bool = True
    std_twice: bool = False


_CONVNEXT = "ConvNext"
_CLIP = _Processor({"shortest_edge": 224}, 3, CLIP, square=False, crop_size=224)
PROCESSORS = {
    _CONVNEXT: _Processor({"shortest_edge": 384}, 3, HALF, square=False),
    "ViT": _Processor({"height": 224, "width": 224}, 2, HALF),
    "Beit": _Processor({"height": 224, "width": 224}, 3, HALF),
    "CLIP": _CLIP,
    "Bit": _CLIP,
    "DINOv3ViT": _Processor({"height": 224, "width": 224}, 2, IMAGENET),
    "Segformer": _Processor({"height": 512, "width": 512}, 2, IMAGENET, crops=False),
    "EfficientNet": _Processor({"height": 346, "width": 346}, 3, HALF, std_twice=True),
}
COUNT_FROM_1 = "masks number classes from 1; give verify --reduce-zero-label"
_HOW = "give --resize N --crop-mode center|squash|border"
_ANY = ("resize", "crop_mode")
_SWITCHES = ("do_resize", "do_rescale", "do_normalize", "do_center_crop", "include_top")


def read_processor(config: Mapping[str, Any], file: str) -> Read:
    """Read a `preprocessor_config.json` of transformers; a file that names no type follows ConvNeXt's rule."""
    off = dict.fromkeys((key for key in _SWITCHES if key in config and config[key] is None), False)
    stated = {key: value for key, value in config.items() if value is not None} | off  # else null is the default
    if "pretrained_cfg" in stated:
        return read_timm_cfg(stated["pretrained_cfg"], file)
    kinds = {key: stated[key] for key in ("image_processor_type", "feature_extractor_type") if key in stated}
    names = {_short(word) for word in kinds.values()}
    if len(names) > 1:
        said = ", but ".join(f"{key} is {value!r}" for key, value in kinds.items())
        raise ValueError(f"{said}: two types of image processor")
    name = names.pop() if names else _CONVNEXT
    processor = PROCESSORS.get(name, PROCESSORS[_CONVNEXT])
    unclear = []
    if name not in PROCESSORS:
        known = ", ".join(PROCESSORS)
        unclear.append(
            Unclear(f"image processor {next(iter(kinds.values()))} is not known (known: {known}); {_HOW}", _ANY)
        )
    unclear += _switches(stated, processor)
    share = float(stated.get("crop_pct", 224 / 256)) if name == _CONVNEXT else None
    fields = _convnext(stated, processor, share) if share is not None else _plain(stated, processor, unclear)
    mean, std = (
        _channels(stated.get(f"image_{key}", default))
        for key, default in zip(("mean", "std"), processor.colors, strict=True)
    )
    if processor.std_twice and stated.get("include_top", True):
        std = tuple(value * value for value in std)
    preprocessing = checked(
        **fields,
        offset="floor",
        interpolation=RESAMPLING[stated.get("resample", processor.resample)],
        mean=mean,
        std=std,
    )
    own = f"{file} (ConvNeXt's rule)" if not kinds else file
    default = f"default of {next(iter(kinds.values()), 'ConvNextImageProcessor')}"
    sources = {
        "size": "size",
        "resize": "size",
        "crop": "size",
        "interpolation": "resample",
        "mean": "image_mean",
        "std": "image_std",
    }
    origins = {value: own if key in stated else default for value, key in sources.items()}
    reducing = [key for key in ("do_reduce_labels", "reduce_labels") if stated.get(key)]  # the latter in old files
    notes = tuple(f"{key} is true: {COUNT_FROM_1}" for key in reducing[:1])
    return Read(preprocessing, origins, tuple(unclear), share, notes)


def _short(name: str) -> str:
    return re.sub(r"(ImageProcessor(Fast|Pil)?|FeatureExtractor)$", "", str(name))


def _switches(stated: Mapping[str, Any], processor: _Processor) -> list[Unclear]:
    """Steps that are switched off or added."""
    unclear = []
    if stated.get("do_resize", True) is not True:
        unclear.append(Unclear(f"do_resize is {stated['do_resize']}: images keep their size; {_HOW}", _ANY))
    colors = "give --mean and --std of pixels from 0 to 1"
    for key in ("do_rescale", "do_normalize"):
        if stated.get(key, True) is not True:
            unclear.append(Unclear(f"{key} is {stated[key]}; {colors}", ("mean", "std")))
    if abs(stated.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-3 or stated.get("rescale_offset"):
        key = "rescale_offset" if stated.get("rescale_offset") else "rescale_factor"
        unclear.append(Unclear(f"{key} is {stated[key]}; {colors}", ("mean", "std")))
    harmless = {"do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_convert_rgb", "do_reduce_labels"}
    for key in stated:
        if key.startswith("do_") and key not in harmless and stated[key]:
            raise ValueError(f"{key} is {stated[key]}: not supported")
    if stated.get("do_center_crop") and not processor.crops:
        unclear.append(Unclear(f"do_center_crop is true, which this processor does not obey; {_HOW}", _ANY))
    return unclear


def _convnext(stated: Mapping[str, Any], processor: _Processor, share: float) -> dict[str, Any]:
    """Below 384 pixels the short side becomes size / crop_pct and the centre is cut, from 384 on it is a squash."""
    size = _size(stated.get("size", processor.size), square=False)
    edge = size["shortest_edge"] if "shortest_edge" in size else _side(size)
    if stated.get("do_center_crop") and _side(_size(stated["crop_size"], square=True)) != edge:
        raise ValueError(f"size {edge}, but crop_size {stated['crop_size']}")
    if edge >= SQUASHED_FROM:
        return {"size": edge, "resize": edge, "crop": "squash"}
    return {"size": edge, "resize": int(edge / share), "crop": "center", "crop_pct": share}


def _plain(stated: Mapping[str, Any], processor: _Processor, unclear: list[Unclear]) -> dict[str, Any]:
    """Resize to height and width or by the short side, then cut the centre if it is asked for."""
    size = _size(stated.get("size", processor.size), stated.get("default_to_square", processor.square))
    crop = "center" if "shortest_edge" in size else "squash"
    resize = size.get("shortest_edge") or as_size(size["height"], size["width"])
    if stated.get("do_center_crop", bool(processor.crop_size)) and processor.crops:
        cut = _side(_size(stated.get("crop_size", processor.crop_size or 0), square=True))
        return {"size": cut, "resize": size.get("shortest_edge") or _side(size), "crop": crop}
    if crop == "center":
        reason = f"size is {size} without do_center_crop, which gives images of any shape; {_HOW}"
        unclear.append(Unclear(reason, _ANY))
    return {"size": resize, "resize": resize, "crop": crop}


def _size(size: Any, square: bool) -> dict[str, int]:
    """A size as `shortest_edge`, or as `height` and `width`."""
    if isinstance(size, (list, tuple)):
        size = {"height": size[0], "width": size[-1]}
    elif not isinstance(size, dict):
        size = {"height": size, "width": size} if square else {"shortest_edge": size}
    if set(size) not in ({"shortest_edge"}, {"height", "width"}):
        raise ValueError(f"size {size}: expected a number, shortest_edge, or height and width")
    return {key: int(value) for key, value in size.items()}


def _side(size: Mapping[str, int]) -> int:
    if len(set(size.values())) != 1:
        raise ValueError(f"size {dict(size)}: expected a square")
    return next(iter(size.values()))


def _channels(values: Any) -> tuple[float, ...]:
    return tuple(values) if isinstance(values, (list, tuple)) else (values,) * 3


def read_timm_cfg(config: Mapping[str, Any], file: str) -> Read:
    """Read the `pretrained_cfg` of timm, as its `resolve_data_config` and `create_transform` do."""
    stated = {key: value for key, value in config.items() if value is not None}
    _, height, width = stated.get("input_size", (3, 224, 224))
    mode, share = stated.get("crop_mode", "center"), float(stated.get("crop_pct", 0.875))
    preprocessing = checked(
        size=as_size(int(height), int(width)),
        resize=as_size(int(height / share), int(width / share)),
        crop=mode,
        crop_pct=share,
        interpolation=stated.get("interpolation", "bicubic"),
        mean=stated.get("mean", IMAGENET[0]),
        std=stated.get("std", IMAGENET[1]),
    )
    sources = {"size": "input_size", "resize": "crop_pct", "crop": "crop_mode"}
    sources |= {key: key for key in ("interpolation", "mean", "std")}
    origins = {value: file if key in stated else "default of timm" for value, key in sources.items()}
    notes = []
    if (tested := stated.get("test_input_size")) and tested[-1] != height:
        share = stated.get("test_crop_pct", share)
        notes.append(f"timm also publishes this model for --imgsz {tested[-1]} --crop-pct {share}")
    return Read(preprocessing, origins, notes=tuple(notes))


def read_open_clip_preprocess(config: Mapping[str, Any], file: str) -> Read:
    """Read an `open_clip_config.json`: the short side is resized to the size and the centre cut, or it is a squash."""
    vision, said = config["model_cfg"]["vision_cfg"], config.get("preprocess_cfg") or {}
    stated = {key: value for key, value in said.items() if value is not None}
    size = _side(_size(vision.get("image_size") or stated.get("size", 224), square=True))  # as OpenCLIP ranks them
    crop = {"shortest": "center", "squash": "squash"}.get(mode := stated.get("resize_mode", "shortest"))
    if crop is None or stated.get("mode", "RGB") != "RGB":
        key, value = ("resize_mode", mode) if crop is None else ("mode", stated["mode"])
        raise BadRequest(f"{file}: preprocess_cfg.{key} is {value!r}; not supported")
    preprocessing = checked(
        size=size,
        resize=size,
        crop=crop,
        crop_pct=1.0,
        interpolation=stated.get("interpolation", "bicubic"),
        mean=_channels(stated.get("mean", CLIP[0])),
        std=_channels(stated.get("std", CLIP[1])),
    )
    sources = {"crop": "resize_mode", "interpolation": "interpolation", "mean": "mean", "std": "std"}
    origins = {value: file if key in stated else "default of OpenCLIP" for value, key in sources.items()}
    return Read(preprocessing, {"size": file, "resize": file} | origins)


def checked(**fields: Any) -> Preprocessing:
    """Preprocessing of these values.

    Raises: ValueError for values that make no sense.
    """
    recipe = msgspec.convert(fields, Preprocessing)
    if not all(1 <= crop <= resized for crop, resized in zip(sides(recipe.size), sides(recipe.resize), strict=True)):
        raise ValueError(f"resize to {recipe.resize}, then crop {recipe.size}: expected 1 ≤ crop ≤ resize")
    if not all(0 < spread < 1e6 for spread in recipe.std) or not all(abs(mean) < 1e6 for mean in recipe.mean):
        raise ValueError(f"mean {recipe.mean}, std {recipe.std}: expected finite numbers, std above 0")
    return recipe
