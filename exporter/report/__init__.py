"""What was measured: findings, and the report that keeps them with the machine they came from.

A check measures and makes findings; `Finding.judged` holds the only comparison with a limit; words and tables
are made elsewhere. The modules of this folder are the formats of `convnext-export report`.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Literal

import msgspec

from exporter import precision
from exporter.artifact import read_sidecar, sidecar_path
from exporter.artifact.disk import write_file
from exporter.artifact.sidecar import Record
from exporter.errors import BadRequest

SCHEMA = 1
MAX_REPORT_BYTES = 512 * 2**20


class Finding(Record, frozen=True):
    """One number: which check measured what, the limit it was judged by, and the raw samples behind it.

    `case` tells numbers of one metric apart ("batch 8"). `launches` says how many of the samples belong to each
    opening of the model, in order. `unit` is "%" for percentages (70.6, not 0.706), "ms" for times. `low` and `high`
    are the ends of a 95 % interval. A finding without a limit informs and always passes; a value that is no number
    (NaN, Inf) is None and passes no limit.
    """

    check: str
    metric: str
    value: float | None
    unit: str = ""
    limit: float | None = None
    passed: bool = True
    detail: str = ""
    low: float | None = None
    high: float | None = None
    samples: tuple[float, ...] = ()
    case: str = ""
    launches: tuple[int, ...] = ()

    @property
    def interval(self) -> tuple[float, float] | None:
        """Both ends of the 95 % interval, or None."""
        return None if self.low is None or self.high is None else (self.low, self.high)


class Report(Record, frozen=True):
    """All findings about one artifact, with what it was built from and where it was measured."""

    passed: bool
    recipe: dict[str, Any]
    artifact: dict[str, Any]
    environment: dict[str, Any]
    findings: tuple[Finding, ...]
    schema: int = SCHEMA

    def value(self, metric: str) -> float | None:
        """The value of a metric, or None when it was not measured."""
        found = self.find(metric)
        return found.value if found else None

    def find(self, metric: str, case: str | None = None) -> Finding | None:
        """The finding of a metric: of this case, or the first there is. What `compare` says of it is another thing."""
        known = (f for f in self.findings if f.metric == metric and f.check != "regression")
        return next((f for f in known if case in (None, f.case)), None)


def judged(finding: Finding, limit: float, better: Literal["low", "high"]) -> Finding:
    """The finding with a limit: its value must not be above it (`low` is better) or below it (`high`)."""
    value = finding.value
    passed = value is not None and (value <= limit if better == "low" else value >= limit)
    return msgspec.structs.replace(finding, limit=limit, passed=passed)


def number(value: float) -> float | None:
    """The value if it is finite, else None."""
    return float(value) if math.isfinite(value) else None


def encode(report: Report) -> bytes:
    """The report as JSON for people: a list of numbers, however long, is one line."""
    text = msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n"
    return re.sub(rb"\[\s+([-+.\deE,\s]+?)\s+\]", lambda found: b"[" + b"".join(found[1].split()) + b"]", text)


def save(report: Report, path: Path) -> None:
    """Write `report.json` in one step."""
    write_file(path, encode(report))


def load(path: Path) -> Report:
    """Read a report.

    Raises: BadRequest for a file that is missing, no report, truncated or of another schema, or of an artifact in a
        precision that this version does not know.
    """
    if not path.is_file():
        raise BadRequest(f"{path}: no such report; `convnext-export verify ARTIFACT` writes one")
    if path.stat().st_size > MAX_REPORT_BYTES:
        raise BadRequest(f"{path}: {path.stat().st_size} bytes is no report of ours")
    content = path.read_bytes()
    try:
        schema = msgspec.json.decode(content, type=dict[str, Any]).get("schema")
        if schema != SCHEMA:
            raise BadRequest(f"{path}: report of schema {schema}, this version reads {SCHEMA}; measure again")
        report = msgspec.json.decode(content, type=Report)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"{path}: no report of ours, or truncated ({error}); measure again") from None
    if "precision" in report.artifact:  # a report of `compare` may speak of none
        precision.get(str(report.artifact["precision"])[:40], path)
    return report


def machine_of(report: Report) -> tuple[object, ...]:
    """What makes a machine another: processor, instruction sets, cores, system."""
    facts = report.environment
    isa = facts.get("isa")
    system = str(facts.get("system", "?")).split(" ")
    return facts.get("cpu"), tuple(isa) if isinstance(isa, list) else (), facts.get("cores"), system[0]


def save_merged(report: Report, path: Path) -> Report:
    """Write a report beside what other checks found of the same artifact on the same machine, and give the whole.

    Findings of the checks that the report has itself are replaced; those of another artifact or machine go.
    """
    try:
        old = load(path) if path.exists() else None
    except BadRequest:
        old = None
    if old and old.artifact.get("sha256") == report.artifact.get("sha256") and machine_of(old) == machine_of(report):
        new = {finding.check for finding in report.findings}
        kept = tuple(finding for finding in old.findings if finding.check not in new)
        report = msgspec.structs.replace(
            report,
            passed=report.passed and all(finding.passed for finding in kept),
            recipe={**old.recipe, **report.recipe},
            environment={**old.environment, **report.environment},
            findings=(*kept, *report.findings),
        )
    save(report, path)
    return report


def is_stale(report: Report) -> bool:
    """Whether the artifact that a report speaks of has been built again since."""
    path = Path(str(report.artifact.get("path", "")))
    if not sidecar_path(path).is_file():
        return False
    try:
        return read_sidecar(path).sha256 != report.artifact.get("sha256")
    except BadRequest:
        return True
