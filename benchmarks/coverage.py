"""Do 95 % intervals of speed-ups hold the truth? One artifact is timed against itself, so the ratio is 1.

    python -m benchmarks.coverage -o benchmarks/results/MACHINE/coverage.json
    python -m benchmarks.coverage int8.onnx int8-of-other-images.onnx --against fp32.onnx -o gain.json

With `--against`, the artifacts take turns against another one. Every repetition is timed as `bench`, the speed-up of
int8 and `compare` time: in fresh processes, disturbed ones again. In every other one a load generator keeps one core
busy. A repetition says "faster" or "slower" where its interval excludes 1. Compared with
itself, an artifact should be neither; compared with another, all verdicts should agree. The file is written after each
repetition.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from math import exp
from pathlib import Path

import msgspec

from benchmarks.provenance import commit
from exporter import artifact as artifacts
from exporter import machine
from exporter.artifact import Artifact
from exporter.artifact.disk import write_file
from exporter.artifact.sidecar import Record
from exporter.backends import environment
from exporter.bench import Arm, Plan, Timing, latency, supervisor, worker
from exporter.build import build
from exporter.recipe import Model, Recipe
from exporter.stats import center, proportion

ARMS = ("one", "other")
BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"  # ends when the experiment is killed


class Repetition(Record, frozen=True):
    """How many times faster one artifact is than the other, with the 95 % interval; the number of processes, and of
    those that were measured again; and why the ratio is marked as noisy, or ""."""

    loaded: bool
    ratio: float
    low: float
    high: float
    processes: int
    measured_again: int
    noise: str
    seconds: float

    @property
    def verdict(self) -> str:
        """The verdict on the speed-up: none if the timing was disturbed, which is a reason beside a wide interval."""
        reasons = self.noise.removeprefix("noisy: ").split(", ")
        if any(reason and not reason.startswith("interval") for reason in reasons):
            return "no verdict"
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "no difference measurable"

    @property
    def holds(self) -> bool:
        """Whether the interval holds 1."""
        return self.low <= 1 <= self.high


class Experiment(Record, frozen=True):
    """All repetitions, and how they were made."""

    commit: str
    command: str
    date: str
    threads: int
    seconds: float
    artifact: str
    environment: dict[str, object]
    repetitions: tuple[Repetition, ...] = ()
    against: str = ""  # or the artifact itself
    schema: int = 1


@contextlib.contextmanager
def busy_core(wanted: bool) -> Iterator[None]:
    """Within, a load generator keeps one core busy."""
    if not wanted:
        yield
        return
    generator = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        yield
    finally:
        generator.kill()
        generator.wait()


def repeat(one: Artifact, other: Artifact, threads: int, seconds: float, seed: int, loaded: bool) -> Repetition:
    """Time an artifact against another, or against itself."""
    arms = tuple(
        Arm(name=name, path=str(artifact.path), threads=threads)
        for name, artifact in zip(ARMS, (one, other), strict=True)
    )
    preprocessing = one.sidecar.preprocessing
    timing = Timing(
        Plan(arms=arms, preprocessing=preprocessing, seconds=seconds / supervisor.PROCESSES, seed=100 * seed)
    )
    begin = time.monotonic()
    with busy_core(loaded):
        supervisor.measure(timing, worker.open_arm, supervisor.PROCESSES)
    ratio = center(latency.speedups(timing, *ARMS))
    return Repetition(
        loaded=loaded,
        ratio=round(exp(ratio.value), 5),
        low=round(exp(ratio.low), 5),
        high=round(exp(ratio.high), 5),
        processes=len(timing.launches),
        measured_again=timing.disturbed,
        noise=latency.noise_of(timing, ratio),
        seconds=round(time.monotonic() - begin, 1),
    )


def summary(repetitions: Sequence[Repetition]) -> str:
    """How many intervals hold 1, and what those that do not say."""
    lines = ["| one core | repetitions | hold 1 | 95 % interval | faster | slower | median width | marked noisy |"]
    lines.append("|---|--:|--:|--:|--:|--:|--:|--:|")
    for name, wanted in (("free", (False,)), ("loaded", (True,)), ("both", (False, True))):
        rows = [one for one in repetitions if one.loaded in wanted]
        if rows:
            held = sum(one.holds for one in rows)
            share, width = proportion(held, len(rows)), sorted(one.high - one.low for one in rows)[len(rows) // 2]
            faster, slower = sum(one.low > 1 for one in rows), sum(one.high < 1 for one in rows)
            noisy = sum(bool(one.noise) for one in rows)
            lines.append(
                f"| {name} | {len(rows)} | {held} | {share.low:.0f}–{share.high:.0f} % | {faster} | {slower} "
                f"| {100 * width:.1f} % | {noisy} |"
            )
    return "\n".join(lines)


VERDICTS = ("faster", "no difference measurable", "slower", "no verdict")


def verdicts(repetitions: Sequence[Repetition]) -> str:
    """How often an artifact got each verdict."""
    lines = [f"| one core | repetitions | {' | '.join(VERDICTS)} | speed-ups | marked noisy |"]
    lines.append("|---|--:|--:|--:|--:|--:|--:|--:|")
    for name, loaded in (("free", False), ("loaded", True)):
        rows = [one for one in repetitions if one.loaded == loaded]
        counts = " | ".join(str(sum(one.verdict == verdict for one in rows)) for verdict in VERDICTS)
        ratios = [one.ratio for one in rows]
        span = f"{min(ratios):.2f}–{max(ratios):.2f} ×" if rows else "–"
        noisy = sum(bool(one.noise) for one in rows)
        lines.append(f"| {name} | {len(rows)} | {counts} | {span} | {noisy} |")
    return "\n".join(lines)


def random_atto(folder: Path) -> Artifact:
    """An atto with random weights for ONNX Runtime."""
    model = Model(variant="atto", weights="random:0")
    return build(Recipe(backend="onnxruntime", precision="fp32", model=model, bench=None), folder).artifact


def main() -> None:
    """Make the repetitions, free and loaded in turn, and print what they come to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifacts", nargs="*", type=Path, help="By default a random atto for ONNX Runtime.")
    parser.add_argument("--against", type=Path, help="The artifact to compare with. By default each with itself.")
    parser.add_argument("-o", "--output", type=Path, required=True, help="The JSON file.")
    parser.add_argument("--repetitions", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=2.0, help="Of timing, for each repetition.")
    parser.add_argument("--threads", type=int, default=machine.default_threads())
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = [artifacts.load(path) for path in options.artifacts] or [random_atto(Path(folder))]
        against = artifacts.load(options.against) if options.against else None
        experiment = Experiment(
            commit=commit(),
            command=f"python -m benchmarks.coverage {' '.join(sys.argv[1:])}",
            date=time.strftime("%Y-%m-%d"),
            threads=options.threads,
            seconds=options.seconds,
            artifact=", ".join(one.path.name for one in measured),
            against=against.path.name if against else "",
            environment=environment(),
        )
        repetitions: list[Repetition] = []
        for turn in range(options.repetitions):
            artifact = measured[turn // 2 % len(measured)]
            one = repeat(artifact, against or artifact, options.threads, options.seconds, turn, loaded=turn % 2 == 1)
            repetitions.append(one)
            print(f"{turn + 1}: {one.ratio:.3f} ({one.low:.3f}–{one.high:.3f})", file=sys.stderr, flush=True)
            written = msgspec.structs.replace(experiment, repetitions=tuple(repetitions))
            write_file(options.output, msgspec.json.format(msgspec.json.encode(written)) + b"\n")
    print(verdicts(repetitions) if against else summary(repetitions))


if __name__ == "__main__":
    main()
