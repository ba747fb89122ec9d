"""The command `package`, apart from the other commands so that it starts fast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from exporter.cli.options import add, options_of, take
from exporter.package import Destination, PackageOptions, destination, names
from exporter.predict import PredictOptions
from exporter.recipe.fields import fields_of

NO_ANSWERS = ("device", "threads")
DESTINATIONS = [destination(name) for name in names()]


def _own_options() -> list[Any]:
    """The options that some destinations have, each with the name of its own."""
    return [option for aim in DESTINATIONS for option in options_of(aim.options, prefix=f"{aim.name}: ")]


def _take_own(aim: Destination, values: dict[str, Any]) -> Any:
    """The options of a destination.

    Raises: click.UsageError for options of another one.
    """
    for other in DESTINATIONS:
        if other.name != aim.name:
            for name, field in fields_of(other.options).items():
                if values.pop(name) != field.default:
                    option = f"--{field.extra.get('option') or name.replace('_', '-')}"
                    raise click.UsageError(f"{option} is for --for {other.name}; leave it out with --for {aim.name}")
    return take(aim.options, values)


@click.command("package", short_help="A folder for a server or an application, from an artifact.")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--for", "aim", type=click.Choice(names()), required=True,
              help="; ".join(f"{aim.name}: {aim.summary}" for aim in DESTINATIONS) + ".")  # fmt: skip
@click.option("-o", "--out", metavar="DIR", type=click.Path(path_type=Path), required=True,
              help="Folder that is not there yet, or empty.")  # fmt: skip
@add(options_of(PackageOptions))
@add(options_of(PredictOptions, skip=NO_ANSWERS))
@add(_own_options())
@click.option("--json", "as_json", is_flag=True, help="The folder and its files as JSON on stdout.")
def package_command(artifact: Path, aim: str, out: Path, as_json: bool, **values: Any) -> None:
    """Write a folder with an artifact and everything that a server or an application needs around it.

    The folder works as it is: it has a README, the labels, a sample picture, a client, and a self-test that compares
    the answers for that picture with those of the artifact.

    \b
    Examples:
      convnext-export package build/tiny_fp32.onnx --for python -o tiny
      convnext-export package build/tiny_fp32.xml --for triton -o tiny --labels labels.txt
    """
    from exporter import artifact as artifacts
    from exporter import package
    from exporter.cli.console import console, drawing, plain, print_json

    options = take(PackageOptions, values)
    answers = take(PredictOptions, values, NO_ANSWERS)
    own = _take_own(destination(aim), values)
    with drawing():
        written = package.package(artifacts.load(artifact), aim, out, options, answers, own)
    if as_json:
        print_json(written)
        return
    console().print(
        f"[bold]{plain(out)}[/]  {len(written.files)} files; {plain(out / 'README.md')} has the commands",
        soft_wrap=True,
    )
