"""Files whose seal, over a key and the content, rejects a damaged file, and one of another key."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from exporter.artifact.disk import write_file
from exporter.errors import ExporterError
from exporter.progress import note

Arrays = dict[str, NDArray[Any]]
# Name, type, shape and values. NumPy's own format is not used: its headers are read by Python's parser, which in
# some versions fails at random in a process of several threads (python/cpython#106905).
_Array = tuple[str, str, tuple[int, ...], bytearray]


def read(path: Path, key: bytes, remedy: str) -> Arrays:
    """The arrays of a file by name, in the order in which they were written; empty when there is no such file.

    A file that is damaged, has another key or is of an earlier version counts as none, and a note says so and ends in
    `remedy`.
    """
    content = read_bytes(path, key, remedy)
    if content is None:
        return {}
    try:
        stored = msgspec.msgpack.decode(content, type=list[_Array])
    except msgspec.DecodeError:  # whole, so an earlier version wrote it
        note(f"{path} is of an earlier version; {remedy}")
        return {}
    return {name: np.frombuffer(values, dtype).reshape(shape) for name, dtype, shape, values in stored}


def read_bytes(path: Path, key: bytes, remedy: str) -> bytes | None:
    """The content of a file, as `read` does; None when there is no such file."""
    try:
        sealed = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        note(f"{path} cannot be read ({error.strerror}); {remedy}")
        return None
    seal, content = sealed[: hashlib.sha256().digest_size], sealed[hashlib.sha256().digest_size :]
    if seal != _seal(key, content):
        note(f"{path} is damaged or has another key; {remedy}")
        return None
    return content


def write(path: Path, key: bytes, arrays: Mapping[str, NDArray[Any]]) -> int:
    """Write a file whole, and return its size in bytes; 0 where it cannot be written, because a cache is optional."""
    content = msgspec.msgpack.encode(
        [(name, array.dtype.str, array.shape, array.tobytes()) for name, array in arrays.items()]
    )
    with suppress(ExporterError):
        write_bytes(path, key, content)
        return len(content)
    return 0


def write_bytes(path: Path, key: bytes, content: bytes) -> None:
    """Write a file whole.

    Raises: Unavailable when the disk is full; BadRequest when the folder cannot be written.
    """
    write_file(path, _seal(key, content) + content)


def _seal(key: bytes, content: bytes) -> bytes:
    return hashlib.sha256(hashlib.sha256(key).digest() + content).digest()
