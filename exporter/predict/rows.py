"""The images in the rows of Parquet files, of this machine or in object storage."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from exporter.artifact.sidecar import Preprocessing
from exporter.backends import Array
from exporter.data import images
from exporter.data.classes import UNKNOWN
from exporter.data.samples import Item, Samples
from exporter.errors import BadRequest
from exporter.predict import parquet, remote
from exporter.predict.image_list import Images, digest_of, joined, state_of, unreadable


def of_tables(word: str, tables: Sequence[Images]) -> Images:
    """The rows of Parquet files.

    Raises: BadRequest where no file has a row.
    """
    if not any(table.samples.total for table in tables):
        raise BadRequest(f"{word}: no rows in it; expected an image in each row")
    return joined(word, tables)


def of_rows(name: str, column: str, recipe: Preprocessing, file: remote.File | None = None) -> Images:
    """The images of the rows of a Parquet file, of this machine or in object storage."""
    path = Path(name).expanduser()
    rows = parquet.Rows(name, path.open("rb") if file is None else file.open(), column)
    key = f"{name}#{rows.column} {state_of(path) if file is None else file.state}"
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
    key = digest_of([key, *(state_of(Path(name)) for name in names if "://" not in name)])

    def items(start: int = 0) -> Iterator[Item]:
        for row in range(start, len(names)):
            load = partial(_read_at, names[row], recipe) if paths[row] else partial(unreadable, "no path in this row")
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
    return images.read(io.BytesIO(remote.file_at(name).read()) if remote.is_address(name) else _file(name), recipe)


def _content_at(name: str) -> bytes:
    return remote.file_at(name).read() if remote.is_address(name) else _file(name).read_bytes()


def _file(name: str) -> Path:
    """The path of an image that a row names.

    Raises: images.Unreadable for an address of another machine, for a path that is not a regular file or not a valid
        file name, and for a file that is too large for an image.
    """
    try:
        path = Path(path_of(name)) if "://" in name else Path(name)
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


def path_of(address: str) -> str:
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
