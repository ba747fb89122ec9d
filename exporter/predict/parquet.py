"""Images in the rows of Parquet files: their bytes, or the paths of their files."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from io import RawIOBase
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import IO, Any, Literal

from exporter.data.folders import names_below
from exporter.data.images import Unreadable
from exporter.errors import BadRequest, Unavailable, first_line, some

SUFFIX = ".parquet"
ROWS = 16  # that are decoded at once
BATCHES = 8  # that stay in memory, for threads that take rows in another order
BUFFER_BYTES = 1 << 20  # so that a row group is not read as a whole
PATHS = ("path", "image", "file", "file_name", "filename")
"""Columns of text that are taken for paths, the first of these that a file has."""
EXPECTED = "expected image bytes (binary, or a struct of bytes and path) or paths (string)"

Kind = Literal["bytes", "struct", "path", ""]


class Rows:
    """The rows of one column of a file.

    A few rows are in memory at a time. Rows that follow each other are read on from where the last ones end; for others
    the row group is read from its start.
    """

    def __init__(self, word: str, stream: IO[bytes] | RawIOBase, column: str = "") -> None:
        """Open a file.

        Args:
            word: as the user typed it, for messages.
            stream: of its content.
            column: of the images; "" for the only one.

        Raises: BadRequest for a file that is none or has no such column; Unavailable where pyarrow is not installed.
        """
        require()
        from pyarrow import parquet

        try:
            file = parquet.ParquetFile(stream, pre_buffer=False, buffer_size=BUFFER_BYTES)
            self.column, self.kind = _column_of(word, file.schema_arrow, column)
        except (OSError, ValueError) as error:
            raise BadRequest(f"{word}: truncated or no Parquet file ({first_line(error)})") from None
        self.word, self.file, self.total = word, file, file.metadata.num_rows
        groups = [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]
        self.starts = [0, *accumulate(groups)]
        self.lock, self.kept = Lock(), deque[tuple[int, Any]](maxlen=BATCHES)
        self.coming: Iterator[Any] = iter(())
        self.group, self.next = -1, 0
        self.damaged: dict[int, tuple[int, str]] = {}

    def value(self, row: int) -> Any:
        """What the column has in a row.

        Raises: images.Unreadable for a row behind the damaged place of its row group, and for text that is not UTF-8.
        """
        with self.lock:
            while True:
                for first, values in self.kept:
                    if first <= row < first + len(values):
                        return _python(values[row - first])
                self._advance(row)

    def _advance(self, row: int) -> None:
        """Read the next rows of the row group of a row."""
        group = bisect_right(self.starts, row) - 1
        damaged_from, reason = self.damaged.get(group, (self.total, ""))
        if row >= damaged_from:
            raise Unreadable(reason)
        if group != self.group or row < self.next:
            self.group, self.next = group, self.starts[group]
            self.coming = self.file.iter_batches(ROWS, [group], [self.column], use_threads=False)
        try:
            values = next(self.coming).column(0)
        except (OSError, ValueError, StopIteration) as error:
            self.damaged[group] = self.next, f"row group {group} is damaged ({first_line(error)})"
            self.group = -1
            return
        self.kept.append((self.next, values))
        self.next += len(values)

    def every(self) -> list[str | None]:
        """The values of all rows of a column of text."""
        return [value for group in range(len(self.starts) - 1) for value in self._texts(group)]

    def _texts(self, group: int) -> list[str | None]:
        try:
            texts: list[str | None] = self.file.read_row_group(group, [self.column]).column(0).to_pylist()
        except (OSError, ValueError) as error:
            raise BadRequest(
                f"{self.word}: row group {group} of its column {self.column} is damaged ({first_line(error)}); leave "
                "the file out"
            ) from None
        return texts


def require() -> None:
    """Raises: Unavailable where pyarrow is not installed."""
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise Unavailable("pyarrow is not installed; pip install 'convnext-export[parquet]'") from None


def is_parquet(name: str) -> bool:
    """Whether a file is a Parquet file by its suffix."""
    return name.lower().endswith(SUFFIX)


def files_in(folder: Path) -> list[str]:
    """The paths of the Parquet files in a folder and below, none hidden, relative to it and sorted.

    Raises: BadRequest for a folder that cannot be listed.
    """
    return sorted(names_below(folder, (SUFFIX,)))


def _column_of(word: str, schema: Any, column: str) -> tuple[str, Kind]:
    """The column with the images, and what it holds.

    Raises: BadRequest where there is none, or several.
    """
    kinds: dict[str, Kind] = {field.name: kind for field in schema if (kind := _kind(field.type))}
    chosen = column or _only_column(word, schema, kinds)
    if schema.names.count(chosen) > 1:
        raise BadRequest(f"{word}: several columns are named {chosen}; rename the others")
    if chosen not in kinds:
        listed = some([f"{field.name} ({field.type})" for field in schema], 6)
        if chosen not in schema.names:
            raise BadRequest(f"{word}: no column {chosen!r} in it; it has {listed}")
        raise BadRequest(f"{word}: column {chosen} is {schema.field(chosen).type}; {EXPECTED}")
    return chosen, kinds[chosen]


def _only_column(word: str, schema: Any, kinds: dict[str, Kind]) -> str:
    """The only column with bytes of images, else the first of paths.

    Raises: BadRequest where there is none, or several.
    """
    columns = some([f"{field.name} ({field.type})" for field in schema], 6)
    binary = [name for name, kind in kinds.items() if kind in ("bytes", "struct")]
    texts = [name for name in PATHS if kinds.get(name) == "path"]
    if len(binary) > 1:
        raise BadRequest(f"{word}: several columns may have images: {some(binary)}; add one, as in #{binary[0]}")
    if not binary and not texts:
        raise BadRequest(
            f"{word}: no column of images in it; {EXPECTED}, and it has {columns}; add #COLUMN for paths in a column "
            f"of another name than {', '.join(PATHS)}"
        )
    return (binary or texts)[0]


def _kind(of_column: Any) -> Kind:
    from pyarrow import types

    if types.is_null(of_column):  # no row has a value
        return "path"
    if types.is_dictionary(of_column):  # a category of pandas
        return _kind(of_column.value_type)
    if any(is_(of_column) for is_ in (types.is_binary, types.is_large_binary, types.is_binary_view)):
        return "bytes"
    if any(is_(of_column) for is_ in (types.is_string, types.is_large_string, types.is_string_view)):
        return "path"
    if types.is_struct(of_column):
        fields = {field.name: field.type for field in of_column}
        has_bytes = "bytes" in fields and (_kind(fields["bytes"]) == "bytes" or types.is_null(fields["bytes"]))
        return "struct" if has_bytes and ("path" not in fields or _kind(fields["path"]) == "path") else ""
    return ""


def _python(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        raise Unreadable("the path in this row is no UTF-8 text") from None
