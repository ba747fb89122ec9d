"""Answers as files, by their suffix."""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from exporter.delimited import escape_formula
from exporter.errors import BadRequest, Unavailable
from exporter.predict.answers import Answers
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
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, columns(answers), restval="", lineterminator="\n")
        writer.writeheader()
        for record in records(answers, chunks()):
            writer.writerow({key: escape_formula(cell) for key, cell in flat(answers, record).items()})


def write_parquet(file: Path, answers: Answers, chunks: Chunks) -> None:
    """A row for each image, in groups of `ROW_GROUP` rows."""
    import pyarrow as pa
    from pyarrow import parquet

    schema = pa.schema([(name, _parquet_type(answers, name)) for name in columns(answers)])
    rows = (flat(answers, record) for record in records(answers, chunks()))
    with parquet.ParquetWriter(file, schema) as writer:
        while group := list(islice(rows, ROW_GROUP)):
            writer.write_table(pa.Table.from_pylist(group, schema), row_group_size=ROW_GROUP)


def _parquet_type(answers: Answers, column: str) -> Any:
    import pyarrow as pa

    word = column.rpartition(".")[2]
    if word == "embedding":
        return pa.list_(pa.float32())
    if word.startswith("class_"):
        return pa.int32()
    return pa.float32() if word.startswith(("probability_", "value_")) else pa.string()


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
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise Unavailable("pyarrow is not installed; pip install 'convnext-export[parquet]'") from None


def check_kinds(out: Path, answers: Answers) -> None:
    """Refuse outputs that a file cannot hold.

    Raises: BadRequest for feature maps anywhere but in `.npz`, and for feature vectors in a CSV.
    """
    if out.suffix.lower() != ".npz" and any(output.is_map for output in answers.outputs):
        raise BadRequest(f"-o {out}: the outputs are feature maps; write them to .npz")
    if out.suffix.lower() == ".csv" and any(output.kind in ("embedding", "features") for output in answers.outputs):
        raise BadRequest(f"-o {out}: the outputs are feature vectors; write them to .npz or .parquet")


def records(answers: Answers, chunks: Iterator[Chunk]) -> Iterator[dict[str, Any]]:
    """A dictionary for each image: its name, and its answers or the reason why it has none."""
    for chunk in chunks:
        good = answers.records(chunk.arrays(), sum(not error for error in chunk.errors))
        for name, error in zip(chunk.names, chunk.errors, strict=True):
            yield {"image": name, "error": error} if error else {"image": name, **next(good)}


def columns(answers: Answers) -> list[str]:
    """The columns of a table of answers."""
    names = ["image"]
    for output in answers.outputs:
        before = f"{output.name}." if len(answers.outputs) > 1 else ""
        names += [before + column for column in _columns_of(answers, output)]
    return [*names, "error"]


def _columns_of(answers: Answers, output: Any) -> list[str]:
    if output.kind in ("embedding", "features"):
        return ["embedding"]
    if output.kind == "values":
        return [f"value_{number + 1}" for number in range(output.width)]
    words = ("class", "label", "probability") if output.labels else ("class", "probability")
    top = [f"{word}_{rank + 1}" for rank in range(min(answers.top, output.width)) for word in words]
    return ["labels", *top] if output.kind == "multilabel" else top


def flat(answers: Answers, record: dict[str, Any]) -> dict[str, Any]:
    """A record with one value for each column."""
    several = len(answers.outputs) > 1
    row: dict[str, Any] = {key: record[key] for key in ("image", "error") if key in record}
    if "error" in record:
        return row
    for output in answers.outputs:
        before, answer = (f"{output.name}.", record[output.name]) if several else ("", record)
        if "embedding" in answer:
            row[f"{before}embedding"] = answer["embedding"]
        for number, value in enumerate(answer.get("values", ())):
            row[f"{before}value_{number + 1}"] = value
        if "labels" in answer:
            row[f"{before}labels"] = ";".join(answer["labels"])
        for rank, one in enumerate(answer.get("predictions", ())):
            row |= {f"{before}{word}_{rank + 1}": value for word, value in one.items()}
    return row
