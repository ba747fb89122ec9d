"""A verification in a folder: its schedule, a copy of the artifact, and the shards that were measured.

The shards can be measured anywhere and in any order, by commands (`measure`) or by a cluster (`cluster`).
`Folder.merged` is the report of all of them.
"""

from __future__ import annotations

import hashlib
import shlex
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path

import msgspec

from exporter import artifact as artifacts
from exporter.artifact import Artifact, disk, sealed, sidecar_path
from exporter.data.fingerprint import fingerprint
from exporter.errors import BadRequest, some
from exporter.progress import note, step, track
from exporter.report import Report
from exporter.verify import VerifyOptions, graphs_of, shards
from exporter.verify.shards import Schedule, Shard

COMMANDS = "commands.txt"
REMEDY = "measure the shard again"


class Folder:
    """The folder of a verification in shards."""

    def __init__(self, path: Path, schedule: Schedule) -> None:
        self.path, self.schedule, self.key = path, schedule, schedule.key

    @property
    def artifact_path(self) -> Path:
        """The copy of the artifact."""
        return self.path / "artifact" / Path(self.schedule.artifact).name

    def write(self, shard: Shard) -> None:
        """Store a shard.

        Raises: Unavailable when the disk is full.
        """
        self.store(shard.number, shards.encode(shard))

    def store(self, number: int, content: bytes) -> None:
        """Store an encoded shard.

        Raises: Unavailable when the disk is full.
        """
        sealed.write_bytes(self._file(number), self._key(number), content)

    def read(self, number: int) -> Shard | None:
        """A shard, or None if it was not measured or its file is damaged or of another schedule."""
        content = sealed.read_bytes(self._file(number), self._key(number), REMEDY)
        return None if content is None else shards.decode(content)

    def missing(self) -> list[int]:
        """The numbers of the shards that must be measured."""
        return [number for number in range(self.schedule.count) if not self.has(number)]

    def merged(self, artifact: Artifact) -> Report:
        """The report of all shards.

        Raises: BadRequest for missing or damaged shards, and where no image could be read.
        """
        if missing := self.missing():
            numbers = some(_ranges(missing), most=20)
            raise BadRequest(
                f"{self.path}: {len(missing)} of {self.schedule.count} shards are missing: {numbers}; run their lines "
                f"of {COMMANDS}, and copy the files of shards/ here"
            )

        def read(number: int) -> Shard:
            shard = self.read(number)
            assert shard is not None
            return shard

        return shards.merged(self.schedule, artifact, read)

    def has(self, number: int) -> bool:
        """Whether a shard was measured and its file is whole."""
        return sealed.read_bytes(self._file(number), self._key(number), REMEDY) is not None

    def _file(self, number: int) -> Path:
        return self.path / "shards" / f"{number:06d}.shard"

    def _key(self, number: int) -> bytes:
        return self.key + number.to_bytes(8, "big")


def create(path: Path, schedule: Schedule) -> Folder:
    """The folder of a schedule, new or continued: shards of the same schedule are kept.

    Raises: BadRequest for a folder that has something else, or shards of another schedule; for one that cannot be
        written.
    """
    file, others = path / "schedule.json", f"{path}: expected a new or empty folder, or one of the same schedule"
    content = msgspec.json.format(msgspec.json.encode(schedule, order="deterministic"), indent=1)
    if file.is_file():
        read_schedule(path)  # refuses a file that is none of this tool
        stored = sorted((path / "shards").glob("[0-9]*.shard"))
        if stored and file.read_bytes() != content:
            raise BadRequest(f"{others}; it has {len(stored)} shards of another one, so give another folder")
    elif path.exists() and (not path.is_dir() or any(entry.name != ".lock" for entry in path.iterdir())):
        raise BadRequest(f"{others}; give another")
    disk.write_file(file, content)
    return _noted(Folder(path, schedule))


def create_internal(path: Path, schedule: Schedule) -> Folder:
    """The subfolder of `path` for a schedule and its images, with the shards that are stored there. All other
    subfolders are removed, because only this tool writes to `path`.

    Raises: BadRequest for images that do not exist; BadRequest or Unavailable for a folder that cannot be written.
    """
    times = fingerprint(schedule.options.data)  # not in the schedule: copies on other machines have other mtimes
    folder = Folder(path / hashlib.sha256(schedule.key + times.encode()).hexdigest()[:16], schedule)
    try:
        path.mkdir(parents=True, exist_ok=True)
        for entry in path.iterdir():
            if entry.is_dir() and entry != folder.path:
                note(f"{entry}: removed, its shards are of other images or options")
                shutil.rmtree(entry, ignore_errors=True)
    except OSError as error:
        raise disk.write_error(error, path) from None
    return _noted(folder)


def merge_or_discard(folder: Folder, artifact: Artifact) -> Report:
    """The report of all shards. Where they cannot be merged all are removed, so that the next command measures every
    image again.

    Raises: as `Folder.merged` does.
    """
    try:
        return folder.merged(artifact)
    except BadRequest:
        shutil.rmtree(folder.path, ignore_errors=True)
        raise


def _noted(folder: Folder) -> Folder:
    if stored := folder.schedule.count - len(folder.missing()):
        note(f"{stored} of {folder.schedule.count} shards are in {folder.path} already")
    return folder


