"""Answers on their way to a file: they are kept in a folder beside it, so that an interrupted run can continue."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace
from numpy.typing import NDArray

from exporter.artifact import disk
from exporter.artifact.sidecar import Record
from exporter.artifact.tensors import Tensor, tensor_of
from exporter.errors import BadRequest

FLUSH_S = 5.0
FLUSH_BYTES = 32 << 20
CHUNK_BYTES = 2048  # of a chunk of a few images in memory, with its names and records, beside its arrays


class Chunk(Record, frozen=True):
    """The answers for one batch: the index of its first image, the names of its images, for each of them why it has no
    answer, or "", and arrays by name, with one row for each image whose error is ""."""

    start: int
    names: tuple[str, ...]
    errors: tuple[str, ...]
    tensors: dict[str, Tensor]

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays by name."""
        return {name: tensor.array() for name, tensor in self.tensors.items()}

    @property
    def end(self) -> int:
        """The number of images up to the end of this chunk."""
        return self.start + len(self.names)

    def after(self, count: int) -> Chunk:
        """The part of it after the first `count` images of all."""
        return self.between(count, self.end)

    def between(self, start: int, stop: int) -> Chunk:
        """The part of it from image number `start` of all up to `stop`, which is left out."""
        first, last = max(0, start - self.start), min(len(self.names), stop - self.start)
        if (first, last) == (0, len(self.names)):
            return self
        errors = self.errors[first:last]
        skipped, rows = (sum(not error for error in part) for part in (self.errors[:first], errors))
        arrays = {name: array[skipped : skipped + rows] for name, array in self.arrays().items()} if rows else {}
        return chunk_of(self.start + first, list(self.names[first:last]), list(errors), arrays)


def chunk_of(start: int, names: list[str], errors: list[str], arrays: Mapping[str, NDArray[Any]]) -> Chunk:
    """A chunk of these arrays."""
    tensors = {name: tensor_of(array) for name, array in arrays.items()}
    return Chunk(start=start, names=tuple(names), errors=tuple(errors), tensors=tensors)


class Job(Record, frozen=True):
    """What a resumed run must have in common with the one before: the sha256 of the artifact, a digest of the images
    (`Images.key`), their number, and the options."""

    artifact: str
    images: str
    total: int
    options: dict[str, Any]


class Store:
    """The folder with the answers so far."""

    def __init__(self, out: Path, job: Job) -> None:
        self.out, self.job = out, job
        self.folder = folder_of(out)
        self.waiting: list[Chunk] = []
        self.waiting_bytes = 0
        self.flushed = time.monotonic()

    def done(self) -> int:
        """The number of images whose answers are kept; files behind one that is damaged or missing are removed."""
        end = 0
        for file in self._files():
            chunks = _read(file)
            if not chunks or chunks[0].start != end:
                file.unlink()
            else:
                end = chunks[-1].end
        return end

    def add(self, chunk: Chunk) -> None:
        """Keep a chunk. From time to time those that are in memory are written.

        Raises: Unavailable when the disk is full.
        """
        self.waiting.append(chunk)
        self.waiting_bytes += CHUNK_BYTES + sum(len(tensor.content) for tensor in chunk.tensors.values())
        if self.waiting_bytes > FLUSH_BYTES or time.monotonic() - self.flushed > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Write the chunks that are in memory."""
        if self.waiting:
            content = msgspec.msgpack.encode(self.waiting)
            name = f"{self.waiting[0].start:012d}.{hashlib.sha256(content).hexdigest()[:16]}"
            disk.write_file(self.folder / name, content)
        self.waiting, self.waiting_bytes, self.flushed = [], 0, time.monotonic()

    def chunks(self) -> Iterator[Chunk]:
        """All chunks on the disk, in order."""
        for file in self._files():
            yield from _read(file)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*.*"))

    def discard(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def finish(self, write: Callable[[Path], None]) -> None:
        """Write the output, all at once, and remove the folder.

        Raises: Unavailable when the disk is full; BadRequest when the folder cannot be written.
        """
        self.flush()
        new = self.folder / "output"
        try:
            write(new)
            disk.flush(new)
            new.replace(self.out)
        except OSError as error:
            new.unlink(missing_ok=True)
            raise disk.write_error(error, self.out.parent) from None
        self.discard()


def _read(file: Path) -> list[Chunk]:
    """The chunks of a file; none where it is damaged. Its name has a digest of its content."""
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest()[:16] != file.suffix[1:]:
        return []
    return msgspec.msgpack.decode(content, type=list[Chunk])


def folder_of(out: Path) -> Path:
    """The folder in which the answers of an unfinished output are kept."""
    return out.with_name(f".{out.name}.partial")


@contextmanager
def opened(out: Path, job: Job, resume: bool, overwrite: bool) -> Iterator[Store]:
    """The store of an output, new or continued; no other process can open it.

    Raises: BadRequest for an output that exists, an unfinished one that is neither resumed nor overwritten, one that
        was begun with other inputs, and one that another process is writing.
    """
    folder, hint = folder_of(out), "--overwrite replaces it"
    is_begun = (folder / "job.json").is_file()
    # Hidden files are of a process that was killed before it had written the job, or lock the folder.
    if folder.is_dir() and not is_begun and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise BadRequest(f"{folder}: a folder of this name is not an unfinished output of this tool; move it away")
    if out.exists() and not overwrite and not (resume and is_begun):
        raise BadRequest(f"{out}: is there already; {hint}, or give another -o")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        release = disk.lock(folder, wait=False)
    except BlockingIOError:
        raise BadRequest(f"{out}: another process is writing it; wait for it, or give another -o") from None
    except OSError as error:
        raise disk.write_error(error, out.parent) from None
    try:
        _begin(Store(out, job), folder / "job.json", resume, overwrite)
        yield Store(out, job)
    finally:
        release()


def _begin(store: Store, file: Path, resume: bool, overwrite: bool) -> None:
    """Take over what is in the folder, or empty it.

    Raises: BadRequest for an unfinished output without `resume`, or of other inputs.
    """
    content = msgspec.json.encode(store.job, order="deterministic")
    if not file.exists() or overwrite or not store.done():
        for old in store.folder.iterdir():
            if old.name != ".lock":
                old.unlink()
        disk.write_file(file, content)
        return
    if not resume:
        raise BadRequest(
            f"{store.out}: an unfinished output is there, {store.done():,} of {store.job.total:,} images; --resume "
            "continues it, --overwrite begins anew"
        )
    if file.read_bytes() != content:
        raise BadRequest(f"{store.out}: {_difference(file, store.job)}; give the same, or --overwrite to begin anew")


def _difference(file: Path, job: Job) -> str:
    """What differs between the job of an unfinished output and this one."""
    try:
        old = msgspec.json.decode(file.read_bytes(), type=Job)
    except msgspec.DecodeError:
        return "the unfinished output is damaged"
    if old.artifact != job.artifact:
        return "the unfinished output is of another artifact"
    if replace(old, options=job.options) == job:
        differ = [name for name in job.options if old.options.get(name) != job.options[name]]
        each = [f"{name.replace('_', ' ')} {old.options.get(name)}, now {job.options[name]}" for name in differ]
        return f"the unfinished output was begun with {'; '.join(each)}"
    return f"the unfinished output is of {old.total:,} other images"
