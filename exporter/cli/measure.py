"""What an artifact is worth: `verify` and `bench`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


@click.command("calibrate", short_help="Choose and freeze a calibration set, or show one.")
@click.argument("source", metavar="[SRC]", required=False)
@click.option(
    "-o", "--output", metavar="FILE", type=click.Path(path_type=Path),
    help="The manifest; by default calibration/NAME.tsv, after the folder.",
)  # fmt: skip
@click.option(
    "--calib-size", "size", metavar="N", type=click.IntRange(1), help="How many images; by default 256, or all."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draw.")
@click.option("--json", "as_json", is_flag=True, help="The manifest as JSON on stdout.")
def calibrate_command(source: str | None, output: Path | None, size: int | None, seed: int, as_json: bool) -> None:
    """Draw images from a folder, equally from its sub-folders, and list them in a manifest with their digests.

    Of a manifest it shows what is in it, after holding every image against its digest. The images stay where they are.
    Without SRC it lists the sets that ship, which `--calib` takes by name.

    \b
    Examples:
      convnext-export calibrate imagenet/train -o calibration/imagenet.tsv --calib-size 512 --seed 1
      convnext-export calibrate calibration/imagenet.tsv
      convnext-export calibrate
    """
    from exporter import artifact
    from exporter.cli.console import console, drawing, plain, print_json, print_table
    from exporter.data import bundled, calibration
    from exporter.errors import BadRequest

    if source is None:
        if output or size:
            raise BadRequest("-o and --calib-size are for freezing a set; give the folder of images too")
        _print_sets(as_json)
        return
    given = bundled.find(source)
    listed = given.suffix.lower() in (".tsv", ".csv") and given.is_file()
    if listed and (output or size):
        raise BadRequest(f"{source} is a frozen set already; give the folder to freeze another")
    path = given if listed else output or Path("calibration") / f"{given.resolve().name}.tsv"
    with drawing():
        if not listed:
            artifact.check_output(path)
        manifest = calibration.read(given) if listed else calibration.freeze(source, size, seed)
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
    from exporter.data import bundled, calibration

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
    console().print(f"they lie in {plain(bundled.folder())}; `--calib NAME` takes one", style="dim", soft_wrap=True)


@click.command("verify", short_help="Accuracy against eager PyTorch: parity, agreement, top-1 and top-5.")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--data", metavar="SRC", default="synthetic", show_default=True,
    help="A folder with a sub-folder per class, a .tsv or .csv manifest, an .npz file, or synthetic.",
)  # fmt: skip
@click.option("--samples", "most", metavar="N", type=click.IntRange(1), help="At most so many images.")
@click.option("--weights", metavar="SRC", help="Where the weights lie now; other weights are refused.")
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    help="What must run it: cpu or cuda on ONNX Runtime, cpu or gpu on OpenVINO.",
)
@click.option("--threads", type=click.IntRange(1, 512), help="Threads; by default the runtime's choice.")
@click.option("--max-drop", metavar="POINTS", type=float, help="Largest loss of top-1, in percentage points.")
@click.option("--min-cosine", type=float, help="Smallest mean cosine to eager's outputs.")
@click.option("--atol", type=float, help="Largest absolute error of an output.")
@click.option("--blocks", is_flag=True, help="Compare the output of every ConvNeXt block too, on the first images.")
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="The report; by default ARTIFACT.report.json.",
)
@click.option("--json", "as_json", is_flag=True, help="The report as JSON on stdout.")
def verify_command(artifact: Path, output: Path | None, as_json: bool, **told: Any) -> None:
    """Hold an artifact against the eager PyTorch model it was made from, on the same images.

    Without limits of your own, each precision has its own; exit code 5 says that one was not held.

    \b
    Example:
      convnext-export verify build/tiny_fp16.xml --data imagenet/val
    """
    from exporter import artifact as artifacts
    from exporter import report
    from exporter.build import pipeline
    from exporter.cli.console import console, drawing, plain, print_findings, print_json

    path = output or artifact.with_name(f"{artifact.name}.report.json")
    artifacts.check_output(path)
    with drawing():
        opened = artifacts.load(artifact)
        made = pipeline.verify(opened, pipeline.VerifyOptions(**told))
    whole = report.save_merged(made, path)
    with drawing():
        pipeline.record_quality(opened, made)
    if as_json:
        print_json(whole)
    else:
        print_findings(made.findings)
        verdict = "[green]passed[/]" if made.passed else "[red]FAILED[/]"
        console().print(f"{plain(artifact.name)} {verdict}; the report is {plain(path)}", soft_wrap=True)
    if not made.passed:
        raise click.exceptions.Exit(5)


def numbers(ctx: click.Context, param: click.Parameter, word: str) -> tuple[int, ...]:
    """Whole numbers between commas, each once."""
    del ctx
    parts = [part.strip() for part in word.split(",")]
    if not all(part.isdecimal() and 1 <= int(part) <= 4096 for part in parts):
        raise click.BadParameter(f"{word!r}: expected whole numbers from 1 to 4096, as in --{param.name} 1,8")
    return tuple(dict.fromkeys(map(int, parts)))


def percentage(ctx: click.Context, param: click.Parameter, word: str | None) -> float | None:
    """A percentage, with its sign or without."""
    del ctx, param
    if word is None:
        return None
    try:
        value = float(word.removesuffix("%"))
    except ValueError:
        value = float("nan")
    if not 0.05 <= value <= 100:
        raise click.BadParameter(f"{word!r}: expected a percentage from 0.05% to 100%")
    return value


def timing_options(duration: float, threads: str) -> Callable[[F], F]:
    """The options of every verb that times, with its own default of seconds."""
    options = (
        click.option("--batch", callback=numbers, default="1", show_default=True, help="Batch sizes, as in 1,8."),
        click.option("--threads", type=click.IntRange(1, 512), help=f"Threads; by default {threads}."),
        click.option(
            "--hint",
            type=click.Choice(["latency", "throughput"]),
            default="latency",
            show_default=True,
            help="One batch at a time, or as many at once as the runtime has streams for.",
        ),
        click.option(
            "--device",
            default="cpu",
            show_default=True,
            help="What must run it: cpu, cuda or tensorrt on ONNX Runtime, cpu or gpu on OpenVINO.",
        ),
        click.option(
            "--duration",
            metavar="SECONDS",
            type=click.FloatRange(0.5, 86400),
            default=duration,
            show_default=True,
            help="Of timing, for each batch size and all models together.",
        ),
        click.option("--seed", default=0, show_default=True, help="Of the order in which the models take turns."),
    )

    def add(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return add


@click.command("bench", short_help="Latency and throughput against eager PyTorch, interleaved.")
@click.argument("artifacts", metavar="ARTIFACT…", nargs=-1, required=True, type=click.Path(path_type=Path))
@timing_options(duration=10, threads="each runtime's choice")
@click.option(
    "--until", metavar="PCT", callback=percentage,
    help="Go on until the speed-up is known to ± so much, at most ten times the duration.",
)  # fmt: skip
@click.option("--also", multiple=True, type=click.Choice(["torch.compile", "tf32", "fp16"]),
              help="Another way to run the model; tf32 and fp16 (channels last) on a GPU.")  # fmt: skip
@click.option("--weights", metavar="SRC", help="Where the weights lie now; other weights are refused.")
@click.option(
    "-o", "--output", metavar="DIR", type=click.Path(path_type=Path),
    help="A folder for the reports; by default each is beside its artifact.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="The reports as a JSON list on stdout.")
def bench_command(artifacts: tuple[Path, ...], output: Path | None, as_json: bool, **told: Any) -> None:
    """Time artifacts and the eager PyTorch model they were made from, in turn, in one process.

    Each round takes every model once, in random order, and speed-ups are medians over pairs of the same round, with
    a 95 % interval over eight openings of the models. Every sample goes into ARTIFACT.report.json, beside what verify
    found. A model that crashes or hangs fails alone (exit code 5).

    \b
    Example:
      convnext-export bench build/tiny_fp32.onnx build/tiny_fp16.xml --batch 1,8
    """
    from exporter import artifact, report
    from exporter.bench import latency
    from exporter.cli.console import console, drawing, plain, print_json, print_rows
    from exporter.report import tables

    paths = [(output or path.parent) / f"{path.name}.report.json" for path in artifacts]
    for path in paths:
        artifact.check_output(path)
    with drawing():
        opened = [artifact.load(path) for path in artifacts]
        made = latency.bench(opened, latency.BenchOptions(**told))
    whole = [report.save_merged(one, path) for one, path in zip(made, paths, strict=True)]
    if as_json:
        print_json(whole)
    else:
        print_rows(tables.latency(tables.told_apart(made)))
        for path in paths:
            console().print(f"the report is {plain(path)}", soft_wrap=True)
    if not all(one.passed for one in made):
        raise click.exceptions.Exit(5)
