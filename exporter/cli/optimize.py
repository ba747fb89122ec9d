"""The command that searches for the best artifact: `optimize`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from exporter.cli.options import add, devices, options_of, take
from exporter.optimize.options import OptimizeOptions, Request
from exporter.recipe import Checks, Export, Model, PreprocessingOptions, Quantization
from exporter.recipe.fields import fields_of

JUDGED = ("samples", "outputs", "threshold", "reduce_zero_label", "when_unsure")
"""The fields of checks that a search needs."""
NO_CHECKS = tuple(name for name in fields_of(Checks) if name not in JUDGED)
NO_EXPORT = ("batch", "keep")  # of the search; parts are kept where int8 loses too much
NO_QUANTIZATION = ("int8_scope", "even_if_slower")  # all scopes are tried, and speed is measured


@click.command("optimize", short_help="Find the best artifact for this machine.")
@add(options_of(OptimizeOptions, more={"device": devices()}))
@add(options_of(Quantization, skip=NO_QUANTIZATION))
@add(options_of(Checks, skip=NO_CHECKS))
@add(options_of(Model))
@add(options_of(PreprocessingOptions))
@add(options_of(Export, skip=NO_EXPORT, more={"form": "Here all are tried unless one is named."}))
@click.option("-o", "--out", metavar="DIR", type=click.Path(path_type=Path), default=Path("build"),
              show_default=True, help="Folder for the artifact.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace artifacts of the same name built from other weights.")
@click.option("--json", "as_json", is_flag=True, help="The result as JSON on stdout.")
def optimize_command(out: Path, force: bool, as_json: bool, **values: Any) -> None:
    """Try runtimes, precisions, forms and numbers of threads, and write the best artifact for this machine.

    Artifacts are timed in turn, in fresh processes, beside eager PyTorch; those that cannot win by their 95 % interval
    are dropped. Accuracy is compared with PyTorch on --data, or else on the calibration images, within --max-drop. The
    artifact, its report and its recipe are written to -o, with optimize.html, a page with everything that was tried.
    An interrupted search goes on where it stopped. If nothing is within the budgets and faster than eager PyTorch, the
    nearest artifact is written and the exit code is 5; --goal size asks for no speed.

    \b
    Examples:
      convnext-export optimize --weights my_convnext.pth --data photos/val --max-drop 0.3
      convnext-export optimize --weights my_convnext.pth --data photos/val --goal throughput --batch 8
      convnext-export optimize --variant tiny --goal size --max-latency 50ms
    """
    import msgspec

    from exporter import artifact, optimize
    from exporter.cli.console import console, drawing, plain, print_json, print_rows
    from exporter.optimize import publish, tables

    request = Request(
        options=take(OptimizeOptions, values),
        quantization=take(Quantization, values, NO_QUANTIZATION),
        checks=take(Checks, values, NO_CHECKS),
        model=take(Model, values),
        preprocessing=take(PreprocessingOptions, values),
        export=take(Export, values, NO_EXPORT),
    )
    for name in (publish.PAGE, publish.DETAILS):
        artifact.check_output(out / name)
    with drawing(), artifact.forced(force):
        outcome = optimize.optimize(request, out)
    result = outcome.result
    if as_json:
        print_json(msgspec.to_builtins(result) | {"report": outcome.report})
    else:
        print_rows(tables.tried(result))
        console().print(tables.FRONT, style="dim", soft_wrap=True)
        console().print(plain(tables.sentence(result)), soft_wrap=True)
        console().print(
            f"the artifact is [bold]{plain(result.artifact)}[/], its recipe {plain(result.recipe)}, "
            f"everything that was tried {plain(out / publish.PAGE)}",
            soft_wrap=True,
        )
    if not result.passed:
        raise click.exceptions.Exit(5)
