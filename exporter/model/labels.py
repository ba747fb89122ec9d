"""Labels of classes: from configurations, and from files in the forms that people have.

A label that begins with a WordNet id, as in `n01440764 tench`, keeps it: folders may have either name.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from exporter.errors import BadRequest

WORDNET = re.compile(r"n\d{8}")
_NUMBERED = re.compile(r"(\d{1,9})(?:\s*[:;,.)]\s*|\s+)(.*\S)")
_INDEX = ("index", "idx", "id", "class", "class_id", "class_index", "label", "label_id", "number", "target")
_NAME = (
    "name",
    "label",
    "class",
    "id",
    "class_name",
    "label_name",
    "description",
    "words",
    "category",
    "wnid",
    "synset",
)
_PLACEHOLDER = re.compile(r"LABEL_\d+")


def from_config(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The labels of a `config.json` of transformers or timm; () where there are none.

    Raises: ValueError when two places disagree, or do not count from 0.
    """
    nested = config.get("pretrained_cfg") or {}
    descriptions = config.get("label_descriptions") or nested.get("label_descriptions")
    named = _in_order(config.get("id2label"))
    if any(map(_PLACEHOLDER.fullmatch, named)):
        named = ()
    places = {
        "id2label": named,
        "label2id": _of_numbers(config.get("label2id") or {}, named),
        "label_names": described(_in_order(config.get("label_names")), descriptions),
        "pretrained_cfg.label_names": described(_in_order(nested.get("label_names")), descriptions),
    }
    known = {key: names for key, names in places.items() if names and not all(map(_PLACEHOLDER.fullmatch, names))}
    if "label_names" in known:  # as timm reads it
        known.pop("pretrained_cfg.label_names", None)
    (key, labels), *others = known.items() or [("", ())]
    for other, names in others:
        if names != labels:
            raise ValueError(f"{_differing(key, labels, other, names)}: two lists of labels")
    return labels


def _of_numbers(numbers: Mapping[str, Any], named: tuple[str, ...]) -> tuple[str, ...]:
    """Labels from `label2id`. Of classes with the same name it has one, so with `id2label` it is only compared."""
    if all(int(number) < len(named) and named[int(number)] == name for name, number in numbers.items()):
        return named
    return _in_order({number: name for name, number in numbers.items()})


def _differing(key: str, labels: Sequence[str], other: str, names: Sequence[str]) -> str:
    if len(labels) != len(names):
        return f"{len(labels)} in {key}, but {len(names)} in {other}"
    at = next(index for index, (one, two) in enumerate(zip(labels, names, strict=True)) if one != two)
    return f"{key} says {labels[at]!r} for class {at}, but {other} {names[at]!r}"


def _in_order(names: Any) -> tuple[str, ...]:
    """Labels from a list, or from a dictionary with the numbers of the classes as keys."""
    if isinstance(names, Mapping):
        return by_number(((int(number), str(name)) for number, name in names.items()), first=(0,))
    return tuple(str(name) for name in names or ())


def described(names: tuple[str, ...], descriptions: Any) -> tuple[str, ...]:
    """Labels with their descriptions, where the names are WordNet ids."""
    if not isinstance(descriptions, Mapping) or not names or not all(map(WORDNET.fullmatch, names)):
        return names
    return tuple(f"{name} {descriptions[name]}" if descriptions.get(name) else name for name in names)


def by_number(numbered: Iterable[tuple[int, str]], first: Sequence[int] = (0, 1)) -> tuple[str, ...]:
    """Labels in the order of their numbers.

    Raises: ValueError when these do not count from one of `first`.
    """
    pairs = sorted(numbered)
    for start in first:
        if [number for number, _ in pairs] == list(range(start, start + len(pairs))):
            return tuple(name for _, name in pairs)
    raise ValueError(f"the numbers of {len(pairs)} labels do not count from {' or '.join(map(str, first))}")


def from_mapping(names: Mapping[Any, Any]) -> tuple[str, ...]:
    """Labels from {"0": "cat"} or {"cat": 0}.

    Raises: ValueError for other dictionaries, and for those that can be read both ways.
    """
    keys, values = all(map(_is_number, names)), all(map(_is_number, names.values()))
    if (
        keys
        and values
        and {str(key): str(value) for key, value in names.items()} != {str(i): str(i) for i in range(len(names))}
    ):
        key, value = next(iter(names.items()))
        raise ValueError(f"class {key} is {value!r}, or class {value} is {key!r}; give a list of labels")
    if keys:
        return by_number((int(number), _text(name)) for number, name in names.items())
    if values:
        return by_number((int(number), _text(name)) for name, number in names.items())
    raise ValueError('expected {"0": "cat"} or {"cat": 0}')


