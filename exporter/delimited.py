"""Tables in text files, read so that no line and no cell is lost without a word."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence

Row = tuple[int, list[str]]  # the number of a line and its cells
FORMULA_STARTS = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20", "::")
_WHOLE = re.compile(r"(-?\d{1,9})(?:\.0*)?")


def whole(text: str) -> int | None:
    """The whole number that a cell holds, also as pandas writes it (`1.0`); None for anything else."""
    match = _WHOLE.fullmatch(text)
    return int(match[1]) if match else None


def rows(lines: Sequence[str], delimiter: str, first: int = 1, quoted: bool = True) -> Iterator[Row]:
    """The cells of every line that is not blank, with the number of the line; `first` is that of the first.

    Cells are stripped, and may have quotes around them; with `quoted` false they are as they are.

    Raises: csv.Error, naming the line, for a quote that does not close in its line.
    """
    if quoted:
        reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=True)
    else:
        reader = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE)
    last = 0
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise csv.Error(f"line {first + last}: {error}; close every quote in its line") from None
        if reader.line_num > last + 1:
            raise csv.Error(f"line {first + last}: a quote does not close; close every quote in its line")
        last = reader.line_num
        if any(cell.strip() for cell in cells) or len(cells) > 1:
            yield first + last - 1, [cell.strip() for cell in cells] if quoted else cells


def check_width(body: Iterable[Row], width: int, head: str = "the header") -> None:
    """Refuse rows with more cells than the header, or with fewer.

    Raises: csv.Error, naming the line.
    """
    for line, cells in body:
        if len(cells) != width:
            raise csv.Error(f"line {line} has {len(cells)} cells: another number of columns than the {width} of {head}")


def escape_formula(cell: object) -> object:
    """A cell with an apostrophe before it if a spreadsheet would take it for a formula, or a CI for a command."""
    return f"'{cell}" if isinstance(cell, str) and cell.lstrip().startswith(FORMULA_STARTS) else cell
