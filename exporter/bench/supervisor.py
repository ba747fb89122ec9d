"""Starts the timing process, listens, and starts another without the arm that brought it down."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from msgspec.structs import replace

from exporter.bench import Arm, Cold, Launch, Opener, Plan, Timing, worker
from exporter.progress import note

HANG_S = 300.0


class _Fell(Exception):
    """The arm at work crashed, hung or raised."""

    def __init__(self, arm: str, reason: str) -> None:
        super().__init__(reason)
        self.arm, self.reason = arm, reason


def launches(timing: Timing, opener: Opener = worker.open_arm, hang_s: float = HANG_S) -> Iterator[Launch]:
    """Time the arms of a plan, launch after launch, for as long as the caller asks for more.

    Each launch is kept in `timing`, as is why an arm fell out. While the caller has the launch in hand the worker
    stands still: progress may be drawn.

    Args:
        timing: what to time, and where to keep it.
        opener: opens an arm; a function of a module, since another process calls it.
        hang_s: seconds of silence after which an arm is taken to hang.
    """
    while any(arm.runtime != "peak" for arm in timing.standing()):
        fallen = len(timing.failures)
        left = replace(timing.plan, arms=tuple(timing.standing()), seed=timing.plan.seed + fallen)
        try:
            for kind, content in _events(worker.time_arms, left, opener, hang_s):
                if kind == "launch":
                    timing.launches.append(content)
                    yield content
        except _Fell as fell:
            timing.failures[fell.arm] = fell.reason
            note(f"{fell.arm} {fell.reason}{'; the others are timed on' if timing.standing() else ''}")


def measure_cold(arm: Arm, plan: Plan, opener: Opener = worker.open_arm, hang_s: float = HANG_S) -> Cold | str:
    """An arm alone in a process of its own, from nothing in memory; or why it fell."""
    try:
        for kind, content in _events(worker.time_cold, replace(plan, arms=(arm,)), opener, hang_s):
            if kind == "cold":
                found: Cold = content
    except _Fell as fell:
        return fell.reason
    return found


def _events(task: Callable[..., None], plan: Plan, opener: Opener, hang_s: float) -> Iterator[tuple[str, Any]]:
    """What a worker tells, one message after another; each is answered once its reader comes back for the next.

    Raises: _Fell with the arm at work when the worker raises, dies or says nothing for too long.
    """
    with _worker(task, plan, opener) as (process, connection, active):
        while True:
            kind, content = _hear(process, connection, hang_s)
            if kind == "done":
                return
            if kind == "fell":
                raise _Fell(plan.arms[active.value].name, content)
            yield kind, content
            connection.send(None)


def _hear(process: BaseProcess, connection: Connection, hang_s: float) -> tuple[str, Any]:
    """The next message, or ("fell", why)."""
    until = time.monotonic() + hang_s
    while not connection.poll(min(1.0, hang_s)):
        if time.monotonic() > until:
            return "fell", f"gave no sign of life for {hang_s:.0f} s"
    try:
        kind, content = connection.recv()
    except (EOFError, ConnectionResetError):
        process.join(5)
        return "fell", f"brought its process down ({_ending(process.exitcode)})"
    return ("fell", f"failed: {content}") if kind == "failed" else (kind, content)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}"


@contextmanager
def _worker(task: Callable[..., None], plan: Plan, opener: Opener) -> Iterator[tuple[BaseProcess, Connection, Any]]:
    """A new process at work, gone when the block ends."""
    fresh = multiprocessing.get_context("spawn")
    ours, theirs = fresh.Pipe()
    active = fresh.Value("i", 0, lock=False)
    process = fresh.Process(target=worker.work, args=(task, theirs, active, plan, opener), daemon=True)
    process.start()
    theirs.close()
    try:
        yield process, ours, active
    finally:
        ours.close()
        process.join(2)
        if process.is_alive():
            process.kill()
            process.join()
