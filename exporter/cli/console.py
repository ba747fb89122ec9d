"""Console output: progress on stderr, tables on stdout, and with `--json` only JSON on stdout."""

from __future__ import annotations

import importlib
import logging
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import click

from exporter.errors import printable
from exporter.progress import REPORTER, Silent

if TYPE_CHECKING:
    from rich.console import Console

    from exporter.artifact import Artifact
    from exporter.report import Finding, Report
    from exporter.report.tables import Table
    from exporter.verify import VerifyOptions

T = TypeVar("T")
REDRAW_S, LINE_S = 0.1, 15.0  # between drawings of a bar, and between lines where no bar can be drawn
VERBOSITY = "exporter.verbosity"  # the key of a command's context
WRAPPED = 24  # the width below which the last column of a table is not wrapped
UNITS = ("B", "kB", "MB", "GB")


def console(stderr: bool = False) -> Console:
    """A console. In a pipe or CI its lines are wide enough for any table."""
    from rich.console import Console

    terminal = Console(stderr=stderr, highlight=False, soft_wrap=False)
    return terminal if terminal.is_terminal else Console(stderr=stderr, highlight=False, width=160)


class Drawn:
    """Draws steps as lines and loops as bars, on stderr; of a verbose command, with the seconds since its start."""

    def __init__(self, verbose: bool = False) -> None:
        self.console = console(stderr=True)
        self.noted: set[str] = set()
        self.start = time.monotonic() if verbose else None

    def step(self, text: str) -> None:
        """Print the name of a step that begins."""
        seconds = "" if self.start is None else f"{time.monotonic() - self.start:7.1f} s "
        self.console.print(f"[dim]{seconds}·[/] {plain(text)}")

    def note(self, text: str) -> None:
        """Print a note, once for each text."""
        if text not in self.noted:
            self.noted.add(text)
            self.console.print(f"[yellow]note:[/] {plain(text)}")

    def track(self, items: Iterable[T], total: int, text: str, count: Callable[[T], int]) -> Iterator[T]:
        """Yield the items, and show how many are done by the count of each: a bar, or in a pipe or CI a line from time
        to time.

        Nothing is drawn while the next item is computed, because it may be a measurement.
        """
        show = self._bar if self.console.is_terminal else self._lines
        return show(items, total, plain(text), count)

    def _bar(self, items: Iterable[T], total: int, text: str, count: Callable[[T], int]) -> Iterator[T]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True, auto_refresh=False) as progress:
            task = progress.add_task(text, total=total)
            drawn = time.monotonic()
            progress.refresh()
            for item in items:
                yield item
                progress.advance(task, count(item))
                if time.monotonic() - drawn > REDRAW_S:
                    progress.refresh()
                    drawn = time.monotonic()

    def _lines(self, items: Iterable[T], total: int, text: str, count: Callable[[T], int]) -> Iterator[T]:
        start = printed = time.monotonic()
        done = 0
        for item in items:
            yield item
            done, now = done + count(item), time.monotonic()
            if now - printed > LINE_S and 0 < done < total:
                left = (now - start) * (total - done) / done
                self.console.print(f"[dim]  {text}: {done} of {total}, about {left:.0f} s left[/]")
                printed = now


def plain(text: object) -> str:
    """The text on one line with its markup escaped: file names and labels may contain any text."""
    from rich.markup import escape

    return escape(printable(str(text)))


def with_verbosity(command: click.Command) -> click.Command:
    """The command with the options `--quiet` and `--verbose`, if it has none."""
    if all(parameter.name != "quiet" for parameter in command.params):
        for name, text in (
            ("quiet", "Print the result and errors only."),
            ("verbose", "Also print when each step began, and the log messages of libraries."),
        ):
            words = (f"-{name[0]}", f"--{name}")
            option = click.Option(words, is_flag=True, expose_value=False, callback=_remember, help=text)
            command.params.append(option)
    return command


