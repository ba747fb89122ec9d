"""Quantization to INT8 and FP8: the artifact that keeps its accuracy, and a report of what it loses and gains."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec

from exporter.artifact import Artifact
from exporter.artifact.outputs import DENSE
from exporter.build.int8 import probe, speed
from exporter.build.int8.search import Candidate, Judge, Search, judging, open_data, search, sensitivities
from exporter.build.int8.work import Work, prepare
from exporter.build.int8.workers import Workers
from exporter.build.resolve import Job, resolve
from exporter.data.calibration import usual_size
from exporter.data.samples import is_synthetic
from exporter.errors import ExporterError, StoppedAfterBuild, Unavailable, first_line
from exporter.progress import note, step
from exporter.recipe import Recipe
from exporter.report import Finding, Report
from exporter.verify import record_quality

Build = Callable[[Recipe, Path], Artifact]


def build(job: Job, build_recipe: Build, workers: Workers | None = None) -> tuple[Artifact, Report]:
    """Build the artifact that stays within its budget with the fewest parts in higher precision.

    Args:
        job: of precision int8 or fp8.
        build_recipe: builds the artifact of another recipe, for the next higher precision.
        workers: processes that compute parts of the build; by default this one computes all.

    Returns: the artifact, and its report, which passes where the budget and the limits of the precision hold. If no
        candidate passes, the artifact is the one that loses least.

    Raises: CheckFailed where it would be slower on this machine (`probe`); other ExporterErrors. Nothing is written
        before the search has ended.
    """
    with tempfile.TemporaryDirectory(prefix="convnext-export-int8-") as temporary:
        folder = Path(temporary)
        data = open_data(job)  # before the calibration, which takes long
        probe.refuse_slower(job, folder / "probe")
        work = prepare(job, folder, workers)
        with judging(work, folder, data, workers) as judge:
            result = search(work, judge, partial(sensitivities, work), job.recipe.export.keep or ())
            cost = _cost_of_synthetic(work, result.best, judge, folder, workers) if _has_real_data(work) else []
        if workers is not None:
            workers.close()
        best = result.best.artifact
        layers = job.runtime.layers(best, job.runtime.options()) if job.runtime.layers is not None else []
        baseline = speed.baseline(work, build_recipe, folder)
        artifact = work.make(result.best.kept, job.out)
        record_quality(artifact, result.best.report)  # an interrupt of the timing leaves the artifact
        step(f"{artifact.path} is written")
        try:
            timed = speed.time(work, result, baseline, folder)
        except KeyboardInterrupt:
            note(f"{artifact.path} is complete; convnext-export bench times it")
            raise StoppedAfterBuild from None
        speeds = speed.findings(timed, result, layers)
        static = job.target.findings(artifact, baseline) if job.target.findings is not None else []
    return artifact, _report(artifact, result, [*speeds, *static, *_calibration(work), *cost])


def _has_real_data(work: Work) -> bool:
    """Whether calibration on synthetic images can be compared with calibration on real ones."""
    data = work.quantization.data
    return work.images.synthetic and data is not None and not is_synthetic(data)


def _cost_of_synthetic(
    work: Work, best: Candidate, judge: Judge, folder: Path, workers: Workers | None
) -> list[Finding]:
    """The loss from calibrating on synthetic images instead of the user's data, with the same parts quantized.

    The data may be unfit for calibration (duplicates, a manifest without digests); then the loss is unknown.
    """
    check = work.job.recipe.precision
    step("calibrating on real images too, to measure what synthetic ones cost")
    quantization = msgspec.structs.replace(work.quantization, calib=str(work.quantization.data), calib_size=None)
    recipe = msgspec.structs.replace(work.job.recipe, quantization=quantization)
    try:
        real = prepare(resolve(recipe, folder), folder, workers)
        other = judge(real, best.kept)
    except ExporterError as error:
        if workers is not None and isinstance(error, Unavailable):
            raise
        detail = f"not measured: {first_line(error)}"
        return [Finding(check=check, metric="synthetic_cost", value=None, detail=detail)]
    images = f"{real.images.total} of {quantization.calib}"
    detail = f"{best.loss:.2f} points lost, {other.loss:.2f} when calibrated on {images}"
    return [Finding(check=check, metric="synthetic_cost", value=best.loss - other.loss, unit="points", detail=detail)]


def _calibration(work: Work) -> list[Finding]:
    images, quantization = work.images, work.quantization
    source = "synthetic images (dead leaves), no photographs" if images.synthetic else f"of {images.source}"
    enough = usual_size(images.synthetic, work.sidecar.task in DENSE)
    few = f"; {enough} or more are better" if images.total < enough else ""
    method = f"{quantization.calib_method}, smoothing {quantization.smoothing:g}"
    has_others = images.synthetic or quantization.data is not None
    same = "" if has_others else "; the loss is measured on the same images, give others with --data"
    detail = f"{source}{few}{same}; {method}, bias correction {quantization.bias_correction}"
    check = work.job.recipe.precision
    return [Finding(check=check, metric="calibration", value=images.total, unit="images", detail=detail)]


def _report(artifact: Artifact, result: Search, first: list[Finding]) -> Report:
    judged = result.best.report
    return msgspec.structs.replace(judged, artifact=artifact.to_dict(), findings=(*first, *judged.findings))
