"""Progress reports: code below `cli` reports its steps to a reporter, which `cli` draws.

With no reporter set nothing is drawn, so the library is silent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar

T = TypeVar("T")


class Reporter(Protocol):
    """Draws progress for a person."""

    def step(self, text: str) -> None:
        """A new step of the work begins."""

    def note(self, text: str) -> None:
        """Something worth reading that is not an error."""

    def track(self, items: Iterable[T], total: int, text: str, count: Callable[[T], int]) -> Iterator[T]:
        """Yield the items, drawing a bar; each moves it by its count."""


class Silent:
    """Draws nothing."""

    def step(self, text: str) -> None:
        """Say nothing."""

    def note(self, text: str) -> None:
        """Say nothing."""

    def track(self, items: Iterable[T], total: int, text: str, count: Callable[[T], int]) -> Iterator[T]:
        """Yield the items."""
        del total, text, count
        yield from items


REPORTER: ContextVar[Reporter] = ContextVar("reporter", default=Silent())  # noqa: B039  (it has no state)


class NotesOnly(Silent):
    """Passes notes on, and draws nothing else."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter

    def note(self, text: str) -> None:
        """Pass a note on."""
        self.reporter.note(text)


@contextmanager
def silent(notes: bool = False) -> Iterator[None]:
    """Draw nothing inside the `with` block, or only `notes`."""
    token = REPORTER.set(NotesOnly(REPORTER.get()) if notes else Silent())
    try:
        yield
    finally:
        REPORTER.reset(token)


def step(text: str) -> None:
    """Say that a step begins."""
    REPORTER.get().step(text)


def note(text: str) -> None:
    """Say something worth reading."""
    REPORTER.get().note(text)


def track(items: Iterable[T], total: int, text: str, count: Callable[[T], int]) -> Iterator[T]:
    """Yield the items under a progress bar that ends at `total`; each moves it by its count."""
    return REPORTER.get().track(items, total, text, count)
