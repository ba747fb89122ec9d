"""INT8 and FP8, from a recipe to an artifact and a report that says what it costs, what it gains, and why."""

from __future__ import annotations

import tempfile
from pathlib import Path

import msgspec

from exporter import backends
from exporter.artifact import Artifact
from exporter.bench import Opener, worker
from exporter.build import pipeline
from exporter.build.int8 import gain
from exporter.build.int8.budget import Budget as Budget
from exporter.build.int8.budget import Choice, Judge, Search, judging, search
from exporter.build.int8.work import Work, check_form, placement_of, prepare
from exporter.data.calibration import SIZE
from exporter.data.samples import is_synthetic
from exporter.errors import BadRequest, ExporterError, first_line
from exporter.progress import step
from exporter.recipe import Recipe
from exporter.report import Finding, Report

DEFAULT = Budget()


def build(
    recipe: Recipe, out: Path, budget: Budget = DEFAULT, opener: Opener = worker.open_arm
) -> tuple[Artifact, Report]:
    """Build the int8 or fp8 artifact that holds the budget with the fewest parts kept back.

    Args:
        recipe: what to build; its precision is int8 or fp8.
        out: the folder to write to.
        budget: what it may lose, and on which images.
        opener: opens a model, in the timing process.

    Returns: the artifact, and its report: passed when the budget and the limits of int8 hold. If no choice holds, the
        artifact is the best that was found.

    Raises: ExporterError, with nothing changed on disk.
    """
    check(recipe, budget)
    backend = backends.get(recipe.backend)
    backend.probe()
    backend.check(recipe.precision, pipeline.batch_of(recipe), pipeline.target_of(recipe))
    with tempfile.TemporaryDirectory(prefix="convnext-export-int8-") as temporary:
        folder = Path(temporary)
        work = prepare(recipe, out, folder)
        with judging(work, budget, folder) as judge:
            found = search(work, judge, lambda: _harms(work))
            cost = _cost_of_synthetic(work, budget, found.best, judge) if _is_to_be_costed(work, budget) else []
        layers = backend.layers(found.best.artifact, backend.options())
        rival = gain.rival(work, folder)
        timed = gain.time(work, found, rival, folder, opener)
        first = gain.findings(timed, found, layers)
        made = work.make(found.best.kept, out)
        looked = backend.findings(made, rival)
    report = _report(made, found, [*first, *looked, *_calibration(work), *cost])
    pipeline.record_quality(made, report)
    return made, report


def check(recipe: Recipe, budget: Budget) -> None:
    """Refuse what can be seen to be wrong without reading anything.

    Raises: BadRequest.
    """
    pipeline.check_precision(recipe)
    check_form(recipe, placement_of(recipe))
    if recipe.precision == "fp8" and recipe.calib_method not in ("minmax", "percentile"):
        raise BadRequest(
            f"--calib-method {recipe.calib_method}: it is for int8's equal steps; fp8 takes minmax or percentile"
        )
    if budget.max_drop is not None and not 0 <= budget.max_drop <= 100:
        raise BadRequest(f"--max-drop {budget.max_drop:g}: expected percentage points from 0 to 100")
    budget.on(budget.data or recipe.calib, recipe.weights)
    if not 0 <= recipe.smoothing <= 1:
        raise BadRequest(f"--smoothing {recipe.smoothing:g}: expected a share from 0 (none) to 1")


def _harms(work: Work) -> dict[str, float]:
    from exporter.quantize import simulation

    return simulation.harms(work.network.model, work.plan, work.images)


def _is_to_be_costed(work: Work, budget: Budget) -> bool:
    return work.images.synthetic and budget.data is not None and not is_synthetic(budget.data)


def _cost_of_synthetic(work: Work, budget: Budget, best: Choice, judge: Judge) -> list[Finding]:
    """What synthetic images cost against real ones: the same choice, calibrated on the user's own data.

    What can be measured on may not do for calibrating (duplicates, a manifest without digests): then it is not known.
    """
    about = work.recipe.precision
    step("calibrating on real images too, to see what synthetic ones cost")
    recipe = msgspec.structs.replace(work.recipe, calib=str(budget.data), calib_size=None)
    try:
        with tempfile.TemporaryDirectory(prefix="convnext-export-int8-") as folder:
            real = prepare(recipe, Path(folder), Path(folder))
            other = judge(real, best.kept)
    except ExporterError as error:
        return [Finding(check=about, metric="synthetic_cost", value=None, detail=f"not known: {first_line(error)}")]
    detail = f"{best.loss:.2f} points lost, {other.loss:.2f} when calibrated on {real.images.total} of {budget.data}"
    return [Finding(check=about, metric="synthetic_cost", value=best.loss - other.loss, unit="points", detail=detail)]


def _calibration(work: Work) -> list[Finding]:
    images = work.images
    what = "images made from seeds (dead leaves), no photographs" if images.synthetic else f"of {images.source}"
    few = f"; {SIZE} or more are better" if images.total < SIZE else ""
    recipe = work.recipe
    how = f"{recipe.calib_method}, smoothing {recipe.smoothing:g}, bias correction {recipe.bias_correction}"
    detail = f"{what}{few}; {how}"
    return [Finding(check=recipe.precision, metric="calibration", value=images.total, unit="images", detail=detail)]


def _report(made: Artifact, found: Search, first: list[Finding]) -> Report:
    judged = found.best.report
    return msgspec.structs.replace(judged, artifact=made.to_dict(), findings=(*first, *judged.findings))
