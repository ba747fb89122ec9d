"""Times two artifacts in turn on this machine: base, head, and the base again to measure the noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray

from exporter import backends, machine
from exporter.artifact import Artifact
from exporter.artifact.sidecar import size_text
from exporter.bench import (
    Arm,
    Launch,
    Opener,
    Plan,
    Timing,
    batches_of,
    check_devices,
    flat,
    supervisor,
    worker,
)
from exporter.bench.latency import noise_of
from exporter.compare import METRICS, Change, Limit, judge, processes_needed
from exporter.errors import BadRequest, CheckFailed
from exporter.progress import step
from exporter.recipe import Seconds, Threads, TimingOptions
from exporter.recipe.fields import about
from exporter.report import Finding
from exporter.stats import center, p_above

BASE, HEAD, CONTROL = "base", "head", "base again"
AGAIN = 2  # times as many processes in the second look, or more if the number of comparisons needs it


class CompareOptions(TimingOptions, frozen=True):
    """Options of timing two artifacts. By default one core is left to other processes, whose noise would otherwise hide
    regressions."""

    across: Annotated[
        tuple[Literal["machine", "model"], ...], about("Compare reports of two machines, or of two models, anyway.")
    ] = ()
    threads: Annotated[Threads | None, about("Threads; by default all cores but one.", metavar="N")] = None
    duration: Annotated[
        Seconds, about("Seconds of timing for each batch size, all models together.", metavar="SECONDS")
    ] = 6.0


@dataclass(frozen=True)
class Pair:
    """The two artifacts of a comparison."""

    base: Artifact
    head: Artifact


def check_pair(pair: Pair, options: CompareOptions) -> None:
    """Refuse pairs with different models or inputs, a batch size that one cannot run, or an unknown runtime or
    precision.

    Raises: BadRequest.
    """
    base, head = pair.base.sidecar, pair.head.sidecar
    if (base.variant, base.task) != (head.variant, head.task) and "model" not in options.across:
        raise BadRequest(
            f"{pair.head.path} is {head.variant} {head.task}, {pair.base.path} is {base.variant} {base.task}: two "
            "models; add --across model to compare them anyway"
        )
    if base.task == head.task and base.spec != head.spec:
        raise BadRequest(
            f"{pair.head.path} returns {head.spec.text}, {pair.base.path} {base.spec.text}; build both with the same "
            "--output and --l2"
        )
    if base.preprocessing.size != head.preprocessing.size:
        raise BadRequest(
            f"{pair.head.path} takes {size_text(head.preprocessing.size)} pixels, {pair.base.path} "
            f"{size_text(base.preprocessing.size)}; "
            "build both with one --imgsz"
        )
    if (base.preprocessing.input == "image") != (head.preprocessing.input == "image"):
        raise BadRequest(
            f"{pair.head.path} or {pair.base.path} takes pictures of any size; build both with one --input"
        )
    for side in (pair.base, pair.head):
        backends.runtime_of(side)
    check_devices((pair.base, pair.head), options.device)
    batches_of(options, (pair.base, pair.head))


def compare_times(
    pair: Pair, limits: Sequence[Limit], options: CompareOptions, opener: Opener = worker.open_arm
) -> list[Finding]:
    """A finding for every limit on a time and every batch.

    Raises: CheckFailed when an arm cannot be timed at all.
    """
    if not limits:
        return []
    first = {
        batch: _changes(pair, limits, batch, options, supervisor.PROCESSES, opener)
        for batch in batches_of(options, (pair.base, pair.head))
    }
    comparisons = [change for changes in first.values() for change in changes]
    findings = judge(comparisons, confirmed=False)
    suspects = [batch for batch, changes in first.items() if any(change.is_suspicious for change in changes)]
    if not suspects:
        return findings
    processes = max(AGAIN * supervisor.PROCESSES, processes_needed(len(comparisons)))
    step("above the limit: measuring again")
    second = {batch: _changes(pair, limits, batch, options, processes, opener) for batch in suspects}
    findings = [finding for finding in findings if finding.case not in {_case(batch) for batch in suspects}]
    # Corrected for all that was looked at first, not only for what is looked at again.
    looked_at = [change for batch, changes in first.items() for change in second.get(batch, changes)]
    again = judge(looked_at, confirmed=True)
    return findings + [finding for finding in again if finding.case in {_case(batch) for batch in suspects}]


def _case(batch: int) -> str:
    return f"batch {batch}"


def _changes(
    pair: Pair, limits: Sequence[Limit], batch: int, options: CompareOptions, processes: int, opener: Opener
) -> list[Change]:
    plan = _plan(pair, batch, options, seed=options.seed + processes)
    names = f"{pair.base.path} (base) and {pair.head.path} (head)"
    step(f"timing {names} in turn in {processes} fresh processes, batch {batch}")
    timing = Timing(plan)
    supervisor.measure(timing, opener, processes, stop_on_failure=True)
    for name, reason in timing.failures.items():
        path = pair.head.path if name == HEAD else pair.base.path
        raise CheckFailed(f"{path}: {reason}; nothing can be compared")
    if "model" not in options.across and min(min(launch.cosine.values()) for launch in timing.launches) <= -1:
        raise CheckFailed(
            f"{pair.head.path} and {pair.base.path}: their outputs are not finite or differ in shape; `verify` them"
        )
    return [_change(limit, _case(batch), timing) for limit in limits]


def _plan(pair: Pair, batch: int, options: CompareOptions, seed: int) -> Plan:
    threads = options.threads or max(1, machine.cores() - 1)
    artifacts = {BASE: pair.base, HEAD: pair.head, CONTROL: pair.base}
    arms = tuple(
        Arm(
            name=name,
            path=str(artifact.path),
            device=backends.device_of(artifact, options.device),
            threads=threads,
            hint=options.hint,
        )
        for name, artifact in artifacts.items()
    )
    preprocessing = pair.base.sidecar.preprocessing
    seconds = options.duration / supervisor.PROCESSES
    return Plan(arms=arms, preprocessing=preprocessing, batch=batch, seconds=seconds, seed=seed)


def _change(limit: Limit, case: str, timing: Timing) -> Change:
    effects, control = [], []
    for launch in timing.launches:
        first, second, head = (_logs(launch, name, limit.metric) for name in (BASE, CONTROL, HEAD))
        effects.append(float(np.median(head - (first + second) / 2)))
        control.append(float(np.median(second - first)))
    itself, difference = center(control), center(effects)
    of = METRICS[limit.metric].of
    base, head_value = (of([flat(launch.blocks[name]) for launch in timing.launches]) for name in (BASE, HEAD))
    images = {name: 1e3 * timing.plan.batch * timing.launches[0].streams[name] for name in (BASE, HEAD)}
    rate = METRICS[limit.metric].higher_is_better
    return Change(
        limit=limit,
        case=case,
        found=difference,
        effects=effects,
        chance=p_above(effects),
        floor=max(abs(itself.low), abs(itself.high)),
        base=images[BASE] / base if rate else base,
        head=images[HEAD] / head_value if rate else head_value,
        least_chance=0.5 ** len(effects),
        noise=noise_of(timing, difference),
        setting=timing.setting(HEAD),
    )


def _logs(launch: Launch, name: str, metric: str) -> NDArray[np.float64]:
    """Logarithms of one launch: for the median one for each round, to compare rounds in pairs; else a single one. For a
    rate the time of a run is divided by the batches that it computes at once."""
    blocks = launch.blocks[name]
    groups = [[block] for block in blocks] if metric == "p50_ms" else [blocks]
    batches = launch.streams[name] if METRICS[metric].higher_is_better else 1
    return np.log([METRICS[metric].of(group) / batches for group in groups])
