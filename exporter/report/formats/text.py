"""Reports as a short table of plain text, for a terminal of 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from exporter.report import Report
from exporter.report.answer import answer
from exporter.report.tables import accuracy, latency, name, sentences

WIDTH = 100
COLUMNS = ("artifact", "size", "top-1", "agreement", "p50 ms", "× eager", "")
DROPPED_FIRST = ("size", "agreement", "× eager", "top-1")


def render(reports: Sequence[Report]) -> str:
    """A row for each artifact, then what `bisect` says, and the one to ship. Columns that do not fit are left out."""
    known = answer(reports)
    below = [*sentences(reports), *([known.sentence] if known else [])]
    wrapped = [line for sentence in below for line in ("", *textwrap.wrap(sentence, WIDTH))]
    return "\n".join([*_lines(reports), *wrapped]) + "\n"


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
            cells |= {column: cell for column, cell in named if column in COLUMNS[1:-1]}
    failed = dict.fromkeys(finding.metric for finding in report.findings if not finding.passed)
    doubts = {
        "unsure": any(finding.unsure for finding in report.findings),
        "noisy": (speedup := report.find("speedup")) is not None and speedup.noise,
    }
    verdict = f"fails {', '.join(failed)}".strip() if not report.passed else "passes"
    return cells | {"": ", ".join([verdict, *(word for word, holds in doubts.items() if holds)])}


def _lines(reports: Sequence[Report]) -> list[str]:
    cells = [dict(zip(COLUMNS, COLUMNS, strict=True)), *map(_row, reports)]
    widths = {column: max(len(row[column]) for row in cells) for column in COLUMNS}
    for column in DROPPED_FIRST:
        if sum(widths.values()) + 2 * (len(widths) - 1) > WIDTH:
            del widths[column]
    lines = [
        "  ".join(row[column].rjust(width) if column in COLUMNS[1:-1] else row[column].ljust(width)
                  for column, width in widths.items()).rstrip()
        for row in cells
    ]  # fmt: skip
    return [lines[0], "─" * min(WIDTH, max(map(len, lines))), *lines[1:]]


RENDER = render
