"""A verification in a folder: its schedule, a copy of the artifact, and the shards that were measured.

The shards can be measured anywhere and in any order, by commands (`measure`) or by a cluster (`cluster`).
`Folder.merged` is the report of all of them.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from exporter import artifact as artifacts
from exporter.artifact import Artifact, disk, sealed, sidecar_path
from exporter.errors import BadRequest, some
from exporter.progress import note, step, track
from exporter.report import Report
from exporter.verify import VerifyOptions, parents_of, shards
from exporter.verify.shards import Schedule, Shard

COMMANDS = "commands.txt"
REMEDY = "the shard is measured again"


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
        return [
            number
            for number in range(self.schedule.count)
            if sealed.read_bytes(self._file(number), self._key(number), REMEDY) is None
        ]

    def merged(self, artifact: Artifact) -> Report:
        """The report of all shards.

        Raises: BadRequest for missing shards.
        """
        if missing := self.missing():
            numbers = some(str(number) for number in missing)
            raise BadRequest(
                f"{self.path}: {len(missing)} of {self.schedule.count} shards are missing: {numbers}; run their lines "
                f"of {COMMANDS}, and copy the files of shards/ here"
            )

        def read(number: int) -> Shard:
            shard = self.read(number)
            assert shard is not None
            return shard

        return shards.merged(self.schedule, artifact, read)

    def _file(self, number: int) -> Path:
        return self.path / "shards" / f"{number:06d}.shard"

    def _key(self, number: int) -> bytes:
        return self.key + number.to_bytes(8, "big")


def create(path: Path, schedule: Schedule) -> Folder:
    """The folder of a schedule, new or continued: shards of the same schedule are kept, those of another are deleted.

    Raises: BadRequest for a folder that has something else, and one that cannot be written.
    """
    file = path / "schedule.json"
    if path.exists() and not file.is_file() and (not path.is_dir() or any(path.iterdir())):
        raise BadRequest(f"{path}: expected a new or empty folder, or one of an earlier --on files; give another")
    content = msgspec.json.format(msgspec.json.encode(schedule, order="deterministic"), indent=1)
    if file.is_file() and file.read_bytes() != content:  # of another schedule
        shutil.rmtree(path / "shards", ignore_errors=True)
    disk.write_file(file, content)
    folder = Folder(path, schedule)
    if schedule.count > len(missing := folder.missing()):
        note(f"{schedule.count - len(missing)} of {schedule.count} shards are in {path} already")
    return folder


@contextmanager
def alone(folder: Folder) -> Iterator[None]:
    """Hold the lock of a folder, so that one process measures all its shards.

    Raises: BadRequest where another does.
    """
    try:
        release = disk.lock(folder.path, wait=False)
    except BlockingIOError:
        raise BadRequest(
            f"{folder.path}: another process is verifying {Path(folder.schedule.artifact).name} for the same report; "
            "wait for it, or give another -o"
        ) from None
    try:
        yield
    finally:
        release()


def write_commands(artifact: Artifact, options: VerifyOptions, path: Path, images: int | None = None) -> Folder:
    """Write a folder from which every shard can be measured by a command of its own, on any machine.

    Args:
        artifact: what to verify; it is copied.
        options: as for `verify`.
        path: the folder.
        images: of a shard.

    Raises: as `shards.schedule` and `create` do.
    """
    folder = create(path, shards.schedule(artifact, options, images))
    target = folder.artifact_path
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for one in (artifact, *map(artifacts.load, parents_of(artifact))):
            for file in (*one.files, sidecar_path(one.path)):
                shutil.copyfile(file, target.parent / file.name)
    except OSError as error:
        raise disk.write_error(error, target.parent) from None
    quoted = shlex.quote(str(path))
    lines = [f"convnext-export shard {quoted} {number}\n" for number in range(folder.schedule.count)]
    disk.write_file(path / COMMANDS, "".join(lines).encode("utf-8", "surrogateescape"))
    return folder


def open_folder(path: Path) -> tuple[Folder, Artifact]:
    """A folder that `write_commands` wrote, and its artifact.

    Raises: BadRequest for any other folder.
    """
    file = path / "schedule.json"
    try:
        schedule = msgspec.json.decode(file.read_bytes(), type=Schedule)
    except (OSError, msgspec.DecodeError):
        raise BadRequest(
            f"{path}: no schedule of shards in it; `convnext-export verify ARTIFACT --on files:{path}` writes one"
        ) from None
    folder = Folder(path, schedule)
    return folder, artifacts.load(folder.artifact_path)


def original_of(folder: Folder, copy: Artifact) -> Artifact:
    """The artifact that a schedule was made for; its copy if that is gone or another one is in its place."""
    with suppress(BadRequest):
        original = artifacts.load(Path(folder.schedule.artifact))
        if original.sidecar.sha256 == copy.sidecar.sha256:
            return original
    return copy


def measure(path: Path, numbers: Sequence[int], data: str | None = None, weights: str | None = None) -> tuple[int, ...]:
    """Measure shards of a folder that are missing, and return their numbers.

    Args:
        path: the folder.
        numbers: of the shards.
        data, weights: where images and weights are on this machine, if not where they were when it was scheduled.

    Raises: BadRequest for a number that the schedule does not have; otherwise as `shards.open_worker` does.
    """
    folder, artifact = open_folder(path)
    schedule = folder.schedule
    if unknown := [number for number in numbers if number not in range(schedule.count)]:
        raise BadRequest(f"shard {unknown[0]}: {path} has the shards 0 to {schedule.count - 1}")
    missing = set(folder.missing())
    wanted = [number for number in dict.fromkeys(numbers) if number in missing]
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


def numbers_of(words: Iterable[str]) -> list[int]:
    """The numbers of shards: `3`, or a range with both ends, `0-7`.

    Raises: BadRequest for other words.
    """
    numbers: list[int] = []
    for word in words:
        first, dash, last = word.partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise BadRequest(f"{word}: expected the number of a shard, or a range like 0-7")
        numbers += range(int(first), int(last) + 1)
    return numbers
