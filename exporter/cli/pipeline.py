"""The commands that run recipes, compare artifacts and write reports: `run`, `compare`, `report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.cli.console import WithSchema, schema_option
from exporter.cli.options import add, devices, options_of
from exporter.compare.gate import GateOptions
from exporter.errors import printable

if TYPE_CHECKING:
    from exporter.run import Outcome, RecipeRun


@click.command("run", short_help="Build, verify, time and report recipes; finished steps are skipped.")
@click.argument("recipes", metavar="RECIPE…", nargs=-1, required=True)
@click.option("-o", "--out", metavar="DIR", type=click.Path(path_type=Path), default=Path("build"),
              show_default=True, help="Folder for artifacts and reports.")  # fmt: skip
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True,
              help="Override a value of the recipes, as in quantization.calib_size=512.")  # fmt: skip
@click.option("--jobs", metavar="N", type=click.IntRange(1, 64), default=1, show_default=True,
              help="Number of recipes built at once; timing always runs alone.")  # fmt: skip
@click.option(
    "--on", metavar="ray[://HOST:PORT]",
    help="Run the recipes on a Ray cluster whose machines share the working folder: one of its own on this machine, or "
    "the one at this address.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace artifacts of the same name built from other weights.")
@click.option("--dry-run", is_flag=True, help="Print which steps would run and which results exist, and run no step.")
@click.option("--json", "as_json", is_flag=True, help="The result of each recipe, as a JSON list on stdout.")
def run_command(
    recipes: tuple[str, ...],
    out: Path,
    overrides: tuple[str, ...],
    jobs: int,
    on: str | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Build, verify, time and report recipes. RECIPE is a file, or the name of a bundled recipe.

    A step whose inputs have not changed (weights, images, options, versions) is skipped with a note. An interrupted
    run continues after the last finished step.

    \b
    Examples:
      convnext-export run my_model.yaml
      convnext-export run onnxruntime/tiny_int8 openvino/tiny_int8 --set quantization.calib=my_images
      convnext-export run recipes/openvino/*.yaml --jobs 2 --dry-run
    """
    from exporter import run
    from exporter.cli import build_commands
    from exporter.cli.console import console, drawing, plain, print_answer, print_json, print_table
    from exporter.errors import BadRequest
    from exporter.recipe import bundled

    if on and jobs > 1:
        raise BadRequest("--jobs is for one machine, and a cluster decides how many recipes run at once; leave one out")
    if on is not None:
        from exporter.run import cluster

        cluster.check_address(on)
    recipe_runs = run.read_all([bundled.find_recipe(word, build_commands()) for word in recipes], out, overrides, force)
    if dry_run:
        plans = {one.name: run.plan(one, on or "") for one in recipe_runs}
        if as_json:
            print_json(plans)
        else:
            columns = ("recipe", *next(iter(plans.values())))
            print_table(columns, [(name, *steps.values()) for name, steps in plans.items()])
        return
    with drawing():
        outcomes = _outcomes(recipe_runs, jobs, on)
        page = run.report_page(outcomes, out)
    if as_json:
        print_json([run.to_dict(outcome) for outcome in outcomes])
    else:
        columns = ("recipe", "artifact", "size", "cosine", "top-1", "drop", "p50 ms", "× eager", "")
        print_table(columns, [_row(outcome) for outcome in outcomes], right=columns[2:-1])
        print_answer([outcome.report for outcome in outcomes if outcome.report is not None])
        if page:
            console().print(f"the report is {plain(page)}", soft_wrap=True)
    for outcome in outcomes:
        if outcome.error:
            click.echo(f"error: {printable(outcome.name)}: {outcome.error}", err=True)
    if code := next((outcome.exit_code for outcome in outcomes if outcome.exit_code), 0):
        raise click.exceptions.Exit(code)


def _outcomes(recipe_runs: Sequence[RecipeRun], jobs: int, on: str | None) -> list[Outcome]:
    from exporter import run
    from exporter.run import pool, recipes

    if on is not None:
        return recipes.run_all(recipe_runs, on)
    return pool.run_all(recipe_runs, jobs) if jobs > 1 else run.run_all(recipe_runs)


