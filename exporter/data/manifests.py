"""Manifests: files that list images with their classes, as this tool, Kaggle and ImageNet write them."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from exporter import delimited
from exporter.data import images
from exporter.errors import BadRequest, some
from exporter.recipe import bundled

MAX_NAME, MAX_PATH = 255, 4000  # bytes that file systems take
CALIBRATION = "# convnext-export calibration set"
SUFFIXES = (".tsv", ".csv", ".txt")
# Names of columns that people use, in lower case.
_COLUMNS = {
    "path": ("path", "filename", "file", "file_name", "image", "image_path", "imageid", "image_id"),
    "label": ("label", "labels", "class", "class_name", "category", "target", "tags"),
    "split": ("split", "subset", "set"),
    "sha256": ("sha256",),
    "mask": ("mask", "mask_path"),
}
_FIELDS = {word: field for field, words in _COLUMNS.items() for word in words}
TESTED = ("val", "validation", "valid", "test")
TRAINED = ("train", "training")
_PAIR = re.compile(r"(.*[^ \t])[ \t]+([^ \t]+)")
_EXPECTED = (
    "expected a line of column names (path, label, mask, split, sha256, or a usual other name), then one image a line"
)


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


_Rows = list[tuple[int, dict[str, str]]]  # with the number of the line


class Listed(NamedTuple):
    """What a manifest says: the folder its paths are relative to, its header, and a dictionary for each line.

    `lines` are the numbers of these lines in the file, `columns` the names of columns that hold 0 or 1: labels of a
    multi-label head, which the dictionaries have by these names.
    """

    root: Path
    header: dict[str, str]
    rows: list[dict[str, str]]
    lines: list[int]
    columns: tuple[str, ...]

    @property
    def generator(self) -> str:
        """What makes the images; "" where they are files."""
        return self.header.get("generator", "")


def read_manifest(path: Path, split: str = "", repeats: bool = False) -> Listed:
    """Read a manifest: a table with columns `path` and, if known, `label`, `sha256` and `split`, or lines `NAME LABEL`
    in a `.txt` file, as in ImageNet's `val.txt`, or names alone; above a table a header of lines `# key: value`. In
    place of `label` a table may have a column for each label, with 0 or 1.

    Paths are relative to the manifest's own folder, or to one beside it: of the manifest's or the split's name, or
    `images`. Those in a column `mask` are relative to its own folder. Those of a calibration set are relative to the
    header's `source`.

    Args:
        path: the file.
        split: the rows to take; "" takes those for validation or testing, or all where there are no splits.
        repeats: whether an image may be listed twice.

    Raises: BadRequest for a file that is no manifest, leads out of its folder, lists an image twice, or can be read in
        two ways.
    """
    try:
        text = path.read_text("utf-8-sig")
        if "\0" in text:
            raise csv.Error("it holds a NUL byte")
        lines = text.split("\n")
        header: dict[str, str] = {}
        columns: tuple[str, ...]
        frozen = next(filter(str.strip, lines), "") == CALIBRATION
        first = 0
        while first < len(lines) and (not lines[first].strip() or lines[first].startswith("#")):
            key, _, value = lines[first].lstrip("# ").partition(":")
            header[key.strip()] = value.strip()
            first += 1
        if path.suffix.lower() == ".txt":
            numbered, columns = _lines(path, lines[first:], first + 1), ()
        else:
            numbered, columns = _table(path, lines[first:], first + 1, frozen)
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadRequest(f"{path}: cannot be read as a manifest ({error})") from None
    numbered, split = _of_split(path, numbered, split)
    rows = [row for _, row in numbered]
    generated = "generator" in header
    root = path.parent / header.get("source", ".") if frozen and not generated else path.parent
    _check_names(path, root, "" if generated else header.get("source", ""), [row["path"] or "" for row in rows])
    if not frozen and not generated:
        root = _folder_of(path, split, rows)
        if root != path.parent:
            _check_names(path, path.parent, "", [f"{root.name}/{row['path']}" for row in rows])
    if not repeats:
        _refuse_repeated(path, numbered)
    return Listed(root, header, rows, [line for line, _ in numbered], columns)


def _table(path: Path, lines: list[str], first: int, frozen: bool) -> tuple[_Rows, tuple[str, ...]]:
    """The rows of a table, by our names of its columns, and the names of the other columns, which hold 0 or 1. Tables
    that this tool froze have no quotes."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    table = list(delimited.rows(lines, delimiter, first, quoted=not frozen))
    words = [word.strip() for word in table[0][1]] if table else []
    names = [_FIELDS.get(word.lower(), "") for word in words]
    if len(table) < 2 or "path" not in names:
        raise BadRequest(f"{path}: {_EXPECTED}")
    delimited.check_width(table[1:], len(words))
    names = _without_label_columns(words, names, table[1:])
    columns = _label_columns(path, words, names, table[1:])
    for field in _COLUMNS:
        if len(both := [words[index] for index, name in enumerate(names) if name == field]) > 1:
            readings = [f"{word} ({table[1][1][words.index(word)]!r} first)" for word in both]
            raise BadRequest(f"{path}: the {field} is in {' or '.join(readings)}; keep one of these columns")
    keys = [name or word for word, name in zip(words, names, strict=True)]
    return [(line, dict(zip(keys, cells, strict=True))) for line, cells in table[1:]], columns


