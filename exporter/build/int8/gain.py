"""Do eight bits pay? It is timed in turn with the next higher precision, and says so when it does not."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log
from pathlib import Path
from statistics import median

import msgspec

from exporter import backends
from exporter.artifact import Artifact, load
from exporter.backends import NARROW, Layer
from exporter.bench import Opener, Timing, flat, latency
from exporter.build import pipeline
from exporter.build.int8.budget import Choice, Search
from exporter.build.int8.work import Work
from exporter.errors import BadRequest, ExporterError, first_line, some
from exporter.progress import note
from exporter.report import Finding
from exporter.stats import center

SECONDS_EACH = 3.0  # of timing, for every model
MOST_ALONE = 6  # parts that are timed each kept back alone


class Timed:
    """All that was tried, timed in one go."""

    def __init__(self, work: Work, search: Search, rival: Artifact, folder: Path, opener: Opener) -> None:
        self.above, self.rival = rival.sidecar.precision, rival
        best = search.best
        self.alone = {
            part: work.make((part,), folder / f"alone-{part}")
            for part in (best.kept if 1 < len(best.kept) <= MOST_ALONE else ())
        }
        batch = work.recipe.batch if isinstance(work.recipe.batch, int) else 1
        artifacts = [self.rival, *(choice.artifact for choice in search.tried), *self.alone.values()]
        options = latency.BenchOptions(
            batch=(batch,), duration=SECONDS_EACH * (1 + len(artifacts)), weights=work.recipe.weights
        )
        self.batch = batch
        self.timing: Timing = latency.time_batch(
            latency.arms_of(artifacts, options), artifacts[0], batch, options, opener
        )

    def ms(self, made: Artifact) -> float:
        """The median latency of an artifact."""
        return median(median(flat(launch.blocks[str(made.path)])) for launch in self.timing.launches)

    def ratio(self, made: Artifact | str, over: Artifact | str) -> tuple[float, float, float]:
        """How many times faster `made` is, with its 95 % interval."""
        names = [one if isinstance(one, str) else str(one.path) for one in (made, over)]
        found = center(latency.speedups(self.timing, *names))
        return exp(found.value), exp(found.low), exp(found.high)

    def fell(self, made: Artifact) -> str:
        """Why an artifact could not be timed, or ""."""
        return self.timing.failures.get(str(made.path), "")


def rival(work: Work, folder: Path) -> Artifact | None:
    """The same network in the next higher precision, which int8 has to be faster than; None where it cannot be built,
    with a note that says why."""
    recipe = msgspec.structs.replace(work.recipe, precision=work.backend.above_int8(), form=None)
    try:
        return pipeline.build(recipe, folder / "above")
    except ExporterError as error:
        note(f"{recipe.precision}, to hold {work.recipe.precision} against, cannot be built: {first_line(error)}")
        return None


def beside(artifact: Artifact) -> Artifact | None:
    """The same network in the next higher precision, where it was built beside an artifact of eight bits."""
    ours = artifact.sidecar
    if ours.quantization is None:
        return None
    above = backends.get(ours.backend).above_int8()
    try:
        found = load(artifact.path.with_name(artifact.path.name.replace(f"_{ours.precision}.", f"_{above}.")))
    except BadRequest:
        return None
    return found if found.sidecar.weights.digest == ours.weights.digest else None


def time(work: Work, search: Search, rival: Artifact | None, folder: Path, opener: Opener) -> Timed | str:
    """Time what was tried, or say why it cannot be."""
    if why := work.backend.unable():
        return why
    if rival is None:
        return f"there is no {work.backend.above_int8()} here to hold it against"
    try:
        timed = Timed(work, search, rival, folder, opener)
    except ExporterError as error:
        return first_line(error)
    for made in (timed.rival, search.best.artifact):
        if why := timed.fell(made) or timed.timing.failures.get(latency.EAGER, ""):
            return why
    return timed


def findings(timed: Timed | str, search: Search, layers: Sequence[Layer]) -> list[Finding]:
    """The gain over the next higher precision first, then the speed-up over eager, then what each part costs."""
    about = search.precision
    if isinstance(timed, str):
        return [
            Finding(check=about, metric="gain", value=None, detail=f"not timed: {timed}"),
            *sensitivities(search),
        ]
    best = search.best
    value, low, high = timed.ratio(best.artifact, timed.rival)
    times = f"{timed.ms(best.artifact):.2f} ms against {timed.ms(timed.rival):.2f} ms in {timed.above}"
    detail = f"{times}, batch {timed.batch}"
    if low <= 1:
        verdict = "DOES NOT PAY" if value <= 1 else "is not shown to pay"
        detail = f"{about} {verdict} here: {detail}; {_blame(best, layers)}"
    gain = Finding(
        check=about, metric="gain", value=value, unit="×", low=low, high=high, detail=detail, case=timed.above
    )
    over_eager = timed.ratio(best.artifact, latency.EAGER)
    speedup = Finding(
        check=about, metric="int8_speedup", value=over_eager[0], unit="×", low=over_eager[1], high=over_eager[2],
        detail="over eager PyTorch, the same run",
    )  # fmt: skip
    return [gain, speedup, *_tried(timed, search), *_kept(timed, search), *sensitivities(search)]


def sensitivities(search: Search) -> list[Finding]:
    """The harm of every part, where it was measured."""
    return [
        Finding(check=search.precision, metric="sensitivity", value=harm, case=part, detail="of the outputs' variance")
        for part, harm in search.harms.items()
    ]


def _blame(best: Choice, layers: Sequence[Layer]) -> str:
    """The layers that keep int8 from winning: rounded ones that are not computed in it, or what is not rounded."""
    told = best.artifact.sidecar.quantization
    assert told is not None
    told_in = best.artifact.sidecar.precision
    whole = {layer.module for layer in layers if layer.precision in NARROW}
    slow = [name for name in told.layers if name not in whole]
    if slow:
        return f"not computed in {told_in}: {some(slow)}"
    if best.kept:
        return f"kept back: {some(best.kept)}"
    share = 100 * sum(told.layers.values()) / (best.artifact.sidecar.macs or 1)
    return (
        f"all {len(told.layers)} rounded layers are computed in {told_in} ({share:.0f} % of the multiply-accumulates), "
        "and the time goes to what is between them: norms, GELU, depthwise convolutions and the rounding itself"
    )


def _tried(timed: Timed, search: Search) -> list[Finding]:
    """Loss and latency of everything that was tried, for the report to draw."""
    if len(search.tried) < 2:
        return []
    found = []
    if search.limit is not None:
        found.append(Finding(check=search.precision, metric="budget", value=search.limit, unit="points"))
    for choice in sorted(search.tried, key=lambda choice: len(choice.kept)):
        case = f"{len(choice.kept)} kept back"
        found.append(Finding(check=search.precision, metric="tried_loss", value=choice.loss, unit="points", case=case))
        if not timed.fell(choice.artifact):
            found.append(
                Finding(
                    check=search.precision, metric="tried_ms", value=timed.ms(choice.artifact), unit="ms", case=case
                )
            )
    return found


def _kept(timed: Timed, search: Search) -> list[Finding]:
    """Every part that was kept back, with its harm and what it costs in speed."""
    best, first = search.best, next((choice for choice in search.tried if not choice.kept), None)
    found = []
    for part in best.kept:
        alone = timed.alone.get(part, best.artifact if len(best.kept) == 1 else None)
        cost = "not timed alone"
        if alone is not None and first is not None and not timed.fell(alone) and not timed.fell(first.artifact):
            ratio = timed.ratio(alone, first.artifact)[0]
            cost = f"{-100 * log(ratio):+.1f} % latency"
        found.append(
            Finding(check=search.precision, metric="kept_back", value=search.harms[part], case=part, detail=cost)
        )
    return found