def _remember(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    if wanted and context.meta.setdefault(VERBOSITY, option.name) != option.name:
        raise click.UsageError("--quiet and --verbose contradict each other; leave one out", context)


@contextmanager
def drawing() -> Iterator[None]:
    """Draw progress inside the `with` block, as much as `--quiet` or `--verbose` asks for."""
    verbosity = click.get_current_context().meta.get(VERBOSITY)
    token = REPORTER.set(Silent() if verbosity == "quiet" else Drawn(verbose=verbosity == "verbose"))
    try:
        with _messages_of_libraries() if verbosity == "verbose" else nullcontext():
            yield
    finally:
        REPORTER.reset(token)


@contextmanager
def _messages_of_libraries() -> Iterator[None]:
    """Print log messages of level INFO and above inside the `with` block."""
    root, handler = logging.getLogger(), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.setLevel(before)
        root.removeHandler(handler)


def print_json(value: Any) -> None:
    """Print one JSON document on stdout."""
    import msgspec

    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


class WithSchema(click.Command):
    """A command whose option `--schema` must stand alone."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """With `--help`, `--schema` is ignored.

        Raises: click.UsageError for other words.
        """
        others = [word for word in args if word != "--schema"]
        if any(word in ctx.help_option_names for word in others):
            return super().parse_args(ctx, others)
        if others and "--schema" in args and not ctx.resilient_parsing:
            raise click.UsageError(f"--schema takes no other word; leave out {shlex.join(others)}", ctx)
        return super().parse_args(ctx, args)


def schema_option(documents: str, module: str) -> Callable[[Any], Any]:
    """A `--schema` option of a command of `WithSchema`, which prints the JSON schema of documents.

    Args:
        documents: what they are, as in "reports".
        module: the name of a module whose `schema` returns it.
    """

    def print_schema(context: click.Context, _: click.Parameter, wanted: bool) -> None:
        if wanted:
            print_json(importlib.import_module(module).schema())
            context.exit()

    return click.option(
        "--schema", is_flag=True, is_eager=True, expose_value=False, callback=print_schema,
        help=f"Print the JSON schema of {documents} instead.",
    )  # fmt: skip


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()) -> None:
    """Print a table on stdout; columns in `right` are aligned right. Columns for which the terminal is too narrow are
    named below it instead."""
    from rich import box
    from rich.table import Table

    from exporter.report.columns import fitting

    terminal, rows = console(), [[plain(cell) for cell in row] for row in rows]
    kept, fits = fitting(columns, rows, terminal.width, WRAPPED)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index in kept:
        column = columns[index]
        table.add_column(
            column, justify="right" if column in right else "left", no_wrap=fits and index != len(columns) - 1
        )
    for row in rows:
        table.add_row(*(row[index] for index in kept))
    terminal.print(table)
    if hidden := [column for index, column in enumerate(columns) if index not in kept]:
        terminal.print(f"not shown in {terminal.width} columns: {', '.join(hidden)}", style="dim", soft_wrap=True)


def print_findings(findings: Iterable[Finding]) -> None:
    """Print findings with their limits and verdicts."""
    from exporter.report import tables

    rows = [
        (
            f.check,
            tables.title(f),
            value(f),
            limit(f),
            ("unsure" if f.unsure else "pass" if f.passed else "FAIL") if f.limit is not None else "",
            f.remarks,
        )
        for f in findings
    ]
    print_table(("check", "metric", "value", "limit", "", "detail"), rows, right=("value", "limit"))


def print_rows(table: Table) -> None:
    """Print a table of a report on stdout."""
    print_table(table.columns, [[cell.replace("**", "") for cell in row] for row in table.rows], right=table.right)


def print_next(text: str, *words: object) -> None:
    """Print what the next command does, and the command, unless the command is quiet."""
    print_hint(f"{text}: {shlex.join(['convnext-export', *map(str, words)])}")


def print_hint(text: str) -> None:
    """Print a line on what to do next, unless the command is quiet."""
    if click.get_current_context().meta.get(VERBOSITY) != "quiet":
        console().print(plain(text), style="dim", soft_wrap=True)


def print_next_step(artifact: Artifact, report: Report, options: VerifyOptions | None = None) -> None:
    """Print the command that follows a verification, if any.

    An artifact that cannot run here can be neither timed nor bisected. `bisect` compares only with the model that the
    artifact was built from, so it cannot explain a difference from `--reference`, nor data that cannot be measured.
    """
    from exporter.artifact.outputs import DENSE
    from exporter.recipe import SYNTHETIC

    differs = any(not f.passed and f.check != "data" and f.value is not None for f in report.findings)
    if report.find("simulated") or not (report.passed or differs):
        return
    if report.passed:
        print_next("time it beside PyTorch", "bench", artifact.path)
    elif options and options.reference:
        print_hint(f"to find the module that differs, build the artifact again with --reference {options.reference}")
    else:
        images: tuple[str, ...] = ("--data", options.data) if options and options.data != SYNTHETIC else ()
        images += ("--reduce-zero-label",) if options and options.reduce_zero_label else ()
        if artifact.sidecar.task not in DENSE:
            print_next("find the part that differs", "bisect", artifact.path, *images)
        elif report.find("block_error") is None:
            print_next("find the block that differs", "verify", artifact.path, *images, "--blocks")


def print_answer(reports: Sequence[Report]) -> None:
    """Print which artifact to ship, where reports tell."""
    from exporter.report.answer import answer

    if (found := answer(reports)) is not None:
        console().print(f"[{'green' if found.passes else 'red'}]{plain(found.sentence)}[/]", soft_wrap=True)


def value(finding: Finding) -> str:
    """A finding's value in its unit."""
    if finding.value is None:
        return "–" if finding.limit is None else "not a number"
    if finding.metric.endswith("bytes") and finding.unit != "%":
        return size(int(finding.value))
    text = f"{finding.value:.2f}" if finding.unit == "×" else number(finding.metric, finding.value)
    if not finding.passed and finding.limit is not None and float(text) == float(limit(finding)):
        text = repr(finding.value)  # every digit, because rounding hides why it fails
    return f"{text} {finding.unit}".strip()


def limit(finding: Finding) -> str:
    """A finding's limit, or nothing."""
    digits = 10 if finding.metric == "cosine" else 6
    return "" if finding.limit is None else f"{finding.limit:.{digits}g}"


def number(metric: str, value: float | str) -> str:
    """The value of a metric with as many digits as matter."""
    if isinstance(value, str):
        return value
    return f"{value:.7f}" if metric == "cosine" else f"{value:.6g}"


def size(count: int) -> str:
    """A number of bytes with a unit."""
    number, unit = float(count), 0
    while number >= 1000 and unit < len(UNITS) - 1:
        number, unit = number / 1000, unit + 1
    return f"{number:.3g} {UNITS[unit]}"
