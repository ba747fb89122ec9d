"""Recipes as YAML files. Keys are the option names of the command line; paths are relative to the file itself."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import yaml

from exporter.artifact.disk import user_path, write_file
from exporter.artifact.sidecar import Record
from exporter.errors import BadRequest
from exporter.recipe import Bench, Checks, PreprocessingOptions, Recipe, bundled, strict
from exporter.recipe.fields import differing, fields_of
from exporter.recipe.strict import Marks

NOT_PATHS = re.compile(r"^(|hub|synthetic|random(:.*)?|hf-hub:.*)$")
TargetOptions = Callable[[str], type[Record]]
"""The record of a backend's target options by the backend's name; raises BadRequest for an unknown one."""


def read(path: Path, overrides: Iterable[str], target_options: TargetOptions) -> tuple[Recipe | None, Marks]:
    """Read a recipe and check each key by itself.

    Args:
        path: the file.
        overrides: `a.b=value`, which replace values of the file; their paths are relative to the working folder.
        target_options: the record that the keys of `target` are read with.

    Returns: the recipe, or None where a key that every recipe needs is missing; and the places and problems.

    Raises: BadRequest for a file that is no YAML.
    """
    root, marks = strict.parse(_text(path), str(path), overrides)
    assert root is not None
    values = strict.read(root, Recipe, marks)
    options: type[Record] = Record
    target = values.pop("target", None)
    if isinstance(target, yaml.Node) and "backend" in values:
        with suppress(BadRequest):  # an unknown backend is reported by `build.check`
            options = target_options(values["backend"])
            values["target"] = strict.read(target, options, marks, ("target",))
    for name in ("backend", "precision"):
        if name not in values and (name,) not in marks.places:
            marks.at((), f"{name} is missing; each recipe names its own")
    quantization = values.get("quantization")
    if quantization is not None and "calib" not in quantization and ("quantization", "calib") not in marks.places:
        marks.at(("quantization",), "calib is missing: a manifest, a folder, an .npz file or 'synthetic'")
    if not {"backend", "precision"} <= set(values):
        return None, marks
    return msgspec.convert(_placed(values, marks, path.parent, options), Recipe), marks


def _text(path: Path) -> str:
    try:
        if not path.is_file():
            raise BadRequest(f"{path}: no such recipe; `convnext-export recipes` lists the bundled ones")
        if path.stat().st_size > strict.MAX_BYTES:
            raise BadRequest(f"{path}: {path.stat().st_size} bytes is no recipe; they have some thirty lines")
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise BadRequest(f"{path}: no text in UTF-8, so no recipe") from None


def _path_fields(options: type[Record]) -> list[tuple[str, str]]:
    """Section and name of each field that is a path."""
    sections = {name: field.section for name, field in fields_of(Recipe).items()} | {"target": options}
    return [
        (section, name)
        for section, kind in sections.items()
        for name, field in (fields_of(kind) if kind else {}).items()
        if field.extra.get("path")
    ]


def _placed(values: dict[str, Any], marks: Marks, folder: Path, options: type[Record]) -> dict[str, Any]:
    """The values as builtins, with the file's own paths relative to its folder."""
    for section, name in _path_fields(options):
        value, mark = (values.get(section) or {}).get(name), marks.places.get((section, name))
        if isinstance(value, str) and _is_path(value, folder) and mark is not None and mark.name == marks.source:
            values[section][name] = os.path.normpath(folder / user_path(value))
    return msgspec.json.decode(msgspec.json.encode(values), type=dict[str, Any])


def _is_path(value: str, folder: Path) -> bool:
    """Whether a value is a path: no reserved word, and no name of a bundled calibration set."""
    return not NOT_PATHS.match(value) and not bundled.is_set(value, folder)


def save(recipe: Recipe, path: Path, options: type[Record]) -> None:
    """Write a recipe; its paths become relative to it.

    Raises: BadRequest where something else than a recipe stands.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise BadRequest(f"{path}: a recipe is a .yaml file")
    if path.exists() and not (path.is_file() and b"\nbackend:" in b"\n" + path.read_bytes()[: strict.MAX_BYTES]):
        raise BadRequest(f"{path}: another file than a recipe stands there; give --save-config another name")
    write_file(path, write(recipe, path, options))


def write(recipe: Recipe, path: Path, options: type[Record]) -> bytes:
    """A recipe as a file in a folder, without fields that are None and without the defaults of `checks` and `bench`."""
    fields: dict[str, Any] = msgspec.to_builtins(recipe)
    head = {name: fields.pop(name) for name in ("schema", "backend", "precision")}
    if recipe.quantization is None:
        del fields["quantization"]
    if not recipe.target:
        del fields["target"]
    if recipe.preprocessing == PreprocessingOptions():
        del fields["preprocessing"]
    fields["checks"] = {"data": recipe.checks.data, **differing(recipe.checks, Checks())}
    if recipe.bench is not None:
        fields["bench"] = differing(recipe.bench, Bench())
        if not fields["bench"]:
            del fields["bench"]
    for section, name in _path_fields(options):
        value = (fields.get(section) or {}).get(name)
        if value is not None and _is_path(value, Path()) and not user_path(value).is_absolute():
            fields[section][name] = os.path.relpath(value, path.parent)
    for section, values in fields.items():
        if section != "target":
            fields[section] = values and {name: value for name, value in values.items() if value is not None}
    text = yaml.dump(head | fields, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    return f"# convnext-export run {path.name}\n{text}".encode()


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Sections in blocks, lists in a line."""


for _kind in (list, tuple):
    _Dumper.add_representer(
        _kind, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, True)
    )


def schema(targets: Mapping[tuple[str, ...], type[Record]], precisions: Iterable[str]) -> dict[str, Any]:
    """The JSON schema of a recipe, for editors.

    Args:
        targets: the record of target options of each backend, by its name and its build command.
        precisions: the precisions of all of them.
    """
    _, parts = msgspec.json.schema_components([Recipe, *targets.values()], ref_template="#/$defs/{name}")
    whole = parts.pop("Recipe")
    whole["properties"]["backend"] = {"enum": sorted({word for words in targets for word in words})}
    whole["properties"]["precision"] = {"enum": sorted(precisions)}
    for part in [whole, *parts.values()]:
        part.pop("description", None)
    whole["allOf"] = [
        {
            "if": {"properties": {"backend": {"enum": words}}},
            "then": {"properties": {"target": {"$ref": f"#/$defs/{kind.__name__}"}}},
        }
        for words, kind in targets.items()
    ]
    whole["title"] = "convnext-export recipe"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **whole, "$defs": parts}
