"""The history of metrics by commit, one JSON line for each report, and detection of steps.

Lines are only appended. Numbers of two machines or two artifacts are never in one series.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import msgspec
import numpy as np

from exporter.artifact.disk import locked, write_file
from exporter.artifact.sidecar import Record
from exporter.errors import BadRequest
from exporter.report import Report, gpu_of, images_of, machine_of
from exporter.report.tables import Table, name

SCHEMA = 1
METRICS = (
    *("speedup", "p50_ms", "p99_ms", "throughput_ips", "top1", "top1_agreement", "map", "label_agreement"),
    *("miou", "pixel_agreement", "neighbour_agreement", "cosine", "r2", "bytes"),
)
OF_IMAGES = METRICS[4:-1]
MAX_BYTES = 256 * 2**20
LEAST_SEGMENT = 3  # commits on either side of a step
LEAST_STEP_PCT = 1.0


class Entry(Record, frozen=True):
    """The values of one report at one commit. Keys of `values` are `metric` or `metric, case`. `settings` has the same
    keys. It holds the setting of each value: device, threads and hint of a time, the images of an accuracy."""

    commit: str
    time: str
    artifact: str
    machine: str
    values: dict[str, float]
    settings: dict[str, str] = msgspec.field(default_factory=dict)
    schema: int = SCHEMA


@dataclass(frozen=True)
class Step:
    """A step of a series: the first commit of the new level, and the medians before and after."""

    artifact: str
    machine: str
    metric: str
    commit: str
    time: str
    before: float
    after: float

    @property
    def change_pct(self) -> float:
        """The change in percent of the level before."""
        return 100 * (self.after / self.before - 1)


@dataclass(frozen=True)
class Series:
    """One metric of one artifact on one machine, ordered by commit."""

    artifact: str
    machine: str
    metric: str
    entries: tuple[Entry, ...]
    setting: str = ""

    @property
    def values(self) -> list[float]:
        """The metric at each commit."""
        return [entry.values[self.metric] for entry in self.entries]

    @property
    def title(self) -> str:
        """The metric; followed by the setting if the metric was measured in several settings."""
        return f"{self.metric} ({self.setting})" if self.setting else self.metric


def append(path: Path, reports: Sequence[Report], commit: str) -> None:
    """Add a line for each report.

    Raises: BadRequest when the file is no history of this tool.
    """
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    try:
        moment = datetime.fromtimestamp(int(epoch), timezone.utc) if epoch.isdecimal() else datetime.now(timezone.utc)
    except (ValueError, OverflowError, OSError):
        raise BadRequest(f"SOURCE_DATE_EPOCH={epoch}: not a time; expected seconds since 1970") from None
    now = moment.isoformat(timespec="seconds")
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent):
        before = path.read_bytes() if path.exists() else b""
        load(path)
        if before and not before.endswith(b"\n"):  # an editor may take the last line break off
            before += b"\n"
        lines = b"".join(msgspec.json.encode(_entry(report, commit, now)) + b"\n" for report in reports)
        write_file(path, before + lines)


def _entry(report: Report, commit: str, now: str) -> Entry:
    findings = {
        f"{f.metric}, {f.case}" if f.case else f.metric: f
        for f in report.findings
        if f.metric in METRICS and f.check != "regression" and f.value is not None
    }
    values = {key: finding.value for key, finding in findings.items() if finding.value is not None}
    images = images_of(report)[:12]
    settings = {
        key: setting
        for key, one in findings.items()
        if (setting := one.setting or (f"images {images}" if images and one.metric in OF_IMAGES else ""))
    }
    machine = ", ".join(
        str(fact) for fact in (*machine_of(report), gpu_of(report)) if fact and isinstance(fact, str | int)
    )
    return Entry(commit=commit, time=now, artifact=name(report), machine=machine, values=values, settings=settings)


def load(path: Path) -> list[Entry]:
    """Read every line of a history.

    Raises: BadRequest for a line that is no entry of this tool, with its number.
    """
    if not path.exists():
        return []
    if path.stat().st_size > MAX_BYTES:
        raise BadRequest(f"{path}: {path.stat().st_size} bytes, more than a history of this tool has")
    entries = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            entry = msgspec.json.decode(line, type=Entry)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadRequest(f"{path}, line {number}: not an entry of a history ({error}); remove the line") from None
        if entry.schema != SCHEMA:
            raise BadRequest(f"{path}, line {number}: schema {entry.schema}, this version reads {SCHEMA}")
        entries.append(entry)
    return entries


def series(entries: Sequence[Entry]) -> list[Series]:
    """Every metric of every artifact on every machine in every setting, in the order of the lines. Lines of earlier
    versions have no setting: where all others have the same, it is taken for theirs too."""
    grouped: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in entries:
        for metric in entry.values:
            grouped.setdefault((entry.artifact, entry.machine, metric), []).append(entry)
    every = []
    for key, members in grouped.items():
        settings = dict.fromkeys(entry.settings.get(key[2], "") for entry in members)
        if len(settings.keys() - {""}) <= 1:
            every.append(Series(*key, tuple(members)))
            continue
        for setting in settings:
            same = tuple(entry for entry in members if entry.settings.get(key[2], "") == setting)
            every.append(Series(*key, same, setting or "not stated"))
    return every


def steps(one: Series) -> list[Step]:
    """The commits at which the level of a series changed.

    Change points by PELT on the logarithms (Killick, Fearnhead and Eckley, "Optimal detection of changepoints with a
    linear computational cost", 2012), the penalty being 3 ln(n) times the variance of the noise, which is taken from
    successive differences, since a step changes only one of them. Steps below 1 % or three times the noise are dropped.
    """
    from ruptures import Pelt

    values = one.values
    if len(values) < 2 * LEAST_SEGMENT or min(values) <= 0:
        return []
    logs = np.log(values)
    differences = np.diff(logs)
    noise = max(float(np.median(np.abs(differences - np.median(differences)))) * 1.4826 / np.sqrt(2), 1e-6)
    breaks = Pelt(model="l2", min_size=LEAST_SEGMENT, jump=1).fit(logs).predict(3 * np.log(len(logs)) * noise**2)
    edges = [0, *breaks]
    result = []
    for start, middle, end in zip(edges, edges[1:], edges[2:], strict=False):
        before, after = np.median(logs[start:middle]), np.median(logs[middle:end])
        if abs(after - before) > max(LEAST_STEP_PCT / 100, 3 * noise):
            at, levels = one.entries[middle], (float(np.exp(before)), float(np.exp(after)))
            result.append(Step(one.artifact, one.machine, one.title, at.commit, at.time, *levels))
    return result


def step_table(entries: Sequence[Entry]) -> Table:
    """A row for each step, the latest first."""
    columns = ("commit", "since", "artifact", "metric", "before", "after", "change", "machine")
    found = sorted((step for one in series(entries) for step in steps(one)), key=lambda step: step.time, reverse=True)
    rows = [
        (
            step.commit[:12],
            step.time[:16].replace("T", " "),
            step.artifact,
            step.metric,
            f"{step.before:.4g}",
            f"{step.after:.4g}",
            f"{step.change_pct:+.1f} %",
            step.machine,
        )
        for step in found
    ]
    return Table("Steps", columns, columns[4:7], rows)
