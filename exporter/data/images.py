"""Decoding and preprocessing of one image file, as in the published evaluations of ConvNeXt."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from exporter.artifact.sidecar import COLORS, Preprocessing, sides

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jfif", ".jpe", ".avif"}
NOT_READ = {".heic", ".heif", ".jxl", ".jp2"}  # photographs that Pillow does not read, or not everywhere
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


def read(file: Path | IO[bytes], recipe: Preprocessing) -> NDArray[Any]:
    """Decode an image, and preprocess it to (C, H, W) float32; one for an artifact that takes pictures stays (H, W, C)
    uint8.

    The pages of a TIFF file are the bands of an input that is neither grey nor RGB nor RGBA.

    Raises: Unreadable for a file that is truncated, too large, no image, or of other channels.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        if isinstance(file, Path) and file.exists() and not file.is_file():  # a pipe would be waited for
            raise Unreadable("no regular file")
        with Image.open(file) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Unreadable(f"{image.width}×{image.height} pixels, more than {MAX_PIXELS:,}")
            if recipe.channels not in COLORS:
                return preprocess_planes(list(_pages(image, recipe.channels)), recipe)
            return prepared(in_color(ImageOps.exif_transpose(image), recipe), recipe)
    except Image.DecompressionBombError:
        raise Unreadable(f"more than {MAX_PIXELS:,} pixels") from None
    except UnidentifiedImageError:
        raise Unreadable("no image of a known format") from None
    except _DAMAGE as error:
        said = str(error).replace(str(file), file.name) if isinstance(file, Path) else str(error)
        raise Unreadable(said or type(error).__name__) from None


def _pages(image: Image.Image, count: int) -> Iterator[Image.Image]:
    """The pages of a file, in grey."""
    pages = getattr(image, "n_frames", 1)
    if pages != count:
        raise Unreadable(f"{pages} pages of {image.mode}, and the network takes {count} channels")
    for page in range(pages):
        image.seek(page)
        yield _converted(image, "L")


def in_color(image: Image.Image, recipe: Preprocessing) -> Image.Image:
    """An image with the channels of the input: 8-bit grey, RGB or RGBA.

    Colour becomes grey by ITU-R 601-2 luma, grey is repeated, CMYK and palettes are converted, transparency is dropped
    where it is no channel, and 16 bits are scaled to 8.
    """
    return _converted(image, COLORS[recipe.channels])


def _converted(image: Image.Image, mode: str) -> Image.Image:
    from PIL import Image

    if image.mode == "F":
        raise Unreadable("32-bit float pixels have no known range; convert it to 8 or 16 bits")
    if image.mode.startswith("I"):
        scaled = np.asarray(image).astype(np.int64) // 257
        if scaled.min() < 0 or scaled.max() > 255:
            raise Unreadable("32-bit pixels beyond 16 bits have no known range; convert it to 8 or 16 bits")
        image = Image.fromarray(scaled.astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)


def prepared(image: Image.Image, recipe: Preprocessing) -> NDArray[Any]:
    """An image, which has the channels of the input, as sessions get it: preprocessed to (C, H, W) float32; or, where
    the artifact takes pictures, as they are, (H, W, C) uint8.

    Raises: Unreadable for an image that is too long and thin.
    """
    if recipe.input != "image":
        return preprocess(image, recipe)
    _resized(image.width, image.height, recipe)
    return np.atleast_3d(np.asarray(image))


def preprocess_pictures(pictures: NDArray[Any], recipe: Preprocessing) -> NDArray[np.float32]:
    """Pictures (N, H, W, C) uint8 as the input of the network, (N, C, height, width) float32."""
    from PIL import Image

    flat = pictures[..., 0] if pictures.shape[-1] == 1 else pictures
    return np.stack([preprocess(Image.fromarray(picture), recipe) for picture in flat])


def preprocess(image: Image.Image, recipe: Preprocessing) -> NDArray[np.float32]:
    """Resize, crop and normalise an image, which has the channels of the input, to (C, H, W) float32."""
    from PIL import Image

    image = image.resize(_resized(image.width, image.height, recipe), Image.Resampling[recipe.interpolation.upper()])
    pixels = np.asarray(_cropped(image, recipe))
    return normalise(pixels if pixels.ndim == 3 else pixels[..., None], recipe)


def size_of(file: Path | IO[bytes]) -> tuple[int, int]:
    """Width and height of an image file, upright.

    Raises: Unreadable for a file that is no image.
    """
    from PIL import ExifTags, Image

    try:
        with Image.open(file) as image:  # reads the header alone
            if image.format == "TIFF":  # Pillow turns it when it is loaded, and some versions when it is opened
                image.load()
            width, height = image.size
            is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # 5 to 8 lie on their side
            return (height, width) if is_turned else (width, height)
    except Image.DecompressionBombError:
        raise Unreadable(f"more than {MAX_PIXELS:,} pixels") from None
    except _DAMAGE as error:
        raise Unreadable(str(error) or type(error).__name__) from None


