"""The calibration sets that ship with the tool, by name."""

from __future__ import annotations

from pathlib import Path

from exporter.artifact.disk import user_path


def folder() -> Path:
    """Where they lie: inside the installed package, or beside it in a checkout."""
    inside = Path(__file__).parent.parent / "calibration"
    return inside if inside.is_dir() else inside.parent.parent / "calibration"


def sets() -> dict[str, Path]:
    """Their names, `digits-256`, and their manifests."""
    return {path.stem: path for path in sorted(folder().glob("*.tsv"))}


def find(source: str) -> Path:
    """What a source of images stands for: a path of the user's own where it exists, else the set of that name."""
    path = user_path(source)
    return path if path.exists() else sets().get(source, path)


def is_name(source: str, beside: Path) -> bool:
    """Whether a source names a set that ships, and no file or folder in the folder `beside`."""
    return source in sets() and not (beside / source).exists()
