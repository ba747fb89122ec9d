"""From files of reports, or a history, to a text in a format."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from exporter import discover, report
from exporter.errors import BadRequest
from exporter.git import git
from exporter.report import history
from exporter.report.tables import told_apart

COMMIT_VARIABLES = ("GITHUB_SHA", "CI_COMMIT_SHA")


def rendered(paths: Sequence[Path], form: str) -> tuple[str, list[str]]:
    """The text, and notes about reports that are out of date.

    Raises: BadRequest for files or formats that cannot be used.
    """
    package = "exporter.report.formats"
    render = discover.load(package, form, "RENDER")
    if any(path.suffix == ".jsonl" for path in paths):
        with_trend = [name for name in discover.names(package) if hasattr(discover.module(package, name), "TREND")]
        if form not in with_trend:
            raise BadRequest(f"--format {form}: a history is written as {' or '.join(with_trend)}")
        if len(paths) > 1:
            raise BadRequest("a history is rendered alone; name one .jsonl file")
        if not (entries := history.load(paths[0])):
            raise BadRequest(f"{paths[0]}: no history there; `report REPORT.json --history {paths[0]}` begins one")
        return str(discover.load(package, form, "TREND")(entries)), []
    loaded = [report.load(path) for path in paths]
    stale = [path for path, made in zip(paths, loaded, strict=True) if report.is_stale(made)]
    return str(render(told_apart(loaded))), [
        f"{path}: its artifact was built again since; measure it again" for path in stale
    ]


def remember(paths: Sequence[Path], file: Path, commit: str | None) -> None:
    """Append reports to a history, under a commit: the one that is given, the CI's, or git's HEAD.

    Raises: BadRequest when there is none, or the history is not ours.
    """
    told = commit or next((os.environ[key] for key in COMMIT_VARIABLES if os.environ.get(key)), None)
    told = told or git("rev-parse", "HEAD", failed="--history: which commit is this? say so with --commit")
    history.append(file, [report.load(path) for path in paths], told)
