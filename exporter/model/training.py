"""What training scripts store beside the weights: their arguments, and the names of the classes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from exporter.artifact.sidecar import Preprocessing, as_size
from exporter.model import labels, openmmlab, processors, stated
from exporter.model.processors import Read

ORIGIN = "args of the checkpoint"
_TRAIN_PY_ARGS = {"crop_pct", "interpolation", "mean", "std"}  # timm's train.py stores all of them
_TIMM_ARGS = ("img_size", "input_size", "crop_pct", "crop_mode", "mean", "std", "interpolation")


def read_training(beside: Mapping[str, Any], statements: stated.Statements) -> tuple[tuple[str, ...], Read | None]:
    """Read labels and preprocessing of a training checkpoint from what it has beside the weights, and state what is
    said about the network.

    Raises: BadRequest for arguments that are not supported; ValueError and others for those that make no sense.
    """
    arguments = _mapping(beside.get("args"))
    if beside.get("args") is not None and not arguments:
        statements.notes.append(f"{ORIGIN}: {type(beside['args']).__name__} is not read")
    read = _preprocessing(arguments, beside.get("arch"), statements) or _openmmlab(beside, statements)
    names, where = _labels(beside, statements)
    if names:
        statements.origins["labels"] = where
    return names, read


def _mapping(value: Any) -> dict[str, Any]:
    """A dictionary with text as keys, or the attributes of a Namespace; {} for anything else."""
    value = value if isinstance(value, Mapping) else getattr(value, "__dict__", None)
    return {key: one for key, one in value.items() if isinstance(key, str)} if isinstance(value, Mapping) else {}


def _preprocessing(args: dict[str, Any], arch: object, statements: stated.Statements) -> Read | None:
    """By whose arguments they are: torchvision's references, facebookresearch's code, or timm's train.py."""
    if "val_crop_size" in args or "val_resize_size" in args:
        return _torchvision(args)
    if "imagenet_default_mean_and_std" in args:
        return _facebook(args)
    model = str(args.get("model") or arch or "")
    if any(key in args for key in _TIMM_ARGS) or "model_kwargs" in args:
        _timm_network(args, model, statements)
        return _timm(args, model)
    return None


def _torchvision(args: Mapping[str, Any]) -> Read:
    size, resize = args.get("val_crop_size") or 224, args.get("val_resize_size") or 256
    keys = {"size": "val_crop_size", "resize": "val_resize_size", "interpolation": "interpolation"}
    recipe = processors.checked(
        size=size, resize=resize, interpolation=_filter(args.get("interpolation")) or "bilinear"
    )
    origins = dict.fromkeys((*keys, "crop", "mean", "std"), "default of torchvision's references")
    return Read(recipe, origins | {name: ORIGIN for name, key in keys.items() if args.get(key)})


def _facebook(args: Mapping[str, Any]) -> Read:
    size = int(args.get("input_size") or 224)
    squash = size >= processors.SQUASHED_FROM
    share = float(args.get("crop_pct") or 224 / 256)
    if size <= 32:  # build_transform neither resizes nor crops such images, as those of CIFAR
        share = 1.0
    mean, std = processors.IMAGENET if args["imagenet_default_mean_and_std"] else processors.HALF
    recipe = processors.checked(
        size=size,
        resize=size if squash else int(size / share),
        crop="squash" if squash else "center",
        crop_pct=None if squash else share,
        mean=mean,
        std=std,
    )
    origins = dict.fromkeys(("size", "resize", "crop", "mean", "std"), ORIGIN)
    return Read(recipe, origins | {"interpolation": "default of facebookresearch"}, share_below_384=share)


def _timm(args: Mapping[str, Any], model: str) -> Read | None:
    """Read the arguments of timm's train.py; a value that they leave out is that of the model."""
    timm_args = {key: args[key] for key in _TIMM_ARGS if args.get(key) is not None}
    if not timm_args and "convnext" not in model:
        return None
    base, default = _published(model)
    if not _TRAIN_PY_ARGS.issubset(args):  # of another script, whose other steps are not known
        default = default.replace("timm's", "published") if "timm's" in default else "default"
    size = timm_args.get("input_size", timm_args.get("img_size", base.size))
    *_, height, width = (size, size) if isinstance(size, int) else size
    share = float(timm_args.get("crop_pct") or base.share)
    recipe = processors.checked(
        size=as_size(height, width),
        resize=as_size(int(height / share), int(width / share)),
        crop=timm_args.get("crop_mode", base.crop),
        crop_pct=share,
        interpolation=_filter(timm_args.get("interpolation")) or base.interpolation,
        mean=_colors(timm_args.get("mean", base.mean)),
        std=_colors(timm_args.get("std", base.std)),
    )
    sources = {"size": ("input_size", "img_size"), "resize": ("crop_pct",), "crop": ("crop_mode",)}
    sources |= {key: (key,) for key in ("interpolation", "mean", "std")}
    return Read(
        recipe, {name: ORIGIN if any(key in timm_args for key in keys) else default for name, keys in sources.items()}
    )


