"""A recipe from beginning to end, and what was measured, judged and for others to read: `run`, `compare`, `report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.cli.options import add, devices, options_of
from exporter.compare.gate import GateOptions

if TYPE_CHECKING:
    from exporter.run import Outcome


@click.command("run", short_help="All of it from recipes: built, verified, timed, reported; what is done is skipped.")
@click.argument("recipes", metavar="RECIPE…", nargs=-1, required=True)
@click.option("-o", "--output", metavar="DIR", type=click.Path(path_type=Path), default=Path("build"),
              show_default=True, help="Where artifacts and reports go.")  # fmt: skip
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True,
              help="Another value than the recipes have, as in quantization.calib_size=512.")  # fmt: skip
@click.option("--jobs", metavar="N", type=click.IntRange(1, 64), default=1, show_default=True,
              help="So many recipes at once; what is timed is timed alone all the same.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Say what would be done and what is there already, and do nothing.")
@click.option("--json", "as_json", is_flag=True, help="What came of each recipe, as a JSON list on stdout.")
def run_command(
    recipes: tuple[str, ...], output: Path, overrides: tuple[str, ...], jobs: int, dry_run: bool, as_json: bool
) -> None:
    """Build, verify, time and report what recipes ask for. RECIPE is a file, or the name of one that ships.

    A step whose inputs have not changed (weights, images, options, versions) is skipped, and says so; what was
    interrupted goes on where it stopped.

    \b
    Examples:
      convnext-export run my_model.yaml
      convnext-export run onnxruntime/tiny_int8 openvino/tiny_int8 --set quantization.calib=my_images
      convnext-export run recipes/*.yaml --jobs 2 --dry-run
    """
    from exporter import run
    from exporter.cli.console import console, drawing, plain, print_json, print_table
    from exporter.recipe import bundled
    from exporter.run import pool

    recipe_runs = run.read_all([bundled.find_recipe(word) for word in recipes], output, overrides)
    if dry_run:
        plans = {job.name: run.plan(job) for job in recipe_runs}
        if as_json:
            print_json(plans)
        else:
            columns = ("recipe", *next(iter(plans.values())))
            print_table(columns, [(name, *steps.values()) for name, steps in plans.items()])
        return
    with drawing():
        outcomes = pool.run_all(recipe_runs, jobs) if jobs > 1 else run.run_all(recipe_runs)
        page = run.report_page(outcomes, output)
    if as_json:
        print_json([run.to_dict(outcome) for outcome in outcomes])
    else:
        columns = ("recipe", "artifact", "size", "cosine", "top-1", "drop", "p50 ms", "× eager", "")
        print_table(columns, [_row(outcome) for outcome in outcomes], right=columns[2:-1])
        if page:
            console().print(f"the report is {plain(page)}", soft_wrap=True)
    for outcome in outcomes:
        if outcome.error:
            click.echo(f"error: {outcome.name}: {outcome.error}", err=True)
    if code := next((outcome.exit_code for outcome in outcomes if outcome.exit_code), 0):
        raise click.exceptions.Exit(code)


def _row(outcome: Outcome) -> tuple[str, ...]:
    """A line of the summary."""
    from exporter.cli.console import size

    made, found = outcome.artifact, outcome.report
    if made is None or found is None:
        return (outcome.name, "", "", "", "", "", "", "", "FAILED")
    numbers = (
        _number(found.value(metric), digits)
        for metric, digits in (("cosine", 6), ("top1", 2), ("top1_drop", 2), ("p50_ms", 3), ("speedup", 2))
    )
    verdict = "passes" if found.passed else "FAILS"
    if not any(step == "done" for step in outcome.steps.values()):
        verdict += ", all there already"
    return (outcome.name, str(made.path), size(made.sidecar.bytes), *numbers, verdict)


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


@click.command("compare", short_help="The CI gate: did latency or accuracy regress?")
@click.argument("sides", metavar="[BASE] HEAD", nargs=-1, required=True, type=click.Path(path_type=Path))
@add(options_of(GateOptions, more={"device": devices()}))
@click.option(
    "-o", "--output", metavar="FILE", type=click.Path(path_type=Path),
    help="The report; by default HEAD.compare.json.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="The report as JSON on stdout.")
def compare_command(sides: tuple[Path, ...], output: Path | None, as_json: bool, **values: Any) -> None:
    """Did HEAD get worse than BASE? Two artifacts, two reports, or an artifact and a git revision to build it from.

    Artifacts are timed in turn on this machine, and BASE twice, so that the noise is known. A regression is
    significant by a rank test (p < 0.01, corrected for all that is compared) and above its limit by more than that
    noise; what looks like one is measured again, twice as long, before it fails. Unless told, one core is left to
    the rest of the machine. Exit code 6 says that a regression was found.

    \b
    Examples:
      convnext-export compare main/tiny_fp16.xml build/tiny_fp16.xml --fail-on p50_ms:5%
      convnext-export compare --base-rev origin/main --build "make model" build/tiny_fp16.xml
      convnext-export compare main.report.json head.report.json --fail-on top1_drop:0.3
    """
    from exporter import artifact, report
    from exporter.cli.console import console, drawing, plain, print_json, print_rows
    from exporter.compare import gate
    from exporter.report import tables

    path = output or sides[-1].with_name(f"{sides[-1].name.removesuffix('.report.json')}.compare.json")
    artifact.check_output(path)
    with drawing():
        made = gate.compare(sides, GateOptions(**values))
    report.save(made, path)
    if as_json:
        print_json(made)
    else:
        print_rows(tables.regressions([made]))
        verdict = "[green]no regression[/]" if made.passed else "[red]REGRESSION[/]"
        console().print(f"{verdict}; the report is {plain(path)}", soft_wrap=True)
    if not made.passed:
        raise click.exceptions.Exit(6)


@click.command("report", short_help="Reports for people and for a CI; a history as a trend page.")
@click.argument("reports", metavar="REPORT.json…", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    default="markdown",
    show_default=True,
    help="html, markdown, junit, github (annotations) or csv.",
)
@click.option("-o", "--output", metavar="FILE", type=click.Path(path_type=Path), help="A file; else stdout.")
@click.option(
    "--history", metavar="FILE", type=click.Path(path_type=Path), help="Append what was measured to this .jsonl too."
)
@click.option("--commit", metavar="SHA", help="Whose numbers these are; by default git's HEAD.")
def report_command(
    reports: tuple[Path, ...], form: str, output: Path | None, history: Path | None, commit: str | None
) -> None:
    """Write one or more reports in a form for people or a CI, or a history as a page that finds its steps.

    \b
    Examples:
      convnext-export report build/*.report.json --format html -o report.html
      convnext-export report build/*.report.json --history history.jsonl
      convnext-export report history.jsonl --format html -o trend.html
    """
    from exporter import artifact
    from exporter.artifact import disk
    from exporter.report import rendering

    for path in (path for path in (output, history) if path):
        artifact.check_output(path)
    text, notes = rendering.rendered(reports, form)
    for note in notes:
        click.echo(f"note: {note}", err=True)
    if history:
        rendering.remember(reports, history, commit)
    if output:
        disk.write_file(output, text.encode())
        click.echo(f"the report is {output}")
    else:
        click.echo(text, nl=False)
