"""The messages of errors, for the page on troubleshooting: collected from the source, by area, cause and fix apart.

A message has the form "cause; what to do". What the program fills in is shown as "…". Messages that end with another
module's text, or are passed on from a library, have no words of their own and are left out.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent / "exporter"
BASE = "ExporterError"
# Folders and files of the package, with the heading of their messages and where to read on.
AREAS: dict[str, tuple[tuple[str, ...], str]] = {
    "Options": (("cli", "discover.py", "precision.py"), "See [Commands](cli.md), or `--help` of the command."),
    "Checkpoints": (("model",), "See [Checkpoints](checkpoints.md)."),
    "Images, labels and manifests": (("data",), "See [Images](verify.md#images)."),
    "Builds": (("build", "quantize", "graph"), "See [Export](export.md)."),
    "Runtimes and devices": (("backends",), "See [Install](install.md); `doctor` shows what this machine can run."),
    "Artifacts and files": (("artifact", "git.py", "errors.py"), "See [Export](export.md)."),
    "Clusters and shards": (
        ("run/cluster.py", "run/distributed.py", "run/recipes.py", "run/spread.py", "run/tasks.py", "verify/shards.py"),
        "See [Cluster](cluster.md).",
    ),
    "Recipes and runs": (("recipe", "run"), "See [Recipes](recipes.md)."),
    "Verify and bisect": (("verify", "bisect"), "See [Verify](verify.md)."),
    "Bench and optimize": (("bench", "optimize"), "See [How it measures](measure.md) and [Optimize](optimize.md)."),
    "Compare and report": (("compare", "report"), "See [CI gate](gate.md)."),
    "Predict": (("predict",), "See [Predict](predict.md)."),
    "Packages": (("package",), "See [Packages](package.md)."),
}


def page() -> str:
    """A table of messages for each area. Where a message does not say what to do, its cell is empty."""
    parts, listed = [], set[str]()
    for heading, (places, pages) in AREAS.items():
        rows = dict.fromkeys(text for place in places for text in messages(ROOT / place) if text not in listed)
        listed |= rows.keys()
        lines = [f"| {_code(cause)} | {_plain(fix)} |" for cause, fix in map(split, rows)]
        table = ["| message | what to do |", "|---|---|", *sorted(lines)]
        parts.append("\n".join([f"### {heading}\n", f"{pages}\n", *table]) + "\n")
    return "\n" + "\n".join(parts) + "\n"


def split(text: str) -> tuple[str, str]:
    """The cause and what to do, at the first semicolon."""
    cause, _, fix = text.partition("; ")
    return (cause, fix) if fix and fix != "…" else (cause, "")


def messages(path: Path) -> list[str]:
    """The messages of a module or of a folder of modules, in order."""
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return [text for file in files for text in own_texts(ast.parse(file.read_text()))]


def own_texts(tree: ast.AST) -> Iterator[str]:
    """The texts with words of their own of the errors that a module makes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _name(node.func) in ERRORS:
            for text in map(words, node.args):
                if any(sign.isalpha() for sign in text):
                    yield text


def words(node: ast.expr) -> str:
    """The fixed words of a string, with "…" for the rest."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)  # type: ignore[misc]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return words(node.left) + words(node.right)
    return "…"


def errors() -> set[str]:
    """`ExporterError` and the classes below it."""
    bases = {
        node.name: {_name(base) for base in node.bases}
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    }
    known = {BASE}
    while more := {name for name, above in bases.items() if above & known} - known:
        known |= more
    return known


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _code(text: str) -> str:
    """Text as code in a cell of a table."""
    escaped = text.replace("|", "\\|").strip()
    return f"`` {escaped} ``" if "`" in escaped else f"`{escaped}`"


def _plain(text: str) -> str:
    """Text in a cell of a table."""
    return "".join(f"\\{sign}" if sign in "|<>*_[]" else sign for sign in text.strip())


ERRORS = errors()
