"""Time and peak memory of whole commands, as a user meets them.

`python -m benchmarks.footprint -o benchmarks/results/MACHINE/footprint.json` runs each command as a process of its
own and keeps every run: seconds of wall clock, and the peak of resident memory as the kernel counted it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
from PIL import Image

from benchmarks.provenance import environment
from exporter.artifact.disk import write_file
from exporter.artifact.sidecar import Record
from exporter.data.synthetic import dead_leaves

COMMAND = Path(sys.executable).with_name("convnext-export")
FEW, MANY = 400, 4000


class Run(Record, frozen=True):
    """One run of a command: wall clock in seconds, peak resident memory in bytes."""

    seconds: float
    peak_bytes: int


class Case(Record, frozen=True):
    """A command and its runs; `weights_bytes` is what its model weighs in fp32."""

    words: tuple[str, ...]
    runs: tuple[Run, ...]
    weights_bytes: int | None = None

    @property
    def seconds(self) -> float:
        """Median wall clock."""
        return statistics.median(run.seconds for run in self.runs)

    @property
    def peak_bytes(self) -> float:
        """Median peak memory."""
        return statistics.median(run.peak_bytes for run in self.runs)


class Footprint(Record, frozen=True):
    """All cases, and the machine they ran on."""

    environment: dict[str, object]
    cases: tuple[Case, ...]
    schema: int = 1


def run(words: tuple[str, ...], folder: Path) -> Run:
    """Type a command in a folder and wait for it."""
    print("$ convnext-export", *words, file=sys.stderr, flush=True)
    start = time.perf_counter()
    process = subprocess.Popen([COMMAND, *words], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"convnext-export {' '.join(words)}: exit code {process.returncode}")
    return Run(seconds=seconds, peak_bytes=usage.ru_maxrss * 1024)


def repeat(words: str, folder: Path, times: int, fresh: str = "", weights: int | None = None) -> Case:
    """A command several times over; what it writes to `fresh` is removed before each."""
    runs = []
    for _ in range(times):
        if fresh:
            shutil.rmtree(folder / fresh, ignore_errors=True)
        runs.append(run(tuple(words.split()), folder))
    return Case(words=tuple(words.split()), runs=tuple(runs), weights_bytes=weights)


def write_photos(folder: Path, count: int) -> None:
    """So many image files; a hundred different ones, over and over."""
    folder.mkdir(parents=True)
    for index in range(count):
        path = folder / f"{index:05}.png"
        if index < 100:
            Image.fromarray(dead_leaves(160, index)).save(path)
        else:
            shutil.copy(folder / f"{index % 100:05}.png", path)


def cases(folder: Path) -> list[Case]:
    """Every claim about time and memory."""
    huge = 660_289_640 * 4
    found = [
        repeat("--help", folder, 7),
        repeat("onnx --variant tiny --weights random:0 -o tiny", folder, 3, "tiny", 28_589_128 * 4),
        repeat("onnx --variant v2_huge --weights random:0 -o huge", folder, 1, "huge", huge),
        repeat("verify huge/v2_huge_fp32.onnx", folder, 1, weights=huge),
    ]
    shutil.rmtree(folder / "huge")
    run(("onnx", "--variant", "atto", "--weights", "random:0", "--imgsz", "64", "-o", "atto"), folder)
    for count in (FEW, MANY):
        write_photos(folder / f"photos{count}", count)
        found.append(repeat(f"verify atto/atto_fp32.onnx --data photos{count}", folder, 3))
    return found


def table(footprint: Footprint) -> str:
    """Markdown: a row per command."""
    lines = ["| command | seconds | peak memory | × its weights |", "|---|--:|--:|--:|"]
    for case in footprint.cases:
        share = f"{case.peak_bytes / case.weights_bytes:.2f}" if case.weights_bytes else ""
        words = " ".join(case.words)
        lines.append(f"| `{words}` | {case.seconds:.2f} | {case.peak_bytes / 1e6:,.0f} MB | {share} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run every case and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    output = parser.parse_args().output.resolve()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        footprint = Footprint(environment=environment(), cases=tuple(cases(Path(folder))))
    write_file(output, msgspec.json.format(msgspec.json.encode(footprint), indent=1) + b"\n")
    print(table(footprint))


if __name__ == "__main__":
    main()
