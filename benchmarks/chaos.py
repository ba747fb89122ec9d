"""A verification on a Ray cluster while processes of it are killed: nothing wrong, nothing lost, nothing counted twice.

    python -m benchmarks.chaos ARTIFACT FOLDER --runs 50 -o build/chaos.json

In each run one to three processes are killed at random moments with SIGKILL: a worker, the raylet (Ray's process for a
machine), or the command itself. The command is typed again until it ends with a report, which must have the bytes of
`verify` on one machine. A shard that was stored must not be measured again.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import psutil

from benchmarks.provenance import environment
from exporter.artifact.disk import write_file
from exporter.artifact.sidecar import Record
from exporter.progress import note

COMMAND = Path(sys.executable).with_name("convnext-export")
KINDS = {"worker": "ray::_do", "raylet": "raylet/raylet", "command": ""}
SHARD = 16
TRIES = 6
LIMIT_S = 300


class Run(Record, frozen=True):
    """What was killed, how often the command was typed, the shards in all, those that a later command found stored and
    those that it measured although they were stored, and what was wrong ("" is nothing)."""

    killed: tuple[str, ...]
    commands: int
    shards: int
    kept: int
    repeated: int
    wrong: str = ""


class Result(Record, frozen=True):
    """All runs, and the machine."""

    environment: dict[str, Any]
    images: int
    runs: tuple[Run, ...]
    schema: int = 1

    def table(self) -> str:
        """One row: runs, processes killed by kind, commands, shards kept, and what was wrong."""
        killed = Counter(kind for run in self.runs for kind in run.killed)
        kinds = ", ".join(f"{killed[kind]} {name}" for kind, name in NAMES.items())
        wrong = sum(bool(run.wrong) for run in self.runs)
        kept, repeated = (sum(getattr(run, name) for run in self.runs) for name in ("kept", "repeated"))
        head = "| runs | killed | commands | shards kept for the next command | measured again | wrong or lost |"
        row = (
            f"| {len(self.runs)} | {kinds} | {sum(run.commands for run in self.runs)} | {kept} | {repeated} | {wrong} |"
        )
        return f"{head}\n|--:|---|--:|--:|--:|--:|\n{row}\n"


NAMES = {"worker": "workers", "raylet": "raylets", "command": "commands"}


def stored(folder: Path) -> dict[str, int]:
    """The stored shards with the time of their files."""
    times = {}
    for path in folder.glob("shards/*.shard"):
        with suppress(FileNotFoundError):
            times[path.name] = path.stat().st_mtime_ns
    return times


def kill(kind: str, command: subprocess.Popen[bytes]) -> bool:
    """Kill a process of a kind that the command started, or itself; False where there is none."""
    if kind == "command":
        command.kill()
        return True
    for process in psutil.process_iter(["cmdline"]):
        if KINDS[kind] in " ".join(process.info["cmdline"] or []):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
                return True
    return False


def clear() -> None:
    """End what a killed command left running."""
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or [])
        if process.pid != os.getpid() and any(
            part in words for part in ("ray::", "raylet", "gcs_server", "/ray/_private")
        ):
            with suppress(psutil.NoSuchProcess):
                process.kill()


def run(artifact: Path, folder: Path, expected: bytes, chance: random.Random) -> Run:
    """One verification with kills."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        work = Path(temporary)
        out = work / "report.json"
        shards = out.with_name(f".{out.name}.shards")
        words = [COMMAND, "verify", artifact, "--data", folder, "--on", "ray", "--shard-size", str(SHARD), "-o", out]
        kinds = [chance.choice(list(KINDS)) for _ in range(chance.randint(1, 3))]
        killed: list[str] = []
        kept = repeated = commands = total = 0
        while not out.exists() and commands < TRIES:
            before = stored(shards)
            command = subprocess.Popen(list(map(str, words)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            commands += 1
            killed += _disturb(command, kinds[len(killed) :], chance)
            after = stored(shards)
            kept += len(before)
            repeated += sum(after[name] != time for name, time in before.items() if name in after)
            total = max(total, len(after))
            clear()
        wrong = "" if out.exists() and out.read_bytes() == expected else "other bytes" if out.exists() else "no report"
        return Run(tuple(killed), commands, total, kept, repeated, wrong)


def _disturb(command: subprocess.Popen[bytes], kinds: list[str], chance: random.Random) -> list[str]:
    """Kill processes of these kinds while a command runs, and return what was killed when it has ended."""
    killed, end = [], time.monotonic() + LIMIT_S
    for kind in kinds:
        moment = time.monotonic() + chance.uniform(2, 20)
        while time.monotonic() < moment and command.poll() is None:
            time.sleep(0.05)
        while command.poll() is None and time.monotonic() < end:
            if kill(kind, command):
                killed.append(kind)
                break
            time.sleep(0.05)
    try:
        command.wait(max(1.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        command.kill()
        command.wait()
    return killed


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--out", type=Path, default=Path("build/chaos.json"))
    options = parser.parse_args()
    chance = random.Random(options.seed)
    report = Path(tempfile.mkdtemp()) / "report.json"
    alone = [COMMAND, "verify", options.artifact, "--data", options.folder, "-o", report]
    for _ in range(2):  # the second report has the accuracy that the first one wrote to the sidecar
        subprocess.run(alone, stdout=subprocess.DEVNULL, check=True)
    expected = report.read_bytes()
    images = int(next(one["value"] for one in msgspec.json.decode(expected)["findings"] if one["metric"] == "images"))
    runs: list[Run] = []
    for number in range(options.runs):
        runs.append(run(options.artifact, options.folder, expected, chance))
        note(f"{number + 1} of {options.runs}: {runs[-1]}")
        result = Result(environment=environment(), images=images, runs=tuple(runs))
        write_file(options.out, msgspec.json.format(msgspec.json.encode(result), indent=1))
    sys.stdout.write(result.table())
    return int(any(one.wrong or one.repeated for one in runs))


if __name__ == "__main__":
    sys.exit(main())
