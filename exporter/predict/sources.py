"""The images that a user means: files, folders, patterns, `file://` addresses, arrays, manifests, standard input."""

from __future__ import annotations

import glob
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import IO
from urllib.parse import unquote_to_bytes

from exporter.artifact import sha256_file
from exporter.artifact.sidecar import Preprocessing
from exporter.backends import Array
from exporter.data import images
from exporter.data.classes import UNKNOWN
from exporter.data.manifests import is_manifest, locate
from exporter.data.samples import Item, Samples, images_in, open_samples
from exporter.errors import BadRequest, nearest
from exporter.recipe import bundled

STDIN = "-"
MAX_STDIN_BYTES = 1 << 28


@dataclass(frozen=True)
class Images:
    """Images in order, and a digest of the names, sizes and times of files, and of the content of arrays and lists;
    `stdin_image` are the bytes of an image on standard input."""

    samples: Samples
    key: str
    stdin_image: bytes = b""

    def file(self, name: str) -> Path | IO[bytes]:
        """An image by its name: a stream for standard input, else its path, which may not exist."""
        return io.BytesIO(self.stdin_image) if name == STDIN and self.stdin_image else Path(name)

    def after(self, count: int) -> Samples:
        """Those after the first `count`."""
        return replace(self.samples, items=lambda: islice(self.samples.items(), count, None), skipped=[])


def open_images(words: Sequence[str], recipe: Preprocessing, stdin: IO[bytes] | None = None) -> Images:
    """The images of all sources, in order.

    Args:
        words: files, folders (with all below them), patterns such as `photos/*.jpg`, `file://` addresses, manifests,
            `.npz` files, bundled sets, `synthetic`, or `-`.
        recipe: how each image becomes an input.
        stdin: read for `-`: the bytes of one image, or the names of files, one a line or separated by NUL.

    Raises: BadRequest for a source that does not exist, or without an image.
    """
    parts = [_open(word, recipe, stdin) for word in words]
    total = sum(part.samples.total for part in parts)

    def items() -> Iterator[Item]:
        return chain.from_iterable(part.samples.items() for part in parts)

    samples = Samples(", ".join(words), total, items, labelled=False)
    return Images(
        samples,
        _digest(part.key for part in parts),
        next((part.stdin_image for part in parts if part.stdin_image), b""),
    )


