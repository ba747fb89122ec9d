"""Errors that a user can fix.

ExporterError            one line, an exit code, and what to do
├── BadRequest           2  a word, recipe or file that cannot be used
├── Unavailable          3  something is missing on this machine
├── RunFailed            3  a runtime failed while it ran a model, as without memory
└── CheckFailed          5  built, but a check did not pass

Ctrl-C is exit code 4. A regression found by `compare` is exit code 6, and no error. Any other exception is a bug of
this tool (exit code 1, with its traceback).
"""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable

# Control characters (terminals act on ESC sequences), marks that reverse the direction of text, line separators and
# halves of surrogate pairs.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

_ESCAPES = {"\t": r"\t", "\n": r"\n", "\r": r"\r"}


class ExporterError(Exception):
    """An error that the user can fix. The message has the cause, the expected value and the next step.

    Each argument is one problem, and one line of the message: names in it, which may come from a file or an archive,
    cannot begin a line or send commands to a terminal.
    """

    exit_code = 2

    def __str__(self) -> str:
        return "\n       ".join(printable(str(problem)) for problem in self.args)


class StoppedAfterBuild(KeyboardInterrupt):
    """Ctrl-C after an artifact was written, while it was timed."""


class BadRequest(ExporterError):
    """A request, recipe or file that cannot be used as it is."""

    exit_code = 2


class Unavailable(ExporterError):
    """Something is missing on this machine; the message has the line that installs it."""

    exit_code = 3


class RunFailed(ExporterError):
    """A runtime failed while it ran a model that it had loaded."""

    exit_code = 3


class CheckFailed(ExporterError):
    """The result of a build did not pass a check."""

    exit_code = 5


def file_error(error: OSError) -> ExporterError | None:
    """The error that a user reads for a file that cannot be read or written, or a full disk; None for any other."""
    if error.filename is None and error.errno != errno.ENOSPC:
        return None
    kind = Unavailable if error.errno == errno.ENOSPC else BadRequest
    return kind(f"{str(error.filename or 'output')[:200]}: {error.strerror}")


def nearest(word: str, known: Iterable[str]) -> str:
    """A clause that suggests the nearest known word, or lists all when none is near."""
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
    """The first line of a library's error message, or the type of the error if the message is empty."""
    return ([*str(error).strip().splitlines(), type(error).__name__][0] or type(error).__name__)[:200]


def last_line(error: BaseException) -> str:
    """The last line of a library's error message, where C++ libraries put the reason."""
    return ([type(error).__name__, *str(error).strip().splitlines()][-1])[:200]


def run_failed(runtime: str, reason: str) -> RunFailed:
    """The error for a runtime that failed while it ran a model."""
    return RunFailed(f"{runtime} failed during a run: {reason}; if memory ran out, use a smaller batch or image size")


def as_utf8(name: str) -> str:
    """The name of a file as text that can be written; bytes that are no UTF-8 are replaced."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def printable(text: str) -> str:
    """The text on one line: whitespace becomes spaces, and signs that a terminal or page would obey become `\\x1b`."""

    def spelled(match: re.Match[str]) -> str:
        sign = match[0]
        if sign in "\t\n\v\f\r":
            return " "
        return f"\\x{ord(sign):02x}" if ord(sign) < 256 else f"\\u{ord(sign):04x}"

    return _UNPRINTABLE.sub(spelled, text)


def escaped(name: str) -> str:
    """A name with its unprintable characters and backslashes as escapes, so that two names never look alike."""

    def spelled(match: re.Match[str]) -> str:
        sign = match[0]
        return _ESCAPES.get(sign) or (f"\\x{ord(sign):02x}" if ord(sign) < 256 else f"\\u{ord(sign):04x}")

    return _UNPRINTABLE.sub(spelled, name.replace("\\", "\\\\"))
