"""Writes what a search chose: the artifact, its report, its recipe, and a page with everything that was tried."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec.structs import replace

from exporter import backends, build, report
from exporter.artifact import Artifact
from exporter.artifact.disk import write_file
from exporter.bench import latency
from exporter.build.int8.work import prepare
from exporter.errors import CheckFailed
from exporter.optimize import tables
from exporter.optimize.candidates import Candidate
from exporter.optimize.result import Result, Row
from exporter.progress import step
from exporter.recipe import SYNTHETIC, Bench, Recipe, file
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
    recipe = search.request.recipe(row.backend, row.precision, row.form, row.scope)
    artifact = _build(recipe, row, out)
    if artifact.sidecar.sha256 != measured.sidecar.sha256:
        raise CheckFailed(
            f"{artifact.path}: another build of the same recipe gave other bytes than those that were measured "
            f"({measured.path}); run the search again"
        )
    written = _report(search, artifact, candidate, result)
    record_quality(artifact, written)
    report.save(written, artifact.path.with_name(f"{artifact.path.name}.report.json"))
    path = artifact.path.with_suffix(".yaml")
    file.save(_recipe(search, recipe, row), path, backends.target(row.backend).options)
    result = replace(
        result, artifact=str(artifact.path), recipe=str(path), sha256=artifact.sidecar.sha256, seconds=round(seconds, 1)
    )
    write_file(out / DETAILS, msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    write_file(out / PAGE, page(result, written).encode())
    search.store.write("report", written)
    search.store.write("result", result)
    return result, written


def _build(recipe: Recipe, row: Row, out: Path) -> Artifact:
    """Build the chosen artifact in the folder of the result; what int8 keeps is known."""
    if row.scope:
        return prepare(build.resolve(recipe, out), out).make(row.kept, out)
    return build.build(recipe, out).artifact


def _recipe(search: Search, recipe: Recipe, row: Row) -> Recipe:
    """The recipe that builds, verifies and times the same artifact."""
    options, quantization = search.request.options, search.request.quantization
    budget = {"max_drop": quantization.max_drop} if search.samples.labelled and quantization.data is not None else {}
    checks = replace(recipe.checks, data=quantization.data or SYNTHETIC, device=_device(search), **budget)
    bench = Bench(threads=row.threads, batch=(options.batch,), hint=row.hint or "latency", device=_device(search))
    return replace(recipe, checks=checks, bench=bench)


def _device(search: Search) -> str | None:
    device = search.request.options.device
    return None if device == "cpu" else device


def _report(search: Search, artifact: Artifact, candidate: Candidate, result: Result) -> Report:
    """The verification of the chosen artifact with its timing and the search."""
    verified = search.reports[candidate]
    timing = search.last.runner.timing
    arm = timing.arm(list(search.last.runs)[result.chosen])
    findings = (
        *verified.findings,
        *latency.findings_of(timing, arm, artifact),
        Finding(
            check="optimize", metric="tried", value=float(sum(row.state != "not tried" for row in result.rows)),
            detail=result.certainty, passed=result.passed,
        ),
    )  # fmt: skip
    return Report(
        passed=all(one.passed for one in findings),
        recipe={**verified.recipe, "optimize": msgspec.to_builtins(search.request)},
        artifact=artifact.to_dict(),
        environment=verified.environment,
        findings=findings,
    )


def page(result: Result, written: Report) -> str:
    """The page with everything that was tried."""
    chart = tables.chart(result)
    return html.page(
        "convnext-export optimize",
        verdict="passes" if result.passed else f"fails: {result.winner.reason or 'a check did not pass'}",
        lead=[tables.sentence(result)],
        tables=[tables.tried(result)],
        charts=[html.chart("Accuracy by latency", chart)] if chart else [],
        environments=html.environments([written]),
    )
