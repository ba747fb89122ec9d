"""Labels in text files and tables, each with its line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from exporter import delimited

WORDNET = re.compile(r"n\d{8}")
_NUMBER = r"(-?\d{1,9}(?:\.0+)?)"
_NUMBER_FIRST = re.compile(_NUMBER + r"(?:\s*[-:;,.)=]\s*|\s+)(\S.*)")
_NUMBER_LAST = re.compile(r"(\S.*?)(?:\s*[:;,=]\s*|\s+-\s+|\s+)" + _NUMBER)
_HEAD = re.compile(r"names\s*:")
_SIGNS = {"\t": "a tab", ";": "';'", ",": "','"}
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


class Entry(NamedTuple):
    """A label and the place in its file, as `line 3`."""

    place: str
    name: str


class _Numbered(NamedTuple):
    """A label with the number of its class, and its line."""

    line: int
    number: int
    name: str


def parse(text: str, suffix: str) -> list[Entry]:
    """The labels of a text file or, by its suffix or header, of a table, in the order of the classes.

    `text` has its lines end in a newline, as Python reads files.

    Raises: ValueError or csv.Error, naming the line, for what can be read in two ways or in none.
    """
    lines = text.split("\n")
    filled = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not filled:
        return []
    if delimiter := _delimiter([line for _, line in filled], suffix):
        return _from_table(lines, delimiter)
    return _from_lines(filled)


def _delimiter(lines: list[str], suffix: str) -> str:
    """What separates the columns of a table; "" for lines of text.

    In a text file only a header with the known names of columns makes a table.
    """
    others = [sign for sign in _SIGNS if all(sign in line for line in lines)]
    if suffix in (".csv", ".tsv"):
        usual = "\t" if suffix == ".tsv" else ","
        return usual if usual in lines[0] else next(iter(others), usual)
    for sign in others:
        words = [_word(cell) for cell in lines[0].split(sign)]
        if len(lines) > 1 and any(words) and all(word in (*_INDEX, *_NAME, "") for word in words):
            return sign
    return ""


def _word(cell: str) -> str:
    return cell.strip().strip('"').lower().replace(" ", "_")


def _in_number_order(numbered: Sequence[_Numbered]) -> list[Entry]:
    """Labels in the order of their numbers.

    Raises: ValueError, naming a line, when these do not count from 0 or 1.
    """
    if not _counts(entry.number for entry in numbered):
        seen: set[int] = set()
        wrong = max(numbered, key=lambda entry: entry.number)
        for entry in numbered:
            if entry.number < 0 or entry.number in seen:
                wrong = entry
                break
            seen.add(entry.number)
        raise ValueError(
            f"the numbers of {len(numbered)} labels do not count from 0 or 1: line {wrong.line} has {wrong.number}"
        )
    return [Entry(f"line {line}", name) for line, _, name in sorted(numbered, key=lambda entry: entry.number)]


def _counts(numbers: Iterable[int]) -> bool:
    """Whether numbers, in some order, count from 0 or from 1."""
    ordered = sorted(numbers)
    return ordered in (list(range(len(ordered))), list(range(1, len(ordered) + 1)))


def _from_lines(lines: list[tuple[int, str]]) -> list[Entry]:
    """One label a line; numbers before or after all of them that count from 0 or 1 are their order."""
    lines = _without_marks(lines)
    matches = [(line, match) for line, text in lines if (match := _NUMBER_FIRST.fullmatch(text))]
    front = [_Numbered(line, int(float(match[1])), _unquoted(match[2])) for line, match in matches]
    matches = [(line, match) for line, text in lines if (match := _NUMBER_LAST.fullmatch(text))]
    back = [_Numbered(line, int(float(match[2])), _unquoted(match[1])) for line, match in matches]
    advice = "number all classes from 0, or give the labels as a JSON list"
    if len(front) == len(lines):
        return _of_numbered_lines(lines, front, back, advice)
    if len(front) > 1 and min(entry.number for entry in front) <= 1:
        numbered = {entry.line for entry in front}
        line, text = next(pair for pair in lines if pair[0] not in numbered)
        raise ValueError(
            f"line {line}, {text!r}, has no number, but line {front[0].line} has {front[0].number}; {advice}"
        )
    same = len(lines) > 1 and len({entry.name for entry in back}) == 1  # `class 0`, `class 1`
    # Numbers from 2 on are none of classes, as in `Boeing 737`.
    if len(back) == len(lines) and not same and min(entry.number for entry in back) <= 1:
        return _in_number_order(back)
    if all("\t" in text and not WORDNET.match(text) for _, text in lines):
        raise ValueError(f"line {lines[0][0]}, {lines[0][1]!r}, has columns separated by a tab, without a header")
    return [Entry(f"line {line}", _unquoted(text)) for line, text in lines]


def _of_numbered_lines(
    lines: list[tuple[int, str]], front: list[_Numbered], back: list[_Numbered], advice: str
) -> list[Entry]:
    """Labels of lines that all begin with a number."""
    (line, text), (_, number, name) = lines[0], front[0]
    orders = [entry.number for entry in front], [entry.number for entry in back]
    if all(map(_counts, orders)) and len(back) == len(front) and len(set(map(tuple, orders))) > 1:
        raise ValueError(f"line {line}, {text!r}, is class {number} or class {back[0].number}; keep one number a line")
    try:
        return _in_number_order(front)
    except ValueError as error:
        raise ValueError(
            f"{error}; the first line is {name!r} for class {number}, or the label {text!r} for class 0; {advice}"
        ) from None


def _without_marks(lines: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """Lines without the marks of a list in YAML: `names:` above it, `-` before each label.

    Raises: ValueError for marks that only some lines have.
    """
    listed = _HEAD.fullmatch(lines[0][1]) and len(lines) > 1
    lines = lines[1:] if listed else lines
    for line, text in lines:
        if _HEAD.match(text):
            raise ValueError(f"line {line} is {text!r}; keep only the labels, one a line")
        if text.startswith("# ") or (listed and " #" in text):
            raise ValueError(f"line {line}, {text!r}, has a comment or a label; remove '#'")
    dashed = [text.startswith("- ") for _, text in lines]
    if any(dashed) and not all(dashed):
        (one, _), (two, text) = lines[dashed.index(True)], lines[dashed.index(False)]
        raise ValueError(f"line {one} begins with '-', but line {two}, {text!r}, does not; remove '-'")
    if all(dashed):
        return [(line, text[2:].strip()) for line, text in lines]
    if listed and (other := next((pair for pair in lines if not _NUMBER_FIRST.fullmatch(pair[1])), None)):
        raise ValueError(f"line {other[0]}, {other[1]!r}, has neither number nor '-', as lists in YAML have")
    return lines


def _unquoted(name: str) -> str:
    """A label without the quotes of CSV and YAML around it."""
    for quote in ('"', "'"):
        if len(name) > 1 and name[0] == name[-1] == quote:
            return name[1:-1].replace(quote * 2, quote).strip()
    return name


def _from_table(lines: list[str], delimiter: str) -> list[Entry]:
    header, *body = delimited.rows(lines, delimiter)
    words = [_word(cell) for cell in header[1]]
    if not set(words) & {*_INDEX, *_NAME} or any(delimited.whole(word) is not None for word in words):
        return _without_header([header, *body], delimiter)
    delimited.check_width(body, len(words))
    if not body:
        raise ValueError(f"line {header[0]} is a header, and no line follows")
    if twice := next((word for word in words if words.count(word) > 1), None):
        raise ValueError(f"two columns are called {twice!r}; keep one of them")
    return _with_header(words, body)


def _without_header(body: list[delimited.Row], delimiter: str) -> list[Entry]:
    """Labels from one column, or from two of which one counts from 0 or 1."""
    (line, first), width = body[0], len(body[0][1])
    delimited.check_width(body, width, f"line {line}")
    if width == 1:
        return _from_lines([(line, cells[0]) for line, cells in body])
    columns = [[delimited.whole(cells[place]) for _, cells in body] for place in range(width)]
    whole = {place: [n for n in column if n is not None] for place, column in enumerate(columns) if None not in column}
    index = [place for place in whole if _counts(whole[place])] or list(whole)
    if width == 2 and len(index) == 1:
        numbers = whole[index[0]]
        return _in_number_order(
            [_Numbered(line, n, cells[1 - index[0]]) for n, (line, cells) in zip(numbers, body, strict=True)]
        )
    raise ValueError(
        f"line {line} has {width} columns separated by {_SIGNS[delimiter]} ({', '.join(first)}), and no header says "
        "what they are; put 'index' and 'name' above them, or quotes around labels"
    )


def _with_header(words: list[str], body: list[delimited.Row]) -> list[Entry]:
    columns = {word: [cells[place] for _, cells in body] for place, word in enumerate(words)}
    whole = {word: [delimited.whole(cell) for cell in column] for word, column in columns.items()}
    numbers = {word: [n for n in column if n is not None] for word, column in whole.items() if None not in column}
    for word in [word for word in words if word in _INDEX and word not in (*_NAME, *numbers)]:
        at = whole[word].index(None)
        raise ValueError(f"line {body[at][0]}: {word} is {columns[word][at]!r}, not a whole number")
    names = [word for word in words if word not in numbers and word in _NAME]
    index = _index_columns(words, numbers, bool(names))
    ids = [word for word in names if all(map(WORDNET.fullmatch, columns[word]))]
    names = [word for word in names if word not in ids] or ids
    ids = [word for word in ids if word not in names]
    if len(names) != 1 or len({tuple(numbers[word]) for word in index}) > 1:
        both = names if len(names) > 1 else index
        said = " or ".join(f"{word} ({columns[word][0]!r} first)" for word in both)
        raise ValueError(
            f"columns {', '.join(words)}: {said or 'none of them'} could hold the labels; keep index and name"
        )
    labels = [" ".join(parts) for parts in zip(*(columns[word] for word in (*ids[:1], names[0])), strict=True)]
    if not index:
        return [Entry(f"line {line}", label) for (line, _), label in zip(body, labels, strict=True)]
    return _in_number_order(
        [_Numbered(line, n, label) for (line, _), n, label in zip(body, numbers[index[0]], labels, strict=True)]
    )


def _index_columns(words: list[str], numbers: Mapping[str, list[int]], named: bool) -> list[str]:
    """The columns that could number the classes: those called so, and any other that counts from 0 or 1.

    Raises: ValueError for other whole numbers beside the names where no column is called so.
    """
    index = [word for word in words if word in numbers and word in _INDEX]
    others = [word for word in words if word in numbers and word not in _INDEX]
    counting = [word for word in others if _counts(numbers[word])]
    if named and not index and len(counting) < len(others):
        odd = next(word for word in others if word not in counting)
        raise ValueError(
            f"column {odd!r} holds numbers ({numbers[odd][0]} first) that do not count from 0 or 1; "
            "call the numbers of the classes 'index', or remove the column"
        )
    return index + counting