def _without_label_columns(words: list[str], names: list[str], body: list[delimited.Row]) -> list[str]:
    """Our names of the columns, without those of columns that hold a label: if the table has label columns, a column
    `Target`, `Tags` or `Mask` with only 0 and 1 is read as a label too."""

    def holds_a_label(index: int) -> bool:
        return all(delimited.whole(cells[index]) in (0, 1) for _, cells in body)

    if not any(name in ("", "mask") and holds_a_label(index) for index, name in enumerate(names)):
        return names
    other = {index for index, name in enumerate(names) if name == "label" and words[index].lower() != name}
    other |= {index for index, name in enumerate(names) if name == "mask"}
    return ["" if index in other and holds_a_label(index) else name for index, name in enumerate(names)]


def _label_columns(path: Path, words: list[str], names: list[str], body: list[delimited.Row]) -> tuple[str, ...]:
    """The columns whose name is none of ours, which hold 0 or 1 in every line: labels of a multi-label head.

    Raises: BadRequest for other unknown columns, and for two of one name.
    """
    columns = [index for index, name in enumerate(names) if not name]
    odd = {
        words[index]: f"{words[index]} has {cells[index]!r} in line {line}"
        for index in columns
        for line, cells in reversed(body)
        if delimited.whole(cells[index]) not in (0, 1)
    }
    if odd:
        raise BadRequest(
            f"{path}: unknown columns {some(list(odd))}; remove them; the column of a label holds 0 or 1 in every "
            f"line, and {next(iter(odd.values()))}; {_EXPECTED}"
        )
    labels = tuple(words[index] for index in columns)
    if twice := [word for word in labels if labels.count(word) > 1 or not word]:
        problem = f"two columns are {twice[0]!r}" if twice[0] else "a column of 0 and 1 has no name"
        raise BadRequest(f"{path}: {problem}; name each label once")
    return labels


def _lines(path: Path, lines: list[str], first: int) -> _Rows:
    """Lines `NAME LABEL`, `NAME MASK.png`, or names alone."""
    expected = (
        "expected a folder, a .tsv or .csv manifest, lines 'IMAGE CLASS' in a .txt file, an .npz file or 'synthetic'"
    )
    filled = [(number, line) for number, line in enumerate(lines, first) if line.strip()]
    names = [(number, {"path": line.strip(" \t\r")}) for number, line in filled]
    pairs = [_PAIR.fullmatch(row["path"]) for _, row in names]
    have_masks = all(pair and _is_image(pair[1]) and pair[2].lower().endswith(".png") for pair in pairs)
    if names and not have_masks and all(_is_image(row["path"]) for _, row in names):
        return names
    rows: _Rows = []
    for (number, line), pair in zip(filled, pairs, strict=True):
        if not pair or not _is_image(pair[1]):
            raise BadRequest(f"{path}: line {number} is {line.strip()[:60]!r}; {expected}")
        rows.append((number, {"path": pair[1], "label": pair[2]}))
    if not rows:
        raise BadRequest(f"{path}: {expected}")
    return rows


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in images.SUFFIXES


