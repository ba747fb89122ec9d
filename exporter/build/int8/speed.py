"""The speed of a quantized artifact against the next higher precision and PyTorch, timed in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import exp, log
from pathlib import Path
from statistics import median

import msgspec

from exporter.artifact import Artifact
from exporter.backends import NARROW, Layer
from exporter.bench import Timing, batches_of, flat, latency
from exporter.build.int8.search import Candidate, Search
from exporter.build.int8.work import Work
from exporter.errors import ExporterError, first_line, some
from exporter.progress import note
from exporter.recipe import Bench, Recipe
from exporter.report import Finding
from exporter.report.tables import NO_VERDICT
from exporter.stats import center, percent

SECONDS_EACH = 3.0  # of timing, for every model
MOST_ALONE = 6  # parts that are timed with each of them alone in higher precision


class Timed:
    """The candidates, the baseline and PyTorch, timed in turn in one run."""

    def __init__(self, work: Work, search: Search, baseline: Artifact, folder: Path) -> None:
        self.above, self.baseline = baseline.sidecar.precision, baseline
        recipe = work.job.recipe
        first, more = _first(search), _kept_by_search(search)
        self.alone = {
            part: work.make((*first.kept, part), folder / f"alone-{part}")
            for part in (more if 1 < len(more) <= MOST_ALONE else ())
        }
        artifacts = [self.baseline, *(candidate.artifact for candidate in search.tried), *self.alone.values()]
        setting = recipe.bench or Bench()
        options = latency.BenchOptions(
            duration=SECONDS_EACH * (1 + len(artifacts)), weights=recipe.model.weights,
            threads=setting.threads, hint=setting.hint, device=setting.device,
        )  # fmt: skip
        self.batch = batches_of(options, artifacts)[0]
        arms = latency.arms_of(artifacts, options)
        # Only latencies are used here, and the candidates were verified before.
        self.timing: Timing = latency.time_batch(arms, artifacts[0], self.batch, options, compared=False)

    def ms(self, artifact: Artifact) -> float:
        """The median latency of an artifact in milliseconds."""
        return median(median(flat(launch.blocks[str(artifact.path)])) for launch in self.timing.launches)

    def ratio(self, artifact: Artifact | str, over: Artifact | str) -> tuple[float, float, float]:
        """How many times faster `artifact` is than `over`, with the ends of the 95 % interval."""
        names = [one if isinstance(one, str) else str(one.path) for one in (artifact, over)]
        measured = center(latency.speedups(self.timing, *names))
        return exp(measured.value), exp(measured.low), exp(measured.high)

    def noise(self, artifact: Artifact, over: Artifact | str) -> str:
        """Why the ratio of two latencies is uncertain, or ""."""
        names = [one if isinstance(one, str) else str(one.path) for one in (artifact, over)]
        return latency.noise_of(self.timing, center(latency.speedups(self.timing, *names)))

    def setting(self, artifact: Artifact) -> str:
        """Device, threads, hint and batch."""
        return f"{self.timing.setting(str(artifact.path))}, batch {self.batch}"

    def failure(self, artifact: Artifact) -> str:
        """Why an artifact could not be timed, or ""."""
        return self.timing.failures.get(str(artifact.path), "")


def baseline(work: Work, build: Callable[[Recipe, Path], Artifact], folder: Path) -> Artifact | None:
    """The same network in the next higher precision, in its own form; None where it cannot be built, with a note that
    says why."""
    job = work.job
    above = job.above_int8
    export = msgspec.structs.replace(job.recipe.export, form=None, keep=None)
    recipe = msgspec.structs.replace(job.recipe, precision=above, export=export, quantization=None)
    try:
        if job.target.form(above, recipe.fixed_batch) == job.form:
            return work.build_above(folder / "above")
        return build(recipe, folder / "above")
    except ExporterError as error:
        note(f"the {above} baseline for {job.recipe.precision} cannot be built: {first_line(error)}")
        return None


def time(work: Work, search: Search, baseline: Artifact | None, folder: Path) -> Timed | str:
    """Time the candidates, or say why they cannot be timed."""
    if reason := work.job.runtime.unable():
        return reason
    if baseline is None:
        return f"there is no {work.job.above_int8} baseline"
    try:
        timed = Timed(work, search, baseline, folder)
    except ExporterError as error:
        return first_line(error)
    for artifact in (timed.baseline, search.best.artifact):
        if reason := timed.failure(artifact) or timed.timing.failures.get(latency.EAGER, ""):
            return reason
    return timed


def findings(timed: Timed | str, search: Search, layers: Sequence[Layer]) -> list[Finding]:
    """The speed-up over the next higher precision first, then over PyTorch, then the cost of each kept part."""
    check = search.precision
    if isinstance(timed, str):
        return [
            Finding(check=check, metric="gain", value=None, detail=f"not timed: {timed}"),
            *sensitivities(search),
        ]
    best = search.best
    setting = timed.setting(best.artifact)
    value, low, high = timed.ratio(best.artifact, timed.baseline)
    speedup = Finding(
        check=check, metric="gain", value=value, unit="×", low=low, high=high, detail=_verdict(timed, search, layers),
        case=timed.above, noise=timed.noise(best.artifact, timed.baseline), setting=setting,
    )  # fmt: skip
    over_eager, noise = timed.ratio(best.artifact, latency.EAGER), timed.noise(best.artifact, latency.EAGER)
    eager = Finding(
        check=check, metric="int8_speedup", value=over_eager[0], unit="×", low=over_eager[1], high=over_eager[2],
        detail=NO_VERDICT if timed.timing.disturbances() else "timed in the same run", noise=noise, setting=setting,
    )  # fmt: skip
    return [speedup, eager, *_tried(timed, search), *_kept(timed, search), *sensitivities(search)]


def _verdict(timed: Timed, search: Search, layers: Sequence[Layer]) -> str:
    """Both latencies, and which is faster, if the 95 % interval of the ratio tells and the timing was not disturbed."""
    check, above, best = search.precision, timed.above, search.best
    _, low, high = timed.ratio(best.artifact, timed.baseline)
    quantized, baseline = timed.ms(best.artifact), timed.ms(timed.baseline)
    times = f"{quantized:.2f} ms, {baseline:.2f} ms in {above}, {timed.setting(best.artifact)}"
    if timed.timing.disturbances():
        verdict = f"{NO_VERDICT}: {times} ({low:.2f}–{high:.2f} ×)"
    elif low > 1:
        verdict = times
    elif high < 1:
        verdict = f"{check} is slower than {above} here: {times}; {_reason(best, layers)}"
    else:
        verdict = f"no difference measurable: {times} ({low:.2f}–{high:.2f} ×); {_reason(best, layers)}"
    noise = timed.noise(best.artifact, timed.baseline)
    return f"{verdict}; {noise}" if noise else verdict


def sensitivities(search: Search) -> list[Finding]:
    """The sensitivity of every part, where it was measured."""
    return [
        Finding(check=search.precision, metric="sensitivity", value=value, case=part, detail="of the outputs' variance")
        for part, value in search.sensitivities.items()
    ]


def _reason(best: Candidate, layers: Sequence[Layer]) -> str:
    """Why the artifact is no faster: quantized layers that are not computed in low precision, or the other layers."""
    sidecar = best.artifact.sidecar
    assert sidecar.quantization is not None
    narrow = {layer.module for layer in layers if layer.precision in NARROW}
    slow = [name for name in sidecar.quantization.layers if name not in narrow]
    if slow:
        return f"not computed in {sidecar.precision}: {some(slow)}"
    if best.kept:
        return f"kept in higher precision: {some(best.kept)}"
    layer_macs = sidecar.quantization.layers
    share = 100 * sum(layer_macs.values()) / (sidecar.macs or 1)
    return (
        f"all {len(layer_macs)} quantized layers are computed in {sidecar.precision} ({share:.0f} % of the "
        "multiply-accumulates); the rest of the time is norms, GELU, depthwise convolutions and quantization itself"
    )


def _tried(timed: Timed, search: Search) -> list[Finding]:
    """Loss and latency of every candidate, for the report's chart."""
    if len(search.tried) < 2:
        return []
    check = search.precision
    rows = []
    if search.limit is not None:
        rows.append(Finding(check=check, metric="budget", value=search.limit, unit="points"))
    for candidate in sorted(search.tried, key=lambda candidate: len(candidate.kept)):
        case = f"{len(candidate.kept)} kept"
        rows.append(Finding(check=check, metric="tried_loss", value=candidate.loss, unit="points", case=case))
        if not timed.failure(candidate.artifact):
            ms = timed.ms(candidate.artifact)
            setting = timed.setting(candidate.artifact)
            rows.append(Finding(check=check, metric="tried_ms", value=ms, unit="ms", case=case, setting=setting))
    return rows


def _first(search: Search) -> Candidate:
    """The candidate that keeps nothing but the parts of `--keep`."""
    return min(search.tried, key=lambda candidate: len(candidate.kept))


def _kept_by_search(search: Search) -> list[str]:
    """The parts that the best candidate keeps beside those of `--keep`."""
    return [part for part in search.best.kept if part not in _first(search).kept]


def _kept(timed: Timed, search: Search) -> list[Finding]:
    """Every part in higher precision, with its sensitivity and its cost in latency."""
    best, first, more = search.best, _first(search), _kept_by_search(search)
    rows = []
    for part in best.kept:
        alone = timed.alone.get(part, best.artifact if more == [part] else None)
        cost = "not timed alone" if part in more else "named by --keep"
        if part in more and alone is not None and not timed.failure(alone) and not timed.failure(first.artifact):
            cost = f"{percent(-log(timed.ratio(alone, first.artifact)[0])):+.1f} % latency"
        value = search.sensitivities.get(part)  # not measured where the first candidate passes
        rows.append(Finding(check=search.precision, metric="kept_back", value=value, case=part, detail=cost))
    return rows
