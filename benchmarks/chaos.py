"""A verification on a Ray cluster while processes of it are killed and its disk is full: nothing wrong, nothing lost,
nothing counted twice.

    python -m benchmarks.chaos ARTIFACT FOLDER --runs 50 -o build/chaos.json

In each run one to three processes are killed at random moments with SIGKILL: a worker, the raylet (Ray's process for a
machine), or the command itself; or the file system of the report, the shards and the caches, which is small and in
memory (this needs the right to mount), is filled until the command ends. The command is typed again until it ends with
a report, which must have the bytes of `verify` on one machine. A shard that was stored must not be measured again.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import psutil

from benchmarks.provenance import environment
from exporter.artifact.disk import write_file
from exporter.artifact.sidecar import Record
from exporter.progress import note

COMMAND = Path(sys.executable).with_name("convnext-export")
KINDS = {"worker": "ray::_do", "raylet": "raylet/raylet", "command": "", "disk": ""}
DISK = "64m"
SHARD = 16
TRIES = 6
LIMIT_S = 300


class Run(Record, frozen=True):
    """What was killed or filled, how often the command was typed, the shards in all, how many commands found stored and
    how many they measured although they were stored, both added up, and what was wrong ("" is nothing)."""

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
        """One row: runs, processes killed and disks filled, commands, shards kept, and what was wrong."""
        killed = Counter(kind for run in self.runs for kind in run.killed)
        kinds = ", ".join(f"{killed[kind]} {name}" for kind, name in NAMES.items())
        wrong = sum(bool(run.wrong) for run in self.runs)
        kept, repeated = (sum(getattr(run, name) for run in self.runs) for name in ("kept", "repeated"))
        head = (
            "| runs | killed or filled | commands | shards kept for the next command | measured again | wrong or lost |"
        )
        row = (
            f"| {len(self.runs)} | {kinds} | {sum(run.commands for run in self.runs)} | {kept} | {repeated} | {wrong} |"
        )
        return f"{head}\n|--:|---|--:|--:|--:|--:|\n{row}\n"


NAMES = {"worker": "workers", "raylet": "raylets", "command": "commands", "disk": "disks"}


def descendants(command: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """The processes that a command started, and those that they started."""
    with suppress(psutil.NoSuchProcess):
        return {process.pid: process for process in psutil.Process(command.pid).children(recursive=True)}
    return {}


@contextmanager
def small_disk() -> Iterator[Path]:
    """A small file system in memory."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", folder], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "-l", folder], check=True)


def fill(file: Path) -> None:
    """Write to a file until its disk is full."""
    with suppress(OSError), file.open("wb", buffering=0) as filling:
        while True:
            filling.write(bytes(4096))


def disturb(kind: str, command: subprocess.Popen[str], filler: Path) -> bool:
    """Fill the disk, or kill the command or a process of a kind that it started; False where there is none."""
    if kind == "disk":
        fill(filler)
        return True
    if kind == "command":
        command.kill()
        return True
    for process in descendants(command).values():
        with suppress(psutil.Error):
            if KINDS[kind] in " ".join(process.cmdline()):
                process.kill()
                return True
    return False


def run(artifact: Path, folder: Path, expected: bytes, total: int, chance: random.Random) -> Run:
    """One verification with kills and full disks."""
    with small_disk() as disk:
        out = disk / "report.json"
        stored = out.with_name(f".{out.name}.shards")
        words = [COMMAND, "verify", artifact, "--data", folder, "--on", "ray", "--shard-size", str(SHARD), "-o", out]
        kinds = [chance.choice(list(KINDS)) for _ in range(chance.randint(1, 3))]
        killed: list[str] = []
        kept = repeated = commands = 0
        while not out.exists() and commands < TRIES:
            before = len(list(stored.rglob("*.shard")))
            text, now = _disturbed(list(map(str, words)), kinds[len(killed) :], disk, chance)
            commands, killed, kept = commands + 1, [*killed, *now], kept + before
            if measuring := re.search(r"in (\d+) shards of up to", text):
                repeated += int(measuring[1]) - (total - before)
        wrong = "" if out.exists() and out.read_bytes() == expected else "other bytes" if out.exists() else "no report"
        return Run(tuple(killed), commands, total, kept, repeated, wrong)


def _disturbed(words: list[str], kinds: list[str], disk: Path, chance: random.Random) -> tuple[str, list[str]]:
    """Type a command and disturb it in these ways while it runs. Return its messages, and what was killed or filled."""
    killed, end, filler = [], time.monotonic() + LIMIT_S, disk / "filler"
    caches = {**os.environ, "XDG_CACHE_HOME": str(disk / "cache")}
    with tempfile.TemporaryFile("w+") as messages:
        command = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=messages, text=True, env=caches)
        started: dict[int, psutil.Process] = {}
        moments = [(kind, time.monotonic() + chance.uniform(2, 10) * (index + 1)) for index, kind in enumerate(kinds)]
        while command.poll() is None and time.monotonic() < end:
            started |= descendants(command)
            if moments and time.monotonic() > moments[0][1] and disturb(moments[0][0], command, filler):
                killed.append(moments.pop(0)[0])
            time.sleep(0.05)
        command.kill()
        command.wait()
        filler.unlink(missing_ok=True)
        for process in started.values():  # what a killed command left
            with suppress(psutil.Error):
                process.kill()
        messages.seek(0)
        return " ".join(messages.read().split()), killed


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
    subprocess.run(alone, stdout=subprocess.DEVNULL, check=True)
    expected = report.read_bytes()
    images = int(next(one["value"] for one in msgspec.json.decode(expected)["findings"] if one["metric"] == "images"))
    runs: list[Run] = []
    for number in range(options.runs):
        runs.append(run(options.artifact, options.folder, expected, -(-images // SHARD), chance))
        note(f"{number + 1} of {options.runs}: {runs[-1]}")
        result = Result(environment=environment(), images=images, runs=tuple(runs))
        write_file(options.out, msgspec.json.format(msgspec.json.encode(result), indent=1))
    sys.stdout.write(result.table())
    return int(any(one.wrong or one.repeated for one in runs))


if __name__ == "__main__":
    sys.exit(main())
