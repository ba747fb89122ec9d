"""Manifests: files that list images with their classes, as this tool, Kaggle and ImageNet write them."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from exporter.data import images
from exporter.errors import BadRequest, some
from exporter.recipe import bundled

MAX_NAME, MAX_PATH = 255, 4000  # bytes that file systems take
CALIBRATION = "# convnext-export calibration set"
SUFFIXES = (".tsv", ".csv", ".txt")
# Names of columns that people use, in lower case.
_COLUMNS = {
    "path": ("path", "filename", "file", "file_name", "image", "image_path", "imageid", "image_id"),
    "label": ("label", "class", "class_name", "category", "target"),
    "split": ("split", "subset", "set"),
    "sha256": ("sha256",),
}
_FIELDS = {word: field for field, words in _COLUMNS.items() for word in words}
_TESTED = ("val", "validation", "valid", "test")
_EXPECTED = "expected a line of column names (path, label, split, sha256, or a usual other name), then one image a line"


def locate(source: str) -> tuple[Path, str]:
    """The path of a source of images and the split that `FILE#split` asks for, or ""."""
    path = bundled.find_images(source)
    if "#" in source and not path.exists():
        file, _, split = source.rpartition("#")
        return bundled.find_images(file), split
    return path, ""


def is_manifest(path: Path) -> bool:
    """Whether a path is a manifest by its suffix."""
    return path.suffix.lower() in SUFFIXES


class Listed(NamedTuple):
    """What a manifest says: the folder its paths are relative to, its header, and a dictionary for each line."""

    root: Path
    header: dict[str, str]
    rows: list[dict[str, str]]

    @property
    def generator(self) -> str:
        """What makes the images; "" where they are files."""
        return self.header.get("generator", "")


def read_manifest(path: Path, split: str = "") -> Listed:
    """Read a manifest: a table with columns `path` and, if known, `label`, `sha256` and `split`, or lines `NAME LABEL`
    in a `.txt` file, as in ImageNet's `val.txt`; above a table a header of lines `# key: value`.

    Paths are relative to the manifest's own folder, or to one beside it: of the manifest's or the split's name, or
    `images`. Those of a calibration set are relative to the header's `source`.

    Args:
        path: the file.
        split: the rows to take; "" takes those for validation or testing, or all where there are no splits.

    Raises: BadRequest for a file that is no manifest, leads out of its folder, or can be read in two ways.
    """
    try:
        text = path.read_text("utf-8-sig")
        if "\0" in text:
            raise csv.Error("it holds a NUL byte")
        lines = [line for line in text.splitlines() if line.strip()]
        header: dict[str, str] = {}
        frozen = bool(lines) and lines[0] == CALIBRATION
        while lines and lines[0].startswith("#"):
            key, _, value = lines.pop(0).lstrip("# ").partition(":")
            header[key.strip()] = value.strip()
        rows = _lines(path, lines) if path.suffix.lower() == ".txt" else _table(path, lines)
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadRequest(f"{path}: cannot be read as a manifest ({error})") from None
    rows, split = _of_split(path, rows, split)
    generated = "generator" in header
    root = path.parent / header.get("source", ".") if frozen and not generated else path.parent
    _check_names(path, root, "" if generated else header.get("source", ""), [row["path"] or "" for row in rows])
    if not frozen and not generated:
        root = _folder_of(path, split, rows)
        if root != path.parent:
            _check_names(path, path.parent, "", [f"{root.name}/{row['path']}" for row in rows])
    return Listed(root, header, rows)


def _table(path: Path, lines: list[str]) -> list[dict[str, str]]:
    """The rows of a table, by our names of its columns."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    words = [word.strip() for word in next(csv.reader(lines[:1], delimiter=delimiter), [])]
    names = [_FIELDS.get(word.lower(), "") for word in words]
    rows = list(csv.DictReader(lines[1:], names, delimiter=delimiter))
    if not rows or "path" not in names or "" in names:
        unknown = [word for word, name in zip(words, names, strict=True) if not name]
        columns = f"unknown columns {some(unknown)}; remove them; " if unknown and "path" in names else ""
        raise BadRequest(f"{path}: {columns}{_EXPECTED}")
    for field in _COLUMNS:
        if len(both := [words[index] for index, name in enumerate(names) if name == field]) > 1:
            values = next(csv.reader(lines[1:2], delimiter=delimiter))
            readings = [f"{word} ({values[words.index(word)]!r} first)" for word in both]
            raise BadRequest(f"{path}: the {field} is in {' or '.join(readings)}; keep one of these columns")
    return [{name: value or "" for name, value in row.items() if name} for row in rows]


