"""The commands that measure: `calibrate`, `verify`, `bench`, `bisect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.bench.latency import BenchOptions
from exporter.cli.options import add, devices, options_of
from exporter.keep import KeepOptions
from exporter.verify import VerifyOptions

if TYPE_CHECKING:
    from exporter.artifact import Artifact
    from exporter.report import Report


@click.command("calibrate", short_help="Create a calibration set, or show one.")
@click.argument("source", metavar="[SRC]", required=False)
@click.option(
    "-o", "--out", metavar="FILE", type=click.Path(path_type=Path),
    help="The manifest; by default calibration/NAME.tsv, NAME being that of the folder.",
)  # fmt: skip
@click.option(
    "--calib-size", "size", metavar="N", type=click.IntRange(1), help="Number of images; by default 256, or all."
)
@click.option("--seed", metavar="N", type=int, help="Seed of the draw; by default 0.")
@click.option("--json", "as_json", is_flag=True, help="The manifest as JSON on stdout.")
def calibrate_command(source: str | None, out: Path | None, size: int | None, seed: int | None, as_json: bool) -> None:
    """Draw the same number of images from every sub-folder of SRC, and write a manifest with their digests.

    If SRC is a manifest, print its content after comparing every image with its digest. Images are not copied. Without
    SRC, list the bundled sets, which `--calib` takes by name.

    \b
    Examples:
      convnext-export calibrate imagenet/train -o calibration/imagenet.tsv --calib-size 512 --seed 1
      convnext-export calibrate calibration/imagenet.tsv
      convnext-export calibrate
    """
    from exporter import artifact
    from exporter.cli.console import console, drawing, plain, print_json, print_table
    from exporter.data import calibration
    from exporter.errors import BadRequest
    from exporter.recipe import bundled

    if source is None:
        if out or size or seed is not None:
            raise BadRequest("-o, --calib-size and --seed are for a new set; give the folder of images too")
        _print_sets(as_json)
        return
    given = bundled.find_images(source)
    listed = given.suffix.lower() in (".tsv", ".csv") and given.is_file()
    if listed and (out or size or seed is not None):
        raise BadRequest(f"{source} is a manifest already; give a folder to create another")
    path = given if listed else out or Path("calibration") / f"{given.resolve().name}.tsv"
    with drawing():
        if not listed:
            artifact.check_output(path)
            calibration.refuse_other_set(path, source)
        manifest = calibration.read(given) if listed else calibration.freeze(source, size, seed or 0)
        calibration.check(manifest, source)
    if not listed:
        calibration.write(manifest, path)
    if as_json:
        print_json({"path": str(path), "digest": manifest.digest, "manifest": manifest})
        return
    print_table(("class", "images"), [(k or "–", str(v)) for k, v in manifest.classes().items()], right=("images",))
    console().print(f"[bold]{plain(path)}[/]  {plain(manifest.rule)}, seed {manifest.seed}", soft_wrap=True)
    where = f"made by {manifest.generator}" if manifest.generator else f"in {manifest.source}"
    console().print(f"digest {manifest.digest}; images {plain(where)}", style="dim", soft_wrap=True)


def _print_sets(as_json: bool) -> None:
    from exporter.cli.console import console, plain, print_json, print_table
    from exporter.data import calibration
    from exporter.recipe import bundled

    found = {name: calibration.read(path) for name, path in bundled.sets().items()}
    if as_json:
        print_json(
            [
                {"name": name, "path": str(bundled.sets()[name]), "images": len(one.entries), "digest": one.digest,
                 "generator": one.generator, "source": one.source, "license": one.license, "rule": one.rule}
                for name, one in found.items()
            ]
        )  # fmt: skip
        return
    rows = [(name, str(len(one.entries)), one.generator, one.license) for name, one in found.items()]
    print_table(("set", "images", "made by", "license"), rows, right=("images",))
    console().print(
        f"folder: {plain(bundled.folder('calibration'))}; use one with `--calib NAME`", style="dim", soft_wrap=True
    )


@click.command("verify", short_help="Compare with eager PyTorch: parity, agreement, top-1 and top-5.")
@click.argument("artifact", type=click.Path(path_type=Path))
@add(options_of(VerifyOptions, more={"device": devices()}))
@click.option(
    "-o",
    "--out",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The report; by default ARTIFACT.report.json.",
)
@click.option(
    "--on", metavar="ray[://HOST:PORT]|files:DIR",
    help="Spread the images over a Ray cluster: one of its own on this machine, or the one at this address. files:DIR "
    "writes a folder with a command for each shard.",
)  # fmt: skip
@click.option("--shard-size", metavar="N", type=click.IntRange(1), help="With --on: images of a shard.  [default: 512]")
@click.option("--json", "as_json", is_flag=True, help="The report as JSON on stdout.")
def verify_command(
    artifact: Path, out: Path | None, on: str | None, shard_size: int | None, as_json: bool, **values: Any
) -> None:
    """Compare an artifact with the PyTorch model that it was built from, on the same images.

    Each precision has limits, which options replace. Exit code 5 means that a check failed.

    \b
    Examples:
      convnext-export verify build/tiny_fp16.xml --data imagenet/val
      convnext-export verify build/tiny_fp16.xml --data imagenet/val --on ray
    """
    from exporter import artifact as artifacts
    from exporter import verify
    from exporter.cli.console import drawing
    from exporter.errors import BadRequest

    if on is None and shard_size is not None:
        raise BadRequest("--shard-size: only applies to shards; add --on, or leave it out")
    options = VerifyOptions(**values)
    if on is not None and on.startswith("files:"):
        _schedule_shards(artifact, options, on, shard_size, out, as_json)
        return
    path = out or artifact.parent / f"{artifact.name}.report.json"
    artifacts.check_output(path)
    with drawing():
        opened = artifacts.load(artifact)
        if on is None:
            verified = verify.verify(opened, options)
        else:
            from exporter.run import distributed

            verified = distributed.verify(opened, options, on, path, shard_size)
    finish_verification(opened, verified, path, as_json, options, remove_shards=on is not None)


def _schedule_shards(
    artifact: Path, options: VerifyOptions, on: str, shard_size: int | None, out: Path | None, as_json: bool
) -> None:
    from exporter import artifact as artifacts
    from exporter.cli.console import console, drawing, plain
    from exporter.errors import BadRequest
    from exporter.run import spread

    name = on.removeprefix("files:")
    folder = Path(name)
    if out is not None or as_json:
        raise BadRequest("--on files: writes no report, `merge` does; give -o or --json to that command")
    if not name:
        raise BadRequest("--on files: expected the name of a folder, as in files:build/shards")
    with drawing():
        written = spread.write_commands(artifacts.load(artifact), options, folder, shard_size)
    text = f"[bold]{plain(folder / spread.COMMANDS)}[/]  {written.schedule.count} commands, one for each shard"
    console().print(text, soft_wrap=True)
    console().print(f"then: convnext-export merge {plain(folder)}", style="dim", soft_wrap=True)


def finish_verification(
    artifact: Artifact,
    verified: Report,
    path: Path,
    as_json: bool,
    options: VerifyOptions | None = None,
    remove_shards: bool = False,
) -> None:
    """Save and print the report of a verification. Exit with 5 where a check failed."""
    from exporter import report, verify
    from exporter.cli.console import console, drawing, plain, print_findings, print_json, print_next_step

    merged = report.save_merged(verified, path)
    if remove_shards:
        from exporter.run import distributed

        distributed.remove_shards(path)
    with drawing():
        verify.record_quality(artifact, verified)
    if as_json:
        print_json(merged)
    else:
        print_findings(verified.findings)
        verdict = "[green]passed[/]" if verified.passed else "[red]FAILED[/]"
        reference = options.reference if options else None
        compared = f", compared with {plain(reference)}" if reference else ""
        console().print(f"{plain(artifact.path.name)} {verdict}{compared}; the report is {plain(path)}", soft_wrap=True)
        print_next_step(artifact, verified, options)
    if not verified.passed:
        raise click.exceptions.Exit(5)


@click.command("bench", short_help="Latency and throughput, compared with eager PyTorch.")
@click.argument("artifacts", metavar="ARTIFACT…", nargs=-1, required=True, type=click.Path(path_type=Path))
@add(options_of(BenchOptions, more={"device": devices()}))
@click.option(
    "-o", "--out", metavar="DIR", type=click.Path(path_type=Path),
    help="A folder for the reports; by default each is beside its artifact.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="The report as JSON on stdout; of several artifacts a list.")
def bench_command(artifacts: tuple[Path, ...], out: Path | None, as_json: bool, **values: Any) -> None:
    """Time artifacts and the eager PyTorch model they were built from, in turn, in six fresh processes.

    Each round runs every model once, in random order. Speed-ups are medians over pairs of the same round, with a 95 %
    interval over processes; a process that others disturbed is measured again. Without --threads, all models get one
    thread for each physical core. PyTorch runs on the kind of device that the artifacts run on. All samples are written
    to ARTIFACT.report.json, next to the findings of verify. If a model crashes or hangs, only this model fails (exit
    code 5).

    \b
    Example:
      convnext-export bench build/tiny_fp32.onnx build/tiny_fp16.xml --batch 1,8
    """
    from exporter import artifact, report
    from exporter.bench import latency, limits
    from exporter.cli.console import console, drawing, plain, print_answer, print_json, print_next, print_rows
    from exporter.errors import BadRequest
    from exporter.report import tables

    paths = [(out or path.parent) / f"{path.name}.report.json" for path in artifacts]
    for path in paths:
        artifact.check_output(path)
    same = [path for path in paths if paths.count(path) > 1]
    if same and len(set(artifacts)) == len(artifacts):  # one artifact named twice is refused below
        count = paths.count(same[0])
        raise BadRequest(
            f"{same[0]}: the reports of {count} artifacts would be this file; bench each with its own -o, or leave -o "
            "out"
        )
    options = BenchOptions(**values)
    with drawing():
        opened = [artifact.load(path) for path in artifacts]
        reports = [limits.with_limits(one, options) for one in latency.bench(opened, options)]
    merged = [report.save_merged(one, path) for one, path in zip(reports, paths, strict=True)]
    if as_json:
        print_json(merged if len(merged) > 1 else merged[0])
    else:
        print_rows(tables.latency(tables.disambiguated(reports)))
        print_answer(tables.disambiguated(merged))
        noun = "report is" if len(paths) == 1 else "reports are"
        console().print(f"the {noun} {plain(', '.join(map(str, paths)))}", soft_wrap=True)
        print_next("show it as a page", "report", *paths, "--format", "html", "-o", "report.html")
    if not all(one.passed for one in reports):
        raise click.exceptions.Exit(5)


ADVICE = ("reason", "few_images", "keep")
"""Metrics of findings that are printed as sentences below the table."""


@click.command("bisect", short_help="The first part that differs from PyTorch, and why.")
@click.argument("artifact", type=click.Path(path_type=Path))
@add(options_of(KeepOptions, more={"device": devices()}))
@click.option("--json", "as_json", is_flag=True, help="The report as JSON on stdout.")
def bisect_command(artifact: Path, as_json: bool, **values: Any) -> None:
    """Run every part of the network in PyTorch on the input that the part has in the artifact, and compare the outputs.

    The first part that differs by more than its precision explains is named, with the likely cause: an overflow in
    fp16, a range of int8 that is too narrow, another operator, scale, eps or order of channels. Exit code 5: a part
    exceeds its limit.

    If a part needs higher precision, the command that builds the artifact with it is printed; --try-keep tries this
    command.

    \b
    Examples:
      convnext-export bisect build/tiny_int8.onnx --data imagenet/val
      convnext-export bisect build/tiny_fp16.onnx --try-keep
    """
    from exporter import artifact as artifacts
    from exporter import keep
    from exporter.cli.console import console, drawing, plain, print_findings, print_json
    from exporter.report import tables

    with drawing():
        report = keep.bisect(artifacts.load(artifact), KeepOptions(**values))
    if as_json:
        print_json(report)
    else:
        print_findings([finding for finding in report.findings if finding.metric not in ADVICE])
        first, *advice = tables.bisected(report)
        console().print(f"[{'green' if report.passed else 'red'}]{plain(first)}[/]", soft_wrap=True)
        for line in advice:
            console().print(plain(line), soft_wrap=True)
    if not report.passed:
        raise click.exceptions.Exit(5)
