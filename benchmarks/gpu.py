"""Everything that needs an NVIDIA GPU, in one go and in under eight minutes, with whatever runtimes are there.

    python -m benchmarks.gpu -o benchmarks/results/<machine>/gpu

It runs `doctor`, then for each network the product's commands: build, time beside eager PyTorch in fp32, TF32, fp16,
bf16 and compiled, verify; and last the tests that are marked `gpu`. A command that fails or would end too late is
recorded with its reason, and the rest goes on. Each report is written as soon as it is there. `--rehearse` runs the
same commands on the CPU with little time: nothing of it is a result.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.provenance import commit, environment
from exporter.artifact.disk import write_file
from exporter.backends.tensorrt import library
from exporter.machine import gpu
from exporter.report import Report
from exporter.report.tables import name

BUDGET_S = 480.0
COMMAND = Path(sys.executable).with_name("convnext-export")
VARIANTS = ("tiny", "base")
BATCHES = ("1", "64")
PRECISIONS = ("fp16", "int8", "fp32", "bf16", "fp8")  # of TensorRT; the most telling first


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """A command: the seconds that it took, its exit code (None if no time was left), the last line of its output."""

    words: tuple[str, ...]
    seconds: float
    code: int | None
    last: str


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """All steps, the machine they ran on, and the commit; a rehearsal is no result."""

    rehearsal: bool
    commit: str
    environment: dict[str, Any]
    gpu: dict[str, str] | None
    seconds: float
    steps: tuple[Step, ...]


class Runner:
    """Runs commands until the time is up, and calls `keep` with the steps after each."""

    def __init__(self, budget: float, keep: Callable[[Sequence[Step]], None] = lambda steps: None) -> None:
        self.begun, self.budget, self.keep = time.monotonic(), budget, keep
        self.steps: list[Step] = []

    @property
    def spent(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.begun

    def run(self, program: Sequence[str | Path], *words: str | Path) -> bool:
        """Run one command; True if it succeeded or its verdict was negative (exit 5)."""
        arguments = tuple(map(str, words))
        print(f"[{self.spent:4.0f} s]", *arguments, file=sys.stderr, flush=True)
        begin, code, output = time.monotonic(), None, "no time was left for it"
        if self.spent < self.budget:
            try:
                done = subprocess.run(
                    [*program, *arguments],
                    capture_output=True,
                    text=True,
                    check=False,
                    timeout=self.budget - self.spent,
                )
                code, output = done.returncode, done.stderr.strip() or done.stdout.strip()
            except subprocess.TimeoutExpired:
                output = "stopped: the time was up"
        last = output.splitlines()[-1] if output else ""
        self.steps.append(Step(words=arguments, seconds=time.monotonic() - begin, code=code, last=last[:300]))
        self.keep(self.steps)
        return code in (0, 5)


WAYS = {
    "eager": "eager PyTorch",
    "tf32": "the same in TF32",
    "eager_fp16": "the same in fp16, channels last",
    "eager_bf16": "the same in bf16, channels last",
    "compiled": "torch.compile, fp32",
}


def table(reports: Sequence[Report]) -> str:
    """Markdown: the latency of PyTorch and of the artifacts by batch size, and the artifacts' speed-up over eager."""
    lines = ["| batch | model | p50 ms | × eager | 95 % interval |", "|--:|---|--:|--:|--:|"]
    for batch, of_batch in itertools.groupby(reports, key=_case):
        ours = list(of_batch)
        for key, way in WAYS.items():
            if ours[0].find(f"{key}_p50_ms") is not None:
                lines.append(f"| {batch} | {way} | {_value(ours[0], f'{key}_p50_ms'):.2f} | | |")
        for report in ours:
            gain = report.find("speedup")
            assert gain is not None
            lines.append(
                f"| {batch} | {name(report)} | {_value(report, 'p50_ms'):.2f} | {gain.value:.2f} "
                f"| {gain.low:.2f}–{gain.high:.2f} |"
            )
    return "\n".join(lines) + "\n"


def _case(report: Report) -> str:
    latency = report.find("p50_ms")
    return latency.case.removeprefix("batch ") if latency is not None else ""


