"""The command `predict`, apart from the other commands so that it starts fast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from exporter.cli.options import add, devices, options_of
from exporter.predict import PredictOptions


@click.command("predict", short_help="Classes, values or feature vectors of images.")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("sources", metavar="SRC...", nargs=-1, required=True)
@add(options_of(PredictOptions, more={"device": devices()}))
@click.option(
    "-o", "--out", metavar="FILE", type=click.Path(path_type=Path),
    help="File that ends in .csv, .jsonl, .parquet or .npz (outputs as they are), or of --task segment a folder for "
    "masks; by default stdout.",
)  # fmt: skip
@click.option("--resume", is_flag=True, help="Continue an unfinished output after its last stored batch.")
@click.option("--overwrite", is_flag=True, help="Replace an output, finished or not.")
@click.option(
    "--on", metavar="ray[://HOST:PORT]",
    help="Spread the images over a Ray cluster: one of its own on this machine, or the one at this address.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object for each image; with -o one of the counts.")
def predict_command(
    artifact: Path,
    sources: tuple[str, ...],
    out: Path | None,
    resume: bool,
    overwrite: bool,
    on: str | None,
    as_json: bool,
    **values: Any,
) -> None:
    """Run an artifact on images, with the preprocessing and the labels that its sidecar has.

    SRC is a file, a folder, a pattern, a manifest, an .npz file, a Parquet file (FILE.parquet#COLUMN takes one column),
    an address (file://, s3://, gs://), or - for standard input: the bytes of an image, or names of files, one a line.
    An image that cannot be read has a reason in place of an answer.

    \b
    Examples:
      convnext-export predict build/tiny_fp32.onnx photo.jpg
      convnext-export predict build/tiny_fp32.onnx photos more/*.png -o answers.csv
      convnext-export predict build/tiny_fp32.onnx photos -o answers.csv --resume
      convnext-export predict build/tiny_fp32.onnx "s3://bucket/val/*.parquet#image" -o answers.parquet
      convnext-export predict build/tiny_segment_fp32.onnx photos -o masks
    """
    import sys

    from exporter import artifact as artifacts
    from exporter import predict
    from exporter.cli.console import console, drawing, plain, print_json
    from exporter.errors import BadRequest, printable

    if out is None and (resume or overwrite or on):
        raise BadRequest("--resume, --overwrite and --on are for an output file; add -o FILE")
    if resume and overwrite:
        raise BadRequest("--resume continues an output and --overwrite replaces it; give one of them")
    options, stdin = PredictOptions(**values), sys.stdin.buffer if "-" in sources else None
    with drawing():
        opened = artifacts.load(artifact)
        if out is None:
            for record in predict.answer(opened, sources, options, stdin):
                click.echo(predict.as_json(record) if as_json else printable(predict.as_text(record)))
            return
        if on is None:
            summary = predict.predict(opened, sources, options, out, resume, overwrite, stdin)
        else:
            from exporter.run import distributed

            summary = distributed.predict(opened, sources, options, on, out, resume, overwrite)
    if as_json:
        print_json({"path": str(out), "summary": summary})
        return
    rate = f", {summary.now / summary.seconds:.0f} a second" if summary.now and summary.seconds > 1 else ""
    lost = len(summary.unreadable)
    count = f"{summary.total - lost:,} of {summary.total:,}" if lost else f"{summary.total:,}"
    console().print(f"[bold]{plain(out)}[/]  {count} image{'' if summary.total == 1 else 's'}{rate}", soft_wrap=True)
