"""The one table of ConvNeXt variants: shapes, preprocessing, default weights, published accuracy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

import msgspec

from exporter.artifact.sidecar import Preprocessing, Record, Size, sides
from exporter.errors import BadRequest, nearest
from exporter.model import levels
from exporter.model.levels import Pyramid

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)


class Step(NamedTuple):
    """The downsampling in front of a stage: its stride and dilation, the dilation of the blocks behind it, and the
    stride from the input."""

    stride: int
    dilation: int
    block_dilation: int
    total: int


class Decoder(Record, frozen=True):
    """The head of UPerNet, for segmentation (`exporter.model.upernet`).

    classes: of the pixels.
    width: channels between its layers.
    levels: the stages whose maps it takes, two or more.
    scales: sides of the grids that the last of these maps is pooled to.
    windows: height, width and both steps of the windows that its configuration evaluates with; () for whole images.
    """

    classes: int
    width: int
    levels: tuple[int, ...]
    scales: tuple[int, ...]
    windows: tuple[int, ...] = ()


class Architecture(Record, frozen=True):
    """What distinguishes one ConvNeXt from another.

    depths, dims: blocks and channels of each stage.
    in_chans: channels of the input.
    stem: `patch` is one convolution of `patch`×`patch` pixels; the three overlaps are two 3×3 of stride 2, the first of
        them narrower (`overlap_tiered`) or followed by an activation (`overlap_act`).
    stem_norm: a norm follows the stem; the isotropic networks have none.
    stem_downsample: a downsampling layer follows the stem, as in timm where `patch` is 2.
    kernels: side of the depthwise convolutions of each stage; () for 7 in all.
    act: activation of the blocks and of `overlap_act`.
    norm, norm_eps: of every norm; `head_eps` and `stage_eps` are those of the last norm and of the stages' norms.
    grn: Global Response Normalization in the blocks (V2).
    output_stride: largest stride; stages beyond it are dilated, as in timm. None for no limit.
    pool: pooling in front of the head; `catavgmax` concatenates both; with `none` only feature maps can be exported.
    head_norm: a norm between pooling and head; with `head_norm_first` in front of the pooling.
    head_layers: layers between norm and head: `linear:WIDTH`, `affine:WIDTH`, `layer:WIDTH` or an activation.
    heads: several classifiers in place of one, `NAME:CLASSES`; each is an output.
    projection: the head is the projection of a CLIP tower, part of the embedding.
    stage_norms: stages whose feature map has a norm of its own.
    decoder, pyramid: the head of a network for segmentation, and the feature pyramid of a detector.
    """

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    in_chans: int = 3
    stem: Literal["patch", "overlap", "overlap_tiered", "overlap_act"] = "patch"
    patch: int = 4
    stem_norm: bool = True
    stem_downsample: bool = False
    kernels: tuple[int, ...] = ()
    act: Activation = "gelu"
    norm: Literal["layer", "rms", "simple"] = "layer"
    norm_eps: float = 1e-6
    head_eps: float | None = None
    stage_eps: float | None = None
    layer_scale: bool = True
    grn: bool = False
    output_stride: int | None = None
    pool: Literal["avg", "max", "avgmax", "catavgmax", "none"] = "avg"
    head_norm: bool = True
    head_norm_first: bool = False
    head_layers: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    projection: bool = False
    stage_norms: tuple[int, ...] = ()
    decoder: Decoder | None = None
    pyramid: Pyramid | None = None

    @property
    def strides(self) -> tuple[int, ...]:
        """Input pixels per pixel of each stage's feature map."""
        return tuple(step.total for step in self.steps)

    @property
    def steps(self) -> tuple[Step, ...]:
        """What each stage's downsampling does; the rule for dilation is that of timm's ConvNeXt."""
        total = (self.patch if self.stem == "patch" else 4) * (2 if self.stem_downsample else 1)
        steps, dilation = [Step(1, 1, 1, total)], 1
        for _ in self.depths[1:]:
            dilates = self.output_stride is not None and total >= self.output_stride
            dilation, stride = (dilation * 2, 1) if dilates else (dilation, 2)
            total *= stride
            steps.append(Step(stride, 1 if dilation <= 2 else 2, dilation, total))
        return tuple(steps)

    @property
    def kernel_sizes(self) -> tuple[int, ...]:
        """Side of the depthwise convolutions of each stage."""
        return self.kernels or (7,) * len(self.depths)

    @property
    def stride(self) -> int:
        """Input pixels per pixel of the last feature map."""
        return self.strides[-1]

    @property
    def stem_width(self) -> int:
        """Channels between the two convolutions of an overlapped stem."""
        return (self.dims[0] // 2 + 4) // 8 * 8 if self.stem == "overlap_tiered" else self.dims[0]


class Variant(Record, frozen=True):
    """One row of the table.

    `hub` is the repository of the default weights on the Hugging Face Hub; `license` what its model card says, as an
    SPDX identifier in lower case; `top1` the published ImageNet-1k accuracy of these at the size of `preprocessing`,
    in percent.
    """

    name: str
    architecture: Architecture
    preprocessing: Preprocessing = Preprocessing()
    hub: str | None = None
    license: str | None = None
    top1: float | None = None

    @property
    def params(self) -> int:
        """Parameters with a head of 1,000 classes."""
        return count_params(self.architecture, 1000)

    @property
    def gmacs(self) -> float:
        """Multiply-accumulates of one image at the published size, in 10⁹."""
        return count_macs(self.architecture, self.preprocessing.size, 1000) / 1e9


def _layers(arch: Architecture, classes: int) -> Iterator[tuple[int, int, int, int]]:
    """Each convolution and linear layer as (weights, outputs per position, layers alike, stride)."""
    dims, first = arch.dims, arch.dims[0]
    if arch.stem == "patch":
        yield arch.patch**2 * arch.in_chans * first, first, 1, arch.patch
    else:
        yield 9 * arch.in_chans * arch.stem_width, arch.stem_width, 1, 2
        yield 9 * arch.stem_width * first, first, 1, 4
    if arch.stem_downsample:
        yield 4 * first * first, first, 1, arch.strides[0]
    for stage, (dim, depth, kernel) in enumerate(zip(dims, arch.depths, arch.kernel_sizes, strict=True)):
        stride = arch.strides[stage]
        if stage:
            yield 4 * dims[stage - 1] * dim, dim, 1, stride
        yield kernel**2 * dim, dim, depth, stride
        yield 4 * dim * dim, 4 * dim, depth, stride
        yield 4 * dim * dim, dim, depth, stride
    width = dims[-1] * (2 if arch.pool == "catavgmax" else 1)
    for kind, size in map(head_layer, arch.head_layers):
        if kind == "linear":
            yield width * size, size, 1, 0
            width = size
    for outputs in [size for _, size in map(head_layer, arch.heads)] or [classes]:
        yield width * outputs, outputs, 1, 0


def _decoder_layers(decoder: Decoder, dims: tuple[int, ...]) -> Iterator[tuple[int, int, int, int]]:
    """Each convolution of UPerNet's head as (weights, outputs per position, level, cells of a pooled map or 0)."""
    width, (*finer, last) = decoder.width, (dims[level] for level in decoder.levels)
    first, coarsest = decoder.levels[0], decoder.levels[-1]
    for cells in decoder.scales:
        yield last * width, width, coarsest, cells
    yield 9 * (last + len(decoder.scales) * width) * width, width, coarsest, 0
    for level, dim in zip(decoder.levels, finer, strict=False):
        yield dim * width, width, level, 0
        yield 9 * width * width, width, level, 0
    yield 9 * len(decoder.levels) * width * width, width, first, 0
    yield width * decoder.classes, decoder.classes, first, 0


def head_layer(layer: str) -> tuple[str, int]:
    """Kind and width of one of `head_layers`, or name and classes of one of `heads`; 0 for an activation."""
    kind, _, width = layer.partition(":")
    return kind, int(width or 0)


def count_params(arch: Architecture, classes: int) -> int:
    """Parameters of a network, without building it."""
    total = sum((weights + outputs) * alike for weights, outputs, alike, _ in _layers(arch, classes))
    per_norm = 2 if arch.norm == "layer" else 1
    blocks = sum(depth * dim for dim, depth in zip(arch.dims, arch.depths, strict=True))
    total += per_norm * blocks + arch.layer_scale * blocks + arch.grn * 8 * blocks
    if arch.decoder is not None:
        total += sum(weights + outputs for weights, outputs, *_ in _decoder_layers(arch.decoder, arch.dims))
    if arch.pyramid is not None:
        total += sum(weights + outputs for weights, outputs, _ in levels.layers(arch.pyramid, arch.dims))
    norms = sum(arch.dims[:-1]) + arch.dims[0] * (arch.stem_norm + arch.stem_downsample)
    norms += arch.dims[-1] * arch.head_norm + sum(arch.dims[stage] for stage in arch.stage_norms)
    return total + per_norm * norms


def count_macs(arch: Architecture, size: Size, classes: int, is_split: bool = False) -> int:
    """Multiply-accumulates of one image of `size` pixels, in convolutions and linear layers.

    `is_split` counts the last 3×3 convolution of UPerNet's head as `SplitMultiscaleConv` computes it.
    """
    heights, widths = (_map_sides(arch, side) for side in sides(size))
    total = 0
    for weights, _, alike, stride in _layers(arch, classes):
        positions = heights[stride] * widths[stride] if stride else 1
        total += weights * alike * positions
    for weights, _, level, cells in _decoder_layers(arch.decoder, arch.dims) if arch.decoder else ():
        stride = arch.strides[level]
        total += weights * (cells * cells or heights[stride] * widths[stride])
    if is_split and arch.decoder is not None:
        maps = [(heights[stride], widths[stride]) for stride in (arch.strides[level] for level in arch.decoder.levels)]
        total -= levels.macs_saved_by_split(arch.decoder.width, maps)
    if arch.pyramid is not None:
        sizes = [(heights[stride], widths[stride]) for stride in arch.strides]
        total += levels.count_macs(arch.pyramid, arch.dims, sizes)
    return total


def _map_sides(arch: Architecture, side: int) -> dict[int, int]:
    """Height or width of the feature maps for that of the image, by their stride. Convolutions without padding leave
    out what is over; those of an overlapped stem are padded and round up."""
    half = -(-side // 2)
    found = {arch.patch: side // arch.patch} if arch.stem == "patch" else {2: half, 4: -(-half // 2)}
    for stride in arch.strides:
        last = max(found)
        found.setdefault(stride, found[last] // max(1, stride // last))
    return found


def _crop(share: float, size: int = 224, colors: dict[str, tuple[float, float, float]] | None = None) -> Preprocessing:
    recipe = Preprocessing(size=size, resize=int(size / share), crop_pct=share)
    return msgspec.structs.replace(recipe, **(colors or {}))


_HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
_CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
_P95 = _crop(0.95)
_HALF90 = _crop(0.9, 224, _HALF)

_WIDTHS = {
    "zepto": (32, 64, 128, 256),
    "atto": (40, 80, 160, 320),
    "femto": (48, 96, 192, 384),
    "pico": (64, 128, 256, 512),
    "nano": (80, 160, 320, 640),
    "tiny": (96, 192, 384, 768),
    "small": (96, 192, 384, 768),
    "base": (128, 256, 512, 1024),
    "large": (192, 384, 768, 1536),
    "xlarge": (256, 512, 1024, 2048),
    "huge": (352, 704, 1408, 2816),
    "xxlarge": (384, 768, 1536, 3072),
}
_DEPTHS = {
    "zepto": (2, 2, 4, 2),
    "atto": (2, 2, 6, 2),
    "femto": (2, 2, 6, 2),
    "pico": (2, 2, 6, 2),
    "nano": (2, 2, 8, 2),
    "tiny": (3, 3, 9, 3),
    "xxlarge": (3, 4, 30, 3),
}


def published_name(name: str) -> str:
    """The name that timm and torchvision have for a variant."""
    return f"convnextv2_{name[3:]}" if name.startswith("v2_") else f"convnext_{name}"


def _variant(
    name: str, tag: str | None, top1: float | None, recipe: Preprocessing | None = None, **differences: object
) -> Variant:
    """A row; the name gives the size, `tag` the default weights on the Hub."""
    v2 = name.startswith("v2_")
    size = name.removeprefix("v2_").split("_")[0]
    arch = Architecture(dims=_WIDTHS[size], depths=_DEPTHS.get(size, (3, 3, 27, 3)), layer_scale=not v2, grn=v2)
    return Variant(
        name=name,
        architecture=msgspec.structs.replace(arch, **differences),
        preprocessing=recipe or Preprocessing(),
        hub=f"timm/{published_name(name)}.{tag}" if tag else None,
        license=("cc-by-nc-4.0" if v2 else "apache-2.0") if tag else None,
        top1=top1,
    )


def _isotropic(size: str, depth: int, dim: int, top1: float) -> Variant:
    # V1 paper, table 2; small and base were trained without layer scale.
    arch = Architecture(depths=(depth,), dims=(dim,), patch=16, stem_norm=False, layer_scale=size == "large")
    return Variant(name=f"isotropic_{size}", architecture=arch, top1=top1)


# top1: timm's results table for the named weights at 224 (256 for the two CLIP models); V1 paper for isotropic.
VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        _variant("zepto", None, None),
        _variant("zepto_rms", "ra4_e3600_r224_in1k", None, _crop(0.875, 224, _HALF), norm="simple"),
        _variant("zepto_rms_ols", "ra4_e3600_r224_in1k", None, _HALF90, norm="simple", stem="overlap_act"),
        _variant("atto", "d2_in1k", 75.664),
        _variant("atto_ols", "a2_in1k", 75.88, stem="overlap_tiered"),
        _variant("atto_rms", None, None, norm="rms"),
        _variant("femto", "d1_in1k", 77.454),
        _variant("femto_ols", "d1_in1k", 77.86, stem="overlap_tiered"),
        _variant("pico", "d1_in1k", 79.526),
        _variant("pico_ols", "d1_in1k", 79.522, _P95, stem="overlap_tiered"),
        _variant("nano", "d1h_in1k", 80.768, _P95),
        _variant("nano_ols", "d1h_in1k", 80.866, _P95, stem="overlap"),
        _variant("tiny", "fb_in1k", 82.066),
        _variant("tiny_hnf", "a2h_in1k", 82.216, _P95, head_norm_first=True),
        _variant("small", "fb_in1k", 83.142),
        _variant("base", "fb_in1k", 83.82),
        _variant("large", "fb_in1k", 84.282),
        _variant(
            "large_mlp",
            "clip_laion2b_augreg_ft_in1k",
            87.344,
            _crop(1.0, 256, _CLIP),
            head_layers=("linear:1536", "gelu"),
        ),
        _variant("xlarge", "fb_in22k_ft_in1k", 87.002),
        _variant("xxlarge", "clip_laion2b_soup_ft_in1k", 88.612, _crop(1.0, 256, _CLIP), norm_eps=1e-5),
        _variant("v2_atto", "fcmae_ft_in1k", 76.664),
        _variant("v2_femto", "fcmae_ft_in1k", 78.488),
        _variant("v2_pico", "fcmae_ft_in1k", 80.304),
        _variant("v2_nano", "fcmae_ft_in1k", 81.83),
        _variant("v2_tiny", "fcmae_ft_in1k", 82.92),
        _variant("v2_small", None, None),
        _variant("v2_base", "fcmae_ft_in1k", 84.874),
        _variant("v2_large", "fcmae_ft_in1k", 85.742),
        _variant("v2_huge", "fcmae_ft_in1k", 86.256),
        _isotropic("small", 18, 384, 79.7),
        _isotropic("base", 18, 768, 82.0),
        _isotropic("large", 36, 1024, 82.6),
    )
}


def published_license(repository: str) -> str | None:
    """The license of a repository whose weights are a variant's default; None for any other."""
    return next((variant.license for variant in VARIANTS.values() if variant.hub == repository), None)


def resolve(name: str) -> tuple[Variant, str | None]:
    """The variant that a name stands for, and the Hub repository if the name says which weights.

    `tiny`, `convnext_tiny` and `convnext-tiny` are one variant; `convnext_tiny.fb_in22k` also names weights.

    Raises: BadRequest for an unknown name, with the nearest known one.
    """
    word, _, tag = name.partition(".")
    short = re.sub(r"^convnext_?", "", word.replace("-", "_").lower())
    if short not in VARIANTS:
        raise BadRequest(f"unknown variant {name!r}; {nearest(short, VARIANTS)}")
    return VARIANTS[short], f"timm/{published_name(short)}.{tag}" if tag else None


_LOOSE = frozenset(
    {"layer_scale", "in_chans", "act", "norm_eps", "head_eps", "stage_eps", "output_stride", "pool", "head_norm",
     "head_layers", "heads", "projection", "stage_norms", "decoder", "pyramid"}
)  # fmt: skip
"""Fields in which a network may differ from a published variant and still have its name."""


def named(arch: Architecture) -> Variant:
    """The variant of this architecture, or `custom` (`v2_custom` with GRN) when no published one has its shape.

    Layer scale is left out of the comparison: every size has been trained with and without. A variant that differs in
    activation, input, pooling or head alone is the one that is nearest.
    """
    for loose in (frozenset({"layer_scale"}), _LOOSE):
        wanted = _without(arch, loose)
        for variant in VARIANTS.values():
            if _without(variant.architecture, loose) == wanted:
                return msgspec.structs.replace(variant, architecture=arch)
    return Variant(name="v2_custom" if arch.grn else "custom", architecture=arch)


def _without(arch: Architecture, names: frozenset[str]) -> dict[str, object]:
    return {name: getattr(arch, name) for name in arch.__struct_fields__ if name not in names}
