"""The disk: one writer at a time, files that are either the old or the new, and errors in one clear line."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from exporter.errors import BadRequest, ExporterError, Unavailable

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def lock(folder: Path, wait: bool = True) -> int:
    """A lock on a folder, held until the handle is closed or the process ends.

    Raises: BlockingIOError when another holds it and `wait` is false.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:  # a file system without locks: one writer at a time is then up to the user
        pass
    return handle


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One at a time: readers and writers of the artifacts of a folder."""
    handle = lock(folder) if folder.is_dir() else None
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def cache_folder() -> Path:
    """Where what can be made again is kept for this user: below `$XDG_CACHE_HOME`, or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "convnext-export"


def write_file(path: Path, content: bytes) -> None:
    """Write one file so that it is either the old or the new, whatever happens.

    Raises: Unavailable when the disk is full; BadRequest when the folder cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        flush(partial)
        partial.replace(path)
    except OSError as error:
        raise write_error(error, path.parent) from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_error(error: OSError, out: Path) -> ExporterError:
    """What to tell a user whose folder could not be written to."""
    if error.errno in NO_SPACE:
        return Unavailable(f"{out}: no space left to write in; free some or choose another folder with -o")
    return BadRequest(f"{out}: cannot be written ({error.strerror}); choose another folder with -o")


def check_space(folder: Path, needed: int) -> None:
    """Refuse work whose result would not fit.

    Raises: Unavailable when fewer than `needed` bytes are free where the folder is, or will be.
    """
    there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise Unavailable(
            f"{folder}: about {needed / 1e6:.0f} MB are needed and {free / 1e6:.0f} MB are free; free some or choose "
            "another folder with -o"
        )


def user_path(word: str) -> Path:
    """A path as a user typed it, with ~ for home.

    Raises: BadRequest for one that no file can have.
    """
    try:
        path = Path(word).expanduser()
        path.exists()
    except (RuntimeError, OSError, ValueError) as error:
        raise BadRequest(f"{word[:80]}: no path that a file can have ({error})"[:240]) from None
    return path