def _of_split(path: Path, rows: _Rows, wanted: str) -> tuple[_Rows, str]:
    """The rows of a split, and its name.

    Raises: BadRequest when there is no such split, or when none or several could be meant.
    """
    splits = list(dict.fromkeys(row["split"].strip() for _, row in rows if "split" in row))
    named = [split for split in splits if split]
    if wanted and wanted not in named:
        raise BadRequest(f"{path}: no split {wanted!r}; it has {some(named) or 'none'}")
    if not named:
        return rows, ""
    tested = [wanted] if wanted else [split for split in named if split.lower() in TESTED]
    if not wanted and "" in splits:
        line = next(line for line, row in rows if not row["split"].strip())
        raise BadRequest(
            f"{path}: line {line} is in no split, and others are in {some(named)}; give a split to every row, or take "
            f"one of them as in {path.name}#{[*tested, *named][0]}"
        )
    if len(splits) == 1 and not tested:
        if splits[0].lower() in TRAINED:
            raise BadRequest(
                f"{path}: its only split is {splits[0]}; to measure on it nevertheless, say {path.name}#{splits[0]}"
            )
        return rows, ""
    if len(tested) != 1:
        choice = " or ".join(f"{path.name}#{split}" for split in tested or splits[:3])
        raise BadRequest(f"{path}: it has the splits {some(splits)}; take one of them as in {choice}")
    return [(line, row) for line, row in rows if row["split"].strip() == tested[0]], tested[0]


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


def masks_of(path: Path, listed: Listed) -> list[str]:
    """The masks of the images of a manifest, relative to its folder: its column `mask`, or labels that all are names of
    PNG files. [] where it has neither.

    Raises: BadRequest for an image without a mask where others have one, for JPEG files, and for masks outside the
        folder.
    """
    if "mask" in listed.columns:
        return []
    field = "mask" if any("mask" in row for row in listed.rows) else "label"
    masks = [row.get(field, "").strip() for row in listed.rows]
    if field == "label" and not all(mask.lower().endswith(".png") for mask in masks):
        return []
    if "" in masks:
        raise BadRequest(f"{path}: line {listed.lines[masks.index('')]} has no mask; add one, or remove the line")
    if lossy := next((mask for mask in masks if mask.lower().endswith((".jpg", ".jpeg"))), ""):
        raise BadRequest(f"{path}: the mask {lossy} is a JPEG, which changes classes near borders; save masks as PNG")
    _check_names(path, path.parent, "", masks)
    return masks


def _check_names(path: Path, root: Path, source: str, names: list[str]) -> None:
    """Refuse names that no file can have, or that lead out of a manifest's folder.

    Raises: BadRequest.
    """
    if long := next(filter(_is_too_long, [source, *names]), None):
        raise BadRequest(f"{path}: {long[:60]!r}… is no name that a file can have; correct the manifest")
    outside = [name for name in names if not name or _leaves(name)]
    if outside:
        raise BadRequest(
            f"{path}: {outside[0]!r} lies outside the folder of this list; use paths relative to it, below it"
        )
    inside = os.path.realpath(root)
    if linked := next((name for name in names if _leads_out(inside, name)), None):
        raise BadRequest(f"{path}: {linked!r} is a link out of {root}; put the image itself there")


def _refuse_repeated(path: Path, rows: _Rows) -> None:
    """Refuse an image in two lines: it would count twice, and intervals would be too narrow.

    Raises: BadRequest.
    """
    lines: dict[str, int] = {}
    for line, row in rows:
        name = os.path.normpath(row["path"])
        first = lines.setdefault(name, line)
        if first != line:
            raise BadRequest(f"{path}: lines {first} and {line} are both {name!r}; list each image once")


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
