"""Supervises the timing process, and restarts it without the arm that crashed it."""

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


class _Failed(Exception):
    """The active arm crashed, hung or raised."""

    def __init__(self, arm: str, reason: str) -> None:
        super().__init__(reason)
        self.arm, self.reason = arm, reason


def launches(timing: Timing, opener: Opener = worker.open_arm, hang_s: float = HANG_S) -> Iterator[Launch]:
    """Time the arms of a plan, launch after launch, until the caller stops the iteration.

    Launches and the failures of arms are stored in `timing`. The worker waits while the caller handles a launch, so
    the caller may draw progress.

    Args:
        timing: what to time, and where to keep it.
        opener: opens an arm; a module-level function, because another process calls it.
        hang_s: seconds without a message after which an arm counts as hung.
    """
    while any(arm.runtime != "peak" for arm in timing.standing()):
        failures = len(timing.failures)
        left = replace(timing.plan, arms=tuple(timing.standing()), seed=timing.plan.seed + failures)
        try:
            for kind, content in _events(worker.time_arms, left, opener, hang_s):
                if kind == "launch":
                    timing.launches.append(content)
                    yield content
        except _Failed as failure:
            timing.failures[failure.arm] = failure.reason
            note(f"{failure.arm} {failure.reason}{'; timing continues without it' if timing.standing() else ''}")


def measure_cold(arm: Arm, plan: Plan, opener: Opener = worker.open_arm, hang_s: float = HANG_S) -> Cold | str:
    """Time the cold start of one arm in a new process; return the times, or the reason of a failure."""
    try:
        for kind, content in _events(worker.time_cold, replace(plan, arms=(arm,)), opener, hang_s):
            if kind == "cold":
                cold: Cold = content
    except _Failed as failure:
        return failure.reason
    return cold


def _events(task: Callable[..., None], plan: Plan, opener: Opener, hang_s: float) -> Iterator[tuple[str, Any]]:
    """Messages of a worker. Each is acknowledged when the caller asks for the next one.

    Raises: _Failed with the active arm when the worker raises, dies or sends no message for `hang_s`.
    """
    with _worker(task, plan, opener) as (process, connection, active):
        while True:
            kind, content = _hear(process, connection, hang_s)
            if kind == "done":
                return
            if kind == "failed":
                raise _Failed(plan.arms[active.value].name, content)
            yield kind, content
            connection.send(None)


def _hear(process: BaseProcess, connection: Connection, hang_s: float) -> tuple[str, Any]:
    """The next message, or ("failed", reason)."""
    until = time.monotonic() + hang_s
    while not connection.poll(min(1.0, hang_s)):
        if time.monotonic() > until:
            return "failed", f"did not respond for {hang_s:.0f} s"
    try:
        kind, content = connection.recv()
    except (EOFError, ConnectionResetError):
        process.join(5)
        return "failed", f"crashed its process ({_ending(process.exitcode)})"
    return ("failed", f"failed: {content}") if kind == "failed" else (kind, content)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}"


@contextmanager
def _worker(task: Callable[..., None], plan: Plan, opener: Opener) -> Iterator[tuple[BaseProcess, Connection, Any]]:
    """Run a task in a new process, which ends with the block."""
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
