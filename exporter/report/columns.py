"""Chooses the columns that fit a terminal; widths are in terminal cells."""

from __future__ import annotations

from collections.abc import Sequence

DROPPED_FIRST = (
    *("load ms", "of peak", "p90 ms", "p99 ms", "images/s", "95 % interval", "max error", "cosine"),
    *("kept in higher precision", "size", "eager", "setting", "agreement", "× eager", "top-1"),
)  # columns of a table that is wider than the terminal


def fitting(
    columns: Sequence[str], rows: Sequence[Sequence[str]], width: int, wrapped: int | None = None
) -> tuple[list[int], bool]:
    """The columns of a table, by number, without as many of `DROPPED_FIRST` as make it fit the width, and whether it
    does. Two spaces go between columns; the last column takes at most `wrapped` cells if given."""
    widths = column_widths(columns, rows)
    if wrapped is not None:
        widths[-1] = min(widths[-1], wrapped)
    kept = list(range(len(columns)))
    dropped = [columns.index(column) for column in DROPPED_FIRST if column in columns[1:-1]]
    while not (fits := sum(widths[index] + 2 for index in kept) - 2 <= width) and dropped:
        kept.remove(dropped.pop(0))
    return kept, fits


def column_widths(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    """The cells that each column takes in a terminal: a CJK letter takes two, a combining mark none."""
    from rich.cells import cell_len

    return [max(map(cell_len, cells)) for cells in zip(columns, *rows, strict=True)]


def padded(text: str, width: int, right: bool) -> str:
    """The text with spaces, aligned right or left in so many cells of a terminal."""
    from rich.cells import cell_len

    spaces = " " * (width - cell_len(text))
    return spaces + text if right else text + spaces
