"""Waiting for other processes to close a file, so that the files beside it can be replaced."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MOST_S = 1.0
PAUSE_S = 0.002


def wait_until_closed(path: Path) -> None:
    """Wait until no process has a file open, for at most `MOST_S`. The file must have a name that nobody opens.

    Linux grants a write lease only on a file that nobody else has open, and ends it when somebody opens the file.
    Where there are no leases (other systems, network file systems), wait for `MOST_S`.
    """
    deadline = time.monotonic() + MOST_S
    handle = os.open(path, os.O_RDONLY)
    try:
        while time.monotonic() < deadline and not _is_closed(handle):
            time.sleep(PAUSE_S)
    finally:
        os.close(handle)


def _is_closed(handle: int) -> bool:
    """Whether nobody else has the file open now, nor opened it by its old name a moment ago."""
    if not hasattr(fcntl, "F_SETLEASE"):
        return False
    try:
        fcntl.fcntl(handle, fcntl.F_SETSIG, signal.SIGURG)  # SIGIO, the default, would end this process
        fcntl.fcntl(handle, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError:
        return False
    time.sleep(PAUSE_S)
    closed = fcntl.fcntl(handle, fcntl.F_GETLEASE) == fcntl.F_WRLCK
    fcntl.fcntl(handle, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return closed
