"""Time and memory by input size: ConvNeXt-T from one dynamic artifact, the others exported for each size."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import log
from pathlib import Path

import msgspec
import numpy as np

from benchmarks import racing
from benchmarks.provenance import environment
from benchmarks.rivals import PLAIN, ROOT, RUNTIMES, THREADS, WAYS, Network, Samples, Way, files
from exporter.artifact.sidecar import Record
from exporter.bench import Arm, Launch, Timing, flat, supervisor
from exporter.build import build
from exporter.recipe import Export, Model, Recipe
from exporter.stats import center

SIZES = (224, 320, 448, 640, 896)
OF_WINDOWS = (224, 448, 672, 896)  # Swin's windows of 7 pixels at stride 32 fill these
COMPARED = ("ConvNeXt-T", "ResNet-50", "Swin-T", "ViT-S (DeiT)")


class Curve(Record, frozen=True):
    """One network on one runtime, a value for each size: milliseconds of an image, process by process, and the peak of
    memory in bytes; and the exponents of time and memory in the number of pixels, with 95 % intervals of the time."""

    network: str
    runtime: str
    way: str
    sizes: tuple[int, ...]
    milliseconds: tuple[Samples, ...]
    peak_bytes: tuple[int | None, ...]
    time_exponent: tuple[float, float, float]
    memory_exponent: float


class Sizes(Record, frozen=True):
    """All curves, and why a network could not be timed, by its name, runtime and size."""

    curves: tuple[Curve, ...]
    environment: dict[str, object]
    failures: dict[str, str] = msgspec.field(default_factory=dict)
    threads: int = THREADS
    schema: int = 1


def sizes_of(network: Network) -> tuple[int, ...]:
    """The input sizes at which a network is timed."""
    return OF_WINDOWS if network.timm.startswith("swin") else SIZES


def time_sizes(networks: Sequence[Network], seconds: float, sizes: Sequence[int]) -> Sizes:
    """Time the compared ones of some networks at those of these sizes that they run, one size after the other.

    All files are made before the first is timed, so that a build that fails loses no times.
    """
    compared = [network for network in networks if network.name in COMPARED]
    arms = {
        size: [_arm(one, runtime, size) for one in compared if size in sizes_of(one) for runtime in RUNTIMES]
        for size in sizes
    }
    timings: dict[int, Timing] = {}
    memory: dict[str, int | None] = {}
    for size in sizes:
        print(f"{size} pixels", file=sys.stderr, flush=True)
        timings[size] = racing.race(arms[size], files.preprocessing(size), 1, seconds)
        for arm in arms[size]:
            cold = supervisor.measure_cold(arm, timings[size].plan)
            memory[arm.name] = None if isinstance(cold, str) else cold.peak_bytes
    failures = {name: reason for timing in timings.values() for name, reason in timing.failures.items()}
    curves = [_curve(one, runtime, timings, memory) for one in compared for runtime in RUNTIMES]
    return Sizes(curves=tuple(filter(None, curves)), environment=environment(THREADS), failures=failures)


def _way(runtime: str) -> Way:
    return next(way for way in WAYS if way.runtime == runtime and way.name == PLAIN and way.precision == "fp32")


def _name(network: Network, runtime: str, size: int) -> str:
    return f"{network.name}, {runtime}, {size}"


def _arm(network: Network, runtime: str, size: int) -> Arm:
    name = _name(network, runtime, size)
    if not network.variant:
        made = files.make(network, _way(runtime), 1, size, Path(ROOT))
        return Arm(name=name, path=str(made.path), threads=THREADS)
    model, export = Model(variant=network.variant, weights="random:0"), Export(imgsz="dynamic")
    recipe = Recipe(backend=runtime, precision="fp32", model=model, export=export)
    return Arm(name=name, path=str(build(recipe, Path(ROOT) / "dynamic").artifact.path), threads=THREADS)


def _curve(network: Network, runtime: str, timings: dict[int, Timing], memory: dict[str, int | None]) -> Curve | None:
    """The curve over the sizes that were timed; None for fewer than two, which have no exponent."""
    names = {size: _name(network, runtime, size) for size in sizes_of(network) if size in timings}
    sizes = tuple(size for size, name in names.items() if name not in timings[size].failures)
    if len(sizes) < 2:
        return None
    peaks = tuple(memory[names[size]] for size in sizes)
    pixels = [log(size * size) for size in sizes]
    per_process = [
        _slope(pixels, [log(_median(launch, names[size])) for size, launch in zip(sizes, launches, strict=True)])
        for launches in zip(*(timings[size].launches for size in sizes), strict=False)
    ]
    time = center(per_process)
    known = [(x, log(peak)) for x, peak in zip(pixels, peaks, strict=True) if peak]
    return Curve(
        network=network.name,
        runtime=runtime,
        way="ours, one dynamic artifact" if network.variant else PLAIN,
        sizes=sizes,
        milliseconds=tuple(racing.samples(timings[size], names[size]) for size in sizes),
        peak_bytes=peaks,
        time_exponent=(time.value, time.low, time.high),
        memory_exponent=_slope([x for x, _ in known], [y for _, y in known]),
    )


def _median(launch: Launch, name: str) -> float:
    return float(np.median(flat(launch.blocks[name])))


def _slope(x: list[float], y: list[float]) -> float:
    """The slope of the line of least squares; of logarithms the exponent of a power law."""
    return float(np.polyfit(x, y, 1)[0])
