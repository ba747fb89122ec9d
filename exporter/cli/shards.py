"""The commands of a verification in shards: `shard` and `merge`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("shard", short_help="Measure shards of a verification, on any machine.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("numbers", metavar="NUMBER…", nargs=-1, required=True)
@click.option(
    "--data", metavar="SRC", help="Path of the images on this machine, if it differs from that in the schedule."
)
@click.option("--weights", metavar="PATH", help="Path of the weights on this machine, if it differs.")
@click.option("--reference", metavar="MODULE", help="Import this module:callable, if the schedule names it.")
def shard_command(
    folder: Path, numbers: tuple[str, ...], data: str | None, weights: str | None, reference: str | None
) -> None:
    """Measure shards of a verification that `verify --on files:DIR` scheduled. Shards that are in DIR are skipped.

    NUMBER is a shard, or a range of them with both ends. Images and versions must be those of the schedule.

    \b
    Examples:
      convnext-export shard build/shards 0
      convnext-export shard build/shards 8-15 --data /mnt/imagenet/val
    """
    from exporter.cli.console import console, drawing, plain
    from exporter.run import spread

    with drawing():
        measured = spread.measure(folder, numbers, data, weights, reference)
    console().print(f"{len(measured)} shards measured; they are in {plain(folder / 'shards')}", soft_wrap=True)


@click.command("merge", short_help="The report of all shards of a verification.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "-o", "--out", metavar="FILE", type=click.Path(path_type=Path),
    help="The report; by default that of the artifact, ARTIFACT.report.json.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="The report as JSON on stdout.")
def merge_command(folder: Path, out: Path | None, as_json: bool) -> None:
    """Write the report of a verification whose shards are all in DIR, as `verify` does. Exit code 5 means that a check
    failed.

    \b
    Example:
      convnext-export merge build/shards
    """
    from exporter import artifact as artifacts
    from exporter.cli.console import drawing
    from exporter.cli.measure import finish_verification
    from exporter.run import spread

    with drawing():
        opened, artifact = spread.open_folder(folder)
        scheduled = Path(opened.schedule.artifact)
        beside = scheduled.parent if scheduled.parent.is_dir() else folder
        path = out or beside / f"{scheduled.name}.report.json"
        artifacts.check_output(path)
        spread.check_report(folder, path)
        merged = opened.merged(artifact)
        artifact = spread.original_of(opened, artifact)
    finish_verification(artifact, merged, path, as_json)
