"""Folders of images, alone or with their masks."""

from __future__ import annotations

from pathlib import Path

from exporter.data import images
from exporter.errors import BadRequest

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
    if not folders:
        return files_in(folder)
    below = "/".join(filter(None, (folders[0], split)))
    return [f"{below}/{name}" for name in files_in(folder / below)] if (folder / below).is_dir() else []


def files_in(folder: Path) -> list[str]:
    """The paths of all image files in a folder and below, masks included, none hidden, relative to it and sorted. Links
    to folders are not followed."""
    files = folder.rglob("*")
    names = (file.relative_to(folder) for file in files if file.suffix.lower() in images.SUFFIXES and file.is_file())
    return sorted(name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts))
