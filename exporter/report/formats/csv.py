"""Reports as comma-separated values: a row for each finding, without its samples."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from exporter.delimited import escape_formula
from exporter.report import Report
from exporter.report.tables import name

ARTIFACT = ("variant", "task", "backend", "precision", "sha256")
FINDING = ("check", "metric", "case", "value", "unit", "low", "high", "limit", "passed", "detail", "noise", "setting")


def render(reports: Sequence[Report]) -> str:
    """The header and the rows. An apostrophe is put before cells that a spreadsheet takes for a formula, or a CI for
    a command."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("artifact", *ARTIFACT, "cpu", *FINDING))
    for report in reports:
        about = [name(report), *(report.artifact.get(key, "") for key in ARTIFACT), report.environment.get("cpu", "")]
        for finding in report.findings:
            cells = [*about, *(getattr(finding, key) for key in FINDING)]
            writer.writerow([escape_formula(cell) for cell in cells])
    return out.getvalue()


RENDER = render
