"""Limits of latency and of the speed-up over PyTorch."""

from __future__ import annotations

import msgspec

from exporter.recipe import Bench
from exporter.report import Finding, Report, judged


def with_limits(report: Report, limits: Bench) -> Report:
    """The report with the limits of latency applied. A speed-up that was not measured is below every limit."""
    findings = tuple(_limited(finding, limits) for finding in (*report.findings, *_without_speedup(report, limits)))
    return msgspec.structs.replace(report, findings=findings, passed=all(finding.passed for finding in findings))


def without_timing(limits: Bench, reason: str) -> list[Finding]:
    """A finding without a value for each limit of a recipe that cannot be timed on this machine."""
    limited = {"speedup": (limits.min_speedup, "×"), "p50_ms": (limits.max_p50_ms, "ms")}
    return [
        Finding(check="latency", metric=metric, value=None, unit=unit, detail=reason)
        for metric, (limit, unit) in limited.items()
        if limit is not None
    ]


def _without_speedup(report: Report, limits: Bench) -> list[Finding]:
    """A finding without a value for each timed case that lacks a limited speed-up."""
    times = [one for one in report.findings if one.check == "latency" and one.metric == "p50_ms"]
    timed = [one.case for one in times if one.value is not None]
    missing = [case for case in timed if report.find("speedup", case) is None]
    return [
        Finding(check="latency", metric="speedup", case=case, value=None, unit="×", detail=_reason(report, case))
        for case in (missing if limits.min_speedup is not None else [])
    ]


def _reason(report: Report, case: str) -> str:
    """Why a case has no speed-up over PyTorch."""
    eager = report.find("eager_p50_ms", case)
    if eager is None:
        return "PyTorch was not timed"
    return "timed in too few processes" if eager.value is not None else f"PyTorch could not be timed: {eager.detail}"


def _limited(finding: Finding, limits: Bench) -> Finding:
    if finding.check == "latency" and finding.metric == "speedup" and limits.min_speedup is not None:
        return judged(finding, limits.min_speedup, "high")
    if finding.check == "latency" and finding.metric == "p50_ms" and limits.max_p50_ms is not None:
        return judged(finding, limits.max_p50_ms, "low")
    return finding
