"""`make docs`: the parts of the documents that are generated, so that none can say what is not so.

`docs/cli.md` is the help of every verb; between the marks in README.md stand tables rendered from the reports in
`benchmarks/results`. A test holds the files against what this module would write.
"""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from benchmarks import agreement, gate
from benchmarks.footprint import Footprint, table
from exporter import report
from exporter.cli import GROUPS, cli
from exporter.report import markdown

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "epyc-milan-2-cores"
FOOTPRINT = ROOT / "benchmarks" / "results" / "xeon-amx-2-cores" / "footprint.json"
DEMO = ("fp32.onnx", "fp16.onnx", "fp32.xml", "fp16.xml")


def cli_help() -> str:
    """The help of every verb, by group."""
    parts = ["# The words of convnext-export\n\nGenerated from the program by `make docs`.\n"]
    parent = cli.make_context("convnext-export", [], resilient_parsing=True)
    for group, verbs in GROUPS.items():
        parts.append(f"\n## {group.capitalize()}\n")
        for verb in verbs:
            command = cli.get_command(parent, verb)
            assert command is not None
            context = click.Context(command, info_name=verb, parent=parent, max_content_width=100, terminal_width=100)
            parts.append(f"\n### {verb}\n\n```text\n{command.get_help(context)}\n```\n")
    return "".join(parts)


def tables() -> dict[str, str]:
    """The tables of the README by their mark."""
    reports = [report.load(RESULTS / "demo" / f"custom_{name}.report.json") for name in DEMO]
    footprint = msgspec.json.decode(FOOTPRINT.read_bytes(), type=Footprint)
    trials = msgspec.json.decode((RESULTS / "gate.json").read_bytes(), type=gate.Experiment)
    others = msgspec.json.decode((RESULTS / "agreement.json").read_bytes(), type=agreement.Result)
    return {
        "demo": markdown.render(reports),
        "footprint": table(footprint),
        "gate": gate.table(trials),
        "agreement": agreement.table(others),
    }


def readme(text: str) -> str:
    """The README with its tables as they are now."""
    for mark, content in tables().items():
        before, _, rest = text.partition(f"<!-- {mark} -->\n")
        _, _, after = rest.partition(f"<!-- /{mark} -->")
        text = f"{before}<!-- {mark} -->\n{content}<!-- /{mark} -->{after}"
    return text


def main() -> None:
    """Write them all."""
    (ROOT / "docs").mkdir(exist_ok=True)
    (ROOT / "docs" / "cli.md").write_text(cli_help())
    path = ROOT / "README.md"
    path.write_text(readme(path.read_text()))


if __name__ == "__main__":
    main()
