"""Reports as GitHub workflow commands: printed in a step, each becomes an annotation of the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from exporter.report import Finding, Report
from exporter.report.tables import metric, name, not_faster


def render(reports: Sequence[Report]) -> str:
    """A line for each annotation: an error for a failed finding, a warning for a noisy or unsure one or for int8 that
    is not faster, and a notice for each report that passes."""
    return "".join(f"{line}\n" for report in reports for line in _lines(report))


def _lines(report: Report) -> Iterator[str]:
    for finding in report.findings:
        title = f"{name(report)}: {metric(finding)}" + (f", {finding.case}" if finding.case else "")
        if not finding.passed:
            yield _command("error", title, finding.text)
        elif finding.unsure or not_faster(finding) or _is_noisy(finding):
            yield _command("warning", title, finding.text)
    if report.passed:
        judged = sum(finding.limit is not None for finding in report.findings)
        yield _command("notice", name(report), f"all {judged} checks passed")


def _is_noisy(finding: Finding) -> bool:
    """Whether a ratio is uncertain; the times that it is computed from get none of their own."""
    is_ratio = finding.unit == "×" or finding.check == "regression"
    return (is_ratio and finding.noise != "") or "noisy" in finding.detail or "noise of" in finding.detail


def _command(kind: str, title: str, message: str) -> str:
    """One command; `%`, line ends and, in a property, `:` and `,` are written as GitHub decodes them."""
    return f"::{kind} title={_data(title).replace(':', '%3A').replace(',', '%2C')}::{_data(message)}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


RENDER = render
