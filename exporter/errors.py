"""What can go wrong that a user can mend.

ExporterError            one line, an exit code, and what to do
├── BadRequest           2  a word, recipe or file that cannot be used
├── Unavailable          3  something is missing on this machine
└── CheckFailed          5  built, but a check did not pass

Ctrl-C is exit code 4; what `compare` found to have got worse is 6, and no error. Anything else that escapes is a bug
of ours (exit code 1, with its traceback).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ExporterError(Exception):
    """Bad news the user can act on. The message says what was found, what was expected and what to do."""

    exit_code = 2


class BadRequest(ExporterError):
    """A request, recipe or file that cannot be used as it is."""

    exit_code = 2


class Unavailable(ExporterError):
    """Something is missing on this machine; the message has the line that installs it."""

    exit_code = 3


class CheckFailed(ExporterError):
    """What was built does not hold what it must."""

    exit_code = 5


def nearest(word: str, known: Iterable[str]) -> str:
    """A clause that offers the nearest of the known words, or lists them when none is near."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(names)}"


def some(names: Iterable[str], most: int = 3) -> str:
    """The first few of the names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def first_line(error: BaseException) -> str:
    """The first line of what a library said, or the kind of its error if it said nothing."""
    return ([*str(error).strip().splitlines(), type(error).__name__][0] or type(error).__name__)[:200]


def last_line(error: BaseException) -> str:
    """The last line of what a library said: C++ puts the reason at the end."""
    return ([type(error).__name__, *str(error).strip().splitlines()][-1])[:200]
