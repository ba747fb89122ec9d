"""Several recipes at once, each in its own process, with one display of their progress."""

from __future__ import annotations

import logging
import multiprocessing
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from logging.handlers import QueueHandler
from pathlib import Path
from typing import Any, TypeVar

from exporter.bench import turns
from exporter.progress import REPORTER, Reporter
from exporter.run import Outcome, RecipeRun, run_or_explain

T = TypeVar("T")
_SHARED: list[Any] = []  # in a child process: the queue to the display, the lock file of timing, and the log handler


def run_all(runs: Sequence[RecipeRun], count: int) -> list[Outcome]:
    """Run recipes, `count` at once. Timing waits until the other processes are done or wait too."""
    context = multiprocessing.get_context("spawn")
    lines = context.Queue()
    drawing = threading.Thread(target=_draw, args=(lines, REPORTER.get()), daemon=True)
    drawing.start()
    with tempfile.TemporaryDirectory(prefix="convnext-export-run-") as folder:
        turn = Path(folder) / "turn"
        turn.touch()
        worker_arguments = (lines, turn, logging.getLogger().level)
        with ProcessPoolExecutor(min(count, len(runs)), context, _begin, worker_arguments) as pool:
            waiting = [pool.submit(_run, recipe_run) for recipe_run in runs]
            try:
                outcomes = [
                    _result(recipe_run, future.result) for recipe_run, future in zip(runs, waiting, strict=True)
                ]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                _stop()
                raise
    lines.put(None)
    drawing.join(5)
    return outcomes


def _result(recipe_run: RecipeRun, result: Callable[[], Outcome]) -> Outcome:
    try:
        return result()
    except BrokenProcessPool:
        why = "its process, or one beside it, was killed: memory may have run out; use fewer --jobs"
        return Outcome(recipe_run.name, error=why, exit_code=3)


def _stop() -> None:
    """Terminate all child processes; each of their writes is atomic."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            process.terminate()


def _draw(lines: Any, reporter: Reporter) -> None:
    while (line := lines.get()) is not None:
        kind, content = line
        if kind == "log":
            logging.getLogger(content.name).handle(content)
        else:
            getattr(reporter, kind)(content)


def _begin(lines: Any, turn: Path, level: int) -> None:
    handler = _LogQueue(lines)
    _SHARED[:] = [lines, turn, handler]
    logging.getLogger().setLevel(level)
    logging.getLogger().addHandler(handler)


class _LogQueue(QueueHandler):
    """Sends log messages to the process that displays them, after the recipe's name."""

    recipe = ""

    def enqueue(self, record: logging.LogRecord) -> None:
        """Send one message, which `prepare` formatted."""
        record.msg = f"{self.recipe}: {record.msg}"
        self.queue.put_nowait(("log", record))


def _run(recipe_run: RecipeRun) -> Outcome:
    lines, turn, handler = _SHARED
    handler.recipe = recipe_run.name
    token = REPORTER.set(_Sent(recipe_run.name, lines))
    try:
        with turns.sharing(turn):
            return run_or_explain(recipe_run)
    except KeyboardInterrupt:  # reported by the process that waits for this one
        os._exit(4)
    finally:
        REPORTER.reset(token)


class _Sent:
    """Progress, sent to the process that displays it, after the recipe's name."""

    def __init__(self, name: str, lines: Any) -> None:
        self.name, self.lines = name, lines

    def step(self, text: str) -> None:
        """A step begins."""
        self.lines.put(("step", f"{self.name}: {text}"))

    def note(self, text: str) -> None:
        """Something worth reading."""
        self.lines.put(("note", text if text.startswith(self.name) else f"{self.name}: {text}"))

    def track(self, items: Iterable[T], total: int, text: str, count: Callable[[T], int]) -> Iterator[T]:
        """The items, without a bar: bars of several processes would overwrite each other."""
        del total, text, count
        yield from items
