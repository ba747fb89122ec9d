"""Reports as Markdown tables, for a pull request or a step summary."""

from __future__ import annotations

from collections.abc import Sequence

from exporter.report import Report
from exporter.report.answer import answer, caveats
from exporter.report.gallery import first_changed
from exporter.report.history import Entry, step_table
from exporter.report.tables import Table, data, machine, tables, warnings


def render(reports: Sequence[Report]) -> str:
    """All tables with rows, the image that differs most, and the machines. Tables have titles if there are several."""
    shown = tables(reports)
    parts = [_table(table, len(shown) > 1) for table in shown]
    lead = [f"{_escape(line)}\n" for line in (*warnings(reports), *caveats(reports))]
    images = [f"{_escape(line)}\n" for line in first_changed(reports)]
    return "\n".join([*_answer(reports), *lead, *parts, *images, _footer(reports)]) + "\n"


def _answer(reports: Sequence[Report]) -> list[str]:
    """The answer, and for several reports a line for each of the others."""
    known = answer(reports)
    if known is None:
        return []
    return [
        f"**{_escape(known.sentence)}**\n",
        *(f"* {_escape(line)}" for line in known.others),
        *([""] if known.others else []),
    ]


def _table(table: Table, titled: bool) -> str:
    marks = ["--:" if column in table.right else "---" for column in table.columns]
    lines = [_line(table.columns), f"|{'|'.join(marks)}|", *(_line(map(_escape, row)) for row in table.rows), ""]
    return "\n".join([f"**{table.title}**\n", *lines] if titled else lines)


def _line(cells: Sequence[str] | map[str]) -> str:
    return "| " + " | ".join(cells) + " |"


# Names come from files and labels, so their markup is escaped, and GitHub's mentions and formulas.
_SIGNS = {ord(sign): f"&#{ord(sign)};" for sign in "\\`|<>[]&*~@$"} | dict.fromkeys(map(ord, "\n\r"), " ")


def _escape(text: str) -> str:
    """The text with its markup escaped, except the bold words of this tool at the start."""
    for word in ("**fails**", "**regressed**"):
        if text.startswith(word):
            return word + _escape(text.removeprefix(word))
    return text.translate(_SIGNS).replace("::", "&#58;:")  # at the start of a line it would be a command of a CI


def _footer(reports: Sequence[Report]) -> str:
    """The data and the machines, each once."""
    lines = []
    for report in reports:
        images = f"Images: {_escape(data(report))}. " if data(report) else ""
        lines.append(f"{images}Machine: {_escape(machine(report))}.")
    return "\n\n".join(sorted(set(lines)))


def render_trend(entries: Sequence[Entry]) -> str:
    """The table of steps of a history."""
    table = step_table(entries)
    return _table(table, False) if table.rows else "No step in this history.\n"


RENDER = render
TREND = render_trend
