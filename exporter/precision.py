"""The table of precisions, with the default limits of artifacts in each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from exporter.artifact.sidecar import Sidecar
from exporter.errors import BadRequest


@dataclass(frozen=True)
class ValueLimits:
    """The default limits of values, which are no classes: mean error in percent of the mean size, R² and Spearman's
    rank correlation with PyTorch."""

    relative_error: float
    r2: float
    spearman: float


@dataclass(frozen=True)
class PixelLimits:
    """The default limits of segmentation, in percent: the share of pixels with PyTorch's class, and mIoU of the classes
    of the artifact with PyTorch's in place of masks."""

    agreement_pct: float
    miou_pct: float


@dataclass(frozen=True)
class Limits:
    """The default limits of parity: cosine, largest error as a share of the outputs' standard deviation, agreement,
    agreement of nearest neighbours, and those of values and of pixels."""

    cosine: float
    share: float
    agreement_pct: float
    neighbours_pct: float
    values: ValueLimits
    pixels: PixelLimits


@dataclass(frozen=True)
class Precision:
    """One precision.

    number_format: of its values; accumulation and statistics may be in another.
    max_drop_points: the largest loss of top-1 that passes by default, in percentage points.
    higher: the precision that it is compared with by default, which has more bits; "" for fp32.
    color: in charts.
    """

    name: str
    bits: int
    number_format: str
    limits: Limits
    max_drop_points: float
    higher: str
    color: str
    needs_calibration: bool = False


# The limits were measured on trained and random weights. Largest errors: fp32 2e-6, fp16 2e-3 … 6e-3, bf16
# 2e-2 … 6e-2 of the standard deviation, int8 and fp8 4e-2 … 3e-1.
# Values, each logit and each difference of two logits of trained models being one (200 photographs, 16 and 64 synthetic
# images): largest relative error fp32 1e-4 %, fp16 0.1 %, bf16 4.4 %, int8 4.1 %; smallest R² 1 − 1e-11, 1 − 2e-6,
# 0.998, 0.996; smallest rank correlation 1, 0.997, 0.997, 0.991.
# Agreement of nearest neighbours, trained atto, 2,000 photographs: fp32 100 %, int8 98.6 %.
# Colours are told apart by people who see them differently, on white and on black (Okabe and Ito, 2008).
_NARROW_PIXELS = PixelLimits(97.0, 90.0)
_EXACT, _CLOSE = ValueLimits(0.01, 0.9999, 0.999), ValueLimits(1.0, 0.999, 0.99)
_NARROW = ValueLimits(10.0, 0.98, 0.95)
_EIGHT_BITS = Limits(0.998, 1.0, 97.0, 80.0, _NARROW, _NARROW_PIXELS)
PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision(
            "fp32",
            32,
            "float",
            Limits(0.99999, 1e-4, 99.9, 99.5, _EXACT, PixelLimits(99.9, 99.5)),
            0.1,
            "",
            "#0072b2",
        ),
        Precision(
            "fp16",
            16,
            "float",
            Limits(0.9999, 0.05, 99.0, 97.0, _CLOSE, PixelLimits(99.0, 97.0)),
            0.2,
            "fp32",
            "#56b4e9",
        ),
        Precision(
            "bf16", 16, "bfloat", Limits(0.999, 0.4, 97.0, 85.0, _NARROW, _NARROW_PIXELS), 0.5, "fp32", "#cc79a7"
        ),
        Precision("int8", 8, "int", _EIGHT_BITS, 0.5, "fp16", "#e69f00", needs_calibration=True),
        Precision("fp8", 8, "float8 e4m3", _EIGHT_BITS, 0.5, "fp16", "#d55e00", needs_calibration=True),
    )
}


def judged_as(sidecar: Sidecar) -> Precision:
    """The precision whose limits hold for an artifact: its own, or fp16 where an fp32 artifact has inputs or outputs in
    fp16, or products in TF32, which have the mantissa of fp16."""
    is_half = any(tensor.dtype == "float16" for tensor in (*sidecar.inputs, *sidecar.outputs))
    is_rounded = is_half or bool(sidecar.target.get("tf32"))
    return get("fp16" if is_rounded and sidecar.precision == "fp32" else sidecar.precision)


def get(name: str, file: Path | str = "") -> Precision:
    """The precision of that name.

    Args:
        name: the precision.
        file: the file that names it, for the message.

    Raises: BadRequest for an unknown one.
    """
    if name not in PRECISIONS:
        where = f"{file}: " if file else ""
        known = f"known: {', '.join(PRECISIONS)}"
        raise BadRequest(f"{where}precision {name!r} is not known to this version; {known}")
    return PRECISIONS[name]