def _filter(value: Any) -> Any:
    """The name of a filter, which some scripts store by Pillow's number."""
    return processors.RESAMPLING[value] if isinstance(value, int) else value


def _colors(values: Any) -> tuple[float, ...]:
    if isinstance(values, str):
        values = [float(value) for value in values.split(",")]
    elif isinstance(values, int | float):
        values = [values]
    return tuple(values) * 3 if len(values) == 1 else tuple(values)


# The first tag of timm's networks, which a name alone means, where its preprocessing is not ConvNeXt's usual one.
_FIRST_TAGS = {
    "convnext_tiny": "in12k_ft_in1k",
    "convnext_small": "in12k_ft_in1k",
    "convnext_large_mlp": "clip_laion2b_soup_ft_in12k_in1k_320",
    "convnext_xxlarge": "clip_laion2b_soup_ft_in1k",
    "convnextv2_huge": "fcmae_ft_in22k_in1k_384",
}
_SHARES = dict.fromkeys(("convnext_nano", "convnext_nano_ols", "convnext_tiny_hnf", "convnext_pico_ols"), 0.95)
_SHARES |= {"convnext_zepto_rms_ols": 0.9} | dict.fromkeys(("test_convnext", "test_convnext2", "test_convnext3"), 0.95)


def _published(model: str) -> tuple[Preprocessing, str]:
    """The preprocessing that timm publishes for a model `NAME` or `NAME.TAG`, and where it comes from."""
    name, _, tag = model.removeprefix("hf-hub:").rpartition("/")[2].partition(".")
    if "convnext" not in name:
        return Preprocessing(crop_pct=0.875), "default of timm"
    tag = tag or _FIRST_TAGS.get(name, "")
    is_clip, sides = tag.startswith("clip"), re.search(r"(^r|_)(320|384|512)(_|$)", tag)
    size = 256 if is_clip or tag.startswith("eupe") else 160 if name.startswith("test") else 224
    share = 0.95 if "in12k" in tag else _SHARES.get(name, 0.875)
    if sides:
        size = int(sides[2])
    if sides or size == 256 or tag.startswith("dinov3"):
        share = 1.0
    squash = size >= processors.SQUASHED_FROM and not tag.startswith(("r384", "clip_laiona"))
    half = name.startswith(("test", "convnext_zepto"))
    mean, std = processors.CLIP if is_clip else processors.HALF if half else processors.IMAGENET
    recipe = processors.checked(
        size=size,
        resize=int(size / share),
        crop="squash" if squash else "center",
        crop_pct=share,
        mean=mean,
        std=std,
    )
    return recipe, f"timm's preprocessing of {f'{name}.{tag}' if tag else name}"


def _timm_network(args: Mapping[str, Any], model: str, statements: stated.Statements) -> None:
    keyword = _mapping(args.get("model_kwargs"))
    stated.read_timm(statements, model if "convnext" in model else None, keyword, "args.model_kwargs.")
    keys = {"gp": stated.MODEL_ARGS["global_pool"], "num_classes": stated.MODEL_ARGS["num_classes"]}
    statements.read(args, keys, "args.")


def _openmmlab(beside: Mapping[str, Any], statements: stated.Statements) -> Read | None:
    """Read the text of the configuration of mmpretrain, mmsegmentation or mmdet."""
    meta = _mapping(beside.get("meta"))
    text = next((value for key in ("cfg", "config") if isinstance(value := meta.get(key), str)), "")
    return openmmlab.read(text, statements) if text else None


def _labels(beside: Mapping[str, Any], statements: stated.Statements) -> tuple[tuple[str, ...], str]:
    """The names of the classes, where they are unmistakable, and where they stand."""
    hyper, meta = _mapping(beside.get("hyper_parameters")), _mapping(beside.get("meta"))
    places: list[tuple[str, Any]] = [
        ("class_to_idx", beside.get("class_to_idx")),
        ("args.class_to_idx", _mapping(beside.get("args")).get("class_to_idx")),
        ("hyper_parameters.class_to_idx", hyper.get("class_to_idx")),
        ("hyper_parameters.id2label", hyper.get("id2label")),
        ("hyper_parameters.class_names", hyper.get("class_names")),
        ("hyper_parameters.classes", hyper.get("classes")),
        ("meta.dataset_meta.classes", _mapping(meta.get("dataset_meta")).get("classes")),
        ("meta.CLASSES", meta.get("CLASSES")),
    ]
    for where, names in places:
        if isinstance(names, Mapping) and names:
            try:
                return labels.from_mapping(names), f"{where} of the checkpoint"
            except ValueError as error:
                statements.notes.append(f"{where} of the checkpoint is not read as labels: {error}")
        if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names):
            return tuple(names), f"{where} of the checkpoint"
    return (), ""
