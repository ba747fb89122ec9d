"""The images that a user means: files, folders, patterns, arrays, manifests, Parquet files, addresses, standard
input."""

from __future__ import annotations

import glob
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote_to_bytes

from exporter.artifact import sha256_file
from exporter.artifact.sidecar import Preprocessing
from exporter.backends import Array
from exporter.data import images
from exporter.data.classes import UNKNOWN
from exporter.data.manifests import is_manifest, locate
from exporter.data.samples import Item, Samples, images_in, mask_folders, open_samples
from exporter.errors import BadRequest, nearest
from exporter.predict import parquet, remote
from exporter.recipe import bundled

STDIN = "-"
MAX_STDIN_BYTES = 1 << 28


@dataclass(frozen=True)
class Images:
    """Images in order, and a digest of the names, sizes and times of files, and of the content of arrays and lists;
    `content` returns by its name the bytes of an image that is no file of this machine, and None for others."""

    samples: Samples
    key: str
    content: Callable[[str], bytes | None] = lambda _: None

    def file(self, name: str) -> Path | IO[bytes]:
        """An image by its name: a stream if it is no file of this machine, else its path, which may not exist."""
        content = self.content(name)
        return Path(name) if content is None else io.BytesIO(content)


def open_images(words: Sequence[str], recipe: Preprocessing, stdin: IO[bytes] | None = None) -> Images:
    """The images of all sources, in order.

    Args:
        words: files, folders (with all below them), patterns such as `photos/*.jpg`, `file://` addresses, manifests,
            `.npz` files, bundled sets, `synthetic`, Parquet files (or folders of them), addresses in object storage,
            or `-`.
        recipe: how each image becomes an input.
        stdin: read for `-`: the bytes of one image, or the names of files, one a line or separated by NUL.

    Raises: BadRequest for a source that does not exist, or without an image; Unavailable where a package that reads it
        is not installed.
    """
    parts = [_open(word, recipe, stdin) for word in words]
    return _joined(", ".join(words), parts)


def _joined(source: str, parts: Sequence[Images]) -> Images:
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

    return Images(Samples(source, total, items, labelled=False), _digest(part.key for part in parts), content)


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
    if remote.is_address(word):
        return _of_storage(word, recipe)
    return _open_here(_path_of(word) if "://" in word else word, recipe)


def _open_here(word: str, recipe: Preprocessing) -> Images:
    """The images of a source of this machine."""
    path, split = locate(word)
    if path.is_dir():
        return _of_folder(word, path, split, recipe)
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise BadRequest(f"{word}: a pipe or device; pipe it to standard input and give -")
    is_pattern = glob.has_magic(word) and not path.exists()
    if not is_pattern and (is_manifest(path) or path.suffix.lower() == ".npz" or _is_a_set(word)):
        samples = open_samples(word, recipe, (), None, repeats=True)
        content = sha256_file(path) if path.is_file() else word
        if path.suffix.lower() == ".npz":
            samples = replace(samples, items=partial(_to_the_end, samples, path.name))
        return Images(samples, f"{samples.total} of {split} of {content}")
    if path.exists() and parquet.is_parquet(path.name):
        return _of_tables(word, [_of_rows(_without(word, split), split, recipe)])
    if path.exists():
        return _of([word], lambda _: partial(images.read, path, recipe), f"{word} {_state(path)}")
    if is_pattern:
        return _of_pattern(word, split, recipe)
    near = nearest(path.name, [entry.name for entry in path.parent.iterdir()]) if path.parent.is_dir() else ""
    raise BadRequest(f"{word}: no such file or folder{f'; {near}' if near.startswith('did') else ''}")


def _without(word: str, split: str) -> str:
    return word.removesuffix(f"#{split}") if split else word


def _of_pattern(word: str, split: str, recipe: Preprocessing) -> Images:
    """The files that match a pattern; if all are Parquet files, their rows."""
    pattern = word if not parquet.is_parquet(_without(word, split)) else _without(word, split)
    matches = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))  # noqa: PTH111, PTH207  (as typed)
    names = [name for name in matches if Path(name).is_file()]
    if names and all(map(parquet.is_parquet, names)):
        return _of_tables(word, [_of_rows(name, split, recipe) for name in names])
    return _of_files(word, names, recipe)


