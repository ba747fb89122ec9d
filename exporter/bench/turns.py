"""Timing alone: of several processes at work, one that times waits until the others are done or wait too."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from exporter.artifact import lockfile

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class Turn(Protocol):
    """A lock that many processes may share, or one may hold alone."""

    def share(self) -> None:
        """Wait until nobody holds it alone."""

    def hold(self) -> None:
        """Wait until nobody else has it."""

    def release(self) -> None:
        """Give it up."""


_TURNS: list[Turn] = []


@contextmanager
def sharing(file: Path) -> Iterator[None]:
    """Within, this process is one of those that take turns over a file."""
    turn: Turn = _Flock(file) if fcntl is not None else _Files(file)
    turn.share()
    _TURNS.append(turn)
    try:
        yield
    finally:
        _TURNS.remove(turn)
        turn.release()


@contextmanager
def alone() -> Iterator[None]:
    """Within, no other of these processes is at work."""
    for turn in _TURNS:
        turn.release()
        turn.hold()
    try:
        yield
    finally:
        for turn in _TURNS:
            turn.release()
            turn.share()


class _Flock:
    """A turn over a lock of the kernel, which wakes those that wait."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.handle: int | None = None

    def share(self) -> None:
        self._take(fcntl.LOCK_SH)

    def hold(self) -> None:
        self._take(fcntl.LOCK_EX)

    def _take(self, kind: int) -> None:
        self.handle = handle = os.open(self.file, os.O_RDONLY)
        fcntl.flock(handle, kind)

    def release(self) -> None:
        handle, self.handle = self.handle, None
        if handle is not None:
            os.close(handle)


class _Files:
    """A turn over lock files, on every system; each process at work has one of its own, and those that wait look again
    and again."""

    def __init__(self, file: Path) -> None:
        self.lock = file.with_name(f"{file.name}.lock")
        self.at_work = file.with_name(f"{file.name}.{lockfile.own_id()}.work")
        self.held: Callable[[], None] = lambda: None

    def share(self) -> None:
        release = lockfile.hold(self.lock, math.inf)
        self.at_work.touch()
        release()

    def hold(self) -> None:
        self.held = lockfile.hold(self.lock, math.inf)
        while not all(map(self._is_gone, self.lock.parent.glob("*.work"))):
            time.sleep(lockfile.LOOK_S)

    def _is_gone(self, at_work: Path) -> bool:
        return lockfile.is_gone(at_work.name.removeprefix(f"{self.lock.stem}.").removesuffix(".work"))

    def release(self) -> None:
        held, self.held = self.held, lambda: None
        held()
        self.at_work.unlink(missing_ok=True)