def _digest(words: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for word in words:
        digest.update(os.fsencode(word) + b"\0")
    return digest.hexdigest()


def _open(word: str, recipe: Preprocessing, stdin: IO[bytes] | None) -> Images:
    if word == STDIN:
        return _from_stdin(recipe, stdin)
    if not word:
        raise BadRequest("a source is empty; give a file, a folder or a pattern")
    if "://" in word:
        word = _path_of(word)
    path, split = locate(word)
    if path.is_dir():
        folder = word.removesuffix(f"#{split}" if split else "").rstrip("/")
        return _of_files(word, [f"{folder}/{name}" for name in images_in(path, split)], recipe)
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise BadRequest(f"{word}: a pipe or device; pipe it to standard input and give -")
    is_pattern = glob.has_magic(word) and not path.exists()
    if not is_pattern and (is_manifest(path) or path.suffix.lower() == ".npz" or _is_a_set(word)):
        samples = open_samples(word, recipe, (), None)
        content = sha256_file(path) if path.is_file() else word
        if path.suffix.lower() == ".npz":
            samples = replace(samples, items=partial(_to_the_end, samples, path.name))
        return Images(samples, f"{samples.total} of {split} of {content}")
    if path.exists():
        return _of([(word, partial(images.read, path, recipe))], f"{word} {_state(path)}")
    if is_pattern:
        matches = sorted(glob.glob(os.path.expanduser(word), recursive=True))  # noqa: PTH111, PTH207  (as typed)
        return _of_files(word, [name for name in matches if Path(name).is_file()], recipe)
    near = nearest(path.name, [entry.name for entry in path.parent.iterdir()]) if path.parent.is_dir() else ""
    raise BadRequest(f"{word}: no such file or folder{f'; {near}' if near.startswith('did') else ''}")


def _to_the_end(samples: Samples, name: str) -> Iterator[Item]:
    """All images of an archive; where it is damaged, the rest of them cannot be read."""
    count = 0
    try:
        for item in samples.items():
            yield item
            count += 1
    except BadRequest as error:
        for index in range(count, samples.total):
            yield f"{name}[{index}]", UNKNOWN, partial(_unreadable, str(error))


def _unreadable(reason: str) -> Array:
    raise images.Unreadable(reason)


def _is_a_set(word: str) -> bool:
    return word == "synthetic" or word in bundled.sets()


def _path_of(address: str) -> str:
    """The path of a `file://` address.

    Raises: BadRequest for addresses of other machines.
    """
    scheme, _, rest = address.partition("://")
    host, slash, path = rest.partition("/")
    if scheme.lower() != "file" or host.lower() not in ("", "localhost"):
        raise BadRequest(f"{address}: only file:// addresses of this machine are read; download it first")
    return os.fsdecode(
        unquote_to_bytes(os.fsencode(slash + path))
    )  # names of files are bytes, and may have # and ? in them


def _from_stdin(recipe: Preprocessing, stdin: IO[bytes] | None) -> Images:
    content = stdin.read(MAX_STDIN_BYTES + 1) if stdin is not None else b""
    if len(content) > MAX_STDIN_BYTES:
        raise BadRequest(
            f"{STDIN}: more than {MAX_STDIN_BYTES >> 20} MiB on standard input; give a folder or a pattern"
        )
    if _is_image(content):
        named = [(STDIN, partial(_read_bytes, content, recipe))]
        return replace(_of(named, hashlib.sha256(content).hexdigest()), stdin_image=content)
    by_nul = b"\0" in content and (content.endswith(b"\0") or _is_text(content.replace(b"\0", b"\n")))
    lines = content.split(b"\0" if by_nul else b"\n")
    names = [os.fsdecode(line.rstrip(b"\r")) for line in lines if line.strip()]
    if not names or any("\0" in name for name in names):
        content_kind = "neither an image nor names of files" if names else "nothing"
        raise BadRequest(
            f"{STDIN}: {content_kind} on standard input; expected an image, or names of files, one a line or each with "
            "NUL behind it"
        )
    return _of_files(STDIN, names, recipe)


def _is_text(content: bytes) -> bool:
    """Whether bytes are text in UTF-8, in lines, as a damaged image is not."""
    text = content.decode("utf-8", "replace").replace("\n", "")
    return "\N{REPLACEMENT CHARACTER}" not in text and text.isprintable()


def _is_image(content: bytes) -> bool:
    """Whether Pillow knows the format."""
    from PIL import Image

    try:
        Image.open(io.BytesIO(content)).close()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
    return True


def _read_bytes(content: bytes, recipe: Preprocessing) -> Array:
    return images.read(io.BytesIO(content), recipe)


def _of_files(word: str, names: Sequence[str], recipe: Preprocessing) -> Images:
    if not names:
        raise BadRequest(f"{word}: no images in it; expected files such as .jpg and .png")
    paths = list(map(Path, names))
    named = [(name, partial(images.read, path, recipe)) for name, path in zip(names, paths, strict=True)]
    return _of(named, _digest(f"{name} {_state(path)}" for name, path in zip(names, paths, strict=True)))


def _state(path: Path) -> str:
    """Size and time of the last change of a file, or "" where there is none."""
    try:
        stat = path.stat()
    except OSError:
        return ""
    return f"{stat.st_size} {stat.st_mtime_ns}"


def _of(named: Sequence[tuple[str, Callable[[], Array]]], key: str) -> Images:
    def items() -> Iterator[Item]:
        for name, make in named:
            yield name, UNKNOWN, make

    return Images(Samples("", len(named), items, labelled=False), key)
