"""Everything that needs an NVIDIA GPU, in one go and in under eight minutes, with whatever runtimes are there.

    python -m benchmarks.gpu -o benchmarks/results/<machine>/gpu

The product's own commands are typed: build, verify, time beside eager PyTorch in fp32, TF32, fp16 and compiled, and the
tests that are marked `gpu`. What fails or would come too late is written down with its reason, and the rest goes on.
`--rehearse` types the same commands on the CPU with a small model and little time: nothing of it is a result.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from exporter.artifact.disk import write_file
from exporter.backends import environment
from exporter.backends.tensorrt import library
from exporter.git import git
from exporter.machine import gpu
from exporter.report import Report
from exporter.report.tables import name

BUDGET_S = 480.0
COMMAND = Path(sys.executable).with_name("convnext-export")
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One command that was typed: how long it took, its exit code (None when it came too late), its last line."""

    words: tuple[str, ...]
    seconds: float
    code: int | None
    last: str


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """All steps, the machine they were typed on, and the commit; a rehearsal is no result."""

    rehearsal: bool
    commit: str
    environment: dict[str, Any]
    gpu: dict[str, str] | None
    seconds: float
    steps: tuple[Step, ...]


class Typist:
    """Runs commands until the time is up, and calls `keep` with the steps after each."""

    def __init__(self, budget: float, keep: Callable[[Sequence[Step]], None] = lambda steps: None) -> None:
        self.begun, self.budget, self.keep = time.monotonic(), budget, keep
        self.steps: list[Step] = []

    @property
    def spent(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.begun

    def type(self, program: Sequence[str | Path], *words: str | Path) -> bool:
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
    "compiled": "torch.compile, fp32",
}


def table(reports: Sequence[Report]) -> str:
    """Markdown: the latency of PyTorch and of the artifacts by batch size, and the artifacts' speed-up over eager."""
    lines = ["| batch | model | p50 ms | × eager | 95 % interval |", "|--:|---|--:|--:|--:|"]
    for batch, of_batch in itertools.groupby(reports, key=_case):
        ours = list(of_batch)
        for key, way in WAYS.items():
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


def build(typist: Typist, out: Path, common: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """Build ONNX for ONNX Runtime, and a plan of each precision with each flavor that is here: (graphs, plans)."""
    graphs: list[Path] = []
    for precision in ("fp32", "fp16"):
        # `linear` is the fastest form on an NVIDIA GPU (docs/forms.md).
        words = ("onnx", "--precision", precision, "--form", "linear", *common, "-o", out / "onnx")
        if typist.type([COMMAND], *words):
            graphs += (out / "onnx").glob(f"*_{precision}.onnx")
    plans: list[Path] = []
    for flavor, precision in itertools.product(library.here(), PRECISIONS):
        extra = ("--calib-size", "32") if precision in ("int8", "fp8") else ()
        words = ("trt", "--flavor", flavor, "--precision", precision, *extra, *common, "-o", out / flavor)
        if typist.type([COMMAND], *words):
            plans += (out / flavor).glob(f"*_{precision}.plan")
    return graphs, plans


def measure(typist: Typist, out: Path, weights: str, device: str, seconds: float) -> None:
    """Run everything: build, verify, time all of it in turn, report, and the tests that need a GPU."""
    graphs, plans = build(typist, out, ("--weights", weights, "--json"))
    for path in [*graphs, *plans]:
        typist.type([COMMAND], "verify", path, "--device", device, "--weights", weights)
    rehearsal = device == "cpu"
    timed = graphs if rehearsal else [*graphs, *plans]
    also = () if rehearsal else ("--also", "tf32", "--also", "fp16", "--also", "torch.compile")
    common = ("--device", device, "--duration", str(seconds), "--weights", weights)
    for batch in ("1",) if rehearsal else ("1", "8"):
        typist.type([COMMAND], "bench", *timed, *also, *common, "--batch", batch, "-o", out / f"batch-{batch}")
    if reports := sorted(out.glob("batch-*/*.report.json")):
        typist.type([COMMAND], "report", *reports, "--format", "html", "-o", out / "report.html")
    typist.type([sys.executable, "-m", "pytest"], "-q", "-m", "gpu", "tests/backends")


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
    commit = os.environ.get("GITHUB_SHA") or git("rev-parse", "--short=12", "HEAD", failed="no commit")
    here = environment()

    def keep(steps: Sequence[Step]) -> None:
        session = Session(
            rehearsal=options.rehearse,
            commit=commit,
            environment=here,
            gpu=facts,
            seconds=typist.spent,
            steps=tuple(steps),
        )
        write_file(options.output / "session.json", msgspec.json.format(msgspec.json.encode(session)))

    typist = Typist(BUDGET_S, keep)
    measure(
        typist,
        options.output,
        options.weights,
        "cpu" if options.rehearse else "cuda",
        1.0 if options.rehearse else 20.0,
    )
    for step in typist.steps:
        verdict = "too late" if step.code is None else f"exit {step.code}"
        print(
            f"{verdict:8} {step.seconds:6.1f} s  {' '.join(step.words)}{'' if step.code == 0 else f'  ({step.last})'}"
        )


if __name__ == "__main__":
    main()