def read_mask(file: Path) -> NDArray[np.int64]:
    """The number of each pixel (H, W) of a mask: of a grey picture in RGB the value of red, without alpha.

    Raises: Unreadable for a file that is damaged, too large, or has several numbers a pixel.
    """
    from PIL import Image

    try:
        with Image.open(file) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Unreadable(f"{image.width}×{image.height} pixels, more than {MAX_PIXELS:,}")
            numbers = np.asarray(image)
            if image.mode in ("RGB", "RGBA", "LA"):  # grey, as many editors save it
                colors = numbers[..., : numbers.shape[2] - (image.mode != "RGB")]
                numbers = colors[..., 0] if (colors == colors[..., :1]).all() else numbers
            if numbers.ndim > 2 or image.mode == "F":
                raise Unreadable(f"{image.mode} has several numbers a pixel")
            return numbers.astype(np.int64)
    except Image.DecompressionBombError:
        raise Unreadable(f"more than {MAX_PIXELS:,} pixels") from None
    except _DAMAGE as error:
        raise Unreadable(str(error) or type(error).__name__) from None


def preprocess_mask(classes: NDArray[np.int64], recipe: Preprocessing) -> NDArray[np.int64]:
    """Resize and crop the classes (H, W) of the pixels of an image as the image itself, by the nearest pixel; what is
    filled up is −1."""
    from PIL import Image

    image = Image.fromarray(classes.astype(np.int32))
    image = image.resize(_resized(image.width, image.height, recipe), Image.Resampling.NEAREST)
    filled = replace(recipe, mean=(-1 / 255,), std=(1.0,))  # `_cropped` fills up with 255 · mean
    return np.asarray(_cropped(image, filled)).astype(np.int64)


def _resized(width: int, height: int, recipe: Preprocessing) -> tuple[int, int]:
    """Width and height after resizing.

    Raises: Unreadable for an image that is too long and thin.
    """
    if recipe.crop == "squash":
        height, width = sides(recipe.resize)
        return width, height
    if recipe.crop == "center" and isinstance(recipe.resize, int):  # rounding as in torchvision
        short = min(width, height)
        resized = int(recipe.resize * width / short), int(recipe.resize * height / short)
    else:  # in the order of timm, which rounds the quotient
        ratios = width / sides(recipe.resize)[1], height / sides(recipe.resize)[0]
        ratio = max(ratios) if recipe.crop == "border" else min(ratios)
        resized = round(width / ratio), round(height / ratio)
    if not 0 < resized[0] * resized[1] <= MAX_PIXELS:
        raise Unreadable(f"{width}×{height} pixels, too long and thin to resize")
    return resized


def _cropped(image: Image.Image, recipe: Preprocessing) -> Image.Image:
    """The centre of an image; a side that is too short is filled up with the mean colour."""
    from PIL import ImageOps

    wanted = recipe.width, recipe.height
    missing = [max(0, side - has) for side, has in zip(wanted, image.size, strict=True)]
    if any(missing):
        before, after = [side // 2 for side in missing], [(side + 1) // 2 for side in missing]
        color = tuple(round(255 * mean) for mean in recipe.mean)
        image = ImageOps.expand(image, (*before, *after), fill=color if len(color) > 1 else color[0])
    spare = [has - side for side, has in zip(wanted, image.size, strict=True)]
    left, top = (side // 2 if recipe.offset == "floor" else round(side / 2) for side in spare)
    return image.crop((left, top, left + recipe.width, top + recipe.height))


def preprocess_planes(planes: Sequence[Image.Image], recipe: Preprocessing) -> NDArray[np.float32]:
    """Resize, crop and normalise grey images, one for each channel, to (C, H, W) float32."""
    singles = [replace(recipe, mean=(mean,), std=(std,)) for mean, std in zip(recipe.mean, recipe.std, strict=True)]
    return np.concatenate([preprocess(plane, single) for plane, single in zip(planes, singles, strict=True)])


def normalise(pixels: NDArray[np.uint8], recipe: Preprocessing) -> NDArray[np.float32]:
    """Normalize pixels (…, H, W, C) from 0…255 to (…, C, H, W) float32: (x / 255 − mean) / std for each channel."""
    scale = np.float32(1 / 255) / np.asarray(recipe.std, np.float32)
    shift = np.asarray(recipe.mean, np.float32) / np.asarray(recipe.std, np.float32)
    return np.ascontiguousarray(np.moveaxis(pixels.astype(np.float32) * scale - shift, -1, -3))
