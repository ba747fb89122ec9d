"""Writes what a search chose: the artifact, its report, its recipe, and a page with everything that was tried."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec.structs import replace

from exporter import artifact as artifacts
from exporter import backends, build, report
from exporter.artifact import Artifact
from exporter.artifact.disk import write_file
from exporter.bench import latency
from exporter.build.int8.work import prepare
from exporter.errors import CheckFailed, some
from exporter.optimize import tables
from exporter.optimize.candidates import Candidate
from exporter.optimize.result import Result, Row
from exporter.progress import note, step
from exporter.recipe import Bench, CpuClass, Recipe, file
from exporter.report import Finding, Report
from exporter.report.formats import html
from exporter.verify import record_quality

if TYPE_CHECKING:
    from exporter.optimize.search import Search

PAGE = "optimize.html"
DETAILS = "optimize.json"


def publish(search: Search, result: Result, out: Path, seconds: float) -> tuple[Result, Report]:
    """Write the artifact that a search chose, and everything about it.

    Raises: CheckFailed where the artifact is not the one that was measured.
    """
    row = result.winner
    candidate = Candidate(backend=row.backend, precision=row.precision, form=row.form, scope=row.scope)
    step(f"writing {candidate}")
    measured = search.builder.artifact(candidate)
    artifact = _artifact(search, measured, row, out)
    if artifact.sidecar.sha256 != measured.sidecar.sha256:
        raise CheckFailed(
            f"{artifact.path}: another build of the same recipe gave other bytes than those that were measured "
            f"({measured.path}); run the search again"
        )
    written = _report(search, artifact, candidate, result)
    result = replace(result, passed=written.passed)  # its checks are also judged on the inputs that it was timed with
    record_quality(artifact, written)
    recipe = artifact.path.with_name(f"{artifact.path.name}.yaml")
    result = replace(
        result,
        artifact=str(artifact.path),
        recipe=str(recipe),
        sha256=artifact.sidecar.sha256,
        seconds=round(seconds, 1),
    )
    if missing := search.not_built_here():
        note(
            f"{some(missing)}: could not be built on this machine (no space on the disk, or a package is missing); run "
            "the same command again to try it"
        )
    else:
        search.store.write("report", written)
        search.store.write("result", result)
    write_about(search, result, written, artifact)
    return result, written


def write_about(search: Search, result: Result, written: Report, artifact: Artifact) -> None:
    """Write the report, the recipe, the details and the page of a search."""
    out, row = artifact.path.parent, result.winner
    report.save(written, artifact.path.with_name(f"{artifact.path.name}.report.json"))
    recipe = _recipe(search, row, artifact)
    file.save(recipe, out / Path(result.recipe).name, backends.target(row.backend).options)
    write_file(out / DETAILS, msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    write_file(out / PAGE, page(result, written).encode())


def _artifact(search: Search, measured: Artifact, row: Row, out: Path) -> Artifact:
    """The chosen artifact in the folder of the result: built again, or copied where a build gives other bytes each
    time."""
    if not backends.target(row.backend).reproducible:
        return _copy(measured, search, out)
    recipe = search.request.recipe(row.backend, row.precision, row.form, row.scope)
    if not row.scope:
        return build.build(recipe, out).artifact
    with tempfile.TemporaryDirectory(prefix="convnext-export-optimize-") as folder:
        return prepare(build.resolve(recipe, out), Path(folder)).make(row.kept, out)  # what int8 keeps is known


def _copy(measured: Artifact, search: Search, out: Path) -> Artifact:
    sidecar = replace(
        measured.sidecar, weights=search.job.sidecar.weights, files=(), sha256="", bytes=0, quality={}, seal=""
    )

    def copy(target: Path) -> None:
        for path in measured.files:
            shutil.copyfile(path, target.parent / path.name)

    return artifacts.publish(out / measured.path.name, sidecar, copy)


def _recipe(search: Search, row: Row, artifact: Artifact) -> Recipe:
    """The recipe that builds, verifies and times the same artifact."""
    request, options, quantization = search.request, search.request.options, search.request.quantization
    recipe = request.recipe(row.backend, row.precision, row.form, row.scope)
    checks = replace(recipe.checks, data=quantization.data or quantization.calib, device=_device(search))
    if quantization.max_drop is not None:
        limits = search.verifying
        checks = replace(checks, max_drop=limits.max_drop, min_agreement=limits.min_agreement)
    bench = Bench(threads=row.threads, batch=(options.batch,), hint=row.hint or "latency", device=_device(search))
    if recipe.quantization is not None and artifact.sidecar.quantization is not None:
        # The class of CPUs in place of `this`; no speed test, because the search timed the artifact.
        cpu = msgspec.convert(artifact.sidecar.quantization.cpu, CpuClass)
        recipe = replace(recipe, quantization=replace(recipe.quantization, cpu=cpu, even_if_slower=True))
    return replace(recipe, checks=checks, bench=bench)


def _device(search: Search) -> str | None:
    device = search.request.options.device
    return None if device == "cpu" else device


def _report(search: Search, artifact: Artifact, candidate: Candidate, result: Result) -> Report:
    """The verification of the chosen artifact with its timing and the search."""
    verified, runner = search.reports[candidate], search.last.runner
    arm = runner.timing.arm(list(search.last.runs)[result.chosen])
    tried = float(sum(row.state != "not tried" for row in result.rows))
    searched = Finding(check="optimize", metric="tried", value=tried, detail=result.certainty, passed=result.passed)
    findings = (*verified.findings, *latency.findings_of(runner.timing, arm, artifact), searched)
    whole = Report(
        passed=all(one.passed for one in findings),
        recipe={**verified.recipe, "optimize": msgspec.to_builtins(search.request)},
        artifact=artifact.to_dict(),
        environment=verified.environment,
        findings=findings,
        pictures=verified.pictures,
        differences=verified.differences,
    )
    return msgspec.convert(msgspec.to_builtins(whole), Report)  # as it is read again: counts are floats


def page(result: Result, written: Report) -> str:
    """The page with everything that was tried."""
    chart = tables.chart(result)
    return html.page(
        "convnext-export optimize",
        verdict="passes" if result.passed else f"fails: {result.winner.reason or 'a check did not pass'}",
        lead=[f"{tables.sentence(result)}.", tables.FRONT],
        tables=[tables.tried(result)],
        charts=[html.chart("Accuracy by latency", chart)] if chart else [],
        environments=html.environments([written]),
    )
