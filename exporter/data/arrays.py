"""`.npz` files with arrays `images` and optionally `labels`, read row by row."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from exporter.artifact.sidecar import Preprocessing
from exporter.data import images
from exporter.errors import BadRequest

MAX_LABEL_BYTES = 1 << 27
_EXPECTED = (
    "expected 'images' (and 'labels') as uint8 (N, H, W, {0}), or float32 (N, {0}, {1}, {2}) already preprocessed"
)


@dataclass(frozen=True)
class Arrays:
    """An open `.npz`. Only one row of images is in memory at a time."""

    path: Path
    recipe: Preprocessing
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    labels: NDArray[np.int64] | None

    @property
    def count(self) -> int:
        """The number of images."""
        return self.shape[0]

    def rows(self) -> Iterator[NDArray[Any]]:
        """Each image as sessions get it: an input (C, H, W) float32, or a picture (H, W, C) uint8."""
        from PIL import Image

        bytes_each = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        with zipfile.ZipFile(self.path) as archive, archive.open("images.npy") as file:
            _header(file)
            for index in range(self.count):
                content = _read(file, bytes_each)
                if len(content) < bytes_each:
                    raise BadRequest(f"{self.path}: damaged: it ends after {index} of {self.count} images")
                row = np.frombuffer(content, self.dtype).reshape(self.shape[1:])
                if self.recipe.input == "image":
                    yield row
                elif self.dtype == np.uint8:
                    planes = [Image.fromarray(plane) for plane in np.moveaxis(row, -1, 0)]
                    yield images.preprocess_planes(planes, self.recipe)
                else:
                    yield row.astype(np.float32)


def _read(file: IO[bytes], count: int) -> bytes:
    """So many bytes, or fewer where the file is damaged."""
    try:
        return file.read(count)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError):
        return b""


def open_npz(path: Path, recipe: Preprocessing, labelled: bool = True) -> Arrays:
    """Open an `.npz` and check its arrays without reading the images; its labels, (N,) or (N, L), are read where
    `labelled`.

    Raises: BadRequest when it is damaged, or when its arrays have wrong names, types or shapes.
    """
    expected = _EXPECTED.format(*recipe.shape)
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if "images.npy" not in names or not set(names) <= {"images.npy", "labels.npy"}:
                raise BadRequest(f"{path}: holds {', '.join(names) or 'nothing'}; {expected}")
            with archive.open("images.npy") as file:
                shape, fortran, dtype = _header(file)
            labels = _labels(path, archive) if labelled and "labels.npy" in names else None
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, NotImplementedError) as error:
        raise BadRequest(f"{path}: truncated or no .npz file ({error}); {expected}") from None
    pixels = dtype == np.uint8 and len(shape) == 4 and shape[-1] == recipe.channels
    inputs = dtype == np.float32 and shape[1:] == recipe.shape
    if fortran or not shape or 0 in shape or not (pixels or inputs):
        raise BadRequest(f"{path}: images are {dtype} {shape}; {expected}")
    if inputs and recipe.input != "normalized":
        raise BadRequest(f"{path}: images are float32, and the artifact takes {recipe.input}; give uint8 pixels")
    if labels is not None and (labels.shape[:1] != shape[:1] or labels.ndim > 2):
        raise BadRequest(f"{path}: {shape[0]} images but labels of shape {labels.shape}")
    return Arrays(path, recipe, shape, dtype, labels)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    return shape, fortran, dtype


def _labels(path: Path, archive: zipfile.ZipFile) -> NDArray[np.int64]:
    if archive.getinfo("labels.npy").file_size > MAX_LABEL_BYTES:
        raise ValueError("labels.npy is too large for labels")
    with archive.open("labels.npy") as file:
        shape, _, dtype = _header(file)
    if int(np.prod(shape)) * max(dtype.itemsize, 1) > MAX_LABEL_BYTES:
        raise ValueError(f"labels of shape {shape}")
    with archive.open("labels.npy") as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
    decisions = array.ndim == 2 and array.dtype.kind in "bf" and bool(np.isin(array, (0, 1)).all())
    if not np.issubdtype(array.dtype, np.integer) and not decisions:
        raise BadRequest(
            f"{path}: labels are {array.dtype} {array.shape}; expected whole numbers: a class for each image (N,), or "
            "0 and 1 for each label of a multi-label head (N, L)"
        )
    return array.astype(np.int64)
