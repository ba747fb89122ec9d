"""Labels of classes: from configurations, and from files in the forms that people have.

A label that begins with a WordNet id, as in `n01440764 tench`, keeps it: folders may have either name.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from exporter.errors import BadRequest
from exporter.model import label_text
from exporter.model.label_text import WORDNET, Entry

_MANY = 1000  # classes, of which two may have the same label
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
    if name is None or isinstance(name, bool):
        raise ValueError(f"{'null' if name is None else str(name).lower()} is not a label")
    if not isinstance(name, (str, int)):
        raise ValueError(f"{name!r} is not a label")
    return str(name)


def read_labels(path: Path) -> tuple[str, ...]:
    """Labels from a file: text, JSON or CSV.

    Raises: BadRequest for a file that cannot be read, or can be read in two ways.
    """
    try:
        entries = _parsed(path.read_text("utf-8-sig"), path.suffix.lower())
        _check_names(entries)
    except FileNotFoundError:
        raise BadRequest(f"{path}: no such file; give a file with the labels, one a line") from None
    except (OSError, UnicodeDecodeError, csv.Error, RecursionError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise BadRequest(
            f"{path}: labels cannot be read ({why}); expected one a line, a JSON list, or CSV with index and name"
        ) from None
    if not entries:
        raise BadRequest(f"{path}: no labels in it; expected one a line")
    return tuple(entry.name for entry in entries)


def _check_names(entries: list[Entry]) -> None:
    """Refuse classes without a name, and two of one name in lists shorter than ImageNet's, which has two cranes.

    Raises: ValueError.
    """
    places: dict[str, str] = {}
    for place, name in entries:
        if not name:
            raise ValueError(f"{place} has an empty label")
        if places.setdefault(name, place) != place and len(entries) < _MANY:
            raise ValueError(f"{places[name]} and {place} are both {name!r}; give each class its own label")


def _parsed(text: str, suffix: str) -> list[Entry]:
    """The labels in the order of the classes. `text` has its lines end in a newline, as Python reads files."""
    if suffix == ".json" or text.lstrip()[:1] in ("[", "{"):
        return [Entry(f"class {number}", name) for number, name in enumerate(_from_json(text))]
    return label_text.parse(text, suffix)


def _from_json(text: str) -> tuple[str, ...]:
    names = json.loads(text, object_pairs_hook=_unrepeated)
    if isinstance(names, dict):
        return from_mapping(names)
    if not isinstance(names, list):
        raise ValueError("no list or object in it")
    return tuple(_text(name) for name in names)


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, which must not have a key twice."""
    names: dict[str, Any] = {}
    for key, value in pairs:
        if key in names:
            raise ValueError(f"{key!r} is {names[key]!r} and {value!r}; keep one of them")
        names[key] = value
    return names
