"""Do others measure the same? `bench` beside pyperf and OpenVINO's benchmark_app; and what timing itself costs.

`python -m benchmarks.agreement ONNX IR -o benchmarks/results/MACHINE/agreement.json` takes, turn by turn:

* the p50 of `bench` on the ONNX artifact, and the median of a bare `InferenceSession.run` under pyperf;
* the p50 of `bench` on the IR, and the median latency that benchmark_app prints;

each in a process of its own, and quotes the median of the ratios of neighbours. The overhead is what `bench` adds to
a callable that takes one millisecond by the clock: the median it reports, and the time between runs that are timed.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from exporter import artifact as artifacts
from exporter.artifact import Record
from exporter.bench import flat, latency, worker
from exporter.disk import write_file
from exporter.measure import timing
from exporter.measure.machine import environment
from exporter.measure.stats import center

BIN = Path(sys.executable).parent
PAIRS = 30


class Agreement(Record, frozen=True):
    """One other way of timing: medians in ms, `bench` and the other in turn."""

    name: str
    bench_ms: tuple[float, ...]
    other_ms: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """Bench ÷ other, of neighbours."""
        return [ours / theirs for ours, theirs in zip(self.bench_ms, self.other_ms, strict=True)]


class Result(Record, frozen=True):
    """All of them, and the overhead on a run of one millisecond in percent."""

    environment: dict[str, object]
    agreements: tuple[Agreement, ...]
    overhead_pct: float
    schema: int = 1


def bench(path: Path, seconds: float) -> float:
    """The p50 of `bench`, without its cold starts."""
    made = artifacts.load(path)
    options = latency.BenchOptions(threads=1, duration=seconds)
    timed = latency.time_batch(latency.arms_of([made], options), made, 1, options, worker.open_arm)
    return statistics.median(sample for launch in timed.launches for sample in flat(launch.blocks[str(path)]))


ORT_LOOP = """
import sys, numpy as np, onnxruntime as ort, pyperf
settings = ort.SessionOptions()
settings.intra_op_num_threads = 1
session = ort.InferenceSession(sys.argv.pop(1), settings, providers=["CPUExecutionProvider"])
(given,) = session.get_inputs()
size = int(sys.argv.pop(1))
images = np.random.default_rng(0).normal(size=(1, 3, size, size)).astype(np.float32)
runner = pyperf.Runner(processes=1, values=40, warmups=5, loops=5)
runner.bench_func("run", session.run, None, {given.name: images})
"""


def pyperf_loop(path: Path, seconds: float) -> float:
    """The median of a bare loop, by pyperf."""
    del seconds
    size = artifacts.load(path).sidecar.preprocessing.size
    with tempfile.TemporaryDirectory() as folder:
        script, out = Path(folder) / "loop.py", Path(folder) / "out.json"
        script.write_text(ORT_LOOP)
        words = [sys.executable, str(script), str(path.resolve()), str(size), "--quiet", "--worker", "-o", str(out)]
        subprocess.run(words, capture_output=True, check=True)
        import pyperf

        return float(pyperf.Benchmark.load(str(out)).median()) * 1e3


def benchmark_app(path: Path, seconds: float) -> float:
    """The median latency that OpenVINO's own tool prints."""
    size = artifacts.load(path).sidecar.preprocessing.size
    words = ["-m", str(path), "-t", str(max(1, round(seconds))), "-hint", "none", "-nireq", "1", "-nstreams", "1"]
    words += ["-nthreads", "1", "-shape", f"[1,3,{size},{size}]", "-infer_precision", "f32", "-api", "sync"]
    done = subprocess.run([BIN / "benchmark_app", *words], capture_output=True, text=True, check=True)
    found = re.search(r"Median:\s+([\d.]+) ms", done.stdout)
    assert found, done.stdout
    return float(found[1])


def in_turn(name: str, path: Path, seconds: float) -> Agreement:
    """Pairs of neighbours, the first of each by chance."""
    other = {"pyperf": pyperf_loop, "benchmark_app": benchmark_app}[name]
    shuffle, ours, theirs = random.Random(0), [], []
    for index in range(PAIRS):
        if shuffle.random() < 0.5:
            ours.append(bench(path, seconds))
            theirs.append(other(path, seconds))
        else:
            theirs.append(other(path, seconds))
            ours.append(bench(path, seconds))
        print(f"{name} {index + 1} of {PAIRS}: {ours[-1]:.3f} {theirs[-1]:.3f} ms", file=sys.stderr, flush=True)
    return Agreement(name=name, bench_ms=tuple(ours), other_ms=tuple(theirs))


def overhead_pct() -> float:
    """What is added to a run that ends one millisecond after it began, in percent."""
    clock = time.perf_counter_ns

    def millisecond() -> None:
        until = clock() + 1_000_000
        while clock() < until:
            pass

    shuffle = random.Random(0)
    paces = {name: timing.settle(millisecond, 0.2, 1) for name in "ab"}
    rounds = timing.interleave(dict.fromkeys("ab", millisecond), paces, 5, shuffle, lambda name: None)
    samples = [sample for blocks in rounds.blocks.values() for block in blocks for sample in block]
    return 100 * (statistics.median(samples) - 1)


def table(result: Result) -> str:
    """Markdown: a row for each other way."""
    lines = ["| against | p50 of `bench` | the other's median | ratio | 95 % interval |", "|---|--:|--:|--:|--:|"]
    for one in result.agreements:
        found = center(one.ratios)
        ours, theirs = (f"{statistics.median(values):.3f} ms" for values in (one.bench_ms, one.other_ms))
        lines.append(f"| {one.name} | {ours} | {theirs} | {found.value:.3f} | {found.low:.3f}–{found.high:.3f} |")
    lines.append(f"\nTiming adds {result.overhead_pct:.2f} % to a run of one millisecond.")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("onnx", type=Path)
    parser.add_argument("ir", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=4.0)
    told = parser.parse_args()
    overhead = overhead_pct()
    agreements = (in_turn("pyperf", told.onnx, told.seconds), in_turn("benchmark_app", told.ir, told.seconds))
    result = Result(environment=environment(), agreements=agreements, overhead_pct=overhead)
    write_file(told.output, msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    print(table(result))


if __name__ == "__main__":
    main()
