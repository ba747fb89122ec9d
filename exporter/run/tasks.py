"""Work that the processes of a Ray cluster do: shards of a verification, ranges of predictions, batches of a
calibration, recipes.

A process opens its models once, and keeps them for all tasks of a job. An error that the user can fix is a result, with
its exit code, so that no task is tried again because of it.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from exporter import __version__, predict, run
from exporter import artifact as artifacts
from exporter.artifact import Artifact, disk
from exporter.build.int8 import workers
from exporter.build.int8.workers import CalibrationPass
from exporter.errors import BadRequest, ExporterError, first_line
from exporter.predict import Ranges
from exporter.run import Outcome, RecipeRun
from exporter.run.steps import verify_options
from exporter.verify import shards
from exporter.verify.shards import Schedule

Task = Callable[[int], bytes]
COPIES = 8
"""Copies of artifacts that a machine keeps, of the jobs that were begun there last."""


@dataclass(frozen=True)
class Job:
    """What all tasks of a job have in common.

    schedule: of the shards, ranges or batches; none for recipes. artifact: its path. files: name and SHA-256 of each of
    its files and of its sidecar; none for a calibration. key: identifies the job. folder: the working folder.
    threads: `OMP_NUM_THREADS` of the process that began the job, "" where it is not set; Ray sets another one. version:
    of this tool.
    """

    schedule: Schedule | Ranges | CalibrationPass | None = None
    artifact: Path = Path()
    files: tuple[tuple[str, str], ...] = ()
    key: str = ""
    folder: Path = field(default_factory=Path.cwd)
    threads: str = field(default_factory=lambda: os.environ.get("OMP_NUM_THREADS", ""))
    version: str = __version__


@dataclass(frozen=True)
class Result:
    """What a task returns, or why it cannot, with the exit code."""

    content: bytes = b""
    error: str = ""
    exit_code: int = 0


_OPENED: dict[str, tuple[ExitStack, Task]] = {}
"""The job that is open in this process."""


def do(job: Job, contents: Sequence[Callable[[], bytes]], number: int) -> Result:
    """Do one task of a job.

    Args:
        job: its models are opened, unless this process has them open.
        contents: functions that return the files of the artifact, for a machine that does not have them; none where all
            machines have them; or, for a calibration, the ranges that it needs.
        number: of the shard, range or batch.
    """
    try:
        if job.key not in _OPENED:
            _close()
            _enter(job)
            stack = ExitStack()
            _OPENED[job.key] = stack, stack.enter_context(_opened(job, contents))
        return Result(_OPENED[job.key][1](number))
    except ExporterError as error:
        return Result(error=str(error), exit_code=error.exit_code)
    except (OSError, MemoryError) as error:
        return Result(error=f"a worker failed: {first_line(error)}", exit_code=3)


def check(job: Job, contents: Sequence[Callable[[], bytes]]) -> Result:
    """Whether this machine can do tasks of a job: it has the same versions and images; for recipes, the same version of
    this tool and the working folder. No model is opened."""
    try:
        if job.version != __version__:
            raise BadRequest(f"convnext-export {__version__}, but the job is of {job.version}; install that version")
        _enter(job)
        if isinstance(job.schedule, CalibrationPass):
            workers.refuse_others(job.schedule)
        elif isinstance(job.schedule, Schedule):
            shards.refuse_others(job.schedule, _artifact(job, contents))
        elif job.schedule is not None:
            predict.refuse_others(job.schedule, _artifact(job, contents))
        return Result()
    except ExporterError as error:
        return Result(error=str(error), exit_code=error.exit_code)
    except (OSError, MemoryError) as error:
        return Result(error=f"the check failed: {first_line(error)}", exit_code=3)


def build(job: Job, recipe_run: RecipeRun) -> tuple[Outcome, Schedule | None]:
    """Build the artifact of a recipe, and make the schedule of its verification, if there are no errors.

    `OMP_NUM_THREADS` stays as Ray sets it, the cores of this task, because several builds can share a machine.
    """
    failed = Outcome(recipe_run.name)
    with run.recording_error(failed):
        _enter_folder(job.folder)
        outcome, schedule = run.build_only(recipe_run), None
        assert outcome.artifact is not None
        with run.recording_error(outcome):
            schedule = shards.schedule(outcome.artifact, verify_options(recipe_run.recipe))
        return outcome, schedule
    return failed, None


def bench(job: Job, recipe_run: RecipeRun) -> Outcome:
    """Time the artifact of a recipe on this machine, and write the report."""
    failed = Outcome(recipe_run.name)
    with run.recording_error(failed):
        _enter(job)
        return run.bench_and_report(recipe_run)
    return failed


def _close() -> None:
    for stack, _ in _OPENED.values():
        stack.close()
    _OPENED.clear()


def _enter(job: Job) -> None:
    """Take the working folder and the number of threads of a job.

    Raises: BadRequest where the folder is missing.
    """
    if job.threads:
        os.environ["OMP_NUM_THREADS"] = job.threads
    else:
        os.environ.pop("OMP_NUM_THREADS", None)
    _enter_folder(job.folder)


def _enter_folder(folder: Path) -> None:
    try:
        os.chdir(folder)
    except OSError as error:
        raise BadRequest(
            f"working folder {folder}: {error.strerror}; mount it under the same path on every machine"
        ) from None


@contextmanager
def _opened(job: Job, contents: Sequence[Callable[[], bytes]]) -> Iterator[Task]:
    """The function that does a task by its number, with the models of a job open."""
    if isinstance(job.schedule, CalibrationPass):
        with workers.open_batches(job.schedule, workers.decode(contents[0]())) as measure:
            yield lambda number: workers.encode(measure(number))
    elif isinstance(job.schedule, Schedule):
        with shards.open_worker(job.schedule, _artifact(job, contents)) as worker:
            yield lambda number: shards.encode(worker.measure(number))
    else:
        assert job.schedule is not None
        with predict.open_ranges(job.schedule, _artifact(job, contents)) as chunks:
            yield lambda number: msgspec.msgpack.encode(list(chunks(number)))


def _artifact(job: Job, contents: Sequence[Callable[[], bytes]]) -> Artifact:
    """The artifact at its own path if its files are the same there, else a copy in this user's cache."""
    wanted = dict(job.files)
    with suppress(BadRequest, OSError):
        artifact = artifacts.load(job.artifact)
        if {file.name: file.sha256 for file in artifact.sidecar.files}.items() <= wanted.items():
            return artifact
    if not contents:
        raise BadRequest(
            f"{job.artifact}: missing on {platform.node()}, or not the artifact that was built; mount the same working "
            "folder on every machine"
        )
    folder = disk.cache_folder() / "artifacts" / job.key
    _make_room(folder)
    for (name, digest), content in zip(job.files, contents, strict=True):
        if not (folder / name).is_file() or artifacts.sha256_file(folder / name) != digest:
            disk.write_file(folder / name, content())
    return artifacts.load(folder / job.artifact.name)


def _make_room(folder: Path) -> None:
    """Make the folder of a copy, or mark it as used now, and remove those that were used longest ago beyond `COPIES`.

    A process that has such a copy open can still read it.

    Raises: Unavailable or BadRequest for a cache that cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
    except OSError as error:
        raise disk.write_error(error, folder.parent, "set XDG_CACHE_HOME to another folder") from None
    used: dict[Path, float] = {}
    for copy in folder.parent.iterdir():
        with suppress(OSError):  # another process removed it
            used[copy] = copy.stat().st_mtime
    used.pop(folder, None)
    for copy in sorted(used, key=lambda copy: used[copy], reverse=True)[COPIES - 1 :]:
        shutil.rmtree(copy, ignore_errors=True)
