"""Answers as files, by their suffix."""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from exporter.delimited import escape_formula
from exporter.errors import BadRequest, some
from exporter.predict import parquet
from exporter.predict.answers import Answers, Arrays, Output
from exporter.predict.store import Chunk

Chunks = Callable[[], Iterator[Chunk]]
ROW_GROUP = 8192  # rows of a Parquet file that are in memory at a time


def write_jsonl(file: Path, answers: Answers, chunks: Chunks) -> None:
    """A JSON object a line."""
    with file.open("wb") as out:
        for record in records(answers, chunks()):
            out.write(msgspec.json.encode(record) + b"\n")


def write_csv(file: Path, answers: Answers, chunks: Chunks) -> None:
    """A header and a row for each image. An apostrophe is put before cells that a spreadsheet takes for a formula."""
    table = columns(answers)
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, [column.name for column in table], restval="", lineterminator="\n")
        writer.writeheader()
        for record in records(answers, chunks()):
            writer.writerow({key: escape_formula(cell) for key, cell in flat(table, record).items()})


def write_parquet(file: Path, answers: Answers, chunks: Chunks) -> None:
    """A row for each image, in groups of `ROW_GROUP` rows."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    types = {"text": pa.string(), "integer": pa.int32(), "float": pa.float32(), "vector": pa.list_(pa.float32())}
    table = columns(answers)
    schema = pa.schema([(column.name, types[column.cell]) for column in table])
    with ParquetWriter(file, schema) as writer:
        for group in _groups(chunks()):
            errors = [error or None for chunk in group for error in chunk.errors]
            cells = _cells_of(answers, group)
            good = pa.array(_places(errors), pa.int64())  # an image with an error has a null in the columns of answers
            every = [
                pa.array([name for chunk in group for name in chunk.names]),
                *(_array(cells[column.name], types[column.cell]).take(good) for column in table[1:-1]),
                pa.array(errors, pa.string()),
            ]
            writer.write_table(pa.Table.from_arrays(every, schema=schema), row_group_size=ROW_GROUP)


def _array(cells: Any, of_type: Any) -> Any:
    """Cells as a column of Parquet; vectors come as (N, width)."""
    import pyarrow as pa

    if not pa.types.is_list(of_type):
        return pa.array(cells, of_type)
    ends = np.arange(len(cells) + 1, dtype=np.int32) * (cells.shape[1] if len(cells) else 0)
    return pa.ListArray.from_arrays(ends, pa.array(np.ravel(cells), pa.float32()))


def _places(errors: Sequence[str | None]) -> Iterator[int | None]:
    """For each image its number among those without an error, None for one with an error."""
    place = 0
    for error in errors:
        yield None if error else place
        place += not error


def _groups(chunks: Iterator[Chunk]) -> Iterator[list[Chunk]]:
    """Chunks of `ROW_GROUP` images together; the last group has fewer. A chunk that goes over the end is divided."""
    group: list[Chunk] = []
    end = ROW_GROUP
    for chunk in chunks:
        while chunk.end >= end:
            yield [*group, chunk.between(chunk.start, end)]
            group, chunk, end = [], chunk.after(end), end + ROW_GROUP
        group += [chunk] if chunk.names else []
    if group:
        yield group


def _cells_of(answers: Answers, group: Sequence[Chunk]) -> dict[str, Any]:
    """The cells of images without an error, by the names of the columns; those of vectors as (N, width)."""
    parts = [chunk.arrays() for chunk in group if chunk.tensors]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
    cells: dict[str, Any] = {}
    for output in answers.outputs:
        before = f"{output.name}." if len(answers.outputs) > 1 else ""
        for column in _columns_of(answers, output):
            cells[before + column.name] = _cells(output, joined, column.keys) if joined else ()
    return cells


def _cells(output: Output, arrays: Arrays, keys: tuple[str | int, ...]) -> Any:
    """The cells of one column: what `Answers.records` has under these keys."""
    if keys[0] == "embedding":
        return arrays[output.name]
    if keys[0] == "values":
        return arrays[output.name][:, int(keys[1])]
    if keys[0] == "labels":
        decided = arrays[f"{output.name}.decided"]
        return [";".join(output.label(number) for number in np.flatnonzero(row).tolist()) for row in decided]
    rank, word = int(keys[1]), keys[2]
    if word == "probability":
        return [round(one, 6) for one in arrays[f"{output.name}.probabilities"][:, rank].tolist()]
    numbers = arrays[f"{output.name}.classes"][:, rank]
    return numbers if word == "class" else [output.labels[number] for number in numbers.tolist()]


def write_npz(file: Path, answers: Answers, chunks: Chunks) -> None:
    """The outputs as they are, with the names of the images they are of, and of those that could not be read."""
    good = [name for chunk in chunks() for name, error in zip(chunk.names, chunk.errors, strict=True) if not error]
    bad = [name for chunk in chunks() for name, error in zip(chunk.names, chunk.errors, strict=True) if error]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, names in (("images", good), ("unreadable", bad)):
            _write_array(archive, name, iter([np.asarray(names, dtype=str)]), len(names))
        for output in answers.outputs:
            if output.labels:
                _write_array(archive, f"{output.name}.labels", iter([np.asarray(output.labels)]), len(output.labels))
            parts = (chunk.arrays()[output.name] for chunk in chunks() if chunk.tensors)
            _write_array(archive, output.name, parts, len(good))


def _write_array(archive: zipfile.ZipFile, name: str, parts: Iterator[Any], count: int) -> None:
    """Write an array of `count` rows that comes in parts."""
    first = next(parts)
    header = {"descr": first.dtype.str, "fortran_order": False, "shape": (count, *first.shape[1:])}
    with archive.open(f"{name}.npy", "w", force_zip64=True) as out:
        np.lib.format.write_array_header_2_0(out, header)
        for part in chain([first], parts):
            out.write(np.ascontiguousarray(part).tobytes())


WRITERS: dict[str, Callable[[Path, Answers, Chunks], None]] = {
    ".csv": write_csv,
    ".jsonl": write_jsonl,
    ".parquet": write_parquet,
    ".npz": write_npz,
}


def check(out: Path) -> None:
    """Refuse a file that cannot be written.

    Raises: BadRequest for an unknown suffix; Unavailable where pyarrow is not installed.
    """
    if out.suffix.lower() not in WRITERS:
        raise BadRequest(f"-o {out}: expected a file that ends in {', '.join(WRITERS)}")
    if out.suffix.lower() == ".parquet":
        parquet.require()


def check_kinds(out: Path, answers: Answers) -> None:
    """Refuse outputs that a file cannot hold.

    Raises: BadRequest for feature maps and tokens anywhere but in `.npz`, and for feature vectors in a CSV.
    """
    if out.suffix.lower() != ".npz" and any(output.is_map for output in answers.outputs):
        raise BadRequest(f"-o {out}: the outputs are maps or tokens; write them to .npz, or masks to a folder")
    vectors = [output.name for output in answers.outputs if output.kind in ("embedding", "features")]
    if out.suffix.lower() == ".csv" and vectors:
        raise BadRequest(f"-o {out}: {some(vectors)}: a CSV has no feature vectors; write .npz, .parquet or .jsonl")


def records(answers: Answers, chunks: Iterator[Chunk]) -> Iterator[dict[str, Any]]:
    """A dictionary for each image: its name, and its answers or the reason why it has none."""
    for chunk in chunks:
        good = answers.records(chunk.arrays(), sum(not error for error in chunk.errors))
        for name, error in zip(chunk.names, chunk.errors, strict=True):
            yield {"image": name, "error": error} if error else {"image": name, **next(good)}


Cell = Literal["text", "integer", "float", "vector"]


@dataclass(frozen=True)
class Column:
    """A column of a table of answers: its name, what its cells hold, and the keys that lead to it in a record."""

    name: str
    cell: Cell
    keys: tuple[str | int, ...]

    def of(self, record: dict[str, Any]) -> Any:
        """The cell of a record, None where it has none."""
        value: Any = record
        for key in self.keys:
            if isinstance(key, str) and key not in value:
                return None
            value = value[key]
        return ";".join(value) if self.cell == "text" and isinstance(value, list) else value


CELLS: dict[str, Cell] = {"class": "integer", "label": "text", "probability": "float"}
"""What the cells of an answer hold, by the word of its record."""


def columns(answers: Answers) -> list[Column]:
    """The columns of a table of answers."""
    every = [Column("image", "text", ("image",))]
    for output in answers.outputs:
        before, keys = (f"{output.name}.", (output.name,)) if len(answers.outputs) > 1 else ("", ())
        for column in _columns_of(answers, output):
            every.append(Column(before + column.name, column.cell, (*keys, *column.keys)))
    return [*every, Column("error", "text", ("error",))]


def _columns_of(answers: Answers, output: Output) -> Iterator[Column]:
    """The columns of one output, with the keys that lead to them in its own answer."""
    if output.kind in ("embedding", "features"):
        yield Column("embedding", "vector", ("embedding",))
        return
    if output.kind == "values":
        yield from (Column(f"value_{number + 1}", "float", ("values", number)) for number in range(output.width))
        return
    if output.kind == "multilabel":
        yield Column("labels", "text", ("labels",))
    words = [word for word in CELLS if word != "label" or output.labels]
    for rank in range(min(answers.top, output.width)):
        yield from (Column(f"{word}_{rank + 1}", CELLS[word], ("predictions", rank, word)) for word in words)


def flat(table: Sequence[Column], record: dict[str, Any]) -> dict[str, Any]:
    """The cells of a record by the names of their columns."""
    cells = {column.name: column.of(record) for column in table}
    return {name: cell for name, cell in cells.items() if cell is not None}
