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

    resample = Image.Resampling[recipe.interpolation.upper()]
    if recipe.crop == "squash":
        image = image.resize((recipe.size, recipe.size), resample)
    else:
        short = min(image.size)
        width, height = (int(recipe.resize * side / short) for side in image.size)
        if width * height > MAX_PIXELS:
            raise Unreadable(f"{image.width}×{image.height} pixels, too long and thin to resize")
        image = image.resize((width, height), resample)
        left, top = (round((side - recipe.size) / 2) for side in image.size)
        image = image.crop((left, top, left + recipe.size, top + recipe.size))
    return normalise(np.asarray(image), recipe)


def normalise(pixels: NDArray[np.uint8], recipe: Preprocessing) -> NDArray[np.float32]:
    """Normalize pixels (…, H, W, 3) from 0…255 to (…, 3, H, W) float32: (x / 255 − mean) / std for each channel."""
    scale = np.float32(1 / 255) / np.asarray(recipe.std, np.float32)
    shift = np.asarray(recipe.mean, np.float32) / np.asarray(recipe.std, np.float32)
    return np.ascontiguousarray(np.moveaxis(pixels.astype(np.float32) * scale - shift, -1, -3))
