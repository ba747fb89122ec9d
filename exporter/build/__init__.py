"""From weights to an artifact: `resolve` validates a recipe, `build` builds it, in every precision."""

from __future__ import annotations

import gc
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from exporter import backends
from exporter.artifact import Artifact, read_sidecar, sidecar_path
from exporter.artifact.sidecar import Sidecar, size_text
from exporter.build import int8, tune
from exporter.build.export import export
from exporter.build.int8.workers import Workers
from exporter.build.resolve import Job as Job
from exporter.build.resolve import check as check
from exporter.build.resolve import check_sources as check_sources
from exporter.build.resolve import read as read
from exporter.build.resolve import resolve as resolve
from exporter.build.resolve import schema as schema
from exporter.build.resolve import target_options as target_options
from exporter.errors import BadRequest
from exporter.model.reference import Reference
from exporter.progress import note, step
from exporter.recipe import Recipe
from exporter.report import Report


@dataclass(frozen=True)
class Built:
    """An artifact, and the report of its build: of quantization, or of an engine's layers; None where there is none."""

    artifact: Artifact
    report: Report | None = None


def build(
    recipe: Recipe,
    out: Path,
    reference: Reference | None = None,
    workers: Workers | None = None,
) -> Built:
    """Build the artifact of a recipe, from the weights to the file that a runtime loads.

    Args:
        recipe: what to build.
        out: the folder to write to.
        reference: the model that the network is compared with; by default the one that the recipe names.
        workers: processes that compute parts of an int8 build; by default this one computes all.

    Raises: ExporterError, with nothing changed on disk.
    """
    job = resolve(recipe, out, reference)
    if job.form == "auto":
        job = job.in_form(tune.fastest(job, _artifact_of))
    for path in job.files:
        _note_replaced(path, job)
    if job.precision.needs_calibration:
        return Built(*int8.build(job, _artifact_of, workers))
    graph = export(job)
    if recipe.precision != "fp32":
        step(f"{recipe.precision} for {recipe.backend}")
    gc.collect()  # networks and graphs have reference cycles; free them before the next is made
    if job.target.lower is not None:
        graph = job.target.lower(graph, recipe.precision, out, recipe.export.keep or ())
        gc.collect()
    artifact = job.target.build(graph, recipe.precision, out, job.options)
    return Built(artifact, _report(job, artifact))


def _note_replaced(path: Path, job: Job) -> None:
    """Note which options of a graph change when an artifact is replaced. `keep` is compared for the job's artifact
    alone, and `form` is not compared for intermediate graphs whose name has the form."""
    if not sidecar_path(path).is_file():
        return
    with suppress(BadRequest):  # an unreadable sidecar names no options to compare
        before, after = _graph_options(read_sidecar(path)), _graph_options(job.sidecar)
        if path == job.files[-1]:
            after["keep"] = list(job.recipe.export.keep or ()) or None
        else:
            same = {"keep"} if job.target.name == backends.ONNX else {"form", "keep"}
            after = {name: value for name, value in after.items() if name not in same}
        changed = [f"{name} {before.get(name)} → {value}" for name, value in after.items() if before.get(name) != value]
        if changed:
            note(f"{path.name} is replaced: {', '.join(changed)}")


def _graph_options(sidecar: Sidecar) -> dict[str, object]:
    """The options of `Export` with which a graph was written, with its input size."""
    options = dict(sidecar.recipe.get("export") or {})
    return options if options.get("imgsz") == "dynamic" else {**options, "imgsz": size_text(sidecar.preprocessing.size)}


def _artifact_of(recipe: Recipe, out: Path) -> Artifact:
    return build(recipe, out).artifact


def _report(job: Job, artifact: Artifact) -> Report | None:
    """What is known of an artifact without running it."""
    findings = job.target.findings(artifact, None) if job.target.findings is not None else []
    if not findings:
        return None
    return Report(
        passed=all(finding.passed for finding in findings),
        recipe=artifact.sidecar.recipe,
        artifact=artifact.to_dict(),
        environment={},
        findings=tuple(findings),
    )
