"""Do others measure the same? `bench` beside pyperf and OpenVINO's benchmark_app; and what timing itself costs.

`python -m benchmarks.agreement ONNX IR -o benchmarks/results/MACHINE/agreement.json` runs, at the same time:

* `bench` on the ONNX artifact, and a bare loop of `InferenceSession.run` under pyperf;
* `bench` on the IR, and benchmark_app;

but only one of the two moves at any moment: each is stopped for a quarter of a second while the other goes on, so that
both meet the same moods of a shared machine. The overhead is what `bench` adds to a callable that takes one
millisecond by the clock.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from benchmarks.provenance import environment
from exporter import artifact as artifacts
from exporter.artifact.disk import write_file
from exporter.artifact.sidecar import Record
from exporter.bench import timing
from exporter.stats import center

BIN = Path(sys.executable).parent
PAIRS = 6
SLICE_S, HEAD_START_S = 0.25, 6


class Agreement(Record, frozen=True):
    """One other way of timing: medians in ms of `bench` and the other beside each other."""

    name: str
    bench_ms: tuple[float, ...]
    other_ms: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """Bench ÷ other, of each pair."""
        return [ours / theirs for ours, theirs in zip(self.bench_ms, self.other_ms, strict=True)]


class Result(Record, frozen=True):
    """All of them, and the overhead on a run of one millisecond in percent."""

    environment: dict[str, object]
    agreements: tuple[Agreement, ...]
    overhead_pct: float
    schema: int = 1


def bench(path: Path, seconds: float, folder: Path) -> list[str]:
    """The words that run `bench`."""
    words = ["--threads", "1", "--duration", str(seconds), "-o", str(folder), "--json"]
    return [str(BIN / "convnext-export"), "bench", str(path), *words]


def bench_p50(said: str) -> float:
    """What it says."""
    report = json.loads(said)
    return float(next(f["value"] for f in report["findings"] if f["metric"] == "p50_ms"))


ORT_LOOP = """
import sys, numpy as np, onnxruntime as ort, pyperf
settings = ort.SessionOptions()
settings.intra_op_num_threads = 1
session = ort.InferenceSession(sys.argv.pop(1), settings, providers=["CPUExecutionProvider"])
(given,) = session.get_inputs()
size = int(sys.argv.pop(1))
images = np.random.default_rng(0).normal(size=(1, 3, size, size)).astype(np.float32)
runner = pyperf.Runner(processes=1, values=int(sys.argv.pop(1)), warmups=20, loops=1)
runner.bench_func("run", session.run, None, {given.name: images})
"""


def pyperf_loop(path: Path, seconds: float, folder: Path) -> list[str]:
    """The words that run a bare loop under pyperf; what it measured is in the folder."""
    script = folder / "loop.py"
    script.write_text(ORT_LOOP)
    size = artifacts.load(path).sidecar.preprocessing.size
    words = ["--quiet", "--worker", "-o", str(folder / "pyperf.json")]
    return [sys.executable, str(script), str(path.resolve()), str(size), str(round(seconds * 200)), *words]


def pyperf_median(said: str, folder: Path) -> float:
    """The median in ms."""
    import pyperf

    del said
    return float(pyperf.Benchmark.load(str(folder / "pyperf.json")).median()) * 1e3


def benchmark_app(path: Path, seconds: float, folder: Path) -> list[str]:
    """The words that run OpenVINO's own tool on the model as it is, its batch left open."""
    del folder
    size = artifacts.load(path).sidecar.preprocessing.size
    words = ["-m", str(path), "-t", str(round(2 * seconds)), "-hint", "none", "-nireq", "1", "-nstreams", "1"]
    words += ["-nthreads", "1", "-data_shape", f"[1,3,{size},{size}]", "-infer_precision", "f32", "-api", "sync"]
    return [str(BIN / "benchmark_app"), *words]


def benchmark_app_median(said: str, folder: Path) -> float:
    """The median latency that it prints."""
    del folder
    found = re.search(r"Median:\s+([\d.]+) ms", said)
    assert found, said
    return float(found[1])


OTHERS = {"pyperf": (pyperf_loop, pyperf_median), "benchmark_app": (benchmark_app, benchmark_app_median)}


def alternated(first: list[str], second: list[str]) -> list[str]:
    """What two commands print that take turns until both have ended; the first, which has more to load before it
    times anything, begins some seconds earlier."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as other:
        files = (out, other)
        running: list[subprocess.Popen[bytes]] = []
        try:
            for words, file, wait in zip((first, second), files, (HEAD_START_S, 0), strict=True):
                running.append(subprocess.Popen(words, stdout=file, stderr=subprocess.DEVNULL, start_new_session=True))
                time.sleep(wait)
            for index in itertools.cycle((0, 1)):
                going = [process for process in running if process.poll() is None]
                if not going:
                    break
                for process in going:
                    moves = process is running[index] or len(going) == 1
                    os.killpg(process.pid, signal.SIGCONT if moves else signal.SIGSTOP)
                time.sleep(SLICE_S)
        finally:  # also after Ctrl-C: one of them is stopped, and would stay so for ever
            for process in running:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        assert not any(process.returncode for process in running), "one of them failed"
        for file in files:
            file.seek(0)
        return [file.read() for file in files]


def in_turn(name: str, path: Path, seconds: float) -> Agreement:
    """So many runs of the two beside each other."""
    words, median = OTHERS[name]
    ours, theirs = [], []
    for index in range(PAIRS):
        with tempfile.TemporaryDirectory() as created:
            folder = Path(created)
            said, other = alternated(bench(path, seconds, folder), words(path, seconds, folder))
            ours.append(bench_p50(said))
            theirs.append(median(other, folder))
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
    lines = ["| tool | p50 of `bench` | median of the tool | ratio | 95 % interval |", "|---|--:|--:|--:|--:|"]
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
    parser.add_argument("--seconds", type=float, default=16.0)
    arguments = parser.parse_args()
    overhead = overhead_pct()
    agreements = (
        in_turn("pyperf", arguments.onnx, arguments.seconds),
        in_turn("benchmark_app", arguments.ir, arguments.seconds),
    )
    result = Result(environment=environment(threads=1), agreements=agreements, overhead_pct=overhead)
    write_file(arguments.output, msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    print(table(result))


if __name__ == "__main__":
    main()
