"""Whether int8 is faster than the next higher precision here, measured on a short network before calibration."""

from __future__ import annotations

import dataclasses
from math import exp, gcd
from pathlib import Path
from statistics import median

from msgspec.structs import replace

from exporter.artifact import Artifact
from exporter.bench import Opener, Timing, batches_of, flat, latency, supervisor, turns, worker
from exporter.build.int8.work import prepare
from exporter.build.resolve import Job
from exporter.errors import CheckFailed, ExporterError, first_line
from exporter.model import structure
from exporter.progress import note, silent, step
from exporter.quantize.cpus import of_this_machine
from exporter.recipe import SYNTHETIC, Bench, Quantization
from exporter.stats import Center, center

IMAGES = 2
SECONDS_PER_PROCESS = 1.5  # of timing, for both models together
CLEAR_SPEEDUP = 1.1  # no more processes are timed when int8 is faster by so much


def refuse_slower(job: Job, folder: Path, opener: Opener = worker.open_arm) -> None:
    """Stop the build where int8 is slower on this machine.

    A network of the same widths with fewer blocks is built in int8 and in the next higher precision, each in the form
    that the target runs fastest, and both are timed in one fresh process after another. Nothing is timed where the
    artifact would not run here: for another class of CPUs, or without the device; nor where only the weights are
    quantized, which serves size.

    Args:
        job: of precision int8 or fp8.
        folder: for the two artifacts.
        opener: opens a model in the timing process.

    Raises: CheckFailed with both latencies, where the whole 95 % interval of the speed-up is below 1 and the timing was
        not disturbed.
    """
    quantization, placement = job.recipe.quantization, job.placement
    assert quantization is not None
    assert placement is not None
    if quantization.even_if_slower or not placement.inputs or job.runtime.unable():
        return
    if quantization.cpu not in ("portable", of_this_machine()):
        return
    precision, higher = job.recipe.precision, job.above_int8
    step(f"is {precision} faster than {higher} here? timing both on a short network ({_blocks(job)})")
    try:
        with silent():
            pair = _build(job, folder)
            with turns.alone():
                timing, log_speedup = _time(job, pair, opener)
    except ExporterError as error:
        note(f"whether {precision} is faster here cannot be measured: {first_line(error)}")
        return
    if log_speedup is None or log_speedup.high >= 0:
        return
    if disturbances := timing.disturbances():
        note(f"cannot tell whether {precision} is faster here: {', '.join(disturbances)}; the build continues")
        return
    _refuse(job, timing, log_speedup)


def _blocks(job: Job) -> str:
    """The blocks of each stage of the short network, and of the whole one."""
    depths = job.checkpoint.variant.architecture.depths
    return f"{', '.join(map(str, shortened(depths)))} blocks instead of {', '.join(map(str, depths))}"


def _short(job: Job) -> Job:
    """The same job for a network with fewer blocks in each stage."""
    variant, name = job.checkpoint.variant, _blocks(job)
    blocks = shortened(variant.architecture.depths)
    architecture = replace(variant.architecture, depths=blocks)
    state = {key: value for key, value in job.checkpoint.state.items() if structure.is_within(key, blocks)}
    weights = replace(job.checkpoint.weights, digest=f"{job.checkpoint.weights.digest}, {name}")
    checkpoint = dataclasses.replace(
        job.checkpoint, state=state, variant=replace(variant, architecture=architecture), weights=weights
    )
    quantization = Quantization(calib=SYNTHETIC, calib_size=IMAGES, int8_scope=job.scope)
    recipe = replace(job.recipe, quantization=quantization, export=replace(job.recipe.export, simplify=False))
    sidecar = replace(job.sidecar, weights=replace(job.sidecar.weights, digest=weights.digest), variant="short")
    return dataclasses.replace(job, recipe=recipe, checkpoint=checkpoint, sidecar=sidecar, reference=None)


def shortened(depths: tuple[int, ...]) -> tuple[int, ...]:
    """Depths divided by their greatest common divisor, or by the smallest one if that divisor is 1; at least 1."""
    divisor = gcd(*depths)
    divisor = divisor if divisor > 1 else min(depths)
    return tuple(max(1, depth // divisor) for depth in depths)


def _build(job: Job, folder: Path) -> tuple[Artifact, Artifact]:
    """The short network in int8 and in the next higher precision, each in the form that it ships in."""
    folder.mkdir()
    work = prepare(_short(job), folder)
    quantized = work.make((), folder / "int8")
    form = job.target.form(job.above_int8, job.recipe.fixed_batch)
    if form != job.form:
        work = prepare(_short(job).in_form(form), folder)
    return quantized, work.build_above(folder / "above")


def _time(job: Job, pair: tuple[Artifact, Artifact], opener: Opener) -> tuple[Timing, Center | None]:
    """The timing, and the logarithm of how many times faster int8 is, or None where it is clearly faster."""
    setting = job.recipe.bench or Bench()
    options = latency.BenchOptions(threads=setting.threads, hint=setting.hint, device=setting.device)
    batch = batches_of(options, pair)[0]
    arms = latency.arms_of(pair, options)[1:]
    timing = Timing(latency.plan_of(arms, pair[0], batch, options, SECONDS_PER_PROCESS, compared=False))
    quantized, above = (str(artifact.path) for artifact in pair)
    for _ in supervisor.launches(timing, opener, stop_on_failure=True):
        ratios = latency.speedups(timing, quantized, above)
        if exp(median(ratios)) > CLEAR_SPEEDUP:
            return timing, None
        if len(ratios) >= supervisor.PROCESSES:
            return timing, center(ratios)
    raise ExporterError(next(iter(timing.failures.values()), "nothing was timed"))


def _refuse(job: Job, timing: Timing, log_speedup: Center) -> None:
    """Raises: CheckFailed, always."""
    arms = timing.plan.arms
    quantized, above = (median(median(flat(one.blocks[arm.name])) for one in timing.launches) for arm in arms)
    precision, higher = job.recipe.precision, job.above_int8
    value, low, high = exp(log_speedup.value), exp(log_speedup.low), exp(log_speedup.high)
    raise CheckFailed(
        f"{precision} is slower than {higher} here: {quantized:.2f} ms instead of {above:.2f} ms, {value:.2f} × (95 % "
        f"{low:.2f}–{high:.2f}; {arms[0].setting}), on a short network ({_blocks(job)}); build {higher}, or set "
        "even_if_slower (--even-if-slower; in a recipe quantization.even_if_slower: true) to build "
        f"{precision} anyway, for example for another machine"
    )
