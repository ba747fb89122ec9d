"""Labels of images, matched to those of a model: one class for each image, or 0 and 1 for each label."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exporter import delimited
from exporter.data.manifests import Listed
from exporter.errors import BadRequest, nearest, some
from exporter.progress import note

Label = int | tuple[int, ...]  # a class, −1 where unknown, or 0 and 1 for each label of a multi-label head
UNKNOWN = -1
_NO_CLASSES = {"train", "training", "val", "valid", "validation", "test", "images", "annotations", "labels", "masks"}
_MEASURED = ("val", "valid", "validation", "test", "images")
_ADD_MULTILABEL = "if the head has a sigmoid for each label, add --outputs multilabel (in compare: --fail-on map_drop)"


def _names_of(label: str) -> set[str]:
    """The names of a class: its label, and the WordNet id and the words that this consists of."""
    match = re.fullmatch(r"(n\d{8})\s+(.+)", label)
    return {label, match[1], match[2]} if match else {label}


def match_classes(
    names: list[str], labels: tuple[str, ...], classes: int, where: str, kind: str = "class"
) -> dict[str, int]:
    """The class number of each name: by the model's labels, else as numbers, else in sorted order.

    Messages call a name a `kind`: "class" or "label".

    A label `n01440764 tench` is also known by its WordNet id and by its words.

    Raises: BadRequest for a class the model does not have, or when names cannot be told apart.
    """
    known = {name: index for index, label in enumerate(labels) for name in _names_of(label)}
    known = _by_number(names, labels) | known
    times = Counter(name for label in labels for name in _names_of(label))
    if any(name in known for name in names):
        for name in names:
            if times[name] > 1:
                raise BadRequest(
                    f"{where}: {times[name]} of the model's labels are {name!r}; give every {kind} by number"
                )
            if name not in known:
                raise BadRequest(
                    f"{where}: {kind} {name!r} is none of the model's {classes} labels; {nearest(name, known)}"
                )
        return {name: known[name] for name in names}
    numbers = {name: number for name in names if (number := delimited.whole(name)) is not None}
    if words := [name for name in names if numbers and name not in numbers]:
        raise BadRequest(f"{where}: {kind} {next(iter(numbers))} is a number, and {words[0]!r} is none; name all alike")
    if numbers:
        if outside := [name for name in names if not 0 <= numbers[name] < classes]:
            kinds = {"class": "classes", "label": "labels"}[kind]
            raise BadRequest(f"{where}: {kind} {outside[0]}, but the model's {kinds} are 0 to {classes - 1}")
        if len(set(numbers.values())) < len(names):
            raise BadRequest(f"{where}: {some(names)} have the same number; write each number in one way")
        return numbers
    # Sorted WordNet ids are ImageNet's classes, whatever words a checkpoint has for them.
    if len(names) == classes and (not labels or all(re.fullmatch(r"n\d{8}", name) for name in names)):
        return {name: index for index, name in enumerate(sorted(names))}
    has = f"{len(labels)} labels, none of them among these" if labels else "no labels"
    raise BadRequest(
        f"{where}: {len(names)} classes ({some(names)}), but the model has {classes} classes and {has}; "
        "build it with --labels FILE, one name a line in the order of the classes, or give images without class folders"
    )


def _by_number(names: list[str], labels: tuple[str, ...]) -> dict[str, int]:
    """The class of each name that is the number of a label, written in another way ("001" or "1.0" for "1"); {} where
    some label is no number."""
    numbers = {delimited.whole(label): index for index, label in enumerate(labels)}
    if None in numbers or len(numbers) < len(labels):
        return {}
    return {name: numbers[number] for name in names if (number := delimited.whole(name)) in numbers}


def of_folders(folders: list[str], labels: tuple[str, ...], classes: int, where: str) -> dict[str, int]:
    """The class of each sub-folder of a folder, as `match_classes` finds it, with a note where another order is likely.

    Raises: BadRequest as `match_classes`, and for sub-folders that are no classes, as train and val.
    """
    has_label = not {name for label in labels for name in _names_of(label)}.isdisjoint(folders)
    if not has_label and {name.lower() for name in folders} <= _NO_CLASSES:
        one = next((name for name in folders if name.lower() in _MEASURED), folders[0])
        raise BadRequest(
            f"{where}: its sub-folders ({some(folders)}) are no classes; give one of them, as {where}/{one}"
        )
    numbers = match_classes(folders, labels, classes, where)
    are_numbers = not has_label and not _by_number(folders, labels) and all(name.isdecimal() for name in folders)
    if are_numbers and folders != sorted(folders, key=lambda name: numbers[name]):
        note(
            f"{where}: sub-folders are taken as numbers of classes; torchvision's ImageFolder counts them as text "
            f"({some(folders)}), so if the model was trained with it, build with --labels FILE that lists the names of "
            "these folders in that order"
        )
    return numbers


def classes_of(path: Path, listed: Listed, labels: tuple[str, ...], classes: int | None) -> list[tuple[str, Label]]:
    """The images of a manifest, each with its class, or all with −1."""
    words = [row.get("label") or "" for row in listed.rows]
    if classes is not None and listed.columns:
        raise BadRequest(
            f"{path}: the columns {some(listed.columns)} are several labels for an image; {_ADD_MULTILABEL}, or remove "
            "the columns"
        )
    if classes is None or not any(words):
        return [(row["path"], UNKNOWN) for row in listed.rows]
    known = {name for label in labels for name in _names_of(label)}
    for line, word in zip(listed.lines, words, strict=True):
        several = _several(word, known)
        if len(several) > 1 and all(part in known or delimited.whole(part) is not None for part in several):
            raise BadRequest(f"{path}: line {line} has several labels, {word}; {_ADD_MULTILABEL}")
    for line, word in zip(listed.lines, words, strict=True):
        if not word or (delimited.whole(word) or 0) < 0:
            has = f"class {word}" if word else "no class"
            raise BadRequest(f"{path}: line {line} has {has}; give a class to every row, or to none")
    numbers = match_classes(sorted(set(words)), labels, classes, str(path))
    return [(row["path"], numbers[word]) for row, word in zip(listed.rows, words, strict=True)]


def labels_of(path: Path, listed: Listed, labels: tuple[str, ...], count: int | None) -> list[tuple[str, Label]]:
    """The images of a manifest, each with 0 or 1 for every label of the model, or all with −1.

    Raises: BadRequest for labels that the model does not have, and for labels in two places.
    """
    cells = [row.get("label") or "" for row in listed.rows]
    if listed.columns and any(cells):
        raise BadRequest(f"{path}: labels are in a column of names and in {some(listed.columns)}; keep one of the two")
    if count is None or not (listed.columns or any(cells)):
        return [(row["path"], UNKNOWN) for row in listed.rows]
    if count == 1 and not listed.columns and not {"0", "1"} & set(labels):
        decisions = [delimited.whole(cell) for cell in cells]
        if "" in cells and 0 in decisions:
            line = listed.lines[cells.index("")]
            raise BadRequest(f"{path}: line {line} has no label, and others have 0; write 0 or 1 in every row")
        if all(decision in (0, 1) for decision in decisions):
            return [(row["path"], (decision or 0,)) for row, decision in zip(listed.rows, decisions, strict=True)]
    if listed.columns:
        names = _columns_of(path, listed.columns, labels, count)
        return [(row["path"], tuple(delimited.whole(row[name]) or 0 for name in names)) for row in listed.rows]
    known = {name for label in labels for name in _names_of(label)}
    parts = [_several(cell, known) for cell in cells]
    for line, several in zip(listed.lines, parts, strict=True):
        if "" in several:
            raise BadRequest(f"{path}: line {line} has a label without a name; write LABEL or LABEL|LABEL")
    numbers = match_classes(sorted({name for several in parts for name in several}), labels, count, str(path), "label")
    positive = [{numbers[name] for name in several} for several in parts]
    return [
        (row["path"], tuple(int(label in numbers) for label in range(count)))
        for row, numbers in zip(listed.rows, positive, strict=True)
    ]


def _several(cell: str, known: Collection[str]) -> list[str]:
    """The labels in a cell, separated by `|` or `;`; a cell that is one of the model's labels is that."""
    if not cell or cell in known:
        return [cell] if cell else []
    return [part.strip() for part in re.split(r"[|;]", cell)]


