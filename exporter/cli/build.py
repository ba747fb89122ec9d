"""The commands that build, one for each target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from exporter import backends, precision
from exporter.cli.options import add, options_of, take
from exporter.errors import BadRequest, printable
from exporter.recipe import SEARCHED, Bench, Checks, Export, Model, PreprocessingOptions, Quantization
from exporter.recipe.fields import fields_of

if TYPE_CHECKING:
    from exporter.backends import Target
    from exporter.build import Built
    from exporter.recipe import Recipe

F = TypeVar("F", bound=Callable[..., Any])

TIMED = ("threads",)
"""The fields of `bench` with which int8 is timed."""
NO_CHECKS = tuple(name for name in fields_of(Checks) if name not in SEARCHED)
NO_TIMING = tuple(name for name in fields_of(Bench) if name not in TIMED)
ON = click.option(
    "--on", metavar="ray[://HOST:PORT]",
    help="int8: spread the calibration, and the verification on --data, over a Ray cluster: ray starts one on this "
    "machine, ray://HOST:PORT uses a running one.",
)  # fmt: skip
OUTPUT = (
    click.option("-o", "--out", metavar="DIR", type=click.Path(path_type=Path), default=Path("build"),
                 show_default=True, help="Folder for the artifact."),
    click.option("--precision", metavar="NAME", help="The precision by name, instead of its flag."),
    click.option("--save-config", metavar="FILE", type=click.Path(path_type=Path),
                 help="Also write this build as a recipe, for `run`."),
    click.option("--force", is_flag=True, help="Replace artifacts of the same name built from other weights."),
    click.option("--dry-run", is_flag=True, help="Check the options and build nothing."),
    click.option("--json", "as_json", is_flag=True, help="The artifact as JSON on stdout."),
)  # fmt: skip


def command(name: str) -> click.Command:
    """The command that builds for a target.

    Args:
        name: the backend's name.
    """
    target = backends.target(name)
    groups: list[list[Callable[[F], F]]] = [[_flag(flag, target) for flag in precision.PRECISIONS]]
    if quantized := calibrated(target):
        scopes, prefix = list(target.placements), f"{', '.join(quantized)}: "
        skip = () if len(scopes) > 1 else ("int8_scope",)
        groups.append(options_of(Quantization, skip=skip, words={"int8_scope": scopes}, prefix=prefix))
        groups.append(options_of(Checks, skip=NO_CHECKS, prefix=prefix))
        groups.append([*options_of(Bench, skip=NO_TIMING, prefix=prefix), ON])
    groups += [
        options_of(target.options),
        options_of(Model),
        options_of(PreprocessingOptions),
        options_of(Export),
        list(OUTPUT),
    ]

    def run(**values: Any) -> None:
        _build(name, target, {flag: values.pop(flag) for flag in precision.PRECISIONS}, values)

    run.__doc__ = "\n\n".join(
        [target.description, "\b\nExamples:\n" + "\n".join(f"  convnext-export {line}" for line in target.examples)]
    )
    options = [option for group in groups for option in group]
    return click.command(target.command, short_help=target.summary)(add(options)(run))


def _flag(name: str, target: Target) -> Callable[[F], F]:
    """The flag of a precision; hidden for the default and for those that the target refuses by name."""
    hidden = name == "fp32" or name not in target.precisions
    return click.option(f"--{name}", is_flag=True, help=target.precisions.get(name), hidden=hidden)


def calibrated(target: Target) -> list[str]:
    """The precisions of a target that need calibration."""
    return [name for name in target.precisions if precision.get(name).needs_calibration]


def _build(name: str, target: Target, flags: dict[str, bool], values: dict[str, Any]) -> None:
    from exporter import artifact, build
    from exporter.cli.console import drawing, print_json
    from exporter.recipe import file

    as_json, out, save, dry_run = (values.pop(key) for key in ("as_json", "out", "save_config", "dry_run"))
    force, on = values.pop("force"), values.pop("on", None)
    if out.suffix == target.suffix and not out.is_dir():
        raise BadRequest(f"-o {out}: expected a folder; the file in it is named after network and precision")
    recipe = _recipe(name, target, _precision(flags, values.pop("precision")), values)
    if save or dry_run:
        build.check(recipe)
    if on is not None:
        from exporter.run import cluster

        cluster.check_address(on)
    if save or dry_run:
        build.check_sources(recipe)
    if save:
        file.save(recipe, save, target.options)
        click.echo(printable(f"the recipe is {save}"), err=True)
    if dry_run:
        network = recipe.model.variant or f"the model of {recipe.model.weights}"
        task = f", {recipe.model.task}" if recipe.model.task else ""
        wanted = f"{network}{task}, in {recipe.precision} for {recipe.backend}"
        message = f"the options are valid, for {wanted}, to {out}; no weights were read, nothing was built"
        click.echo(printable(message), err=as_json)
        if as_json:
            print_json({"recipe": recipe})
        return
    with drawing(), artifact.forced(force):
        built = _built(recipe, out, on)
    _show(built, as_json)


def _built(recipe: Recipe, out: Path, on: str | None) -> Built:
    from exporter import build

    if on is None:
        return build.build(recipe, out)
    from exporter.run import distributed

    return distributed.build(recipe, out, on)


def _recipe(name: str, target: Target, wanted: str, values: dict[str, Any]) -> Recipe:
    """The recipe of a command line."""
    import msgspec

    from exporter.recipe import SYNTHETIC, Recipe
    from exporter.recipe.fields import differing

    quantization, checks, bench = None, Checks(), Bench()
    if quantized := calibrated(target):
        checks, bench = take(Checks, values, NO_CHECKS), take(Bench, values, NO_TIMING)
        skip = () if "int8_scope" in values else ("int8_scope",)
        quantization = take(Quantization, values, skip)
        if wanted in precision.PRECISIONS and not precision.get(wanted).needs_calibration:
            _refuse_calibration(quantized)
            quantization = None
    options = take(target.options, values)
    data = quantization.data if quantization is not None else None
    return Recipe(
        backend=name,
        precision=wanted,
        quantization=quantization,
        target=differing(options, target.options()),
        model=take(Model, values),
        preprocessing=take(PreprocessingOptions, values),
        export=take(Export, values),
        checks=msgspec.structs.replace(checks, data=data or SYNTHETIC),
        bench=bench,
    )


def _refuse_calibration(quantized: Sequence[str]) -> None:
    """Options of calibration would be ignored in other precisions than these."""
    context = click.get_current_context()
    names = {**fields_of(Quantization), **dict.fromkeys((*SEARCHED, *TIMED, "on"))}
    for param in context.command.params:
        source = context.get_parameter_source(str(param.name))
        if param.name in names and source is click.core.ParameterSource.COMMANDLINE:
            flags = " or ".join(f"--{name}" for name in quantized)
            raise BadRequest(f"{param.opts[0]} is for {' and '.join(quantized)}; add {flags}, or leave it out")


def _show(built: Built, as_json: bool) -> None:
    """Print what was built; a report of its accuracy is written beside it."""
    from exporter import report
    from exporter.cli.console import console, plain, print_findings, print_json, print_next, print_next_step, size

    artifact, sidecar = built.artifact, built.artifact.sidecar
    judged = built.report if sidecar.quantization is not None else None
    path = artifact.path.with_name(f"{artifact.path.name}.report.json")
    if judged is not None:
        report.save(judged, path)
    if as_json:
        print_json({"artifact": artifact.to_dict()} | ({"report": built.report} if built.report is not None else {}))
    else:
        if built.report is not None:
            print_findings(built.report.findings)
        console().print(f"[bold]{plain(artifact.path)}[/]  {sidecar.precision}, {size(sidecar.bytes)}", soft_wrap=True)
        if judged is None:
            print_next("check it on your images", "verify", artifact.path, "--data", "FOLDER")
        else:
            verdict = "[green]passed[/]" if judged.passed else "[red]FAILED[/]: the artifact is the best candidate"
            console().print(f"{verdict}; the report is {plain(path)}", soft_wrap=True)
            print_next_step(artifact, judged)
    if judged is not None and not judged.passed:
        raise click.exceptions.Exit(5)


def _precision(flags: dict[str, bool], named: str | None) -> str:

    names = [name for name, on in flags.items() if on] + ([named] if named else [])
    if len(set(names)) > 1:
        raise BadRequest(f"one precision at a time, not {' and '.join(names)}")
    return names[0] if names else "fp32"
