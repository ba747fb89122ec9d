"""Arrays as records, for files and messages."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.artifact.sidecar import Record


class Tensor(Record, frozen=True):
    """An array as bytes."""

    dtype: str
    shape: tuple[int, ...]
    content: bytes

    def array(self) -> NDArray[Any]:
        """The array. It cannot be written to.

        Raises: ValueError where the bytes do not fit type and shape, and for types that are no numbers.
        """
        return np.frombuffer(self.content, self.dtype).reshape(self.shape)


def tensor_of(array: NDArray[Any]) -> Tensor:
    """The record of an array."""
    return Tensor(dtype=array.dtype.str, shape=array.shape, content=np.ascontiguousarray(array).tobytes())
