"""Reports as a Markdown table, one row per artifact."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from exporter.report import Report

COLUMNS = ("artifact", "runs on", "size", "top-1", "eager", "agreement", "cosine", "max error", "")


def render(reports: Sequence[Report]) -> str:
    """A table of what `verify` found, and where."""
    rows = [_row(report) for report in reports]
    lines = [_line(COLUMNS), "|---|---|" + "--:|" * 6 + "---|", *map(_line, rows)]
    return "\n".join([*lines, "", _footer(reports)]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _row(report: Report) -> tuple[str, ...]:
    name = Path(str(report.artifact.get("path", "?"))).name
    precision = report.environment.get("session", {})
    where = f"{report.artifact.get('backend', '?')} {report.artifact.get('precision', '?')}"
    arithmetic = precision.get("arithmetic") if isinstance(precision, dict) else None
    if arithmetic and arithmetic != report.artifact.get("precision"):
        where += f", computed in {arithmetic}"
    bad = [finding.metric for finding in report.findings if not finding.passed]
    return (
        _escape(name),
        _escape(where),
        f"{(report.value('bytes') or 0) / 1e6:.2f} MB",
        _number(report.value("top1"), "{:.2f} %"),
        _number(report.value("top1_eager"), "{:.2f} %"),
        _number(report.value("top1_agreement"), "{:.2f} %"),
        _number(report.value("cosine"), "{:.7f}"),
        _number(report.value("max_abs"), "{:.2g}"),
        "passes" if report.passed else f"**fails** {', '.join(bad)}",
    )


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


# Names come from files and labels: no table, link, tag or emphasis may come out of them.
_SIGNS = {ord(sign): f"&#{ord(sign)};" for sign in "\\`|<>[]&*"} | {ord("\n"): " "}


def _escape(text: str) -> str:
    return text.translate(_SIGNS)


def _footer(reports: Sequence[Report]) -> str:
    """The data and the machines, each said once."""
    lines = {f"Images: {_escape(_data(report))}. Machine: {_machine(report)}." for report in reports}
    return "\n\n".join(sorted(lines))


def _data(report: Report) -> str:
    return next((finding.detail for finding in report.findings if finding.metric == "images"), "none")


def _machine(report: Report) -> str:
    versions = report.environment.get("versions")
    versions = versions if isinstance(versions, dict) else {}
    tools = [f"{tool} {versions[tool]}" for tool in ("torch", "onnxruntime", "openvino") if tool in versions]
    return _escape("; ".join([str(report.environment.get("cpu", "?")), ", ".join(tools)]))


RENDER = render
