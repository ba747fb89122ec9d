"""Images in order: names, paths, and a digest that tells when they changed."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from exporter.backends import Array
from exporter.data import images
from exporter.data.classes import UNKNOWN
from exporter.data.samples import Item, Samples


@dataclass(frozen=True)
class Images:
    """Images in order, and a digest of the names, sizes and times of files, and of the content of arrays and lists;
    `content` returns by its name the bytes of an image that is no file of this machine, and None for others; `paths`
    yields the paths of all in order, by default their names."""

    samples: Samples
    key: str
    content: Callable[[str], bytes | None] = lambda _: None
    paths: Callable[[], Iterable[Path]] | None = None

    def named(self) -> Iterator[tuple[str, Path]]:
        """The names of all images in order, with their paths, which may not exist."""
        names = (name for name, *_ in self.samples.items())
        return ((name, Path(name)) for name in names) if self.paths is None else zip(names, self.paths(), strict=True)

    def file(self, name: str, path: Path) -> Path | IO[bytes]:
        """An image: a stream if it is no file of this machine, else its path."""
        content = self.content(name)
        return path if content is None else io.BytesIO(content)


def joined(source: str, parts: Sequence[Images]) -> Images:
    """The images of all parts, in order."""
    total = sum(part.samples.total for part in parts)

    def items(start: int = 0) -> Iterator[Item]:
        for part in parts:
            if start < part.samples.total:
                yield from part.samples.items(start)
            start = max(0, start - part.samples.total)

    def content(name: str) -> bytes | None:
        every = (part.content(name) for part in parts)
        return next((one for one in every if one is not None), None)

    def paths() -> Iterator[Path]:
        for part in parts:
            yield from (path for _, path in part.named())

    return Images(Samples(source, total, items, labelled=False), digest_of(part.key for part in parts), content, paths)


def digest_of(words: Iterable[str]) -> str:
    """A digest of words in order."""
    digest = hashlib.sha256()
    for word in words:
        digest.update(os.fsencode(word) + b"\0")
    return digest.hexdigest()


def unreadable(reason: str) -> Array:
    """In place of a function that reads an image.

    Raises: images.Unreadable.
    """
    raise images.Unreadable(reason)


def state_of(path: Path) -> str:
    """Size and time of the last change of a file, or "" where there is none."""
    try:
        stat = path.stat()
    except (OSError, ValueError):  # ValueError: a name with a NUL
        return ""
    return f"{stat.st_size} {stat.st_mtime_ns}"


def of_names(names: Sequence[str], make: Callable[[str], Callable[[], Array]], key: str) -> Images:
    """Images by their names; `make` returns a function that reads one. Nothing but the names is kept in memory."""

    def items(start: int = 0) -> Iterator[Item]:
        for index in range(start, len(names)):
            yield names[index], UNKNOWN, make(names[index])

    return Images(Samples("", len(names), items, labelled=False), key)
