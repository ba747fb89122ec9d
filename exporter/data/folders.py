"""Folders of images, alone or with their masks."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NoReturn

from exporter.data import images
from exporter.errors import BadRequest, some
from exporter.progress import note

MASK_FOLDERS = (
    ("images", "annotations"),  # ADE20K
    ("images", "masks"),
    ("img_dir", "ann_dir"),  # mmsegmentation
    ("leftImg8bit", "gtFine"),  # Cityscapes
    ("JPEGImages", "SegmentationClass"),  # PASCAL VOC
    ("images", "labels"),
)
"""Sub-folders of a folder with images and their masks."""


def mask_folders(folder: Path) -> tuple[str, str] | None:
    """The names of the sub-folders of images and of their masks, if a folder has both. A folder of other files is none
    of masks: `annotations/` of COCO, `labels/` of YOLO."""
    return next((pair for pair in MASK_FOLDERS if _have_masks(folder / pair[0], folder / pair[1])), None)


def _have_masks(image_folder: Path, mask_folder: Path) -> bool:
    if not (image_folder.is_dir() and mask_folder.is_dir()):
        return False
    are_pictures = (file.suffix.lower() in images.SUFFIXES for file in mask_folder.rglob("*") if file.is_file())
    return next(are_pictures, True) or any(are_pictures)


def images_in(folder: Path, split: str = "") -> list[str]:
    """The paths of the images in a folder and below, none hidden, relative to it and sorted.

    If the folder has images and masks (`mask_folders`), they are its images alone, with `split` those of that
    sub-folder.

    Raises: BadRequest for a `split` of a folder without masks.
    """
    folders = mask_folders(folder)
    if split and folders is None:
        raise BadRequest(
            f"{folder}#{split}: #{split} needs a folder with images and masks, as images/ and annotations/; leave it "
            f"out, or give {folder / split}"
        )
    below = "/".join(filter(None, (folders[0], split))) if folders else ""
    if not (folder / below).is_dir():
        return []
    names = sorted(names_below(folder / below, images.SUFFIXES | images.NOT_READ))
    if left_out := [name for name in names if Path(name).suffix.lower() in images.NOT_READ]:
        note(f"{folder / below}: {some(left_out)} left out, in formats that Pillow does not read; convert them to JPEG")
        names = [name for name in names if Path(name).suffix.lower() in images.SUFFIXES]
    return [f"{below}/{name}" if below else name for name in names]


def is_hidden(name: str) -> bool:
    """Whether a file or folder is passed over: its name begins with a dot, or it is `lost+found` of a disk."""
    return name.startswith(".") or name == "lost+found"


def files_in(folder: Path) -> list[str]:
    """The paths of all image files in a folder and below, masks included, none hidden, relative to it and sorted. Links
    to folders are not followed.

    Raises: BadRequest for a folder that cannot be listed, whose images would be left out.
    """
    return sorted(names_below(folder, images.SUFFIXES))


def names_below(folder: Path, suffixes: Collection[str]) -> Iterator[str]:
    """The paths of the files with these suffixes in a folder and below, relative to it, without what `is_hidden`.

    Raises: BadRequest as `files_in` does.
    """

    def refuse(error: OSError) -> NoReturn:
        raise BadRequest(f"{error.filename}: cannot be listed ({error.strerror})")

    for above, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not is_hidden(name)]
        for name in names:
            file = Path(above, name)
            if not is_hidden(name) and file.suffix.lower() in suffixes and file.is_file():
                yield file.relative_to(folder).as_posix()
