"""Decoding and preprocessing of one image file, as in the published evaluations of ConvNeXt."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from exporter.artifact.sidecar import Preprocessing

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm"}
MAX_PIXELS = 100_000_000  # 300 MB decoded


# What Pillow raises over damaged files, by format.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    MemoryError,
    ArithmeticError,
    struct.error,
)


class Unreadable(Exception):
    """An image that cannot be used; the message has the reason."""


def read(file: Path | IO[bytes], recipe: Preprocessing) -> NDArray[np.float32]:
    """Decode and preprocess an image to (3, size, size) float32.

    Raises: Unreadable for a file that is truncated, too large or no image.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Unreadable(f"{image.width}×{image.height} pixels, more than {MAX_PIXELS:,}")
            return preprocess(_rgb(ImageOps.exif_transpose(image)), recipe)
    except Image.DecompressionBombError:
        raise Unreadable(f"more than {MAX_PIXELS:,} pixels") from None
    except _DAMAGE as error:
        said = str(error).replace(str(file), file.name) if isinstance(file, Path) else str(error)
        raise Unreadable(said or type(error).__name__) from None


def _rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB: grey is repeated, CMYK and palettes converted, transparency dropped, 16 bits scaled to 8."""
    from PIL import Image

    if image.mode == "F":
        raise Unreadable("32-bit float pixels have no known range; convert it to 8 or 16 bits")
    if image.mode.startswith("I"):
        scaled = np.asarray(image).astype(np.int64) // 257
        image = Image.fromarray(scaled.clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def preprocess(image: Image.Image, recipe: Preprocessing) -> NDArray[np.float32]:
    """Resize, crop and normalise an RGB image to (3, size, size) float32."""
    from PIL import Image

    image = image.resize(_resized(image.width, image.height, recipe), Image.Resampling[recipe.interpolation.upper()])
    return normalise(np.asarray(_cropped(image, recipe)), recipe)


def _resized(width: int, height: int, recipe: Preprocessing) -> tuple[int, int]:
    """Width and height after resizing.

    Raises: Unreadable for an image that is too long and thin.
    """
    if recipe.crop == "squash":
        return recipe.resize, recipe.resize
    if recipe.crop == "border":
        ratio = max(width / recipe.resize, height / recipe.resize)  # in the order of timm, which rounds the quotient
        resized = round(width / ratio), round(height / ratio)
    else:
        short = min(width, height)
        resized = int(recipe.resize * width / short), int(recipe.resize * height / short)
    if not 0 < resized[0] * resized[1] <= MAX_PIXELS:
        raise Unreadable(f"{width}×{height} pixels, too long and thin to resize")
    return resized


def _cropped(image: Image.Image, recipe: Preprocessing) -> Image.Image:
    """The centre of an image; a side that is too short is filled up with the mean colour."""
    from PIL import ImageOps

    missing = [max(0, recipe.size - side) for side in image.size]
    if any(missing):
        before, after = [side // 2 for side in missing], [(side + 1) // 2 for side in missing]
        image = ImageOps.expand(image, (*before, *after), fill=tuple(round(255 * mean) for mean in recipe.mean))
    spare = [side - recipe.size for side in image.size]
    left, top = (side // 2 if recipe.offset == "floor" else round(side / 2) for side in spare)
    return image.crop((left, top, left + recipe.size, top + recipe.size))


def normalise(pixels: NDArray[np.uint8], recipe: Preprocessing) -> NDArray[np.float32]:
    """Normalize pixels (…, H, W, 3) from 0…255 to (…, 3, H, W) float32: (x / 255 − mean) / std for each channel."""
    scale = np.float32(1 / 255) / np.asarray(recipe.std, np.float32)
    shift = np.asarray(recipe.mean, np.float32) / np.asarray(recipe.std, np.float32)
    return np.ascontiguousarray(np.moveaxis(pixels.astype(np.float32) * scale - shift, -1, -3))
