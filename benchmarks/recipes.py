"""The recipes that ship, written by `make docs`: each sound, complete and alike, with the schema beside them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import msgspec

from exporter import backends, build
from exporter.recipe import Model, Quantization, Recipe, file
from exporter.recipe.fields import Field, expected, fields_of

FOLDER = Path(__file__).parent.parent / "recipes"
SCHEMA = "recipe.schema.json"
BACKENDS = ("onnxruntime", "openvino", "tensorrt")
VARIANTS = ("tiny", "small", "base", "large", "v2_tiny", "v2_base")
PRECISIONS = ("fp16", "int8")
TASKS = ("classify", "features")
CALIBRATE = (
    "# Calibrated on synthetic images. Your own give more accuracy: "
    "--set quantization.calib=FOLDER --set quantization.data=LABELLED_FOLDER\n"
)


def files() -> dict[str, bytes]:
    """Every file, by its name below the folder."""
    made = {SCHEMA: msgspec.json.format(msgspec.json.encode(build.schema()), indent=1) + b"\n"}
    for backend, variant, task, precision in product(BACKENDS, VARIANTS, TASKS, PRECISIONS):
        name = "_".join([variant, *([] if task == "classify" else [task]), precision])
        path = Path(backend) / f"{name}.yaml"
        recipe = Recipe(
            backend=backend,
            precision=precision,
            model=Model(variant=variant, task=task),
            quantization=Quantization() if precision == "int8" else None,
        )
        text = file.write(recipe, path, backends.target(backend).options).decode()
        head = f"# yaml-language-server: $schema=../{SCHEMA}\n# convnext-export run {backend}/{name}\n"
        body = text.partition("\n")[2]
        made[str(path)] = (head + (CALIBRATE if precision == "int8" else "") + body).encode()
    return made


def key_table() -> str:
    """Every key of a recipe, what it takes, its default and its meaning."""
    rows = ["| key | takes | default | |", "|---|---|---|---|"]
    rows += list(_rows(Recipe, "", ""))
    for backend in BACKENDS:
        rows += list(_rows(backends.target(backend).options, "target.", f" ({backend})"))
    return "\n".join(rows) + "\n"


def _rows(kind: type[msgspec.Struct], above: str, suffix: str) -> Iterator[str]:
    for field in fields_of(kind).values():
        if field.section is not None:
            yield from _rows(field.section, f"{field.name}.", suffix)
        elif field.name != "target":
            cells = [f"`{above}{field.name}`{suffix}", expected(field.hint), _default(field), field.help]
            yield f"| {' | '.join(cells)} |"


def _default(field: Field) -> str:
    if field.default is msgspec.NODEFAULT:
        return "required"
    if field.extra.get("default"):
        return str(field.extra["default"])
    return "" if field.default in (None, ()) else str(field.default).lower()


def main() -> None:
    """Write them all."""
    for name, content in files().items():
        path = FOLDER / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
