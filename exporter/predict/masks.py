"""Masks of segmentation as PNG files: the class of each pixel, and the picture in the colours of its classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporter.artifact.disk import write_file
from exporter.artifact.sidecar import Preprocessing
from exporter.backends import Outputs
from exporter.data import images
from exporter.data.masks import MOST_COLORS, colors
from exporter.errors import BadRequest
from exporter.predict.answers import Answers, Arrays
from exporter.predict.image_list import state_of
from exporter.predict.sources import STDIN
from exporter.verify.checks.segmentation import classes_of

if TYPE_CHECKING:
    from PIL import Image

    from exporter.artifact import Artifact

OVERLAY = "_overlay"
OPACITY = 0.5  # of the colours over the picture


@dataclass(frozen=True)
class Classes(Answers):
    """Keeps the class of each pixel in place of its scores, which take `num_classes` times the memory."""

    def of(self, values: Outputs) -> Arrays:
        """The classes (N, H, W) of the pixels of N images."""
        output = self.outputs[0]
        return {output.name: classes_of(values[output.place]).astype(np.int32)}


def path_of(folder: Path, name: str) -> Path:
    """The file of the mask of an image: its path below the folder, without roots and steps up; `stdin.png` of `-`."""
    path = Path("stdin" if name == STDIN else name)
    parts = [part for part in path.parts if part not in ("..", path.anchor)]
    file = folder.joinpath(*parts)
    return file.with_suffix(".png") if file.suffix.lower() in images.SUFFIXES else file.with_name(f"{file.name}.png")


def _overlay(mask: Path) -> Path:
    return mask.with_name(f"{mask.stem}{OVERLAY}.png")


def check_names(folder: Path, named: Sequence[tuple[str, Path]]) -> None:
    """Raises: BadRequest for two images whose masks or overlays would be one file, and for masks or overlays that would
    replace an image of the sources. `named` are the names of the images, with their paths, which may not exist."""
    owners: dict[Path, tuple[str, Path]] = {}
    read = {path.resolve() for _, path in named if state_of(path)} if folder.is_dir() else set()
    for name, image in named:
        mask = path_of(folder, name)
        for path in (mask, _overlay(mask)):
            other = owners.setdefault(path, (name, image))
            if other[1] != image:
                both = " and ".join(one if "://" in one else str(where) for one, where in (other, (name, image)))
                raise BadRequest(f"{path}: would be written for both {both}; write them to two folders")
            if read and state_of(path) and path.resolve() in read:
                raise BadRequest(f"{path}: is a source, and a mask would replace it; give another folder")


def refuse_one_class(artifact: Artifact) -> None:
    """Raises: BadRequest for a network with one class, which every pixel of its masks would have."""
    if artifact.sidecar.weights.num_classes == 1:
        raise BadRequest(
            f"{artifact.path}: the network has one class, so every pixel of a mask would have it; build with --output "
            "logits, write them with predict -o FILE.npz, and apply a threshold"
        )


def write(path: Path, classes: NDArray[Any], num_classes: int, file: Path | IO[bytes], recipe: Preprocessing) -> None:
    """Write the mask of an image, and beside it `NAME_overlay.png` if the image is in colour and can be read.

    Where images are stretched, both have the size of the image, by the nearest pixel; else that of the input.

    Args:
        path: of the mask.
        classes: (H, W) of the input.
        num_classes: of the network.
        file: the image, as a path or a stream. A path that does not exist, as of an array, gives a mask of the size of
            the input and no overlay.
        recipe: how the image became the input.

    Raises: BadRequest when the folder cannot be written; Unavailable when the disk is full.
    """
    from PIL import Image

    picture = _picture(file, recipe)
    numbers = Image.fromarray(classes.astype(np.int32))
    size = picture.size if picture is not None else _size(file, recipe)
    if size is not None:
        numbers = numbers.resize(size, Image.Resampling.NEAREST)
    mask = np.asarray(numbers)
    write_file(path, _png(_image_of(mask, num_classes)))
    if picture is not None:
        mixed = (1 - OPACITY) * np.asarray(picture) + OPACITY * colors()[mask % MOST_COLORS]
        write_file(_overlay(path), _png(Image.fromarray(mixed.round().astype(np.uint8))))


def _image_of(mask: NDArray[Any], num_classes: int) -> Image.Image:
    """Classes as an image whose values are their numbers: with a palette, or 16 bits for more than 256 classes."""
    from PIL import Image

    if num_classes > MOST_COLORS:
        return Image.fromarray(mask.astype(np.uint16))
    image = Image.fromarray(mask.astype(np.uint8), "P")
    image.putpalette(colors().tobytes())
    return image


def _picture(file: Path | IO[bytes], recipe: Preprocessing) -> Image.Image | None:
    """The picture that a mask lies over: the image itself where it was stretched, else the input; None for what is no
    file in colour."""
    from PIL import Image, ImageOps

    if recipe.channels != 3 or (isinstance(file, Path) and not file.is_file()):
        return None
    if recipe.is_stretched:
        with Image.open(file) as image:
            return images.in_color(ImageOps.exif_transpose(image), recipe)
    pixels = np.moveaxis(images.read(file, recipe.of_network()), 0, -1)
    return Image.fromarray(
        (255 * (pixels * recipe.std + np.asarray(recipe.mean))).round().clip(0, 255).astype(np.uint8)
    )


def _size(file: Path | IO[bytes], recipe: Preprocessing) -> tuple[int, int] | None:
    """Width and height of an image file that was stretched, None for others."""
    if not recipe.is_stretched or (isinstance(file, Path) and not file.is_file()):
        return None
    return images.size_of(file)


def _png(image: Image.Image) -> bytes:
    import io

    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
