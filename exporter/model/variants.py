"""The one table of ConvNeXt variants: shapes, preprocessing, default weights, published accuracy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

import msgspec

from exporter.artifact.sidecar import Preprocessing, Record, Size, sides
from exporter.errors import BadRequest, nearest


class Architecture(Record, frozen=True):
    """What distinguishes one ConvNeXt from another.

    `stem`: `patch` is 4×4 of stride 4 (16×16 for isotropic); the three overlaps are two 3×3 of stride 2, the
    first of them narrower (`overlap_tiered`) or followed by GELU (`overlap_act`).
    """

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    stem: Literal["patch", "overlap", "overlap_tiered", "overlap_act"] = "patch"
    norm: Literal["layer", "rms", "simple"] = "layer"
    norm_eps: float = 1e-6
    layer_scale: bool = True
    grn: bool = False
    head_norm_first: bool = False
    head_hidden: int | None = None
    in_chans: int = 3

    @property
    def isotropic(self) -> bool:
        """One stage at stride 16 (V1 paper, section 3.3)."""
        return len(self.depths) == 1

    @property
    def stride(self) -> int:
        """Input pixels per pixel of the last feature map."""
        return 16 if self.isotropic else 4 * 2 ** (len(self.depths) - 1)

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
    if arch.isotropic:
        yield 16 * 16 * arch.in_chans * first, first, 1, 16
    elif arch.stem == "patch":
        yield 4 * 4 * arch.in_chans * first, first, 1, 4
    else:
        yield 9 * arch.in_chans * arch.stem_width, arch.stem_width, 1, 2
        yield 9 * arch.stem_width * first, first, 1, 4
    stride = 16 if arch.isotropic else 4
    for stage, (dim, depth) in enumerate(zip(dims, arch.depths, strict=True)):
        if stage:
            stride *= 2
            yield 4 * dims[stage - 1] * dim, dim, 1, stride
        yield 49 * dim, dim, depth, stride
        yield 4 * dim * dim, 4 * dim, depth, stride
        yield 4 * dim * dim, dim, depth, stride
    hidden = arch.head_hidden or dims[-1]
    if arch.head_hidden:
        yield dims[-1] * hidden, hidden, 1, 0
    yield hidden * classes, classes, 1, 0


def count_params(arch: Architecture, classes: int) -> int:
    """Parameters of a network, without building it."""
    total = sum((weights + outputs) * alike for weights, outputs, alike, _ in _layers(arch, classes))
    per_norm = 2 if arch.norm == "layer" else 1
    blocks = sum(depth * dim for dim, depth in zip(arch.dims, arch.depths, strict=True))
    total += per_norm * blocks + arch.layer_scale * blocks + arch.grn * 8 * blocks
    norms = arch.dims[-1] if arch.isotropic else arch.dims[0] + sum(arch.dims[:-1]) + arch.dims[-1]
    return total + per_norm * norms


def count_macs(arch: Architecture, size: Size, classes: int) -> int:
    """Multiply-accumulates of one image of `size` pixels, in convolutions and linear layers."""
    height, width = sides(size)
    total = 0
    for weights, _, alike, stride in _layers(arch, classes):
        positions = (height // stride) * (width // stride) if stride else 1
        total += weights * alike * positions
    return total


def _crop(share: float, size: int = 224, colors: dict[str, tuple[float, float, float]] | None = None) -> Preprocessing:
    recipe = Preprocessing(size=size, resize=int(size / share))
    return msgspec.structs.replace(recipe, **(colors or {}))


_HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
_CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
_P95 = _crop(0.95)

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


def _published(name: str) -> str:
    """What timm calls a variant."""
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
        hub=f"timm/{_published(name)}.{tag}" if tag else None,
        license=("cc-by-nc-4.0" if v2 else "apache-2.0") if tag else None,
        top1=top1,
    )


def _isotropic(size: str, depth: int, dim: int, top1: float) -> Variant:
    # V1 paper, table 2; small and base were trained without layer scale.
    arch = Architecture(depths=(depth,), dims=(dim,), layer_scale=size == "large")
    return Variant(name=f"isotropic_{size}", architecture=arch, top1=top1)


# top1: timm's results table for the named weights at 224 (256 for the two CLIP models); V1 paper for isotropic.
VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        _variant("zepto", None, None),
        _variant("zepto_rms", "ra4_e3600_r224_in1k", None, _crop(0.875, 224, _HALF), norm="simple"),
        _variant(
            "zepto_rms_ols",
            "ra4_e3600_r224_in1k",
            None,
            _crop(0.9, 224, _HALF),
            norm="simple",
            stem="overlap_act",
        ),
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
        _variant("large_mlp", "clip_laion2b_augreg_ft_in1k", 87.344, _crop(1.0, 256, _CLIP), head_hidden=1536),
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
    return VARIANTS[short], f"timm/{_published(short)}.{tag}" if tag else None


def named(arch: Architecture) -> Variant:
    """The variant of this architecture, or `custom` (`v2_custom` with GRN) when no published one has it.

    Layer scale and input channels are left out of the comparison: every size has been trained with and without.
    """
    for variant in VARIANTS.values():
        alike = msgspec.structs.replace(variant.architecture, layer_scale=arch.layer_scale, in_chans=arch.in_chans)
        if alike == arch:
            return msgspec.structs.replace(variant, architecture=arch)
    return Variant(name="v2_custom" if arch.grn else "custom", architecture=arch)
