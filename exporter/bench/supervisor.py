"""Starts one timing process after another, and goes on without the arm that crashed one."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from exporter import machine
from exporter.bench import Arm, Cold, Launch, Opener, Plan, Timing, turns, worker
from exporter.errors import ExporterError
from exporter.progress import note, track

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext

PROCESSES = 6
"""Timing processes, the unit of every interval: the fewest of which signed ranks give a 95 % interval."""
HANG_S = 300.0
STACK_S = 5.0  # given to a process that hangs, to write down where
REPEATS = 1  # of the timing, when other processes disturbed it


class _Failed(Exception):
    """The active arm crashed, hung or raised."""

    def __init__(self, arm: str, reason: str) -> None:
        super().__init__(reason)
        self.arm, self.reason = arm, reason


def launches(
    timing: Timing, opener: Opener = worker.open_arm, hang_s: float = HANG_S, stop_on_failure: bool = False
) -> Iterator[Launch]:
    """Time the arms of a plan, each time in a fresh process, until the caller stops the iteration.

    Launches and the failures of arms are stored in `timing`. No process is left while the caller handles a launch.

    Args:
        timing: what to time, and where to keep it.
        opener: opens an arm; a module-level function, because another process calls it.
        hang_s: seconds without a message after which an arm counts as hung.
        stop_on_failure: stop as soon as an arm failed.
    """
    seed = timing.plan.seed
    while any(arm.runtime != "peak" for arm in timing.standing()) and not (stop_on_failure and timing.failures):
        launch = _launch(timing, seed, opener, hang_s, goes_on=not stop_on_failure)
        seed += 1
        if launch is not None:
            timing.launches.append(launch)
            yield launch


def _launch(timing: Timing, seed: int, opener: Opener, hang_s: float, goes_on: bool) -> Launch | None:
    """Time the standing arms in one process; None, with the failure stored, if an arm failed.

    `goes_on` says whether the others are timed after a failure.
    """
    launch: Launch | None = None
    try:
        for kind, content in _events(worker.time_arms, _plan(timing, seed), opener, hang_s):
            launch = content if kind == "launch" else launch
    except _Failed as failure:
        timing.failures[failure.arm] = failure.reason
        note(
            f"{failure.arm} {failure.reason}{'; timing continues without it' if goes_on and timing.standing() else ''}"
        )
        return None
    return launch


def _plan(timing: Timing, seed: int) -> Plan:
    """The plan of the next process: standing arms, with the products of the peak that the first undisturbed process
    chose."""
    facts = next((launch.facts for launch in timing.launches if not is_disturbed(launch)), {})
    arms = (replace(arm, product=facts.get(arm.name, {}).get("product", "")) for arm in timing.standing())
    return replace(timing.plan, arms=tuple(arms), seed=seed)


def measure(
    timing: Timing,
    opener: Opener,
    count: int,
    most: int | None = None,
    enough: Callable[[], bool] = lambda: True,
    stop_on_failure: bool = False,
) -> None:
    """Time the arms of a plan in fresh processes, while no other process of this tool is at work.

    Processes that others disturbed are measured again, once: if as many as were wanted stayed undisturbed, only those
    are kept, else all.

    Args:
        timing: what to time, and where to keep it.
        opener: opens an arm; a module-level function, because other processes call it.
        count: number of processes.
        most: largest number of processes, where `enough` asks for more; by default what replaces disturbed ones.
        enough: whether the intervals are narrow enough.
        stop_on_failure: stop as soon as an arm failed.
    """
    most = max(most or 0, count * (1 + REPEATS))
    with turns.alone():
        for _ in track(launches(timing, opener, HANG_S, stop_on_failure), count, "processes", lambda _: 1):
            measured = len(timing.launches)
            repeated = measured >= count * (1 + REPEATS) or len(_undisturbed(timing)) >= count
            if measured >= most or (repeated and _is_enough(timing, count, enough)):
                break
    if len(undisturbed := _undisturbed(timing)) >= count:
        timing.disturbed = len(timing.launches) - len(undisturbed)
        timing.launches[:] = undisturbed


def _is_enough(timing: Timing, count: int, enough: Callable[[], bool]) -> bool:
    """Whether the intervals of the launches that will be kept are narrow enough."""
    undisturbed, every = _undisturbed(timing), timing.launches[:]
    timing.launches[:] = undisturbed if len(undisturbed) >= count else every
    try:
        return enough()
    finally:
        timing.launches[:] = every


def _undisturbed(timing: Timing) -> list[Launch]:
    return [launch for launch in timing.launches if not is_disturbed(launch)]


def is_disturbed(launch: Launch) -> bool:
    """Whether other processes stretched the runs of a process."""
    return bool(machine.disturbances([launch.conditions]))


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
    with _worker(task, plan, opener) as (process, connection, active, stack):
        while True:
            kind, content = _hear(process, connection, hang_s)
            if kind == "done":
                return
            if kind == "hung":
                kind, content = "failed", f"did not respond for {hang_s:.0f} s{_place(process, stack)}"
            if kind == "failed":
                raise _Failed(plan.arms[active.value].name, content)
            yield kind, content
            connection.send(None)


def _hear(process: BaseProcess, connection: Connection, hang_s: float) -> tuple[str, Any]:
    """The next message, ("hung", None) where none comes for `hang_s`, or ("failed", reason)."""
    until = time.monotonic() + hang_s
    while not connection.poll(min(1.0, hang_s)):
        if time.monotonic() > until:
            return "hung", None
    try:
        kind, content = connection.recv()
    except (EOFError, ConnectionResetError):
        process.join(5)
        return "failed", f"crashed its process ({_ending(process.exitcode)})"
    return ("failed", f"failed: {content}") if kind == "failed" else (kind, content)


def _place(process: BaseProcess, stack: Connection) -> str:
    """Where a process hangs, as " (in FUNCTION, FILE:LINE)"; "" where it does not say so."""
    if process.pid is None or not hasattr(signal, "SIGUSR1"):
        return ""
    os.kill(process.pid, signal.SIGUSR1)
    written, end = b"", time.monotonic() + STACK_S
    while stack.poll(max(0.0, end - time.monotonic())):  # the stack is written in pieces
        piece = os.read(stack.fileno(), 1 << 16)
        written += piece
        frame = re.search(r'File "(.+)", line (\d+) in (.+)\n', written.decode(errors="replace"))
        if frame or not piece:
            return f" (in {frame[3]}, {frame[1]}:{frame[2]})" if frame else ""
    return ""


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}"


@contextmanager
def _worker(
    task: Callable[..., None], plan: Plan, opener: Opener
) -> Iterator[tuple[BaseProcess, Connection, Any, Connection]]:
    """Run a task in a new process, which ends with the block; SIGUSR1 makes it write its Python stack to the last of
    these."""
    context = _context(task, plan)
    ours, theirs = context.Pipe()
    active = context.Value("i", 0, lock=False)
    stack, written = context.Pipe(duplex=False)
    process = context.Process(target=worker.work, args=(task, theirs, active, plan, opener, written), daemon=True)
    process.start()
    theirs.close()
    written.close()
    try:
        yield process, ours, active, stack
    finally:
        ours.close()
        stack.close()
        process.join(2)
        if process.is_alive():
            process.kill()
            process.join()


def _context(task: Callable[..., None], plan: Plan) -> ForkServerContext | SpawnContext:
    """How a timing process starts: on Linux CPUs forked from a process that has imported the libraries of the arms,
    which saves 2 to 3 seconds each time; as a new interpreter for cold starts, where the import is timed too, for other
    devices, whose drivers may not survive a fork, and on other systems."""
    on_cpu = all(arm.device == "cpu" for arm in plan.arms)
    if task is worker.time_cold or not on_cpu or sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([worker.__name__, *_modules(plan.arms)])  # the first call counts
    return context


def _modules(arms: Sequence[Arm]) -> list[str]:
    """The modules of the runtimes of the arms; none of an artifact that cannot be loaded, which its timing process
    reports."""
    modules: list[str] = []
    for arm in arms:
        with suppress(ExporterError):
            modules += worker.runtime_of(arm).modules
    return list(dict.fromkeys(modules))