@contextmanager
def alone(path: Path, name: str) -> Iterator[None]:
    """Hold the lock of a folder, so that one process measures all its shards.

    Args:
        path: the folder, which is made if it is missing.
        name: of the artifact or recipe, for the message.

    Raises: BadRequest where another process holds it, and for a folder that cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        release = disk.lock(path, wait=False)
    except BlockingIOError:
        raise BadRequest(
            f"{path}: another process is working on {name} in this folder; wait for it, or give another -o"
        ) from None
    except OSError as error:
        raise disk.write_error(error, path.parent) from None
    try:
        yield
    finally:
        release()


def write_commands(artifact: Artifact, options: VerifyOptions, path: Path, size: int | None = None) -> Folder:
    """Write a folder from which every shard can be measured by a command of its own, on any machine.

    Args:
        artifact: what to verify; it is copied.
        options: as for `verify`.
        path: the folder.
        size: images of a shard.

    Raises: as `shards.schedule` and `create` do.
    """
    if "\n" in str(path) or path.resolve() in artifact.path.resolve().parents:
        raise BadRequest(f"{path}: expected a folder without the artifact, and without a line break in its name")
    folder = create(path, shards.schedule(artifact, options, size))
    target = folder.artifact_path
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for one in (artifact, *graphs_of(artifact)):
            for file in (*one.files, sidecar_path(one.path)):
                _copy(file, target.parent / file.name)
    except OSError as error:
        raise disk.write_error(error, target.parent) from None
    quoted = shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))
    lines = [f"convnext-export shard {quoted} {number}\n" for number in range(folder.schedule.count)]
    disk.write_file(path / COMMANDS, "".join(lines).encode("utf-8", "surrogateescape"))
    return folder


def _copy(file: Path, target: Path) -> None:
    """Copy a file under a temporary name, then rename it. A target with the same bytes is left as it is: workers may
    have it open."""
    if target.is_file() and artifacts.sha256_file(target) == artifacts.sha256_file(file):
        return
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.copyfile(file, partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _ranges(numbers: Sequence[int]) -> list[str]:
    """Numbers in rising order as `shard` takes them: `3`, `17`, `40-46`."""
    words: list[str] = []
    for _, members in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in members]
        words.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return words


def read_schedule(path: Path) -> Schedule:
    """The schedule in a folder.

    Raises: BadRequest for any other folder.
    """
    file = path / "schedule.json"
    try:
        schedule = msgspec.json.decode(file.read_bytes() if file.is_file() else b"", type=Schedule)
        if "\0" in schedule.artifact:
            raise ValueError("no file has such a name")
    except (OSError, ValueError):
        raise BadRequest(
            f"{path}: no schedule of shards of this version in it; `convnext-export verify ARTIFACT --on files:{path}` "
            "writes one"
        ) from None
    return schedule


def open_folder(path: Path) -> tuple[Folder, Artifact]:
    """A folder that `write_commands` wrote, and its artifact.

    Raises: BadRequest for any other folder.
    """
    schedule = read_schedule(path)
    folder = Folder(path, schedule)
    return folder, artifacts.load(folder.artifact_path)


def check_report(folder: Path, path: Path) -> None:
    """Raises: BadRequest for a report that would replace a file of the folder."""
    inside = path.resolve().parent in (folder.resolve() / "shards", folder.resolve() / "artifact")
    if inside or (path.resolve().parent == folder.resolve() and path.name in ("schedule.json", COMMANDS)):
        raise BadRequest(f"-o {path}: a file of the shards; give another name")


def original_of(folder: Folder, copy: Artifact) -> Artifact:
    """The artifact that a schedule was made for; its copy if that is gone or another one is in its place."""
    with suppress(BadRequest):
        original = artifacts.load(Path(folder.schedule.artifact))
        if original.sidecar.sha256 == copy.sidecar.sha256:
            return original
    return copy


def measure(
    path: Path,
    words: Iterable[str],
    data: str | None = None,
    weights: str | None = None,
    reference: str | None = None,
) -> tuple[int, ...]:
    """Measure shards of a folder that are missing, and return their numbers.

    Args:
        path: the folder.
        words: numbers of shards, as for `numbers_of`.
        data, weights: where images and weights are on this machine, if not where they were when it was scheduled.
        reference: a module of the user that the schedule names; it is imported only if it is named here too.

    Raises: BadRequest for a number that the schedule does not have; otherwise as `shards.open_worker` does.
    """
    folder, artifact = open_folder(path)
    schedule, named = folder.schedule, folder.schedule.options.reference
    if reference != (named if named and ":" in named else None):
        raise BadRequest(
            f"--reference: the schedule compares with {named or 'the network of this tool'}; "
            + (f"add --reference {named} to import that module" if named and ":" in named else "leave it out")
        )
    numbers = numbers_of(words, schedule.count, str(path))
    wanted = [number for number in dict.fromkeys(numbers) if not folder.has(number)]
    if not wanted:
        note("every one of these shards was measured already")
        return ()
    with shards.open_worker(schedule, artifact, data, weights) as worker:
        for number in wanted:
            step(f"shard {number} of {schedule.count}: {schedule.images_of(number)}")
            samples, batches = worker.batches(number)
            measured = list(track(batches, samples.total, "images", lambda batch: len(batch.names)))
            folder.write(worker.shard(number, measured, samples.skipped))
    return tuple(wanted)


def numbers_of(words: Iterable[str], count: int, folder: str) -> list[int]:
    """The numbers of shards: `3`, or a range with both ends, `0-7`.

    Args:
        words: as typed.
        count: of the shards of the folder.
        folder: for the message.

    Raises: BadRequest for other words, and for shards that there are not.
    """
    numbers: list[int] = []
    for word in words:
        first, dash, last = word.partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal()) or len(first + last) > 20 or int(first) > int(last):
            raise BadRequest(f"{word[:40]}: expected the number of a shard, or a range like 0-7")
        if int(last) >= count:
            raise BadRequest(f"shard {last}: {folder} has the shards 0 to {count - 1}")
        numbers += range(int(first), int(last) + 1)
    return numbers
