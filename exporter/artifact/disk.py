"""The disk: one writer at a time, files that are either the old or the new, and errors in one clear line."""

from __future__ import annotations

import errno
import functools
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from exporter.artifact import lockfile
from exporter.errors import BadRequest, ExporterError, Unavailable
from exporter.progress import note

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# EBADF is what NFS gives for the handle of a folder, which cannot be opened to be written to.
NO_FOLDER_LOCKS = {errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}
LOCK_WAIT_S = 600
PARTIAL = ".partial"  # the end of the name of a file that is being written


def lock(folder: Path, wait: bool = True, file: Path | None = None) -> Callable[[], None]:
    """Lock a folder; the lock ends when the returned function is called, or with the process.

    Where no folder can be locked (Windows, some network file systems) a lock file is held instead: `file`, or `.lock`
    in the folder. It names its process, and does not count when that process is gone. A process that may not write
    there gets no lock and needs none: it cannot change an artifact.

    Raises: BlockingIOError when another holds it and `wait` is false; Unavailable when another holds a lock file for
        longer than `LOCK_WAIT_S`.
    """
    return _lock_folder(folder, wait) or _hold_lock_file(file or folder / ".lock", wait)


def _lock_folder(folder: Path, wait: bool) -> Callable[[], None] | None:
    """Lock a folder itself; None where that cannot be done."""
    if fcntl is None or not folder.is_dir():
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if error.errno in NO_FOLDER_LOCKS:
            return None
        raise
    return functools.partial(os.close, handle)


def _hold_lock_file(file: Path, wait: bool) -> Callable[[], None]:
    try:
        return lockfile.hold(file, LOCK_WAIT_S if wait else 0)
    except lockfile.Held as error:
        if not wait:
            raise BlockingIOError(errno.EWOULDBLOCK, str(error)) from None
        raise Unavailable(
            f"{error} and has been for {LOCK_WAIT_S} s; wait until it is done, or remove the file if that process is "
            "no more"
        ) from None
    except OSError as error:
        if error.errno not in READ_ONLY:
            raise
    return lambda: None


@contextmanager
def locked(folder: Path, waiting_note: str = "") -> Iterator[None]:
    """One at a time: readers and writers of the artifacts of a folder.

    Args:
        folder: with the artifacts.
        waiting_note: printed before waiting for another process.
    """
    release = _lock_or_wait(folder, waiting_note) if folder.is_dir() else None
    try:
        yield
    finally:
        if release is not None:
            release()


def _lock_or_wait(folder: Path, waiting_note: str) -> Callable[[], None]:
    if waiting_note:
        with suppress(BlockingIOError):
            return lock(folder, wait=False)
        note(waiting_note)
    return lock(folder)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` for what becomes `target`: it is removed at the end unless it was renamed.

    Folders that killed processes left for the same target are removed first.
    """
    with locked(target.parent):
        _remove_new_folders(target)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".new", dir=target.parent))
        release = lock(folder, file=folder.with_suffix(".lock"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        release()


def _remove_new_folders(target: Path) -> None:
    """Remove the folders of dead processes, whose locks are free."""
    pattern = f".{glob.escape(target.name)}.*"
    left = [*target.parent.glob(f"{pattern}.new"), *target.parent.glob(f"{pattern}.lock")]
    for folder in {path.with_suffix(".new") for path in left}:
        with suppress(OSError):
            release = lock(folder, wait=False, file=folder.with_suffix(".lock"))
            shutil.rmtree(folder, ignore_errors=True)
            if folder.is_file():  # of a process that ended while it made its lock file
                folder.unlink()
            release()


def cache_folder() -> Path:
    """Where what can be made again is kept for this user: below `$XDG_CACHE_HOME`, or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "convnext-export"


def write_file(path: Path, content: bytes) -> None:
    """Write one file, or what a link to a file names, so that it is either the old or the new, whatever happens.

    Raises: Unavailable when the disk is full; BadRequest when the folder cannot be written.
    """
    path = path.resolve() if path.is_symlink() else path
    partial = path.with_name(f".{lockfile.own_id()}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_partial_files(path.parent.absolute())
        partial.write_bytes(content)
        flush(partial)
        partial.replace(path)
    except OSError as error:
        raise write_error(error, path.parent, "choose another folder") from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@functools.cache
def _remove_partial_files(folder: Path) -> None:
    """Remove the partial files that killed processes left in a folder, once in each process."""
    for left in folder.glob(f".*{PARTIAL}"):
        if lockfile.is_gone(left.name[1:].removesuffix(PARTIAL)):
            with suppress(OSError):
                left.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    windows = os.name == "nt"  # which opens no folders, and flushes a file only through a handle that may write
    if windows and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_error(error: OSError, out: Path, instead: str = "choose another folder with -o") -> ExporterError:
    """What to tell a user whose folder could not be written to. `instead` names the way to another folder."""
    if error.errno in NO_SPACE:
        return Unavailable(f"{out}: no space left to write in; free some or {instead}")
    there = next((path for path in (out, *out.parents) if path.exists()), out)
    reason = f"{there} is a file, not a folder" if there != out and there.is_file() else error.strerror
    return BadRequest(f"{out}: cannot be written ({reason}); {instead}")


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
