"""A verification in a folder: its plan, a copy of the artifact, and the shards that were measured.

The shards can be measured anywhere and in any order, by commands (`measure`) or by a cluster (`cluster`).
`Folder.merged` is the report of all of them.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from exporter import artifact as artifacts
from exporter.artifact import Artifact, disk, sealed, sidecar_path
from exporter.errors import BadRequest, some
from exporter.progress import note, step, track
from exporter.report import Report
from exporter.verify import VerifyOptions, shards
from exporter.verify.shards import Plan, Shard

COMMANDS = "commands.txt"
AGAIN = "the shard is measured again"


class Folder:
    """The folder of a verification in shards."""

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path, self.plan, self.key = path, plan, plan.key

    @property
    def artifact_path(self) -> Path:
        """The copy of the artifact."""
        return self.path / "artifact" / Path(self.plan.artifact).name

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
        """A shard, or None if it was not measured or its file is damaged or of another plan."""
        content = sealed.read_bytes(self._file(number), self._key(number), AGAIN)
        return None if content is None else shards.decode(content)

    def missing(self) -> list[int]:
        """The numbers of the shards that must be measured."""
        return [
            number
            for number in range(self.plan.count)
            if sealed.read_bytes(self._file(number), self._key(number), AGAIN) is None
        ]

    def merged(self, artifact: Artifact) -> Report:
        """The report of all shards.

        Raises: BadRequest for missing shards.
        """
        if missing := self.missing():
            lines = some(str(number) for number in missing)
            raise BadRequest(
                f"{self.path}: {len(missing)} of {self.plan.count} shards are missing: {lines}; run their lines of "
                f"{COMMANDS}, and copy the files of shards/ here"
            )

        def read(number: int) -> Shard:
            shard = self.read(number)
            assert shard is not None
            return shard

        return shards.merged(self.plan, artifact, read)

    def _file(self, number: int) -> Path:
        return self.path / "shards" / f"{number:06d}.shard"

    def _key(self, number: int) -> bytes:
        return self.key + number.to_bytes(8, "big")


def create(path: Path, plan: Plan) -> Folder:
    """The folder of a plan, new or continued: shards of the same plan are kept.

    Raises: BadRequest for a folder that has something else, and one that cannot be written.
    """
    file = path / "plan.json"
    if path.exists() and not file.is_file() and (not path.is_dir() or any(path.iterdir())):
        raise BadRequest(f"{path}: expected a new or empty folder, or one of an earlier --on files; give another")
    content = msgspec.json.format(msgspec.json.encode(plan, order="deterministic"), indent=1)
    if file.is_file() and file.read_bytes() != content:
        shutil.rmtree(path / "shards", ignore_errors=True)
    disk.write_file(file, content)
    folder = Folder(path, plan)
    if plan.count > len(missing := folder.missing()):
        note(f"{plan.count - len(missing)} of {plan.count} shards are in {path} already")
    return folder


def write_commands(artifact: Artifact, options: VerifyOptions, path: Path, images: int | None = None) -> Folder:
    """Write a folder from which every shard can be measured by a command of its own, on any machine.

    Args:
        artifact: what to verify; it is copied.
        options: as for `verify`.
        path: the folder.
        images: of a shard.

    Raises: as `shards.plan` and `create` do.
    """
    folder = create(path, shards.plan(artifact, options, images))
    target = folder.artifact_path
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for file in (*artifact.files, sidecar_path(artifact.path)):
            shutil.copyfile(file, target.parent / file.name)
    except OSError as error:
        raise disk.write_error(error, target.parent) from None
    words = shlex.quote(str(path))
    lines = [f"convnext-export shard {words} {number}\n" for number in range(folder.plan.count)]
    disk.write_file(path / COMMANDS, "".join(lines).encode("utf-8", "surrogateescape"))
    return folder


def open_folder(path: Path) -> tuple[Folder, Artifact]:
    """A folder that `write_commands` wrote, and its artifact.

    Raises: BadRequest for any other folder.
    """
    file = path / "plan.json"
    try:
        plan = msgspec.json.decode(file.read_bytes(), type=Plan)
    except (OSError, msgspec.DecodeError):
        raise BadRequest(
            f"{path}: no plan of shards in it; `convnext-export verify ARTIFACT --on files:{path}` writes one"
        ) from None
    folder = Folder(path, plan)
    return folder, artifacts.load(folder.artifact_path)


def measure(path: Path, numbers: Sequence[int], data: str | None = None, weights: str | None = None) -> tuple[int, ...]:
    """Measure shards of a folder that are missing, and return their numbers.

    Args:
        path: the folder.
        numbers: of the shards.
        data, weights: where images and weights are on this machine, if not where they were when it was planned.

    Raises: BadRequest for a number that the plan does not have; otherwise as `shards.open_worker` does.
    """
    folder, artifact = open_folder(path)
    plan = folder.plan
    if unknown := [number for number in numbers if number not in range(plan.count)]:
        raise BadRequest(f"shard {unknown[0]}: {path} has the shards 0 to {plan.count - 1}")
    missing = set(folder.missing())
    wanted = [number for number in dict.fromkeys(numbers) if number in missing]
    if not wanted:
        note("every one of these shards was measured already")
        return ()
    with shards.open_worker(plan, artifact, data, weights) as worker:
        for number in wanted:
            step(f"shard {number} of {plan.count}: {plan.images_of(number)}")
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