def _row(outcome: Outcome) -> tuple[str, ...]:
    """A row of the summary."""
    from exporter.cli.console import size
    from exporter.report.tables import doubts

    artifact, report = outcome.artifact, outcome.report
    if artifact is None or report is None:
        return (outcome.name, "", "", "", "", "", "", "", "FAILED")
    numbers = (
        _number(report.value(metric), digits)
        for metric, digits in (("cosine", 6), ("top1", 2), ("top1_drop", 2), ("p50_ms", 3), ("speedup", 2))
    )
    words = ["passes" if report.passed else "FAILS", *doubts(report.findings)]
    if not any(step == "done" for step in outcome.steps.values()):
        words.append("all steps skipped")
    return (outcome.name, str(artifact.path), size(artifact.sidecar.bytes), *numbers, ", ".join(words))


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


@click.command("compare", short_help="The CI gate: fail if latency or accuracy regressed.")
@click.argument("sides", metavar="[BASE] HEAD", nargs=-1, required=True, type=click.Path(path_type=Path))
@add(options_of(GateOptions, more={"device": devices()}))
@click.option(
    "-o", "--out", metavar="FILE", type=click.Path(path_type=Path),
    help="The report; by default HEAD.compare.json.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="The report as JSON on stdout.")
def compare_command(sides: tuple[Path, ...], out: Path | None, as_json: bool, **values: Any) -> None:
    """Compare HEAD with BASE: two artifacts, two reports, or one artifact and the git revision to build its base from.

    Artifacts are timed in turn on this machine, and BASE twice, to measure the noise. A regression is significant by
    a rank test (p < 0.01, corrected for the number of comparisons) and exceeds its limit by more than that noise. It
    is measured again before the command fails, in twice as many processes or, among more than 40 comparisons, as many
    as a significant one needs. By default, one core is left to other processes. Exit code 6 means that a regression was
    found.

    A report may be a list of reports, as `bench --json` prints it. Answers are compared only where both reports were
    verified on the same images.

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

    path = out or sides[-1].parent / f"{sides[-1].name.removesuffix('.report.json')}.compare.json"
    artifact.check_output(path, sides)
    with drawing():
        comparison = gate.compare(sides, GateOptions(**values))
    report.save(comparison, path)
    if as_json:
        print_json(comparison)
    else:
        print_rows(tables.regressions([comparison]))
        worse = dict.fromkeys(finding.metric for finding in comparison.findings if not finding.passed)
        verdict = f"[red]REGRESSION[/] of {', '.join(worse)}" if worse else "[green]no regression[/]"
        console().print(f"{verdict}; the report is {plain(path)}", soft_wrap=True)
    if not comparison.passed:
        raise click.exceptions.Exit(6)


@click.command("report", cls=WithSchema, short_help="Render reports for people or a CI, or a history as a trend page.")
@click.argument("reports", metavar="REPORT.json…", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    default="markdown",
    show_default=True,
    help="html, markdown, text, junit, github (annotations) or csv.",
)
@click.option("-o", "--out", metavar="FILE", type=click.Path(path_type=Path), help="Output file; by default stdout.")
@click.option(
    "--history", metavar="FILE", type=click.Path(path_type=Path), help="Also append the reports to this .jsonl file."
)
@click.option("--commit", metavar="SHA", help="Commit of the reports in the history; by default git's HEAD.")
@schema_option("reports and comparisons", "exporter.report")
def report_command(
    reports: tuple[Path, ...], form: str, out: Path | None, history: Path | None, commit: str | None
) -> None:
    """Render one or more reports for people or a CI, or a history as a page with its steps.

    \b
    Examples:
      convnext-export report build/*.report.json --format html -o report.html
      convnext-export report build/*.report.json --history history.jsonl
      convnext-export report history.jsonl --format html -o trend.html
      convnext-export report --schema > report.schema.json
    """
    from exporter import artifact
    from exporter.artifact import disk
    from exporter.cli.console import drawing
    from exporter.errors import BadRequest
    from exporter.report import rendering

    if commit is not None and history is None:
        raise BadRequest("--commit: there is no history to write it to; add --history FILE, or leave it out")
    for path in (path for path in (out, history) if path):
        artifact.check_output(path, [*reports, *([history] if history and path == out else [])])
    with drawing():
        text, notes = rendering.rendered(reports, form)
    for note in notes:
        click.echo(printable(f"note: {note}"), err=True)
    if history:
        rendering.remember(reports, history, commit)
    if out:
        disk.write_file(out, text.encode())
        click.echo(printable(f"the report is {out}"))
    else:
        click.echo(text, nl=False)
