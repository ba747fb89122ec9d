"""Several recipes at once, each in a process of its own, drawn as one."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from exporter.bench import turns
from exporter.progress import REPORTER, Reporter
from exporter.run import Outcome, RecipeRun, run_or_tell

T = TypeVar("T")
_SHARED: list[Any] = []  # a process's way to the one that draws, and the file that turns are taken over


def run_all(jobs: Sequence[RecipeRun], count: int) -> list[Outcome]:
    """Every recipe, `count` at once. What is timed is timed alone: it waits until the others are done or wait too."""
    context = multiprocessing.get_context("spawn")
    lines = context.Queue()
    drawing = threading.Thread(target=_draw, args=(lines, REPORTER.get()), daemon=True)
    drawing.start()
    with tempfile.TemporaryDirectory(prefix="convnext-export-run-") as folder:
        turn = Path(folder) / "turn"
        turn.touch()
        with ProcessPoolExecutor(min(count, len(jobs)), context, _begin, (lines, turn)) as pool:
            waiting = [pool.submit(_run, job) for job in jobs]
            try:
                outcomes = [_result(job, future.result) for job, future in zip(jobs, waiting, strict=True)]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                _stop()
                raise
    lines.put(None)
    drawing.join(5)
    return outcomes


def _result(job: RecipeRun, result: Callable[[], Outcome]) -> Outcome:
    try:
        return result()
    except BrokenProcessPool:
        why = "its process, or one beside it, was killed: memory may have run out; use fewer --jobs"
        return Outcome(job.name, error=why, exit_code=3)


def _stop() -> None:
    """End all that was begun, and what that began: nothing that it writes can be torn."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            process.terminate()


def _draw(lines: Any, reporter: Reporter) -> None:
    while (line := lines.get()) is not None:
        kind, text = line
        getattr(reporter, kind)(text)


def _begin(lines: Any, turn: Path) -> None:
    _SHARED[:] = [lines, turn]


def _run(job: RecipeRun) -> Outcome:
    lines, turn = _SHARED
    token = REPORTER.set(_Sent(job.name, lines))
    try:
        with turns.sharing(turn):
            return run_or_tell(job)
    except KeyboardInterrupt:  # the process that waits for this one tells of it
        os._exit(4)
    finally:
        REPORTER.reset(token)


class _Sent:
    """Progress, sent to the process that draws, with the recipe's name before it."""

    def __init__(self, name: str, lines: Any) -> None:
        self.name, self.lines = name, lines

    def step(self, text: str) -> None:
        """A step begins."""
        self.lines.put(("step", f"{self.name}: {text}"))

    def note(self, text: str) -> None:
        """Something worth reading."""
        self.lines.put(("note", text if text.startswith(self.name) else f"{self.name}: {text}"))

    def track(self, items: Iterable[T], total: int, text: str, count: Callable[[T], int]) -> Iterator[T]:
        """The items; bars of several processes would be drawn over each other."""
        del total, text, count
        yield from items
