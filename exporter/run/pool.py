"""Several recipes at once, each in its own process, with one display of their progress."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from logging.handlers import QueueHandler
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from exporter.bench import turns
from exporter.progress import REPORTER, Reporter
from exporter.run import Outcome, RecipeRun, run_or_explain

T = TypeVar("T")
STOP_S = 10
_SHARED: list[Any] = []  # in a child process: the queue to the display, the lock file of timing, and the log handler


def run_all(runs: Sequence[RecipeRun], count: int) -> list[Outcome]:
    """Run recipes, `count` at once. Timing waits until the other processes are done or wait too."""
    import psutil  # noqa: F401  (`_stop` has no time to load it)

    context = multiprocessing.get_context("spawn")
    lines = context.Queue()
    drawing = threading.Thread(target=_draw, args=(lines, REPORTER.get()), daemon=True)
    drawing.start()
    with tempfile.TemporaryDirectory(prefix="convnext-export-run-") as folder:
        turn = Path(folder) / "turn"
        turn.touch()
        worker_arguments = (lines, turn, logging.getLogger().level)
        processes = _Processes(min(count, len(runs)), lambda: ProcessPoolExecutor(1, context, _begin, worker_arguments))
        with processes, ThreadPoolExecutor(min(count, len(runs))) as threads:
            outcomes = [threads.submit(processes.run, recipe_run) for recipe_run in runs]
            try:
                finished = [outcome.result() for outcome in outcomes]
            except BaseException:
                _stop(threads, outcomes)
                raise
    lines.put(None)
    drawing.join(5)
    return finished


class _Processes:
    """Executors of one process each: where one is killed, only the recipe that it ran fails."""

    def __init__(self, count: int, start: Callable[[], Executor]) -> None:
        self.start = start
        self.idle = SimpleQueue[Executor]()
        for _ in range(count):
            self.idle.put(start())

    def __enter__(self) -> _Processes:
        return self

    def __exit__(self, *exception: object) -> None:
        while not self.idle.empty():
            self.idle.get().shutdown()

    def run(self, recipe_run: RecipeRun) -> Outcome:
        """Run a recipe in an idle process. A process that was killed is replaced."""
        executor = self.idle.get()
        try:
            return executor.submit(_run, recipe_run).result()
        except BrokenProcessPool:
            executor.shutdown(wait=False)
            executor = self.start()
            why = "its process was killed: memory may have run out; use fewer --jobs"
            return Outcome(recipe_run.name, error=why, exit_code=3)
        finally:
            self.idle.put(executor)


def _stop(threads: ThreadPoolExecutor, outcomes: Sequence[Future[Outcome]]) -> None:
    """Terminate all child processes, also those that are just starting; each of their writes is atomic. They have
    `STOP_S` to remove their temporary files. Further interrupts change nothing."""
    import psutil

    end = time.monotonic() + STOP_S
    while not all(outcome.done() for outcome in outcomes):
        with suppress(KeyboardInterrupt):
            threads.shutdown(wait=False, cancel_futures=True)
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    process.terminate() if time.monotonic() < end else process.kill()
            time.sleep(0.1)


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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that waits for this one terminates it
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
    signal.signal(signal.SIGTERM, _interrupt)
    sys.unraisablehook = _take_the_next
    try:
        with turns.sharing(turn):
            return run_or_explain(recipe_run)
    except KeyboardInterrupt:  # reported by the process that waits for this one
        os._exit(4)
    finally:
        sys.unraisablehook = sys.__unraisablehook__
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        REPORTER.reset(token)


def _interrupt(number: int, frame: object) -> None:
    """Raise KeyboardInterrupt once, so that temporary files are removed."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _take_the_next(discarded: sys.UnraisableHookArgs) -> None:
    """Python discards an interrupt in a destructor: take the next one, which comes soon."""
    if issubclass(discarded.exc_type, KeyboardInterrupt):
        signal.signal(signal.SIGTERM, _interrupt)
    else:
        sys.__unraisablehook__(discarded)


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
