"""Timing alone: of several processes at work, one that times waits until the others are done or wait too."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_HANDLES: list[int] = []


@contextmanager
def sharing(file: Path) -> Iterator[None]:
    """Within, this process is one of those that take turns over a file."""
    handle = os.open(file, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)
    _HANDLES.append(handle)
    try:
        yield
    finally:
        _HANDLES.remove(handle)
        os.close(handle)


@contextmanager
def alone() -> Iterator[None]:
    """Within, no other of these processes is at work."""
    for handle in _HANDLES:
        fcntl.flock(handle, fcntl.LOCK_UN)
        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        for handle in _HANDLES:
            fcntl.flock(handle, fcntl.LOCK_SH)
