"""Precisions: number formats, limits of accuracy and defaults, in one table."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Literal

from exporter.artifact.sidecar import Record
from exporter.errors import BadRequest, nearest


class Precision(Record, frozen=True):
    """A precision that artifacts are built in.

    bits: of a weight.
    format: of a weight.
    cosine: smallest mean cosine to the outputs of PyTorch.
    share: largest error of an output, as a share of the outputs' standard deviation.
    agreement_pct: smallest share of images with the same top-1 as PyTorch.
    max_drop: largest loss of top-1, in percentage points.
    needs_calibration: whether it is built with calibration images.
    above: the next higher precision, or None.
    color: in charts.
    help: of its flag on the command line.
    """

    name: str
    bits: int
    format: Literal["float", "bfloat", "integer", "float E4M3"]
    cosine: float
    share: float
    agreement_pct: float
    max_drop: float
    color: str
    help: str
    needs_calibration: bool = False
    above: str | None = None


# Limits were measured on trained and random weights. Largest errors as a share of the spread: fp32 2e-6, fp16 2e-3 to
# 6e-3, bf16 2e-2 to 6e-2, int8 and fp8 4e-2 to 3e-1.
_ALL = (
    Precision(name="fp32", bits=32, format="float", cosine=0.99999, share=1e-4, agreement_pct=99.9, max_drop=0.1,
              color="#0072b2", help="Weights and arithmetic in fp32."),
    Precision(name="fp16", bits=16, format="float", cosine=0.9999, share=0.05, agreement_pct=99.0, max_drop=0.2,
              color="#56b4e9", above="bf16",
              help="Half the size; statistics of norms stay in fp32, and CPUs compute in fp32."),
    Precision(name="bf16", bits=16, format="bfloat", cosine=0.999, share=0.4, agreement_pct=97.0, max_drop=0.5,
              color="#cc79a7", above="fp32",
              help="Half the size, computed in bf16 where the device has it; statistics of norms stay in fp32."),
    Precision(name="int8", bits=8, format="integer", cosine=0.998, share=1.0, agreement_pct=97.0, max_drop=0.5,
              color="#e69f00", above="fp16", needs_calibration=True,
              help="8-bit integers in the layers that keep their accuracy; needs calibration images."),
    Precision(name="fp8", bits=8, format="float E4M3", cosine=0.998, share=1.0, agreement_pct=97.0, max_drop=0.5,
              color="#d55e00", above="fp16", needs_calibration=True,
              help="8-bit floats (E4M3), for GPUs of compute capability 8.9 and above; needs calibration images."),
)  # fmt: skip
PRECISIONS = {precision.name: precision for precision in _ALL}


def get(name: str) -> Precision:
    """The precision of that name.

    Raises: BadRequest for an unknown one.
    """
    if name not in PRECISIONS:
        raise BadRequest(f"unknown precision {name!r}; {nearest(name, PRECISIONS)}")
    return PRECISIONS[name]


def of(path: Path, name: str) -> Precision:
    """The precision of an artifact.

    Raises: BadRequest, which names the file, for a precision that this version does not know.
    """
    if name not in PRECISIONS:
        known = ", ".join(PRECISIONS)
        raise BadRequest(f"{path}: its precision {name!r} is not known to this version (known: {known}); upgrade it")
    return PRECISIONS[name]


def next_higher(name: str, computed: Collection[str]) -> str:
    """The next precision above this one that a device computes in; fp32 if there is none.

    Args:
        name: a precision of the table.
        computed: the precisions that the device computes in.
    """
    above = PRECISIONS[name].above
    while above is not None and above not in computed:
        above = PRECISIONS[above].above
    return above or "fp32"
