"""What was measured, for others to read: `report`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("report", short_help="Reports as a table for a pull request.")
@click.argument("reports", metavar="REPORT.json…", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--format", "form", default="markdown", show_default=True, help="How to write it.")
@click.option("-o", "--output", metavar="FILE", type=click.Path(path_type=Path), help="A file; else stdout.")
def report_command(reports: tuple[Path, ...], form: str, output: Path | None) -> None:
    """Write one or more reports in a form for people: one row per artifact.

    \b
    Example:
      convnext-export report build/*.report.json --format markdown
    """
    from exporter import artifact, discover, disk, report

    render = discover.load("exporter.report", form, "RENDER")
    loaded = [report.load(path) for path in reports]
    for path, made in zip(reports, loaded, strict=True):
        if report.is_stale(made):
            click.echo(f"note: {path}: its artifact was built again since; verify it again", err=True)
    text = render(loaded)
    if output:
        artifact.check_output(output)
        disk.write_file(output, text.encode())
    click.echo(text, nl=False)