def _is_number(value: Any) -> bool:
    return (
        not isinstance(value, bool)
        and isinstance(value, (int, str))
        and str(value).isdecimal()
        and len(str(value)) < 10
    )


def _text(name: Any) -> str:
    """A label; a pair of WordNet id and words, as Keras has them, is one."""
    if isinstance(name, list) and name and all(isinstance(part, str) for part in name):
        return " ".join(name)
    if not isinstance(name, (str, int)):
        raise ValueError(f"{name!r} is no label")
    return str(name)


def read_labels(path: Path) -> tuple[str, ...]:
    """Labels from a file: text, JSON or CSV.

    Raises: BadRequest for a file that cannot be read, or can be read in two ways.
    """
    try:
        text = path.read_text("utf-8-sig")
        labels = _parsed(text, path.suffix.lower())
    except (OSError, UnicodeDecodeError, csv.Error, msgspec.DecodeError, RecursionError, ValueError) as error:
        raise BadRequest(
            f"{path}: labels cannot be read ({error}); expected one a line, a JSON list, or CSV with index and name"
        ) from None
    if not labels:
        raise BadRequest(f"{path}: no labels in it; expected one a line")
    return labels


def _parsed(text: str, suffix: str) -> tuple[str, ...]:
    if suffix == ".json" or text.lstrip()[:1] in ("[", "{"):
        names = msgspec.json.decode(text)
        if isinstance(names, dict):
            return from_mapping(names)
        if not isinstance(names, list):
            raise ValueError("no list or object in it")
        return tuple(_text(name) for name in names)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if suffix in (".csv", ".tsv") and (labels := _from_table(lines, "\t" if suffix == ".tsv" else ",")):
        return labels
    return _from_lines(lines)


def _from_lines(lines: list[str]) -> tuple[str, ...]:
    """One label a line; numbers before all of them that count from 0 or 1 are their order."""
    matches = [_NUMBERED.fullmatch(line) for line in lines]
    numbered = [(int(match[1]), match[2]) for match in matches if match]
    if not lines or len(numbered) < len(lines):
        return tuple(lines)
    try:
        return by_number(numbered)
    except ValueError as error:
        number, name = numbered[0]
        raise ValueError(
            f"{error}: the first line is {name!r} for class {number}, or the label {lines[0]!r} for class 0; "
            "number all classes, or give the labels as a JSON list"
        ) from None


def _from_table(lines: list[str], delimiter: str) -> tuple[str, ...]:
    """Labels from a table with a header; () for one without."""
    header, *rows = csv.reader(lines, delimiter=delimiter)
    words = [word.strip().lower().replace(" ", "_") for word in header]
    if not rows or not set(words) & {*_INDEX, *_NAME}:
        return ()
    if any(len(row) != len(words) for row in rows):
        raise ValueError(f"a line with another number of columns than the {len(words)} of the header")
    columns = {word: [row[place].strip() for row in rows] for place, word in enumerate(words)}
    numbers = {word for word, column in columns.items() if all(map(_is_number, column))}
    index = [word for word in words if word in numbers and word in _INDEX]
    names = [word for word in words if word not in numbers and word in _NAME]
    ids = [word for word in names if all(map(WORDNET.fullmatch, columns[word]))]
    names = [word for word in names if word not in ids] or ids
    ids = [word for word in ids if word not in names]
    if len(names) != 1 or len({tuple(columns[word]) for word in index}) > 1:
        both = names if len(names) > 1 else index
        said = " or ".join(f"{word} ({columns[word][0]!r} first)" for word in both)
        raise ValueError(
            f"columns {', '.join(words)}: {said or 'none of them'} could hold the labels; keep index and name"
        )
    labels = [" ".join(parts) for parts in zip(*(columns[word] for word in (*ids[:1], names[0])), strict=True)]
    return by_number(zip(map(int, columns[index[0]]), labels, strict=True)) if index else tuple(labels)
