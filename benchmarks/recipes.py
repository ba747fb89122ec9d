"""The recipes that ship, written by `make docs`: each sound, complete and alike, with the schema beside them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import msgspec

from exporter import backends, recipe_file, strict
from exporter.build import int8
from exporter.recipe import Recipe

FOLDER = Path(__file__).parent.parent / "recipes"
SCHEMA = "recipe.schema.json"
VARIANTS = ("tiny", "small", "base", "large", "v2_tiny", "v2_base")
PRECISIONS = ("fp16", "int8")
TASKS = ("classify", "features")
CALIBRATE = (
    "# Better than synthetic: your own images, --set quantization.calib=FOLDER --set quantization.data=LABELLED\n"
)


def files() -> dict[str, bytes]:
    """Every file, by its name below the folder."""
    made = {SCHEMA: msgspec.json.format(msgspec.json.encode(recipe_file.schema()), indent=1) + b"\n"}
    for backend, variant, task, precision in product(recipe_file.buildable(), VARIANTS, TASKS, PRECISIONS):
        name = "_".join([variant, *([] if task == "classify" else [task]), precision])
        path = Path(backend) / f"{name}.yaml"
        recipe = Recipe(backend=backend, variant=variant, task=task, precision=precision)  # type: ignore[arg-type]
        text = recipe_file.write(recipe_file.of(recipe, int8.Budget()), path).decode()
        head = f"# yaml-language-server: $schema=../{SCHEMA}\n# convnext-export run {backend}/{name}\n"
        body = text.partition("\n")[2]
        made[str(path)] = (head + (CALIBRATE if precision == "int8" else "") + body).encode()
    return made


def key_table() -> str:
    """Every key of a recipe, what it takes, and what it is when it is left out."""
    rows = ["| key | takes | left out |", "|---|---|---|"]
    for key, hint, default in _keys(recipe_file.RecipeFile, ""):
        rows.append(f"| `{key}` | {strict.expected(hint)} | {default} |")
    for backend in recipe_file.buildable():
        for key, hint, default in _keys(backends.get(backend).target, "target."):
            rows.append(f"| `{key}` ({backend}) | {strict.expected(hint)} | {default} |")
    return "\n".join(rows) + "\n"


def _keys(kind: type[msgspec.Struct], above: str) -> Iterator[tuple[str, Any, str]]:
    for field in msgspec.structs.fields(kind):
        hint = strict.hints(kind)[field.name]
        section = strict.section_of(hint)
        if section is not None:
            yield from _keys(section, f"{field.name}.")
        elif field.name != "target":
            yield f"{above}{field.name}", hint, _default(field)


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "must be said"
    return "" if field.default in (None, msgspec.NODEFAULT, ()) else str(field.default).lower()


def main() -> None:
    """Write them all."""
    for name, content in files().items():
        path = FOLDER / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
