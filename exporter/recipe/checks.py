"""The checks of a recipe, which are options of `verify`."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from exporter.artifact.sidecar import Record
from exporter.recipe.fields import about
from exporter.recipe.types import SYNTHETIC, Count, Device, OutputKind, ReduceZeroLabel, WhenUnsure


class Checks(Record, frozen=True):
    """Images and limits of `verify`. Where a limit is None, the precision's own limit holds."""

    data: Annotated[
        str,
        about(
            "A folder with a folder per class, or with images/ and annotations/ (masks; FOLDER#split), a manifest "
            "(.tsv, .csv, .txt; FILE#split), an .npz file or synthetic.",
            metavar="SRC",
            path=True,
        ),
    ] = SYNTHETIC
    samples: Annotated[Count | None, about("Largest number of images; by default all.", metavar="N")] = None
    max_drop: Annotated[
        Annotated[float, Meta(ge=-100, le=100)] | None,
        about(
            "Largest loss of top-1, of mAP of a multi-label head, or of mIoU on masks, in percentage points.",
            metavar="POINTS",
        ),
    ] = None
    min_agreement: Annotated[
        Annotated[float, Meta(ge=0, le=100)] | None,
        about(
            "Smallest share of images with the same top-1 as PyTorch, of equal decisions of a multi-label head, of "
            "equal nearest neighbours of feature vectors, or of pixels with the same class, in percent.",
            metavar="PCT",
        ),
    ] = None
    min_cosine: Annotated[
        Annotated[float, Meta(ge=-1, le=1)] | None,
        about("Smallest mean cosine to the outputs of PyTorch.", metavar="X"),
    ] = None
    max_relative_error: Annotated[
        Annotated[float, Meta(ge=0)] | None,
        about("Of a regression: largest mean error, in percent of the mean size of a value.", metavar="PCT"),
    ] = None
    min_r2: Annotated[
        Annotated[float, Meta(le=1)] | None,
        about("Of a regression: smallest R² to the values of PyTorch.", metavar="X"),
    ] = None
    min_spearman: Annotated[
        Annotated[float, Meta(ge=-1, le=1)] | None,
        about("Of a regression: smallest rank correlation with the values of PyTorch.", metavar="X"),
    ] = None
    atol: Annotated[Annotated[float, Meta(ge=0)] | None, about("Largest absolute error of an output.", metavar="X")] = (
        None
    )
    when_unsure: Annotated[
        WhenUnsure | None,
        about(
            "What to do where the images are too few to tell whether a limit of top-1, mAP or agreement is kept.",
            default="fail in CI (CI=true), else warn; the precision's own limits warn",
        ),
    ] = None
    outputs: Annotated[
        OutputKind | None,
        about(
            "What a head computes: scores of classes, one of which is right; of labels, each right or not (multilabel, "
            "trained with a sigmoid for each label); or values of a regression.",
            default="values for a head with one output, else classes",
        ),
    ] = None
    threshold: Annotated[
        Annotated[float, Meta(gt=0, lt=1)] | None,
        about(
            "Multi-label: probability (sigmoid of the output) at or above which an image has a label.",
            metavar="P",
            default="0.5",
        ),
    ] = None
    reduce_zero_label: ReduceZeroLabel = False
    slide: Annotated[
        bool,
        about(
            "For --task segment: resize images without changing their aspect ratio, run overlapping windows over them "
            "and average the logits, as mmsegmentation does; without it each image is resized and runs once."
        ),
    ] = False
    window: Annotated[
        Annotated[int, Meta(ge=32, le=4096)] | None,
        about(
            "Side of the windows in pixels.",
            metavar="N",
            default="the artifact's input size, or for any size test_cfg of the checkpoint, or 512",
        ),
    ] = None
    stride: Annotated[
        Annotated[int, Meta(ge=1, le=4096)] | None,
        about(
            "Step between windows in pixels.",
            metavar="N",
            default="test_cfg of the checkpoint, or two thirds of a window: 341 of 512",
        ),
    ] = None
    device: Device = None


SEARCHED = ("outputs", "threshold", "reduce_zero_label", "when_unsure")
"""The fields of checks by which the search of int8 and fp8 judges its candidates."""
