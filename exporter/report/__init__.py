"""Findings, which hold measured numbers, and reports, which hold the findings about one artifact on one machine.

Checks create findings. `judged` is the only place that compares a number with its limit. `tables` and `formats` turn
reports into text.
"""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from exporter import precision
from exporter.artifact import read_sidecar, refuse_sidecar, sidecar_path
from exporter.artifact.disk import write_file
from exporter.artifact.sidecar import Record, schema_of
from exporter.errors import BadRequest, printable
from exporter.progress import note

SCHEMA = 1
MOST_DIFFERENCES = 12  # images of `Report.differences`, and of an artifact on the page
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
MAX_REPORT_BYTES = 512 * 2**20


class Finding(Record, frozen=True):
    """One measured number, with its check, its limit and its raw samples.

    `case` distinguishes numbers of one metric ("batch 8"). `launches` is the number of samples of each process that
    timed the model, in order; `noise` says why a ratio of times is uncertain, `setting` names the device, threads and
    hint that were timed. `unit` is "%" for percentages (70.6, not 0.706), "ms" for times. `low` and `high` are the ends
    of a 95 % interval. A finding without a limit always passes. A value that is not finite is None and passes no limit.
    `unsure` is whether it passes with a warning: its interval reaches beyond the limit
    for significance.
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
    noise: str = ""
    setting: str = ""
    unsure: bool = False

    @property
    def remarks(self) -> str:
        """The detail, with noise and setting unless it names them, for tables without columns for those."""
        others = [text for text in (self.noise, self.setting) if text and text not in self.detail]
        return "; ".join(filter(None, [self.detail, *others]))

    @property
    def text(self) -> str:
        """The value, the limit and the remarks."""
        value = "no number" if self.value is None else f"{self.value:.6g} {self.unit}".strip()
        limit = "" if self.limit is None else f", limit {self.limit:.6g}"
        return f"{value}{limit}" + (f": {self.remarks}" if self.remarks else "")

    @property
    def interval(self) -> tuple[float, float] | None:
        """Both ends of the 95 % interval, or None."""
        return None if self.low is None or self.high is None else (self.low, self.high)


class Picture(Record, frozen=True):
    """An image whose classes of pixels were compared with a reference (`reference` says with what), with the share of
    equal ones in percent, and three PNG in base64: the reference, the artifact, and where they differ."""

    name: str
    reference: str
    agreement: float
    images: tuple[str, str, str]


class Prediction(Record, frozen=True):
    """A class or label by its number, its name where that is known, and its probability, from 0 to 1."""

    index: int
    name: str = ""
    probability: float | None = None


class Difference(Record, frozen=True):
    """An image with the answers of the reference and of the artifact.

    changed: whether the class is another one, or a label was set or removed.
    probability_change: |p_artifact − p_reference| of the reference's class, 0 to 1; of several labels, of the one that
        changed most; None where a probability is not finite.
    labels: the true classes; None where they are not known.
    thumbnail: a JPEG in base64 of the image as the network takes it, "" where there is none.
    """

    image: str
    reference: Prediction
    artifact: Prediction
    changed: bool
    probability_change: float | None = None
    labels: tuple[Prediction, ...] | None = None
    thumbnail: str = ""


class Report(Record, frozen=True):
    """All findings about one artifact, with its recipe and the machine; `pictures` of segmentation. `differences` has
    the images whose answers differ most, the first one most; None where answers were not compared."""

    passed: bool
    recipe: dict[str, Any]
    artifact: dict[str, Any]
    environment: dict[str, Any]
    findings: tuple[Finding, ...]
    schema: int = SCHEMA
    pictures: tuple[Picture, ...] = ()
    differences: tuple[Difference, ...] | None = None

    def value(self, metric: str) -> float | None:
        """The value of a metric, or None when it was not measured."""
        finding = self.find(metric)
        return finding.value if finding else None

    def find(self, metric: str, case: str | None = None) -> Finding | None:
        """The first finding of a metric and, if given, of a case. Findings of `compare` are not searched."""
        known = (f for f in self.findings if f.metric == metric and f.check != "regression")
        return next((f for f in known if case in (None, f.case)), None)

    @property
    def failures(self) -> str:
        """The findings beyond their limits, in words."""
        beyond = [one for one in self.findings if not one.passed and one.limit is not None]
        values = ["is no number" if one.value is None else f"{one.value:.6g}, limit {one.limit:g}" for one in beyond]
        return "; ".join(f"{one.metric} {value}" for one, value in zip(beyond, values, strict=True))


def judged(finding: Finding, limit: float, better: Literal["low", "high"]) -> Finding:
    """The finding with a limit. If `better` is "low" the value may not exceed it, if "high" it may not be below it."""
    value = finding.value
    passed = value is not None and (value <= limit if better == "low" else value >= limit)
    return msgspec.structs.replace(finding, limit=limit, passed=passed)


def number(value: float) -> float | None:
    """The value if it is finite, else None."""
    return float(value) if math.isfinite(value) else None


def schema() -> dict[str, Any]:
    """The JSON schema of a report; a comparison is one too."""
    return schema_of(Report, "convnext-export report")


def encode(report: Report) -> bytes:
    """The report as indented JSON; a list of numbers is one line, however long."""
    # Only lists have line breaks here: JSON escapes those in texts.
    text = msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n"
    return re.sub(rb"\[\n\s*([-+.\deE,\s]+?)\n\s*\]", lambda match: b"[" + b"".join(match[1].split()) + b"]", text)


def save(report: Report, path: Path) -> None:
    """Write a report atomically."""
    write_file(path, encode(report))


def load(path: Path) -> Report:
    """Read a report.

    Raises: BadRequest as `load_all` does, and for a list of several.
    """
    reports = load_all(path)
    if len(reports) > 1:
        raise BadRequest(f"{path}: a list of {len(reports)} reports, expected one")
    return reports[0]


def load_all(path: Path) -> list[Report]:
    """Read a report, a document that has one as `report`, or a list of them: all that commands print with `--json`.

    Raises: BadRequest for a file that is missing, truncated, no report or of another schema, for a list without a
        report, and for an artifact in an unknown precision.
    """
    if not path.is_file():
        raise BadRequest(f"{path}: no such report; `convnext-export verify ARTIFACT` writes one")
    refuse_sidecar(path)
    if path.stat().st_size > MAX_REPORT_BYTES:
        raise BadRequest(f"{path}: {path.stat().st_size} bytes, more than a report of this tool has")
    content = path.read_bytes()
    try:
        if content.startswith(UTF16):  # as PowerShell redirects
            content = content.decode("utf-16").encode()
        content = content.removeprefix(codecs.BOM_UTF8)
        known = msgspec.json.decode(content, type=list[dict[str, Any]] | dict[str, Any])
        listed = _reports_in(known if isinstance(known, list) else [known], path)
        schemas = [one.get("schema") for one in listed]
        if other := [schema for schema in schemas if schema != SCHEMA]:
            raise BadRequest(
                f"{path}: report of schema {str(other[0])[:40]}, this version reads {SCHEMA}; measure again"
            )
        reports = [msgspec.convert(one, Report) for one in listed]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"{path}: not a report of this tool, or truncated ({error}); measure again") from None
    if not reports:
        raise BadRequest(f"{path}: no report in it; measure again")
    for report in reports:
        if "precision" in report.artifact:  # a report of `compare` may have none
            precision.get(str(report.artifact["precision"])[:40], path)
    return reports


def _reports_in(documents: list[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """The reports among JSON objects; that of a recipe which failed is None.

    Raises: BadRequest for an object that is no report and has none.
    """
    for document in documents:
        if not {"report", "schema"} & set(document):
            keys = printable(", ".join(document)[:80]) or "no key"
            raise BadRequest(
                f"{path}: an object with {keys}, expected a report, as `verify`, `bench`, `compare` and `run` print "
                "it with --json; give the output of one of these"
            )
        if document.get("report") is None and document.get("error"):
            failure = printable(f"{document.get('recipe')}: {document['error']}"[:200])
            note(f"{path}: no report of a recipe that failed, {failure}")
        elif not isinstance(document.get("report", {}), dict | None):
            raise BadRequest(f"{path}: `report` holds no report; give the output of a command as it was printed")
    reports = [document.get("report", document) for document in documents]
    return [report for report in reports if report is not None]


def gpu_of(report: Report) -> str:
    """The name of the NVIDIA GPU that something was timed on, or nothing."""
    gpu = report.environment.get("gpu_before")
    return str(gpu.get("name", "")) if isinstance(gpu, dict) else ""


def images_of(report: Report) -> str:
    """The digest of the images that a report was verified on, with their classes, or ""."""
    verified = report.recipe.get("verify")
    return str(verified.get("images") or "") if isinstance(verified, dict) else ""


def machine_of(report: Report) -> tuple[object, ...]:
    """The facts that identify a machine: processor, instruction sets, cores, system."""
    facts = report.environment
    isa = facts.get("isa")
    system = str(facts.get("system", "?")).split(" ")
    return facts.get("cpu"), tuple(isa) if isinstance(isa, list) else (), facts.get("cores"), system[0]


def of_one_machine(reports: Sequence[Report]) -> bool:
    """Whether reports are of the same machine, and those of GPUs of the same GPU."""
    gpus = {gpu for report in reports if (gpu := gpu_of(report))}
    return all(machine_of(report) == machine_of(reports[0]) for report in reports) and len(gpus) <= 1


OF_A_TIMING = ("gpu_before", "gpu_after", "timing", "session")
"""Facts of the environment that a new timing replaces."""
OF_A_VERIFICATION = {
    "accuracy",
    "blocks",
    "data",
    "multilabel",
    "neighbours",
    "parity",
    "sanity",
    "segmentation",
    "structure",
    "values",
}
"""Checks of `verify`, whose findings belong to one set of images."""


def save_merged(report: Report, path: Path) -> Report:
    """Write a report, merged with the file at `path` if that is of the same artifact, machine and versions; return the
    result.

    The old file keeps its findings of checks that the new report does not have; of a new verification only those of
    the build and of latency, so that no report mixes the images of two verifications. If it is of another artifact,
    machine or version of a recorded package, it is replaced.
    """
    try:
        old = load(path) if path.exists() else None
    except BadRequest:
        old = None
    if old and _origin(old) == _origin(report):
        new = {finding.check for finding in report.findings}
        kept = tuple(finding for finding in old.findings if finding.check not in new)
        if "verify" in report.recipe:
            kept = tuple(finding for finding in kept if finding.check not in OF_A_VERIFICATION)
        before = {
            key: value for key, value in old.environment.items() if key not in OF_A_TIMING or "latency" not in new
        }
        report = msgspec.structs.replace(
            report,
            passed=report.passed and all(finding.passed for finding in kept),
            recipe={**old.recipe, **report.recipe},
            environment={**before, **report.environment},
            findings=(*kept, *report.findings),
            pictures=report.pictures or (() if "verify" in report.recipe else old.pictures),
            differences=report.differences if "verify" in report.recipe else old.differences,
        )
    save(report, path)
    return report


def _origin(report: Report) -> tuple[object, ...]:
    """What two reports must share to be merged: the artifact, the machine, and the versions of what ran."""
    return report.artifact.get("sha256"), machine_of(report), report.environment.get("versions")


def is_stale(report: Report) -> bool:
    """Whether the artifact was rebuilt after the report."""
    path = Path(str(report.artifact.get("path") or "?"))
    try:
        if not sidecar_path(path).is_file():
            return False
        return read_sidecar(path).sha256 != report.artifact.get("sha256")
    except BadRequest:
        return True
    except OSError:  # a name that no file here can have
        return False
