"""Renders report files, or a history file, as text in one of the formats."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace

from exporter import discover, machine, report
from exporter.artifact.sidecar import Record
from exporter.errors import BadRequest, printable
from exporter.git import git
from exporter.report import Finding, Report, history
from exporter.report.tables import disambiguated, name

R = TypeVar("R", bound=Record)


def rendered(paths: Sequence[Path], form: str) -> tuple[str, list[str]]:
    """Render reports or a history; return the text and notes about outdated reports.

    Raises: BadRequest for files or formats that cannot be used.
    """
    package = "exporter.report.formats"
    render = discover.load(package, form, "RENDER")
    if any(path.suffix == ".jsonl" for path in paths):
        with_trend = [name for name in discover.names(package) if hasattr(discover.module(package, name), "TREND")]
        if form not in with_trend:
            raise BadRequest(f"--format {form}: a history is written as {' or '.join(with_trend)}")
        if len(paths) > 1:
            raise BadRequest("a history cannot be combined with other files; name one .jsonl file")
        if not (entries := history.load(paths[0])):
            raise BadRequest(f"{paths[0]}: no entries; `report REPORT.json --history {paths[0]}` appends one")
        return str(discover.load(package, form, "TREND")([_printable(entry) for entry in entries])), []
    loaded = [(path, one) for path in paths for one in report.load_all(path)]
    return str(render(disambiguated([_judged(_printable(one)) for _, one in loaded]))), [
        f"{path}: {name(one)} was rebuilt after this report; measure it again"
        for path, one in loaded
        if report.is_stale(one)
    ]


def _judged(one: Report) -> Report:
    """The report; one whose verdict contradicts its findings fails, with a finding that says so."""
    failed = dict.fromkeys(finding.metric for finding in one.findings if not finding.passed)
    if one.passed != bool(failed):
        return one
    why = f"marked as passed, but {', '.join(failed)} failed" if failed else "marked as failed, but no finding failed"
    contradiction = Finding(check="report", metric="verdict", value=None, passed=False, detail=f"{why}; measure again")
    return replace(one, passed=False, findings=(*one.findings, contradiction))


def _printable(record: R) -> R:
    """The record with every text in it on one line, without signs that a terminal, a browser or a CI would obey."""
    return msgspec.convert(_without_controls(msgspec.to_builtins(record)), type(record))


def _without_controls(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {_without_controls(key): _without_controls(one) for key, one in value.items()}
    return [_without_controls(one) for one in value] if isinstance(value, list | tuple) else value


def remember(paths: Sequence[Path], file: Path, commit: str | None) -> None:
    """Append reports to a history under a commit: the argument, the variable of the CI, or git's HEAD.

    Raises: BadRequest when no commit is known, or the file is no history of this tool.
    """
    commit = (
        commit
        or machine.ci_commit()
        or git("rev-parse", "HEAD", failed="--history: the commit is not known; give it with --commit")
    )
    history.append(file, disambiguated([one for path in paths for one in report.load_all(path)]), commit)
