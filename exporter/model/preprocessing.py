"""The preprocessing of an artifact: as files beside the weights state it, or the published one, changed by options."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from exporter.artifact.sidecar import Preprocessing, Size, as_size, sides, size_text
from exporter.errors import BadRequest
from exporter.model import processors
from exporter.model.config import Config
from exporter.model.processors import SQUASHED_FROM, Unclear
from exporter.model.variants import Variant
from exporter.recipe import PreprocessingOptions

# torchvision publishes another recipe than the papers with its weights: bilinear, and its own resize.
_TORCHVISION_RESIZE = {"tiny": 236, "small": 230, "base": 232, "large": 232}
VALUES = ("size", "resize", "crop", "interpolation", "mean", "std")


@dataclass(frozen=True)
class Stated:
    """Preprocessing as it is known for weights, before options and the input size.

    origins: for each value, where it comes from.
    unclear: steps that options must replace.
    share_below_384: crop_pct of sizes below 384 pixels, where ConvNeXt's published rule holds, which squashes from
        there on; None where it does not.
    source: the weights, for errors.
    """

    preprocessing: Preprocessing
    origins: dict[str, str]
    unclear: tuple[Unclear, ...] = ()
    share_below_384: float | None = None
    source: str = ""

    def resolve(
        self, options: PreprocessingOptions | None = None, size: Size | None = None
    ) -> tuple[Preprocessing, dict[str, str]]:
        """The preprocessing for an input size in pixels, and where each value comes from.

        Raises: BadRequest for a step that is not followed and no option replaces, and for options that contradict each
            other.
        """
        options = options or PreprocessingOptions()
        self._refuse_unclear(options)
        recipe, origins = self.preprocessing, dict(self.origins)
        if size is not None and size != recipe.size:
            origins["size"] = "--imgsz"
            if self.share_below_384 is None:
                recipe = recipe.at(size)
            else:
                recipe = _by_rule(recipe, size, self.share_below_384)
                if recipe.crop != self.preprocessing.crop:
                    rule = f"published rule for {size} pixels"
                    origins |= {"resize": rule, "crop": rule}
        return _changed(recipe, origins, options)

    def _refuse_unclear(self, options: PreprocessingOptions) -> None:
        options_used = {name for name in ("mean", "std", "crop_mode") if getattr(options, name) is not None}
        if options.resize is not None or options.crop_pct is not None:
            options_used.add("resize")
        for step in self.unclear:
            if not options_used.issuperset(step.options):
                raise BadRequest(f"{self.source}: {step.reason}")


def _by_rule(recipe: Preprocessing, size: Size, share: float) -> Preprocessing:
    """ConvNeXt's published rule: a crop below 384 pixels, and a squash from there on."""
    if min(sides(size)) >= SQUASHED_FROM:
        return replace(recipe, size=size, resize=size, crop="squash", crop_pct=None)
    return replace(recipe, size=size, resize=_shared(size, share), crop="center", crop_pct=share)


def _shared(size: Size, share: float) -> Size:
    """The size that images are resized to, of which the input is a share."""
    height, width = sides(size)
    return as_size(int(height / share), int(width / share))


def refuse_contradiction(options: PreprocessingOptions) -> None:
    """Raises: BadRequest for options of which one would be ignored."""
    if options.resize is not None and options.crop_pct is not None:
        raise BadRequest(f"--resize {options.resize} and --crop-pct {options.crop_pct}: give one of them")


def _changed(
    recipe: Preprocessing, origins: dict[str, str], options: PreprocessingOptions
) -> tuple[Preprocessing, dict[str, str]]:
    """The preprocessing with the values of options."""
    refuse_contradiction(options)
    for name, option in (("crop", "crop_mode"), ("interpolation", "interpolation"), ("mean", "mean"), ("std", "std")):
        if (value := getattr(options, option)) is not None:
            if name in ("mean", "std"):
                value = _channels(name, value, len(recipe.mean))
            recipe = replace(recipe, **{name: value})
            origins[name] = f"--{option.replace('_', '-')}"
    if options.resize is not None:
        recipe = replace(recipe, resize=options.resize, crop_pct=None)
        origins["resize"] = "--resize"
    if options.crop_pct is not None:
        recipe = replace(recipe, resize=_shared(recipe.size, options.crop_pct), crop_pct=options.crop_pct)
        origins["resize"] = "--crop-pct"
    small = any(a < b for a, b in zip(sides(recipe.resize), sides(recipe.size), strict=True))
    if small and recipe.crop != "border":
        raise BadRequest(
            f"--resize {size_text(recipe.resize)}: smaller than the input size {size_text(recipe.size)}; "
            "give at least that"
        )
    return recipe, origins


def _channels(name: str, values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if len(values) not in (1, channels):
        raise BadRequest(f"--{name}: {len(values)} values, but the network has {channels} channels")
    return values if len(values) == channels else values * channels


def known(config: Config, layout: str, variant: Variant, source: str) -> Stated:
    """The preprocessing for weights: by the files beside them, else as published for their layout and variant."""
    if config.preprocessing is not None:
        origins = {name: config.origins[name] for name in VALUES}
        return Stated(config.preprocessing, origins, config.unclear, config.share_below_384, source)
    if variant.architecture.decoder is not None:
        return Stated(processors.UPERNET, dict.fromkeys(VALUES, "published preprocessing of UPerNet"), source=source)
    if variant.architecture.pyramid is not None:
        return Stated(processors.DETECTOR, dict.fromkeys(VALUES, "published preprocessing of mmdet"), source=source)
    if layout == "dinov3":
        return Stated(processors.DINOV3, dict.fromkeys(VALUES, "published preprocessing of DINOv3"), source=source)
    if layout == "torchvision" and variant.name in _TORCHVISION_RESIZE:
        recipe = Preprocessing(resize=_TORCHVISION_RESIZE[variant.name], interpolation="bilinear")
        return Stated(recipe, dict.fromkeys(VALUES, f"published preprocessing of torchvision's {variant.name}"))
    stated = published(variant)
    if config.image_size is None:
        return stated
    recipe, origins = stated.resolve(size=config.image_size)
    return dataclasses.replace(stated, preprocessing=recipe, origins=origins | {"size": "image_size of config.json"})


def with_keras(stated: Stated, normalization: Mapping[str, Sequence[float]]) -> Stated:
    """The preprocessing with the mean and variance of a Keras model's Normalization layer, of pixels from 0 to 255."""
    mean = tuple(value / 255 for value in normalization["mean"])
    std = tuple(math.sqrt(value) / 255 for value in normalization["variance"])
    origins = dict.fromkeys(("mean", "std"), "Normalization layer of the Keras model")
    return dataclasses.replace(
        stated, preprocessing=replace(stated.preprocessing, mean=mean, std=std), origins=stated.origins | origins
    )


def published(variant: Variant) -> Stated:
    """The published preprocessing of a variant; of a custom one, that of the papers."""
    origin = "default" if variant.name.endswith("custom") else f"published preprocessing of {variant.name}"
    recipe = variant.preprocessing
    return Stated(recipe, dict.fromkeys(VALUES, origin), share_below_384=recipe.share)
