"""Reports as a short table of plain text, for a terminal of 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from exporter.report import Report
from exporter.report.answer import answer, caveats
from exporter.report.columns import column_widths, fitting, padded
from exporter.report.tables import accuracy, accuracy_cells, doubts, failed_metrics, latency, name, sentences

WIDTH = 100
COLUMNS = ("artifact", "size", "top-1", "agreement", "p50 ms", "× eager", "")
RIGHT = COLUMNS[1:-1]


def render(reports: Sequence[Report]) -> str:
    """A row for each artifact, then what `bisect` says, and the one to ship. Columns that do not fit are left out."""
    known = answer(reports)
    below = [line for sentence in sentences(reports) for line in ("", sentence)]  # whole, as they may hold a command
    lines = [*([known.sentence] if known else []), *caveats(reports)]
    below += [part for line in lines for part in ("", *textwrap.wrap(line, WIDTH))]
    return "\n".join([*_lines(reports), *below]) + "\n"


def _row(report: Report) -> dict[str, str]:
    """The cells of one report by column, of the first batch that was timed."""
    label = name(report)
    label = (
        f"./{label}" if label.startswith((":", "#")) else label
    )  # at the start of a line, a CI would take it for a command
    cells = dict.fromkeys(COLUMNS, "–") | {"artifact": label}
    for table in (accuracy([report]), latency([report])):
        for row in [row for row in table.rows if row[0] == name(report)][:1]:
            named = zip(table.columns, row, strict=True)
            cells |= {column: cell for column, cell in named if column in RIGHT}
    cells["top-1"] = accuracy_cells(report)[1]  # or mAP, or mIoU, as it says
    verdict = "passes" if report.passed else f"fails {', '.join(failed_metrics(report.findings))}".strip()
    return cells | {"": ", ".join([verdict, *doubts(report.findings)])}


def _lines(reports: Sequence[Report]) -> list[str]:
    rows = [tuple(_row(report).values()) for report in reports]
    kept, _ = fitting(COLUMNS, rows, WIDTH)
    widths = column_widths(COLUMNS, rows)
    lines = [
        "  ".join(padded(row[index], widths[index], COLUMNS[index] in RIGHT) for index in kept).rstrip()
        for row in (COLUMNS, *rows)
    ]
    total = sum(widths[index] + 2 for index in kept) - 2
    return [lines[0], "─" * min(WIDTH, total), *lines[1:]]


RENDER = render