def _of_folder(word: str, path: Path, split: str, recipe: Preprocessing) -> Images:
    """The images of a folder; if it has none, the rows of its Parquet files."""
    folder = _without(word, split).rstrip("/")
    may_be_column = bool(split) and mask_folders(path) is None
    names = [] if may_be_column else images_in(path, split)
    if not names and (tables := parquet.files_in(path)):
        return _of_tables(word, [_of_rows(f"{folder}/{name}", split, recipe) for name in tables])
    return _of_files(word, [f"{folder}/{name}" for name in names or images_in(path, split)], recipe)


def _of_storage(word: str, recipe: Preprocessing) -> Images:
    """The images at an address in object storage; if it has none, the rows of its Parquet files."""
    address, _, column = word.rpartition("#") if "#" in word else (word, "", "")
    try:
        files = remote.files_at(word)
    except BadRequest:
        if not column:
            raise
        files = remote.files_at(address)
    visible = [file for file in files if not any(part.startswith(".") for part in file.path.split("/"))]
    tables = [file for file in visible if parquet.is_parquet(file.path)]
    pictures = [file for file in visible if Path(file.path).suffix.lower() in images.SUFFIXES]
    if tables and (column or not pictures):
        return _of_tables(word, [_of_rows(file.address, column, recipe, file) for file in tables])
    if not pictures:
        raise BadRequest(f"{word}: no images in it; expected files such as .jpg and .png, or .parquet")
    by_name = {file.address: file for file in pictures}
    key = _digest(f"{file.address} {file.state}" for file in pictures)
    part = _of(list(by_name), lambda name: partial(_read_remote, by_name[name], recipe), key)
    return replace(part, content=lambda name: by_name[name].read() if name in by_name else None)


def _read_remote(file: remote.File, recipe: Preprocessing) -> Array:
    return images.read(io.BytesIO(file.read()), recipe)


def _of_tables(word: str, tables: Sequence[Images]) -> Images:
    """The rows of Parquet files.

    Raises: BadRequest where no file has a row.
    """
    if not any(table.samples.total for table in tables):
        raise BadRequest(f"{word}: no rows in it; expected an image in each row")
    return _joined(word, tables)


def _of_rows(name: str, column: str, recipe: Preprocessing, file: remote.File | None = None) -> Images:
    """The images of the rows of a Parquet file, of this machine or in object storage."""
    path = Path(name).expanduser()
    rows = parquet.Rows(name, path.open("rb") if file is None else file.open(), column)
    key = f"{name}#{rows.column} {_state(path) if file is None else file.state}"
    if rows.kind == "path":
        return _of_paths(name, rows.every(), recipe, key)

    def items(start: int = 0) -> Iterator[Item]:
        for row in range(start, rows.total):
            yield f"{name}[{row}]", UNKNOWN, partial(_read_row, rows, name, row, recipe)

    def content(image: str) -> bytes | None:
        row = image.removeprefix(f"{name}[").removesuffix("]")
        return _content_of(rows.value(int(row)), name) if row.isdecimal() and image == f"{name}[{row}]" else None

    return Images(Samples("", rows.total, items, labelled=False), key, content)


def _of_paths(table: str, paths: Sequence[str | None], recipe: Preprocessing, key: str) -> Images:
    """The images whose paths the rows of a Parquet file have."""
    names = [_beside(table, path) if path else f"{table}[{row}]" for row, path in enumerate(paths)]

    def items(start: int = 0) -> Iterator[Item]:
        for row in range(start, len(names)):
            load = partial(_read_at, names[row], recipe) if paths[row] else partial(_unreadable, "no path in this row")
            yield names[row], UNKNOWN, load

    def content(name: str) -> bytes | None:
        return _content_at(name) if "://" in name and name in names else None

    return Images(Samples("", len(names), items, labelled=False), key, content)


def _beside(table: str, path: str) -> str:
    """A path in a row as a path or an address: relative ones begin at the folder of the Parquet file."""
    if "://" in path or Path(path).is_absolute():
        return path
    return f"{table.rpartition('/')[0]}/{path}" if "/" in table else path


def _read_at(name: str, recipe: Preprocessing) -> Array:
    return _read_remote(remote.file_at(name), recipe) if remote.is_address(name) else images.read(_file(name), recipe)


def _content_at(name: str) -> bytes:
    return remote.file_at(name).read() if remote.is_address(name) else _file(name).read_bytes()