def _columns_of(path: Path, columns: Sequence[str], labels: tuple[str, ...], count: int) -> list[str]:
    """The column of each label of the model, by its name or its number.

    Raises: BadRequest for a column of no label, and for a label without a column.
    """
    by_name = any(_names_of(label) & set(columns) for label in labels)
    words = labels if by_name else [str(number) for number in range(count)]
    matched = [next((column for column in columns if column in _names_of(word)), "") for word in words]
    if len(set(matched) - {""}) < len(matched) - matched.count(""):
        twice = next(column for column in matched if column and matched.count(column) > 1)
        raise BadRequest(
            f"{path}: the column {twice!r} names {matched.count(twice)} labels of the model; name the columns by "
            f"number, 0 to {count - 1}"
        )
    if stray := [column for column in columns if column not in matched]:
        raise BadRequest(
            f"{path}: column {stray[0]!r} is no label of the model; {_columns_wanted(stray[0], labels, count)}"
        )
    if "" in matched:
        missing = words[matched.index("")]
        raise BadRequest(f"{path}: no column for the label {missing}; give one for each of the {count} labels")
    return matched


def _columns_wanted(stray: str, labels: tuple[str, ...], count: int) -> str:
    """What to call the columns instead of a name that is no label."""
    if not labels:
        return f"the model has no names of its labels: name the columns 0 to {count - 1}"
    return f"{nearest(stray, labels)}; rename or remove the column"


def check_arrays(path: Path, labels: NDArray[np.int64], classes: int, multilabel: bool) -> None:
    """Refuse labels of an `.npz` that are not those of the model.

    Raises: BadRequest.
    """
    lowest, highest = (int(labels.min()), int(labels.max())) if labels.size else (0, 0)
    if not multilabel and labels.ndim == 2:
        raise BadRequest(f"{path}: labels of shape {labels.shape} are several for an image; {_ADD_MULTILABEL}")
    if multilabel and labels.shape[1:] != (classes,):
        raise BadRequest(
            f"{path}: labels of shape {labels.shape}; of a multi-label head with {classes} labels they are "
            f"({len(labels)}, {classes}), 0 or 1"
        )
    if multilabel and not 0 <= lowest <= highest <= 1:
        raise BadRequest(f"{path}: labels from {lowest} to {highest}; those of a multi-label head are 0 or 1")
    if lowest < 0 or (highest >= classes and not multilabel):
        raise BadRequest(f"{path}: labels from {lowest} to {highest}, the model has {classes} classes")
