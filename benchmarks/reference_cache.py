"""How long `verify` takes for 2 and for 8 artifacts of one network, with PyTorch's answers cached and without.

    python -m benchmarks.reference_cache WEIGHTS FOLDER -o FILE

Each `verify` is a process of its own, with all cores. With the cache, all artifacts share one that is empty at first;
without, each artifact gets an empty one. The two take turns, artifact by artifact.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.provenance import environment
from exporter.artifact.disk import write_file
from exporter.artifact.sidecar import Record
from exporter.model import FORMS

COMMAND = Path(sys.executable).with_name("convnext-export")
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml"}
ARTIFACTS = tuple((command, form) for form in FORMS for command in SUFFIXES)
FEW = 2


class Result(Record, frozen=True):
    """Seconds of `verify` for each artifact, in order, with the cache and without."""

    environment: dict[str, Any]
    weights: str
    images: int
    cached: dict[str, float]
    uncached: dict[str, float]
    schema: int = 1

    def table(self) -> str:
        """A row with the cache and one without: seconds for the first artifacts, for all, and their ratio."""
        head = f"| PyTorch's answers | {FEW} artifacts | {len(self.cached)} artifacts | ratio |\n|---|--:|--:|--:|"
        rows = [_row("cached", self.cached), _row("computed for each artifact", self.uncached)]
        return "\n".join([head, *rows]) + "\n"


def _row(name: str, seconds: dict[str, float]) -> str:
    few, every = sum(list(seconds.values())[:FEW]), sum(seconds.values())
    return f"| {name} | {few:.1f} s | {every:.1f} s | {every / few:.2f} |"


def run(cache: Path, *words: object) -> float:
    """Run the command with a cache folder, and return its seconds; a failed check does not matter here."""
    settings = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    begin = time.perf_counter()
    env = {**settings, "XDG_CACHE_HOME": str(cache)}
    done = subprocess.run([COMMAND, *map(str, words)], env=env, stdout=subprocess.DEVNULL, check=False)
    seconds = time.perf_counter() - begin
    if done.returncode not in (0, 5):
        sys.exit(done.returncode)
    return seconds


def measure(weights: Path, source: Path, images: int | None) -> Result:
    """Build the artifacts, and verify each with the cache and without."""
    cached, uncached = dict[str, float](), dict[str, float]()
    count: tuple[object, ...] = ("--samples", images) if images else ()
    with tempfile.TemporaryDirectory() as folder:
        shared = Path(folder, "shared")
        for index, (command, form) in enumerate(ARTIFACTS):
            name, out, alone = f"{command} {form}", Path(folder, str(index)), Path(folder, f"alone{index}")
            run(alone, command, "--weights", weights, "--form", form, "-o", out)
            (artifact,) = (path for path in out.iterdir() if path.suffix == SUFFIXES[command])
            ways = [(cached, shared), (uncached, alone)]
            for seconds, cache in ways if index % 2 else reversed(ways):
                seconds[name] = run(cache, "verify", artifact, "--data", source, *count)
            print(f"{name}: {cached[name]:.1f} s, uncached {uncached[name]:.1f} s", file=sys.stderr, flush=True)
        report = msgspec.json.decode(Path(f"{artifact}.report.json").read_bytes())
    seen = next(finding["value"] for finding in report["findings"] if finding["metric"] == "images")
    return Result(environment=environment(), weights=weights.stem, images=int(seen), cached=cached, uncached=uncached)


def main() -> None:
    """Measure, write the result, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", type=Path, default=Path("build/reference_cache.json"))
    parser.add_argument("--images", type=int, help="so many of the folder, evenly spread; by default all")
    options = parser.parse_args()
    result = measure(options.weights, options.folder, options.images)
    write_file(options.o, msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    print(result.table())


if __name__ == "__main__":
    main()