def _file(name: str) -> Path:
    """The path of an image that a row names.

    Raises: images.Unreadable for an address of another machine, for a path that is not a regular file or not a valid
        file name, and for a file that is too large for an image.
    """
    try:
        path = Path(_path_of(name)) if "://" in name else Path(name)
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise images.Unreadable(f"{name}: no regular file")
        if (size := path.stat().st_size) > remote.MAX_BYTES:
            raise images.Unreadable(f"{name}: {size:,} bytes, more than {remote.MAX_BYTES:,}")
    except BadRequest as error:
        raise images.Unreadable(str(error)) from None
    except OSError as error:
        raise images.Unreadable(f"{name}: {error.strerror}") from None
    except ValueError:  # a name with a NUL
        raise images.Unreadable("the path in this row is no name of a file") from None
    return path


def _read_row(rows: parquet.Rows, table: str, row: int, recipe: Preprocessing) -> Array:
    return images.read(io.BytesIO(_content_of(rows.value(row), table)), recipe)


def _content_of(value: Any, table: str) -> bytes:
    """The bytes of the image in a row: of the row itself, or of the file that it names.

    Raises: images.Unreadable where there is none.
    """
    content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if content is not None:
        return bytes(content)
    if not path:
        raise images.Unreadable("no image in this row")
    return _content_at(_beside(table, path))


def _to_the_end(samples: Samples, name: str, start: int = 0) -> Iterator[Item]:
    """The images of an archive from number `start` on; where it is damaged, the rest of them cannot be read."""
    return islice(_every(samples, name), start, None)


def _every(samples: Samples, name: str) -> Iterator[Item]:
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


def refuse_source(out: Path, sources: Sequence[str]) -> None:
    """Refuse to replace a file that images are read from.

    Raises: BadRequest where the output is a source, or a Parquet file in a folder or of a pattern that is one.
    """
    if not out.is_file():
        return
    for word in sources:
        for text in (word, word.rpartition("#")[0]):
            local = _path_of(text) if text.lower().startswith("file://") else os.path.expanduser(text)  # noqa: PTH111
            matches = [Path(one) for one in glob.glob(local, recursive=True)] if local else []  # noqa: PTH207
            read = [Path(local), *matches] if local else []
            if any(one.samefile(out) for one in read if one.is_file()) or _is_read_from(read, out, text != word):
                raise BadRequest(f"-o {out}: the images are read from there ({word}); give another name")


def _is_read_from(folders: Sequence[Path], out: Path, has_column: bool) -> bool:
    """Whether an output is a Parquet file whose rows `_of_folder` reads: one in a folder without images, or with a
    column that is named."""
    return out.suffix.lower() == ".parquet" and any(
        folder.is_dir() and folder.resolve() in out.resolve().parents and (has_column or not images_in(folder, ""))
        for folder in folders
    )


def _is_a_set(word: str) -> bool:
    return word == "synthetic" or word in bundled.sets()


def _path_of(address: str) -> str:
    """The path of a `file://` address.

    Raises: BadRequest for addresses of other machines.
    """
    scheme, _, rest = address.partition("://")
    host, slash, path = rest.partition("/")
    if scheme.lower() != "file" or host.lower() not in ("", "localhost"):
        raise BadRequest(
            f"{address}: expected a file:// address of this machine, or one in object storage "
            f"({'://, '.join(remote.PACKAGES)}://); download it first"
        )
    # Names of files are bytes, and may have # and ? in them.
    return os.fsdecode(unquote_to_bytes(os.fsencode(slash + path)))


def _from_stdin(recipe: Preprocessing, stdin: IO[bytes] | None) -> Images:
    content = stdin.read(MAX_STDIN_BYTES + 1) if stdin is not None else b""
    if len(content) > MAX_STDIN_BYTES:
        raise BadRequest(
            f"{STDIN}: more than {MAX_STDIN_BYTES >> 20} MiB on standard input; give a folder or a pattern"
        )
    if _is_image(content):
        part = _of([STDIN], lambda _: partial(_read_bytes, content, recipe), hashlib.sha256(content).hexdigest())
        return replace(part, content=lambda name: content if name == STDIN else None)
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
    key = _digest(f"{name} {_state(Path(name))}" for name in names)
    return _of(names, lambda name: partial(images.read, Path(name), recipe), key)


def _state(path: Path) -> str:
    """Size and time of the last change of a file, or "" where there is none."""
    try:
        stat = path.stat()
    except OSError:
        return ""
    return f"{stat.st_size} {stat.st_mtime_ns}"


def _of(names: Sequence[str], make: Callable[[str], Callable[[], Array]], key: str) -> Images:
    """Images by their names; `make` returns a function that reads one. Nothing but the names is kept in memory."""

    def items(start: int = 0) -> Iterator[Item]:
        for index in range(start, len(names)):
            yield names[index], UNKNOWN, make(names[index])

    return Images(Samples("", len(names), items, labelled=False), key)
