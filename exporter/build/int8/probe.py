"""Whether int8 can be faster than the next higher precision, measured on a short network before calibration."""

from __future__ import annotations

import dataclasses
from math import exp, gcd
from pathlib import Path
from statistics import median

from msgspec.structs import replace

from exporter.artifact import Artifact
from exporter.bench import Opener, Timing, batches_of, flat, latency, supervisor, turns
from exporter.build.int8.work import prepare
from exporter.build.resolve import Job
from exporter.errors import CheckFailed, ExporterError, first_line
from exporter.model import structure
from exporter.progress import note, silent, step
from exporter.quantize.cpus import of_this_machine
from exporter.recipe import SYNTHETIC, Bench, Quantization
from exporter.stats import Center, center

IMAGES = 2
SECONDS = 1.5  # of timing in each process, for both models together
CLEARLY = 1.1  # no more processes are timed when int8 is faster by so much


def refuse_slower(job: Job, folder: Path, opener: Opener) -> None:
    """Stop the build where int8 is slower on this machine.

    A network of the same widths, with fewer blocks, is built in int8 and in the next higher precision, in the form of
    the job, and timed in one fresh process after another. Nothing is timed where the artifact would not run here: for
    another class of CPUs, or without the device; nor where only the weights are quantized, which serves size.

    Args:
        job: of precision int8 or fp8.
        folder: for the two artifacts.
        opener: opens a model in the timing process.

    Raises: CheckFailed with both latencies, where the 95 % interval of their ratio says that int8 is slower.
    """
    quantization, placement = job.recipe.quantization, job.placement
    assert quantization is not None
    assert placement is not None
    if quantization.even_if_slower or not placement.inputs or job.runtime.unable():
        return
    if quantization.cpu not in ("portable", of_this_machine()):
        return
    short = _short(job)
    names = f"{job.recipe.precision} and {job.target.above_int8()}"
    step(f"timing {names} on a network of {short.sidecar.variant}, to see whether {job.recipe.precision} is faster")
    try:
        with silent():
            pair = _build(short, folder)
        with turns.alone():
            timing, over = _time(job, pair, opener)
    except ExporterError as error:
        note(f"whether {job.recipe.precision} is faster here cannot be measured: {first_line(error)}")
        return
    if over is not None and over.high < 0:
        _refuse(job, timing, over)


def _short(job: Job) -> Job:
    """The job with fewer blocks: as many in each stage as the depths have in proportion, at least one."""
    variant = job.checkpoint.variant
    depths = variant.architecture.depths
    blocks = shortened(depths)
    name = f"{'-'.join(map(str, blocks))} of {'-'.join(map(str, depths))} blocks"
    architecture = replace(variant.architecture, depths=blocks)
    state = {key: value for key, value in job.checkpoint.state.items() if structure.is_within(key, blocks)}
    weights = replace(job.checkpoint.weights, digest=f"{job.checkpoint.weights.digest}, {name}")
    checkpoint = dataclasses.replace(
        job.checkpoint, state=state, variant=replace(variant, architecture=architecture), weights=weights
    )
    quantization = Quantization(calib=SYNTHETIC, calib_size=IMAGES, int8_scope=job.scope)
    recipe = replace(job.recipe, quantization=quantization, export=replace(job.recipe.export, simplify=False))
    sidecar = replace(job.sidecar, weights=replace(job.sidecar.weights, digest=weights.digest), variant=name)
    return dataclasses.replace(job, recipe=recipe, checkpoint=checkpoint, sidecar=sidecar, reference=None)


def shortened(depths: tuple[int, ...]) -> tuple[int, ...]:
    """Depths in nearly the same proportion, with one block in the shortest stage."""
    whole = gcd(*depths)
    divisor = whole if whole > 1 else min(depths)
    return tuple(max(1, depth // divisor) for depth in depths)


def _build(short: Job, folder: Path) -> tuple[Artifact, Artifact]:
    """The short network in int8, and in the next higher precision."""
    folder.mkdir()
    work = prepare(short, folder)
    return work.make((), folder / "int8"), work.above(folder / "above")


def _time(job: Job, pair: tuple[Artifact, Artifact], opener: Opener) -> tuple[Timing, Center | None]:
    """The timing, and the logarithm of how many times faster int8 is, or None where it is clearly faster."""
    setting = job.recipe.bench or Bench()
    options = latency.BenchOptions(threads=setting.threads, hint=setting.hint, device=setting.device)
    batch = batches_of(options, pair)[0]
    timing = Timing(latency.plan_of(latency.arms_of(pair, options)[1:], pair[0], batch, options, SECONDS))
    quantized, above = (str(artifact.path) for artifact in pair)
    for _ in supervisor.launches(timing, opener):
        ratios = latency.speedups(timing, quantized, above)
        if timing.failures:
            raise ExporterError(next(iter(timing.failures.values())))
        if exp(median(ratios)) > CLEARLY:
            return timing, None
        if len(ratios) >= supervisor.PROCESSES:
            return timing, center(ratios)
    raise ExporterError(next(iter(timing.failures.values()), "nothing was timed"))


def _refuse(job: Job, timing: Timing, over: Center) -> None:
    """Raises: CheckFailed, always."""
    arms = timing.plan.arms
    quantized, above = (median(median(flat(one.blocks[arm.name])) for one in timing.launches) for arm in arms)
    check, higher = job.recipe.precision, job.target.above_int8()
    raise CheckFailed(
        f"{check} is slower than {higher} here: {exp(over.value):.2f} × its speed (95 % {exp(over.low):.2f}–"
        f"{exp(over.high):.2f}; {quantized:.2f} ms, {above:.2f} ms in {higher}, {arms[0].setting}, for a network of "
        f"the same widths with fewer blocks); use --{higher}, or build it all the same with --even-if-slower"
    )
