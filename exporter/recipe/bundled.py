"""Bundled recipes and calibration sets, by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from exporter.artifact.disk import user_path
from exporter.errors import BadRequest, nearest


def folder(name: str) -> Path:
    """The folder `recipes` or `calibration`: inside the installed package, or beside it in a checkout."""
    inside = Path(__file__).parent.parent / name
    return inside if inside.is_dir() else inside.parent.parent / name


def recipes() -> dict[str, Path]:
    """The files of the bundled recipes by name, as in `onnxruntime/tiny_int8`."""
    root = folder("recipes")
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.glob("*/*.yaml"))}


def find_recipe(word: str, backends: Mapping[str, str] = MappingProxyType({})) -> Path:
    """The file of a recipe: a path, or the name of a bundled one.

    Args:
        word: a path or a name, whose folder is a backend or the build command of one.
        backends: the names of backends by their build commands.

    Raises: BadRequest when there is neither, with the nearest name.
    """
    path, known = user_path(word), recipes()
    if path.is_file():
        return path
    folder, slash, name = word.partition("/")
    full = f"{backends.get(folder, folder)}{slash}{name}"
    if full not in known and path.suffix in (".yaml", ".yml"):
        raise BadRequest(f"{word}: no such file")
    if full not in known:
        raise BadRequest(f"{word}: no such recipe; {nearest(full, known) if known else 'give a file'}")
    return known[full]


def sets() -> dict[str, Path]:
    """The manifests of the bundled calibration sets by name, as in `digits-256`."""
    return {path.stem: path for path in sorted(folder("calibration").glob("*.tsv"))}


def find_images(source: str) -> Path:
    """The path of a source of images: a path that exists, else the bundled set of that name."""
    path = user_path(source)
    return path if path.exists() else sets().get(source, path)


def is_set(source: str, beside: Path) -> bool:
    """Whether a source names a bundled set, and no file or folder in the folder `beside`."""
    return source in sets() and not (beside / source).exists()
