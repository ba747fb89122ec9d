"""A recipe as a file: one build, and what it must hold, complete in some thirty lines of YAML.

Its keys are the words of the command line. Paths in it are relative to the file itself, so that a recipe and the
weights beside it can be moved together.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import yaml

from exporter import backends, strict
from exporter.artifact.disk import user_path, write_file
from exporter.artifact.sidecar import Record
from exporter.build import int8
from exporter.data import bundled
from exporter.data.calibration import SYNTHETIC
from exporter.errors import BadRequest
from exporter.recipe import EIGHT_BITS, Recipe
from exporter.recipe_file import contradictions
from exporter.recipe_file.contradictions import buildable as buildable
from exporter.recipe_file.records import PATHS, SCHEMA, WORDS, Bench, Checks, Export, Model, Quantizing
from exporter.recipe_file.records import RecipeFile as RecipeFile


def of(recipe: Recipe, budget: int8.Budget) -> RecipeFile:
    """The file that says what a build verb was told."""
    words = msgspec.structs.asdict(recipe)

    def part(kind: type[Record]) -> dict[str, Any]:
        return {word: words[word] for word in kind.__struct_fields__ if word in words}

    eight = recipe.precision in EIGHT_BITS
    quantization = Quantizing(**part(Quantizing), **msgspec.structs.asdict(budget)) if eight else None
    target = {word: value for word, value in recipe.target.items() if value}
    return RecipeFile(
        backend=recipe.backend,
        precision=recipe.precision,
        model=Model(**part(Model)),
        export=Export(**part(Export)),
        quantization=quantization,
        target={word: value for word, value in target.items() if value != "none"},
        checks=Checks(data=budget.data or SYNTHETIC),
    )


def read(path: Path, overrides: Iterable[str] = ()) -> RecipeFile:
    """Read a recipe and hold it against all that needs no work to know.

    Args:
        path: the file.
        overrides: `a.b=value`, put in its place; their paths are relative to the working folder.

    Raises: BadRequest with every problem, each in a line of its own with line and column.
    """
    root, marks = strict.parse(_text(path), str(path), overrides)
    assert root is not None
    found = strict.read(root, RecipeFile, marks)
    _target(found, marks)
    for word in ("backend", "precision"):
        if word not in found and (word,) not in marks.places:
            marks.at((), f"{word} is missing; every recipe says its own")
    eight = found.get("quantization")
    if eight is not None and "calib" not in eight and ("quantization", "calib") not in marks.places:
        marks.at(("quantization",), "calib is missing: a manifest, a folder, an .npz file or 'synthetic'")
    try:
        made = msgspec.convert(_placed(found, marks, path.parent), RecipeFile)
    except msgspec.ValidationError:  # for want of a key that was told of
        marks.refuse()
        raise
    contradictions.find(made, marks)
    marks.refuse()
    return made


def _text(path: Path) -> str:
    try:
        if not path.is_file():
            raise BadRequest(f"{path}: no such recipe; `convnext-export recipes` lists those that ship")
        if path.stat().st_size > strict.MAX_BYTES:
            raise BadRequest(f"{path}: {path.stat().st_size} bytes is no recipe; they have some thirty lines")
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise BadRequest(f"{path}: no text in UTF-8, so no recipe") from None


def _target(found: dict[str, Any], marks: strict.Marks) -> None:
    """The target's keys are those of the backend's own record."""
    node = found.pop("target", None)
    if isinstance(node, yaml.Node) and "backend" in found:
        with suppress(BadRequest):  # an unknown backend is told of later
            found["target"] = strict.read(node, backends.get(found["backend"]).target, marks, ("target",))


def _placed(found: dict[str, Any], marks: strict.Marks, folder: Path) -> dict[str, Any]:
    """Paths that the file says are relative to its folder, those of an override to the working folder."""
    for name, section in found.items():
        for word in PATHS if isinstance(section, dict) else ():
            value, mark = section.get(word), marks.places.get((name, word))
            if not isinstance(value, str) or WORDS.match(value) or bundled.is_name(value, folder):
                continue
            if mark is not None and mark.name == marks.source:
                section[word] = os.path.normpath(folder / user_path(value))
    return msgspec.json.decode(msgspec.json.encode(found), type=dict[str, Any])


def check(made: RecipeFile) -> None:
    """Refuse what contradicts itself.

    Raises: BadRequest with every problem.
    """
    marks = strict.Marks("")
    contradictions.find(made, marks)
    marks.refuse()


def save(made: RecipeFile, path: Path) -> None:
    """Write a recipe; its paths become relative to it.

    Raises: BadRequest for a recipe that `read` would refuse, or where something else than a recipe stands.
    """
    check(made)
    if path.suffix not in (".yaml", ".yml"):
        raise BadRequest(f"{path}: a recipe is a .yaml file")
    if path.exists() and not (path.is_file() and b"\nbackend:" in b"\n" + path.read_bytes()[: strict.MAX_BYTES]):
        raise BadRequest(f"{path}: something that is no recipe stands there; give --save-config another name")
    write_file(path, write(made, path))


def write(made: RecipeFile, path: Path) -> bytes:
    """A recipe as a file in a folder, without what is the default and could be nothing else."""
    words: dict[str, Any] = {"schema": SCHEMA, "backend": made.backend, "precision": made.precision}
    words["model"], words["export"] = made.model, made.export
    if made.quantization is not None:
        words["quantization"] = made.quantization
    if made.target:
        words["target"] = made.target
    words["checks"] = made.checks
    bench = None if made.bench is None else _differs(made.bench, Bench())
    if bench or made.bench is None:
        words["bench"] = bench
    whole = msgspec.to_builtins(words)
    whole["checks"] = {"data": made.checks.data, **_differs(made.checks, Checks())}
    for section in whole.values():
        for word in list(section) if isinstance(section, dict) else ():
            if section[word] is None:
                del section[word]
            elif word in PATHS and not _is_word(section[word]) and not user_path(section[word]).is_absolute():
                section[word] = os.path.relpath(section[word], path.parent)
    text = yaml.dump(whole, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    return f"# convnext-export run {path.name}\n{text}".encode()


def _is_word(value: str) -> bool:
    """Whether a value is no path: one of the words, or the name of a calibration set that ships."""
    return bool(WORDS.match(value)) or bundled.is_name(value, Path())


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Sections in blocks, lists in a line."""


_Dumper.add_representer(list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, True))


def _differs(record: Record, default: Record) -> dict[str, Any]:
    ours, theirs = msgspec.to_builtins(record), msgspec.to_builtins(default)
    return {word: value for word, value in ours.items() if value != theirs[word]}


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors: the target's keys are those of the backend that is named."""
    names = buildable()
    targets = {name: backends.get(name).target for name in names}
    _, parts = msgspec.json.schema_components([RecipeFile, *targets.values()], ref_template="#/$defs/{name}")
    whole = parts.pop("RecipeFile")
    whole["properties"]["backend"] = {"enum": names}
    whole["properties"]["precision"] = {"enum": sorted({p for name in names for p in backends.get(name).precisions})}
    for part in [whole, *parts.values()]:
        part.pop("description", None)
    whole["allOf"] = [
        {
            "if": {"properties": {"backend": {"const": name}}},
            "then": {"properties": {"target": {"$ref": f"#/$defs/{kind.__name__}"}}},
        }
        for name, kind in targets.items()
    ]
    whole["title"] = "convnext-export recipe"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **whole, "$defs": parts}
