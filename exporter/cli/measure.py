"""What an artifact is worth: `verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


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
    from exporter import pipeline, report
    from exporter.cli.console import console, drawing, plain, print_findings, print_json

    path = output or artifact.with_name(f"{artifact.name}.report.json")
    artifacts.check_output(path)
    with drawing():
        opened = artifacts.load(artifact)
        made = pipeline.verify(opened, pipeline.VerifyOptions(**told))
    report.save(made, path)
    with drawing():
        pipeline.record_quality(opened, made)
    if as_json:
        print_json(made)
    else:
        print_findings(made.findings)
        verdict = "[green]passed[/]" if made.passed else "[red]FAILED[/]"
        console().print(f"{plain(artifact.name)} {verdict}; the report is {plain(path)}", soft_wrap=True)
    if not made.passed:
        raise click.exceptions.Exit(5)
