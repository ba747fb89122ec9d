"""Reports and series with numbers that a chart can draw. An axis of matplotlib overflows long before a float does."""

from __future__ import annotations

from msgspec.structs import replace

from exporter.report import Finding, Report

LARGEST, SMALLEST = 1e15, 1e-15  # no measured value is near these bounds


def drawable(report: Report) -> Report:
    """The report with every number of its findings as `bounded`."""
    return replace(report, findings=tuple(map(_finding, report.findings)))


def bounded(value: float) -> float:
    """The value, at most ±1e15; below ±1e-15 it is 0."""
    return max(-LARGEST, min(LARGEST, value)) if abs(value) >= SMALLEST else 0.0


def _finding(finding: Finding) -> Finding:
    value, low, high, limit = (
        None if one is None else bounded(one) for one in (finding.value, finding.low, finding.high, finding.limit)
    )
    samples = tuple(map(bounded, finding.samples))
    return replace(finding, value=value, low=low, high=high, limit=limit, samples=samples)