def _lines(path: Path, lines: list[str]) -> list[dict[str, str]]:
    """Lines `NAME LABEL`."""
    pairs = [line.rsplit(maxsplit=1) for line in lines]
    if not pairs or any(len(pair) != 2 or Path(pair[0]).suffix.lower() not in images.SUFFIXES for pair in pairs):
        raise BadRequest(
            f"{path}: expected a folder, a .tsv or .csv manifest, lines 'IMAGE CLASS' in a .txt file, an .npz file or "
            "'synthetic'"
        )
    return [{"path": name, "label": label} for name, label in pairs]


def _of_split(path: Path, rows: list[dict[str, str]], wanted: str) -> tuple[list[dict[str, str]], str]:
    """The rows of a split, and its name."""
    splits = list(dict.fromkeys(row["split"].strip() for row in rows if "split" in row))
    if wanted and wanted not in splits:
        raise BadRequest(f"{path}: no split {wanted!r}; it has {some(splits) or 'none'}")
    tested = [split for split in splits if split.lower() in _TESTED] if not wanted else [wanted]
    if not splits or (len(splits) == 1 and not tested):
        return rows, ""
    if len(tested) != 1:
        choice = " or ".join(f"{path.name}#{split}" for split in tested or splits[:3])
        raise BadRequest(f"{path}: it has the splits {some(splits)}; take one of them as in {choice}")
    return [row for row in rows if row["split"].strip() == tested[0]], tested[0]


def _folder_of(path: Path, split: str, rows: list[dict[str, str]]) -> Path:
    """The folder that holds the images; the rows get the suffixes that their names lack.

    Raises: BadRequest when two folders hold the first image.
    """
    names = dict.fromkeys(["", path.stem, split, "images"])
    folders = [path.parent / name for name in names if name or not split]
    first = rows[0]["path"]
    holding = [folder for folder in folders if next(_files(folder, first), "")]
    if len(holding) > 1:
        raise BadRequest(f"{path}: {first} is in {' and in '.join(map(str, holding))}; keep one of them")
    folder = holding[0] if holding else path.parent
    for row in rows:
        if Path(row["path"]).suffix.lower() not in images.SUFFIXES:
            row["path"] = next(_files(folder, row["path"]), row["path"])
    return folder


def _files(folder: Path, name: str) -> Iterator[str]:
    """The names of a file that is there, as listed or with the suffix of an image."""
    suffixes = [""] if Path(name).suffix.lower() in images.SUFFIXES else sorted(images.SUFFIXES)
    for suffix in (*suffixes, ".JPEG") if suffixes != [""] else suffixes:
        if (folder / f"{name}{suffix}").is_file():
            yield name + suffix


def _check_names(path: Path, root: Path, source: str, names: list[str]) -> None:
    """Refuse names that no file can have, or that lead out of a manifest's folder.

    Raises: BadRequest.
    """
    if long := next(filter(_is_too_long, [source, *names]), None):
        raise BadRequest(f"{path}: {long[:60]!r}… is no name that a file can have; correct the manifest")
    outside = [name for name in names if not name or _leaves(name)]
    if outside:
        raise BadRequest(f"{path}: {outside[0]!r} lies outside the manifest's folder; use paths relative to it")
    inside = os.path.realpath(root)
    if linked := next((name for name in names if _leads_out(inside, name)), None):
        raise BadRequest(f"{path}: {linked!r} is a link out of {root}; put the image itself there")


def _leads_out(inside: str, name: str) -> bool:
    """Whether a link on the way to a file below a folder leads out of it."""
    try:
        return not Path(os.path.realpath(f"{inside}/{name}")).is_relative_to(inside)
    except (OSError, ValueError):  # no path that a file can have: told of when it is read
        return False


def _is_too_long(name: str) -> bool:
    return len(name) > MAX_PATH or any(len(part.encode("utf-8", "replace")) > MAX_NAME for part in name.split("/"))


def _leaves(name: str) -> bool:
    path = Path(name)
    return path.is_absolute() or ".." in path.parts
