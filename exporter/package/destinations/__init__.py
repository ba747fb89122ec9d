"""Destinations of packages. Each module of this folder is one destination, and ends in
`DESTINATION = Destination(...)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from exporter import discover
from exporter.artifact.outputs import Answer
from exporter.artifact.sidecar import Record
from exporter.package.contents import Contents


class DestinationOptions(Record, frozen=True):
    """Options of a destination. Most have none. Each field is an option of the command, so no two destinations have
    fields of one name."""


@dataclass(frozen=True)
class Destination:
    """A destination of packages.

    name: of its module, the word of `--for`.
    summary: a sentence for the help of the command.
    check: raises BadRequest for an artifact that it cannot be written for, before anything is run.
    write: writes the files into a folder; those that every package has (`common`) come from `exporter.package`.
    program: the module of the package that the self-test runs: `predict` or `client`.
    selftest: the template of the self-test.
    options: the record that `check` and `write` take.
    exact: whether the arithmetic there is always that of the artifact.
    segment_answers: the outputs (`--output`) of segmentation that it has code for.
    """

    name: str
    summary: str
    check: Callable[[Contents, DestinationOptions], None]
    write: Callable[[Contents, DestinationOptions, Path], None]
    program: str = "client"
    selftest: str = "selftest.py"
    options: type[DestinationOptions] = DestinationOptions
    exact: Callable[[Contents], bool] = lambda _: True
    segment_answers: tuple[Answer, ...] = ()


def names() -> list[str]:
    """The names of all destinations: the modules of this folder."""
    return discover.names(__name__)


def destination(name: str) -> Destination:
    """The destination of that name.

    Raises: BadRequest for an unknown one, with the nearest.
    """
    loaded: Destination = discover.load(__name__, name, "DESTINATION")
    return loaded
