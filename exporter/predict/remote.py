"""Files in object storage, by addresses such as `s3://BUCKET/FOLDER`, through fsspec."""

from __future__ import annotations

import glob
import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from exporter.data.images import Unreadable
from exporter.errors import BadRequest, Unavailable, first_line

PACKAGES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "az": "adlfs",
    "hf": "huggingface-hub",
    "memory": "fsspec",
}
"""What reads the addresses of a scheme. `memory` is the memory of this process."""
MAX_BYTES = 1 << 28  # of an image
_STATES = ("ETag", "etag", "md5Hash", "blob_id", "LastModified", "last_modified", "updated", "mtime")


def is_address(word: str) -> bool:
    """Whether a word is an address in object storage."""
    scheme, separator, _ = word.partition("://")
    return bool(separator) and scheme.lower() in PACKAGES


@dataclass(frozen=True)
class File:
    """A file in object storage: its address, what opens it, its path there, and its size and state as text, which
    change with its content."""

    address: str
    system: Any
    path: str
    size: int = 0
    state: str = ""

    def read(self) -> bytes:
        """The content of an image.

        Raises: images.Unreadable for a file that does not exist, or is too large for an image; Unavailable where the
            storage does not answer.
        """
        if self.size > MAX_BYTES:
            raise Unreadable(f"{self.size:,} bytes, more than {MAX_BYTES:,}")
        try:
            with _answering(self.address):
                return bytes(self.system.cat_file(self.path))
        except FileNotFoundError:
            raise Unreadable("no such file") from None

    def open(self) -> io.RawIOBase:
        """The file as a stream, of which parts can be read.

        Raises: Unavailable where the storage does not answer, also while it is read.
        """
        return _Stream(self)


class _Stream(io.RawIOBase):
    """A stream whose failures are not taken for a damaged file."""

    def __init__(self, file: File) -> None:
        self.file = file
        with _answering(file.address):
            self.stream = file.system.open(file.path, "rb")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self.stream.tell())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self.stream.seek(offset, whence))

    def read(self, size: int = -1) -> bytes:
        with _answering(self.file.address):
            return bytes(self.stream.read(size))


@contextmanager
def _answering(address: str) -> Iterator[None]:
    """Raises: Unavailable in place of the errors of a storage; ImportError and FileNotFoundError as they are."""
    try:
        yield
    except (ImportError, FileNotFoundError):
        raise
    except Exception as error:  # noqa: BLE001  (each storage has errors of its own, without a common base class)
        raise Unavailable(
            f"{address}: the storage does not answer ({first_line(error)}); check the address, the connection and the "
            "credentials"
        ) from None


def file_at(address: str) -> File:
    """The file at an address, which is not looked up.

    Raises: Unavailable where the package that reads it is not installed.
    """
    scheme, _, rest = address.partition("://")
    scheme = scheme.lower()
    try:
        import fsspec

        with _answering(address):
            system = fsspec.filesystem(scheme)
    except ImportError:
        package = PACKAGES[scheme]
        raise Unavailable(f"{address}: {package} is not installed; pip install {package}") from None
    return File(address, system, system._strip_protocol(f"{scheme}://{rest}") if rest else "")


def files_at(address: str) -> list[File]:
    """The file at an address, else all below it, else those that match it as a pattern, sorted.

    Raises: BadRequest where there is none; Unavailable as `file_at` does, and where the storage does not answer.
    """
    at, every = file_at(address), dict[str, Any]()
    with suppress(FileNotFoundError), _answering(address):
        if at.path and at.system.isfile(at.path):
            every = {at.path: at.system.info(at.path)}
        elif glob.has_magic(at.path) and not at.system.exists(at.path):
            every = at.system.glob(at.path, detail=True)
        elif at.path:
            every = at.system.find(at.path, detail=True)
    scheme = address.partition("://")[0].lower()
    files = [
        File(f"{scheme}://{path.lstrip('/')}", at.system, path, int(info.get("size") or 0), _state(info))
        for path, info in sorted(every.items())
        if info.get("type") == "file"
    ]
    if not files:
        raise BadRequest(f"{address}: no such file or folder in the storage")
    return files


def _state(info: dict[str, Any]) -> str:
    return f"{info.get('size')} {next((info[name] for name in _STATES if info.get(name)), '')}"
