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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from exporter.artifact.disk import write_file
from exporter.backends import environment
from exporter.backends.tensorrt import library
from exporter.git import git
from exporter.machine import gpu

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
    """Types commands until the time is up."""

    def __init__(self, budget: float) -> None:
        self.begun, self.budget = time.monotonic(), budget
        self.steps: list[Step] = []

    @property
    def spent(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.begun

    def type(self, program: Sequence[str | Path], *words: str | Path) -> bool:
        """Type one command; True when it did what it should (a verdict that does not hold is one, too)."""
        told = tuple(map(str, words))
        print(f"[{self.spent:4.0f} s]", *told, file=sys.stderr, flush=True)
        begin, code, said = time.monotonic(), None, "no time was left for it"
        if self.spent < self.budget:
            try:
                done = subprocess.run(
                    [*program, *told], capture_output=True, text=True, check=False, timeout=self.budget - self.spent
                )
                code, said = done.returncode, done.stderr.strip() or done.stdout.strip()
            except subprocess.TimeoutExpired:
                said = "stopped: the time was up"
        last = said.splitlines()[-1] if said else ""
        self.steps.append(Step(words=told, seconds=time.monotonic() - begin, code=code, last=last[:300]))
        return code in (0, 5)


def build(typist: Typist, out: Path, common: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """Build ONNX for ONNX Runtime, and a plan of each precision with each flavor that is here: (graphs, plans)."""
    made: list[Path] = []
    for precision in ("fp32", "fp16"):
        if typist.type([COMMAND], "onnx", "--precision", precision, *common, "-o", out / "onnx"):
            made += (out / "onnx").glob(f"*_{precision}.onnx")
    plans: list[Path] = []
    for flavor, precision in itertools.product(library.here(), PRECISIONS):
        extra = ("--calib-size", "32") if precision in ("int8", "fp8") else ()
        words = ("trt", "--flavor", flavor, "--precision", precision, *extra, *common, "-o", out / flavor)
        if typist.type([COMMAND], *words):
            plans += (out / flavor).glob(f"*_{precision}.plan")
    return made, plans


def measure(typist: Typist, out: Path, weights: str, device: str, seconds: float) -> None:
    """Type everything: build, verify, time all of it in turn, report, and the tests that need a GPU."""
    made, plans = build(typist, out, ("--weights", weights, "--json"))
    for path in [*made, *plans]:
        typist.type([COMMAND], "verify", path, "--device", device, "--weights", weights)
    rehearsal = device == "cpu"
    timed = made if rehearsal else [*made, *plans]
    also = () if rehearsal else ("--also", "tf32", "--also", "fp16", "--also", "torch.compile")
    told = ("--device", device, "--duration", str(seconds), "--weights", weights)
    for batch in ("1",) if rehearsal else ("1", "8"):
        typist.type([COMMAND], "bench", *timed, *also, *told, "--batch", batch, "-o", out / f"batch-{batch}")
    if reports := sorted(out.glob("batch-*/*.report.json")):
        typist.type([COMMAND], "report", *reports, "--format", "html", "-o", out / "report.html")
    typist.type([sys.executable, "-m", "pytest"], "-q", "-m", "gpu", "tests/backends")


def main(words: Sequence[str] | None = None) -> None:
    """Type everything and write the session down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="a folder for the session and its reports")
    parser.add_argument("--weights", default="random:0", help="as the product takes them")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with little time")
    told = parser.parse_args(words)
    found = gpu()
    if found is None and not told.rehearse:
        sys.exit("no NVIDIA GPU here (nvidia-smi tells of none); --rehearse types the same on the CPU")
    typist = Typist(BUDGET_S)
    measure(typist, told.output, told.weights, "cpu" if told.rehearse else "cuda", 1.0 if told.rehearse else 20.0)
    session = Session(
        rehearsal=told.rehearse,
        commit=os.environ.get("GITHUB_SHA") or git("rev-parse", "--short=12", "HEAD", failed="no commit"),
        environment=environment(),
        gpu=found,
        seconds=typist.spent,
        steps=tuple(typist.steps),
    )
    write_file(told.output / "session.json", msgspec.json.format(msgspec.json.encode(session)))
    for step in session.steps:
        verdict = "too late" if step.code is None else f"exit {step.code}"
        print(
            f"{verdict:8} {step.seconds:6.1f} s  {' '.join(step.words)}{'' if step.code == 0 else f'  ({step.last})'}"
        )


if __name__ == "__main__":
    main()
