"""A lock held by a file, for systems and file systems that lock no folders.

The file holds the id of its owner and appears complete, by a hard link, so that it never has to be guessed whose it is.
Only the owner removes it. When the owner's process is gone, whoever holds a second such lock, named after that owner,
puts its own id in place: only one can, and nobody removes a lock that was taken over meanwhile.
"""

from __future__ import annotations

import glob
import hashlib
import os
import platform
import secrets
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

LOOK_S = 0.02  # between two looks at a lock that another holds
SAME_START_S = 2  # start times of one process may differ by a correction of the clock
_BUSY = (FileExistsError, PermissionError) if os.name == "nt" else (FileExistsError,)


class Held(Exception):
    """Another process holds the lock; the message names it."""


def hold(file: Path, wait_s: float) -> Callable[[], None]:
    """Create a lock file, and return the function that removes it.

    Raises: Held when another process has held it for `wait_s` seconds; OSError when the file cannot be written.
    """
    me = own_id()
    mine = file.with_name(f"{file.name}.{me}.new")
    until = time.monotonic() + wait_s
    mine.write_text(me, "utf-8")
    try:
        while not (_place(mine, file) or _take_over(mine, file)):
            if time.monotonic() >= until:
                raise Held(f"{file} is held by {_described(_owner(file))}")
            time.sleep(LOOK_S)
    finally:
        mine.unlink(missing_ok=True)
    for left in file.parent.glob(f"{glob.escape(file.name)}.*.new"):
        if is_gone(left.name.removeprefix(f"{file.name}.").removesuffix(".new")):
            left.unlink(missing_ok=True)
    return partial(_remove, file)


def _place(mine: Path, file: Path) -> bool:
    """Give a written file its name, unless that is taken."""
    try:
        if os.name == "nt":
            mine.rename(file)  # which replaces nothing there
        else:
            file.hardlink_to(mine)
    except _BUSY:
        return False
    return True


def _take_over(mine: Path, file: Path) -> bool:
    """Replace the lock file of a process that is gone."""
    owner = _owner(file)
    if not is_gone(owner):
        return False
    try:
        release = hold(file.with_name(f"{file.name}.{owner}"), 0)
    except Held:
        return False
    try:
        if _owner(file) != owner:
            return False
        mine.replace(file)
    except _BUSY:
        return False
    finally:
        release()
    return True


def _owner(file: Path) -> str:
    """The id in a lock file; "" when it is gone."""
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _remove(file: Path) -> None:
    """Remove a file; Windows does not while another process reads it."""
    for _ in range(100):
        try:
            file.unlink(missing_ok=True)
        except PermissionError:
            time.sleep(LOOK_S)
        else:
            return


def own_id() -> str:
    """An id of this process that no other use has: its number, its start, its machine, and a random word."""
    pid = os.getpid()
    return f"{pid}-{_started(pid):.0f}-{_machine()}-{secrets.token_hex(4)}"


def is_gone(owner: str) -> bool:
    """Whether an id is that of a process of this machine which ended. Those of other machines cannot be asked."""
    pid, start, machine = _parts(owner)
    return machine == _machine() and abs(_started(pid) - start) > SAME_START_S


def _parts(owner: str) -> tuple[int, int, str]:
    words = owner.split("-")
    if len(words) != 4 or not (words[0].isdecimal() and words[1].isdecimal()):
        return 0, 0, ""
    return int(words[0]), int(words[1]), words[2]


def _described(owner: str) -> str:
    pid, _, machine = _parts(owner)
    return f"process {pid} of this machine" if machine == _machine() else "a process of another machine"


def _started(pid: int) -> float:
    """When a process began, in seconds; −10⁹ when there is none."""
    import psutil

    try:
        return float(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        return -1e9
    except psutil.AccessDenied:  # another user's: it runs
        return float("nan")


def _machine() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]
