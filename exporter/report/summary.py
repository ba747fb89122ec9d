"""The tables of a page: verdicts as chips, a fact that all rows share once above its table, and no empty columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from exporter.report import Finding, Report
from exporter.report.tables import (
    Table,
    accuracy_cells,
    bisections,
    changes,
    data,
    doubts,
    failed_metrics,
    int8,
    latency,
    latency_cells,
    machine,
    metric,
    name,
    noise_of,
    number,
    regressions,
    runs_on,
    sensitivity,
    setting,
)

SHARED = ("artifact", "setting", "batch", "calibrated on", "baseline", "case", "eager", "machine", "runs on")
"""Columns that become a line above the table if all rows have the same cell."""
EMPTY = ("", "–")


@dataclass(frozen=True)
class Chip:
    """A short verdict, with a sign for readers who cannot tell its colour."""

    text: str
    kind: Literal["good", "bad", "unsure", "noisy", "changed"]

    @property
    def sign(self) -> str:
        """One character for the kind."""
        return {"good": "✓", "bad": "✗", "unsure": "?", "noisy": "~", "changed": "≠"}[self.kind]


Cell = str | tuple[Chip, ...]


@dataclass(frozen=True)
class View:
    """A table as a page shows it; `shared` has the columns that became a line above it, with their cell."""

    title: str
    columns: tuple[str, ...]
    right: tuple[str, ...]
    rows: Sequence[tuple[Cell, ...]]
    shared: tuple[tuple[str, str], ...] = ()


def view(table: Table, chips: Sequence[tuple[Chip, ...]] | None = None) -> View:
    """The table without empty columns and without those that all rows share.

    Args:
        table: a column without title is the verdict in words, and is dropped.
        chips: the verdict of each row; without them the table gets no such column.
    """
    dropped = {""}
    shared: list[tuple[str, str]] = []
    for index, column in enumerate(table.columns):
        cells = {row[index] for row in table.rows if row[index] not in EMPTY}
        if not cells:
            dropped.add(column)
        elif column in SHARED and len(cells) == 1 and len(table.rows) > 1:
            dropped.add(column)
            shared.append((column, cells.pop()))
    kept = [index for index, column in enumerate(table.columns) if column not in dropped]
    columns = tuple(table.columns[index] for index in kept)
    rows: list[tuple[Cell, ...]] = [tuple(row[index] for index in kept) for row in table.rows]
    if chips is not None:
        columns = (columns[0], "verdict", *columns[1:])
        rows = [(row[0], verdict, *row[1:]) for row, verdict in zip(rows, chips, strict=True)]
    return View(table.title, columns, tuple(one for one in table.right if one not in dropped), rows, tuple(shared))


def chips(findings: Sequence[Finding]) -> tuple[Chip, ...]:
    """A chip for each metric that failed, else one that everything passes; then doubt and noise."""
    failed = tuple(Chip(f"fails {one}", "bad") for one in failed_metrics(findings))
    passes = Chip("passes", "good") if all(finding.passed for finding in findings) else Chip("fails", "bad")
    return (*(failed or (passes,)), *(Chip(word, word) for word in doubts(findings)))


def _is_unsure(finding: Finding) -> bool:
    return finding.passed and finding.unsure and finding.check != "regression"


def views(reports: Sequence[Report]) -> list[View]:
    """The tables at the top of the page: regressions, artifacts, int8."""
    shown = [
        (regressions(reports), [_change_chips(change) for _, change in changes(reports)]),
        _artifacts([report for report in reports if _is_measured(report)]),
        (int8(reports), None),
    ]
    return [view(table, verdicts) for table, verdicts in shown if table.rows]


def appendix(reports: Sequence[Report]) -> list[View]:
    """The tables at the end of the page: the errors of `bisect`, all percentiles and batches, and sensitivity."""
    return [view(table) for table in (bisections(reports), latency(reports), sensitivity(reports)) if table.rows]


def _change_chips(change: Finding) -> tuple[Chip, ...]:
    first = Chip("passes", "good") if change.passed else Chip("regressed", "bad")
    return (first, *(Chip(word, word) for word in doubts([change])))


def _is_measured(report: Report) -> bool:
    """Whether the report has accuracy or latency of its own, not only changes from a base or errors of parts."""
    other = ("regression", "blocks", "bisect", "report")
    return any(finding.check not in other for finding in report.findings)


def _artifacts(reports: Sequence[Report]) -> tuple[Table, list[tuple[Chip, ...]]]:
    """A row for each artifact, with the latency of its first case, and its verdict; the fastest that passes first."""
    reports = sorted(reports, key=lambda report: (not report.passed, report.value("p50_ms") or math.inf))
    accuracy = ("size", "top-1", "eager", "agreement", "cosine", "max error")
    columns = ("artifact", "runs on", *accuracy, "batch", "p50 ms", "p99 ms", "images/s", "× eager (95 %)")
    rows = [(name(report), runs_on(report), *accuracy_cells(report), *_timing(report)) for report in reports]
    verdicts = [chips([f for f in report.findings if f.check != "regression"]) for report in reports]
    return Table("Artifacts", columns, columns[2:], rows), verdicts


def _timing(report: Report) -> tuple[str, ...]:
    """Batch, median and 99th percentile, images per second, and the speed-up with its interval."""
    p50 = report.find("p50_ms")
    if p50 is None:
        return ("–",) * 5
    median, _, p99, throughput, speedup, interval, *_ = latency_cells(report, p50.case)
    return (
        p50.case.removeprefix("batch "),
        median,
        p99,
        throughput,
        f"{speedup} ({interval})" if interval else speedup,
    )


def failures(reports: Sequence[Report]) -> list[str]:
    """A line for each failed check, with its value, limit and detail, except those that the table of changes or
    `tables.sentences` has."""
    return [
        f"{name(report)} fails {metric(finding)} {finding.case}".rstrip() + f": {number(finding)} {_limit(finding)}"
        for report in reports
        for finding in report.findings
        if not finding.passed and finding.check not in ("regression", "report") and finding.metric != "reason"
    ]


def _limit(finding: Finding) -> str:
    limit = "" if finding.limit is None else f"(limit {finding.limit:.4g})"
    return f"{finding.unit} {limit}".strip() + (f"; {finding.remarks}" if finding.remarks else "")


def facts(reports: Sequence[Report]) -> list[tuple[str, str]]:
    """What holds for the whole page: machine, commit, images, setting of the timing, doubts, noise.

    Each text stands once, with its artifacts where there are several texts.
    """
    known: list[tuple[str, list[tuple[str, str]]]] = [
        ("machine", [(name(report), machine(report)) for report in reports]),
        ("commit", [(name(report), str(report.environment.get("commit") or "")) for report in reports]),
        ("images", [(name(report), data(report)) for report in reports]),
        ("timed on", [(name(report), _setting(report)) for report in reports]),
        ("unsure", [(name(report), f.metric) for report in reports for f in report.findings if _is_unsure(f)]),
        ("noise", [(name(report), noise) for report in reports for noise in _noises(report)]),
    ]
    return [(label, line) for label, texts in known for line in _once(texts)]


def _once(texts: Sequence[tuple[str, str]]) -> list[str]:
    holders: dict[str, dict[str, None]] = {}
    for artifact, text in texts:
        if text:
            holders.setdefault(text, {})[artifact] = None
    return [f"{text} ({', '.join(names)})" if len(holders) > 1 else text for text, names in holders.items()]


def _setting(report: Report) -> str:
    p50 = report.find("p50_ms")
    return setting(report, p50) if p50 else ""


def _noises(report: Report) -> list[str]:
    return list(dict.fromkeys(filter(None, (noise_of(finding).removeprefix("noisy: ") for finding in report.findings))))
