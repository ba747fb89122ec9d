"""Images with masks, which have the class of each pixel: folders as those of ADE20K and Cityscapes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exporter.artifact import sha256_file
from exporter.artifact.sidecar import Preprocessing
from exporter.data import images
from exporter.data.classes import UNKNOWN
from exporter.data.manifests import locate
from exporter.data.samples import Item, Samples, images_in, read_file, spread
from exporter.errors import BadRequest

IGNORED = 255  # the value of pixels without a class, in all these data sets
_FOLDERS = (
    ("images", "annotations"),  # ADE20K
    ("images", "masks"),
    ("img_dir", "ann_dir"),  # mmsegmentation
    ("leftImg8bit", "gtFine"),  # Cityscapes
)
_ENDINGS = (("_leftImg8bit", "_gtFine_labelTrainIds"),)


@dataclass(frozen=True)
class Values:
    """What the values of masks stand for.

    classes: of the network, numbered from 0.
    reduce_zero_label: whether masks number them from 1, and 0 is a pixel without a class.
    """

    classes: int
    reduce_zero_label: bool = False


def folders_of(source: str) -> tuple[Path, Path] | None:
    """The folders of images and of masks of a source (`FOLDER`, or `FOLDER#SPLIT` for one of their sub-folders), or
    None where it has none."""
    path, split = locate(source)
    for one, other in _FOLDERS:
        if (path / one).is_dir() and (path / other).is_dir():
            return path / one / split, path / other / split
    return None


def open_masks(
    source: str, pair: tuple[Path, Path], recipe: Preprocessing, values: Values, most: int | None = None
) -> Samples:
    """The images of a folder, each with its mask at the size of the network's input.

    Args:
        source: what the user gave, for messages.
        pair: from `folders_of`.
        recipe: how each image becomes an input.
        values: what the values of masks stand for.
        most: at most so many images, evenly spread; None is all.

    Raises: BadRequest for a folder without images, and an image without a mask.
    """
    folder, beside = pair
    names = images_in(folder) if folder.is_dir() else []
    if not names:
        raise BadRequest(f"{folder}: no images in it; give the folder that has images/ and annotations/")
    if most and most < len(names):
        names = [names[index] for index in spread(len(names), most)]
    paths = _masks(names, beside)

    def items() -> Iterator[Item]:
        for name, mask in zip(names, paths, strict=True):
            yield name, partial(_read, folder / name, mask, recipe, values), partial(read_file, folder / name, recipe)

    return Samples(source, len(names), items, labelled=True, identity=lambda name: sha256_file(folder / name))


def _masks(names: Sequence[str], folder: Path) -> list[Path]:
    """The mask of each image.

    Raises: BadRequest for an image without one.
    """
    paths = []
    for name in names:
        stem = name.rpartition(".")[0]
        for ending, of_mask in _ENDINGS:
            stem = stem.removesuffix(ending) + of_mask if stem.endswith(ending) else stem
        if not (folder / f"{stem}.png").is_file():
            raise BadRequest(f"{folder / stem}.png: no such mask, for the image {name}; add it, or remove the image")
        paths.append(folder / f"{stem}.png")
    return paths


def _read(image: Path, mask: Path, recipe: Preprocessing, values: Values) -> NDArray[np.int64]:
    """The class of each pixel (height, width) of the input, −1 where it has none. Masks take the way of their image,
    with the nearest pixel.

    Raises: BadRequest for a mask of another size than its image, or with a value that is no class.
    """
    try:
        classes, size = images.read_mask(mask), images.size_of(image)
    except images.Unreadable as error:
        raise BadRequest(
            f"{mask}: cannot be read as a mask ({error}); a mask is a PNG with one number a pixel"
        ) from None
    if classes.shape[::-1] != size:
        raise BadRequest(
            f"{mask}: {classes.shape[1]}×{classes.shape[0]} pixels, but its image has {size[0]}×{size[1]}; give masks "
            "of the size of their images"
        )
    first = 1 if values.reduce_zero_label else 0
    ignored = (classes == IGNORED) | (classes < first)
    classes = np.where(ignored, UNKNOWN, classes - first)
    if (largest := int(classes.max())) >= values.classes:
        advice = "; --reduce-zero-label is for masks that count from 1" if not first else ""
        raise BadRequest(
            f"{mask}: value {largest + first}, but the {values.classes} classes are {first} to "
            f"{values.classes - 1 + first}, and {IGNORED} is ignored{advice}"
        )
    return images.preprocess_mask(classes, recipe)