def _value(report: Report, metric: str) -> float:
    value = report.value(metric)
    assert value is not None
    return value


def build(
    runner: Runner, out: Path, weights: Sequence[str], precisions: Sequence[str]
) -> tuple[list[Path], list[Path]]:
    """Build ONNX in fp32 and fp16, and an engine of each precision with each TensorRT that is installed."""
    graphs: list[Path] = []
    for precision in ("fp32", "fp16"):
        # `linear` is the fastest form on an NVIDIA GPU (docs/forms.md).
        words = ("onnx", "--precision", precision, "--form", "linear", *weights, "--json", "-o", out / "onnx")
        if runner.run([COMMAND], *words):
            graphs += (out / "onnx").glob(f"*_{precision}.onnx")
    engines: list[Path] = []
    for flavor, precision in itertools.product(library.here(), precisions):
        extra = ("--calib-size", "32", "--even-if-slower") if precision in ("int8", "fp8") else ()
        most = ("--max-batch", str(max(BATCHES)))  # by default an engine takes at most 16 images
        words = ("trt", "--flavor", flavor, "--precision", precision, *most, *extra, *weights, "--json")
        words = (*words, "-o", out / flavor)
        if runner.run([COMMAND], *words):
            engines += (out / flavor).glob(f"*_{precision}.plan")
    return graphs, engines


def measure(runner: Runner, out: Path, weights: Sequence[str], precisions: Sequence[str], rehearsal: bool) -> None:
    """Build one network, time all of its artifacts in turn, and verify them."""
    graphs, engines = build(runner, out, weights, precisions)
    timed = graphs if rehearsal else [*graphs, *engines]
    also = () if rehearsal else ("--also", "tf32", "--also", "fp16", "--also", "bf16", "--also", "torch.compile")
    device = () if rehearsal else ("--device", "cuda")
    duration = ("--duration", "1" if rehearsal else "10")
    for batch in ("1",) if rehearsal else BATCHES:
        words = (*also, *device, *duration, *weights[:2], "--batch", batch)
        runner.run([COMMAND], "bench", *timed, *words, "-o", out / f"batch-{batch}")
    for path in [*graphs, *engines]:
        runner.run([COMMAND], "verify", path, *device, *weights[:2])


def measure_all(runner: Runner, out: Path, weights: str, rehearsal: bool) -> None:
    """Check the machine, measure each network, render the report, and run the tests that need a GPU."""
    runner.run([COMMAND], "doctor")
    variants = VARIANTS if weights.startswith("random:") else ("",)
    for variant, precisions in zip(variants, (PRECISIONS, ("fp16", "int8")), strict=False):
        named = ("--weights", weights, *(("--variant", variant) if variant else ()))
        measure(runner, out / variant, named, precisions, rehearsal)
    if reports := sorted(out.glob("**/batch-*/*.report.json")):
        runner.run([COMMAND], "report", *reports, "--format", "html", "-o", out / "report.html")
    runner.run([sys.executable, "-m", "pytest"], "-q", "-m", "gpu", "tests/backends")


def main(words: Sequence[str] | None = None) -> None:
    """Run everything and write the session, after each step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="a folder for the session and its reports")
    parser.add_argument("--weights", default="random:0", help="as the product takes them")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with little time")
    options = parser.parse_args(words)
    facts = gpu()
    if facts is None and not options.rehearse:
        sys.exit("no NVIDIA GPU here (nvidia-smi finds none); --rehearse runs the same on the CPU")
    here = environment()

    def keep(steps: Sequence[Step]) -> None:
        session = Session(
            rehearsal=options.rehearse,
            commit=commit(),
            environment=here,
            gpu=facts,
            seconds=runner.spent,
            steps=tuple(steps),
        )
        write_file(options.output / "session.json", msgspec.json.format(msgspec.json.encode(session)))

    runner = Runner(BUDGET_S, keep)
    measure_all(runner, options.output, options.weights, options.rehearse)
    for step in runner.steps:
        verdict = "too late" if step.code is None else f"exit {step.code}"
        print(
            f"{verdict:8} {step.seconds:6.1f} s  {' '.join(step.words)}{'' if step.code == 0 else f'  ({step.last})'}"
        )


if __name__ == "__main__":
    main()
