"""Bundled recipes, by name."""

from __future__ import annotations

from pathlib import Path

from exporter.artifact.disk import user_path
from exporter.errors import BadRequest, nearest


def folder() -> Path:
    """Where they lie: inside the installed package, or beside it in a checkout."""
    inside = Path(__file__).parent.parent / "recipes"
    return inside if inside.is_dir() else inside.parent.parent / "recipes"


def names() -> dict[str, Path]:
    """Their names, `onnxruntime/tiny_int8`, and their files."""
    root = folder()
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.glob("*/*.yaml"))}


def find(word: str) -> Path:
    """The file of a recipe: one of the user's own, or one that ships.

    Raises: BadRequest when there is neither, with the nearest name.
    """
    path = user_path(word)
    known = names()
    if path.is_file() or word not in known:
        if not path.is_file():
            raise BadRequest(f"{word}: no such recipe; {nearest(word, known) if known else 'give a file'}")
        return path
    return known[word]
