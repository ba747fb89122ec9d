"""Reports as one self-contained HTML page: no request, whole without its script, light or dark as the reader's system.

The page allows only its own script, by the script's hash, so that a browser runs no other one.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from exporter.report import Report, charts
from exporter.report.answer import Answer, answer, caveats
from exporter.report.drawable import drawable
from exporter.report.gallery import gallery
from exporter.report.history import Entry, series, step_table, steps
from exporter.report.summary import appendix, facts, failures, view, views
from exporter.report.tables import Table, is_comparison, name, warnings

TEMPLATE = Path(__file__).with_name("page.html.j2")
SCRIPT = Path(__file__).with_name("page.js")


class Chart(NamedTuple):
    """A heading and an SVG."""

    title: str
    svg: Any


def render(reports: Sequence[Report]) -> str:
    """The page."""
    judged = [report for report in reports if not is_comparison(report)]
    bad = dict.fromkeys(name(report) for report in judged if not report.passed)
    cases = dict.fromkeys(f.case for r in reports for f in r.findings if f.metric == "p50_ms" and f.samples)
    shown = list(map(drawable, reports))
    drawn = [chart("Change from the base", charts.changes(shown))]
    drawn += [chart("Accuracy by latency", charts.accuracy_against_latency(shown))]
    drawn += [chart(f"Accuracy loss of int8 by latency, {name(r)}", charts.tried(r)) for r in shown]
    drawn += [chart("Error of each block", charts.blocks(shown))]
    drawn += [chart(f"Latency of every run, {case}", charts.distributions(shown, case)) for case in cases]
    return page(
        "convnext-export report",
        answer=answer(reports),
        verdict=f"fails: {', '.join(bad)}" if bad else None if len(judged) < len(reports) else "passes",
        lead=[*failures(reports), *warnings(reports), *caveats(reports)],
        facts=facts(reports),
        tables=views(reports),
        appendix=[*appendix(reports), *_blocks(reports)],
        charts=[one for one in drawn if one.svg],
        gallery=gallery(reports),
        masks=[(name(report), report.pictures) for report in reports if report.pictures],
        environments=environments(reports),
        provenance=[(name(report), _provenance(report)) for report in reports],
    )


def chart(title: str, svg: str) -> Chart:
    """A chart whose SVG is put into the page without escaping."""
    from markupsafe import Markup

    return Chart(title, Markup(svg))


def page(title: str, verdict: str | None = None, **parts: Any) -> str:
    """The template with its parts; whatever comes from a file is escaped."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    lists = ("lead", "facts", "tables", "appendix", "charts", "masks", "environments", "provenance")
    blank: dict[str, Any] = {"answer": None, "gallery": None, **{key: [] for key in lists}}
    for key in ("tables", "appendix"):
        parts[key] = [view(one) if isinstance(one, Table) else one for one in parts.get(key, [])]
    script = SCRIPT.read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(TEMPLATE.read_text("utf-8"))
    return template.render(title=title, verdict=verdict, script=Markup(script), digest=digest, **(blank | parts))


def _blocks(reports: Sequence[Report]) -> list[Table]:
    """Error and precision of every block, a column for each artifact."""
    known = [(r, {f.case: f for f in r.findings if f.metric == "block_error"}) for r in reports]
    known = [(r, found) for r, found in known if found]
    columns = ("block", *(name(report) for report, _ in known))
    cases = dict.fromkeys(case for _, found in known for case in found)
    rows = [(case, *(_block(found.get(case)) for _, found in known)) for case in cases]
    return [Table("Error and precision of each block", columns, columns[1:], rows)] if rows else []


def _block(finding: Any) -> str:
    if finding is None:
        return "–"
    value = "NaN" if finding.value is None else f"{finding.value:.2g}"
    return f"{value} · {finding.detail}" if finding.detail else value


def environments(reports: Sequence[Report]) -> list[list[tuple[str, str]]]:
    """The facts of each machine, once. Facts of a session or of its timing belong to the artifact."""
    own = ("session", "timing", "gpu_before", "gpu_after")
    facts = [tuple(_facts({k: v for k, v in r.environment.items() if k not in own})) for r in reports]
    return [list(one) for one in dict.fromkeys(facts)]


def _provenance(report: Report) -> list[tuple[str, str]]:
    wanted = ("path", "sha256", "bytes", "backend", "precision", "variant", "task", "weights", "parents", "versions")
    known = {key: report.artifact[key] for key in wanted if key in report.artifact}
    session: dict[str, Any] = {
        key: report.environment[key] for key in ("session", "timing") if key in report.environment
    }
    return _facts({**known, **session, "recipe": report.recipe})


def _facts(values: dict[str, Any]) -> list[tuple[str, str]]:
    return [(key.replace("_", " "), _words(value)) for key, value in values.items() if value not in (None, "", [], {})]


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(one)}" for key, one in value.items() if one is not None)
    if isinstance(value, list | tuple):
        return ", ".join(map(_words, value))
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def render_trend(entries: Sequence[Entry]) -> str:
    """The page of a history: the charts of series with a step first, then the others."""
    known = [(one, steps(one)) for one in series(entries) if len(one.entries) > 1]
    known.sort(key=lambda pair: not pair[1])
    machines = dict.fromkeys(one.machine for one, _ in known)
    suffix = {machine: f" ({machine})" if len(machines) > 1 else "" for machine in machines}
    table = step_table(entries if any(found for _, found in known) else [])  # looks for the steps once more
    return page(
        "convnext-export trend",
        answer=_trend(entries, table),
        facts=[] if table.rows else [("machine", machine) for machine in machines],
        tables=[table] if table.rows else [],
        charts=[
            chart(f"{one.artifact}: {one.title}{suffix[one.machine]}", charts.trend(one, found)) for one, found in known
        ],
    )


def _trend(entries: Sequence[Entry], table: Table) -> Answer:
    """How many steps the history has, and the latest, with its commit."""
    commits = f"{len({entry.commit for entry in entries})} commits"
    if not table.rows:
        return Answer(f"No step in {commits}.", None, ())
    commit, time, artifact, metric, before, after, change, _ = table.rows[0]
    latest = f"at commit {commit} ({time}): {artifact}, {metric}, {before} → {after} ({change})"
    count = f"{len(table.rows)} step{'s' if len(table.rows) > 1 else ''}"
    return Answer(f"{count} in {commits}, the latest {latest}.", None, ())


RENDER = render
TREND = render_trend
