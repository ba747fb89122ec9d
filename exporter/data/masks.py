"""Images with masks, which have the class of each pixel: folders as those of ADE20K and Cityscapes, and manifests."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from exporter.artifact import sha256_file
from exporter.artifact.sidecar import Preprocessing
from exporter.data import images
from exporter.data.classes import UNKNOWN
from exporter.data.folders import images_in, mask_folders
from exporter.data.manifests import TESTED, TRAINED, is_manifest, locate, masks_of, read_manifest
from exporter.data.samples import Item, Samples, read_file, spread
from exporter.errors import BadRequest, some

MOST_COLORS = 256
IGNORED = 255  # the value of pixels without a class, in all these data sets
_ENDINGS = (("_leftImg8bit", "_gtFine_labelTrainIds"),)


def colors() -> NDArray[np.uint8]:
    """A colour for each of 256 classes, (256, 3): those of PASCAL VOC's devkit (`VOClabelcolormap`), in which bit
    3·k + c of the number is bit 7 − k of channel c; class 0 is black."""
    numbers = np.arange(MOST_COLORS)
    table = np.zeros((MOST_COLORS, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            table[:, channel] |= (((numbers >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return table


@dataclass(frozen=True)
class Values:
    """What the values of masks stand for.

    classes: of the network, numbered from 0.
    reduce_zero_label: whether masks number them from 1, and 0 is a pixel without a class.
    """

    classes: int
    reduce_zero_label: bool = False


class Pair(NamedTuple):
    """An image with its mask: its name for the user, both files, and the SHA-256 of the image where it is known."""

    name: str
    image: Path
    mask: Path
    digest: str = ""


def pairs_of(source: str) -> list[Pair] | None:
    """The images of a source that has masks: `FOLDER`, or `FOLDER#SPLIT` for one of the sub-folders of its images and
    masks, or a manifest with a column `mask`. None for any other.

    Raises: BadRequest for a folder without images, or with those of training and others where no split is named, and a
        manifest that cannot be read.
    """
    path, split = locate(source)
    if is_manifest(path) and path.is_file():
        listed = read_manifest(path, split)
        masks = masks_of(path, listed)
        return [
            Pair(row["path"], listed.root / row["path"], path.parent / mask, row.get("sha256", ""))
            for row, mask in zip(listed.rows, masks, strict=bool(masks))
        ] or None
    folders = mask_folders(path)
    if folders is None:
        return None
    image_folder, mask_folder = (path / name / split for name in folders)
    names = images_in(image_folder) if image_folder.is_dir() else []
    if not names:
        splits = sorted(entry.name for entry in (path / folders[0]).iterdir() if entry.is_dir()) if split else []
        has = f"{path.name} has the splits {some(splits)}" if splits else f"put the images into {path / folders[0]}"
        raise BadRequest(f"{image_folder}: no images in it; {has}")
    if not split:
        _refuse_training_images(source, image_folder)
    pairs = [Pair(name, image_folder / name, _mask_in(mask_folder, name)) for name in names]
    first: dict[Path, str] = {}
    for pair in pairs:
        if (other := first.setdefault(pair.mask, pair.name)) != pair.name:
            raise BadRequest(f"{pair.mask}: the mask of both {other} and {pair.name}; keep one of these images")
    return pairs


def _refuse_training_images(source: str, image_folder: Path) -> None:
    """Refuse to measure images of training together with others.

    Raises: BadRequest.
    """
    splits = sorted(entry.name for entry in image_folder.iterdir() if entry.is_dir())
    if len(splits) > 1 and any(_is_one_of(split, TRAINED) for split in splits):
        example = next((split for split in splits if _is_one_of(split, TESTED)), splits[0])
        raise BadRequest(f"{source}: it has the splits {some(splits)}; take one of them as in {source}#{example}")


def _is_one_of(split: str, names: Sequence[str]) -> bool:
    """Whether a split has one of these names, perhaps with a number behind it, as `train2017`."""
    return re.fullmatch(rf"({'|'.join(names)})([-_]?\d.*)?", split.lower()) is not None


def open_masks(
    source: str,
    pairs: Sequence[Pair],
    preprocessing_of: Callable[[Path], Preprocessing],
    values: Values,
    most: int | None = None,
) -> Samples:
    """Images, each with its mask at the size of the network's input.

    Args:
        source: what the user gave, for messages.
        pairs: from `pairs_of`.
        preprocessing_of: the preprocessing of the file of an image.
        values: what the values of masks stand for.
        most: at most so many images, evenly spread; None is all.

    Raises: BadRequest for an image without a mask.
    """
    if most and most < len(pairs):
        pairs = [pairs[index] for index in spread(len(pairs), most)]
    for pair in pairs:
        if not pair.mask.is_file():
            raise BadRequest(f"{pair.mask}: no such mask, for the image {pair.name}; add it, or remove the image")

    def items(start: int = 0) -> Iterator[Item]:
        for name, image, mask, digest in islice(pairs, start, None):
            yield (
                name,
                partial(_read, image, mask, preprocessing_of, values),
                partial(_input, image, preprocessing_of, digest),
            )

    files = {pair.name: pair.image for pair in pairs}
    return Samples(source, len(pairs), items, labelled=True, identity=lambda name: sha256_file(files[name]))


def _input(image: Path, preprocessing_of: Callable[[Path], Preprocessing], digest: str) -> NDArray[Any]:
    return read_file(image, preprocessing_of(image), digest)


def _mask_in(folder: Path, name: str) -> Path:
    """The mask of an image in the folder of masks."""
    stem = name.rpartition(".")[0]
    for ending, of_mask in _ENDINGS:
        stem = stem.removesuffix(ending) + of_mask if stem.endswith(ending) else stem
    upper = folder / f"{stem}.PNG"
    return upper if upper.is_file() else folder / f"{stem}.png"


def _read(
    image: Path, mask: Path, preprocessing_of: Callable[[Path], Preprocessing], values: Values
) -> NDArray[np.int64]:
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
        turned = "; the image is turned upright, as its EXIF data says" if classes.shape == size else ""
        raise BadRequest(
            f"{mask}: {classes.shape[1]}×{classes.shape[0]} pixels, but its image has {size[0]}×{size[1]}; give masks "
            f"of the size of their images{turned}"
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
    return images.preprocess_mask(classes, preprocessing_of(image))
