"""A recipe as a file: one build, and what it must hold, complete in some thirty lines of YAML.

Its keys are the words of the command line. Paths in it are relative to the file itself, so that a recipe and the
weights beside it can be moved together.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec
import yaml

from exporter import backends, checks, discover, int8, pipeline, strict
from exporter.bench.latency import BenchOptions
from exporter.data.calibration import SYNTHETIC
from exporter.disk import user_path, write_file
from exporter.errors import BadRequest, Unavailable, nearest
from exporter.graph import trace
from exporter.model import FORMS
from exporter.model.variants import resolve
from exporter.recipe import EIGHT_BITS, Recipe
from exporter.sidecar import Record
from exporter.verifying import VerifyOptions

SCHEMA = 1
PATHS = ("weights", "labels", "calib", "data", "timing_cache")
_WORDS = re.compile(r"^(hub|synthetic|random(:.*)?|hf-hub:.*)$")


class Model(Record, frozen=True):
    """Which network, from which weights, and what it gives out."""

    variant: str | None = None
    weights: str = "hub"
    labels: str | None = None
    task: Literal["classify", "features"] = "classify"


class Export(Record, frozen=True):
    """How its graph is cut and written."""

    imgsz: int | Literal["dynamic"] | None = None
    batch: int | Literal["dynamic"] = "dynamic"
    opset: int = 20
    simplify: bool = True
    form: str | None = None
    input: Literal["normalized", "float01", "uint8"] = "normalized"


class Quantizing(Record, frozen=True):
    """How it comes to eight bits, and what it may lose by that: its budget, which decides what is kept back."""

    calib: str
    calib_size: int | None = None
    calib_seed: int = 0
    calib_method: Literal["minmax", "entropy", "percentile", "mse"] = "minmax"
    smoothing: float = 0.5
    bias_correction: Literal["none", "fast", "full"] = "fast"
    int8_scope: str | None = None
    max_drop: float | None = None
    data: str | None = None


class Checks(Record, frozen=True):
    """What it is verified on, and by which limits; None is each precision's own."""

    data: str = SYNTHETIC
    samples: int | None = None
    max_drop: float | None = None
    min_agreement: float | None = None
    min_cosine: float | None = None
    atol: float | None = None
    device: str = "cpu"


class Bench(Record, frozen=True):
    """How it is timed beside eager PyTorch; `min_speedup` is over that, `max_p50_ms` a time in milliseconds, both for
    every batch size. None for `batch` is what was exported, or 1."""

    batch: tuple[int, ...] | None = None
    threads: int | None = None
    hint: Literal["latency", "throughput"] = "latency"
    device: str = "cpu"
    duration: float = 10.0
    until: float | None = None
    seed: int = 0
    also: tuple[Literal["torch.compile", "tf32", "fp16"], ...] = ()
    min_speedup: float | None = None
    max_p50_ms: float | None = None


class RecipeFile(Record, frozen=True):
    """One build. Without `bench: null` it is timed too."""

    backend: str
    precision: str
    schema: Literal[1] = 1
    model: Model = Model()
    export: Export = Export()
    quantization: Quantizing | None = None
    target: dict[str, Any] = msgspec.field(default_factory=dict)
    checks: Checks = Checks()
    bench: Bench | None = Bench()

    def recipe(self) -> Recipe:
        """What is built."""
        told = {} if self.quantization is None else msgspec.structs.asdict(self.quantization)
        told = {word: value for word, value in told.items() if word not in ("max_drop", "data")}
        parts = {**msgspec.structs.asdict(self.model), **msgspec.structs.asdict(self.export), **told}
        return Recipe(backend=self.backend, precision=self.precision, target=self.target, **parts)

    def budget(self) -> int8.Budget:
        """What eight bits may lose."""
        asked = self.quantization
        return int8.Budget() if asked is None else int8.Budget(max_drop=asked.max_drop, data=asked.data)

    def verify_options(self) -> VerifyOptions:
        """How it is verified."""
        told = msgspec.structs.asdict(self.checks)
        return VerifyOptions(most=told.pop("samples"), weights=_elsewhere(self.model.weights), **told)

    def bench_options(self) -> BenchOptions | None:
        """How it is timed, or None."""
        if self.bench is None:
            return None
        told = msgspec.structs.asdict(self.bench)
        fixed = self.export.batch if isinstance(self.export.batch, int) else 1
        batch = told.pop("batch") or (fixed,)
        told = {word: value for word, value in told.items() if word not in ("min_speedup", "max_p50_ms")}
        return BenchOptions(batch=batch, weights=_elsewhere(self.model.weights), **told)


def _elsewhere(weights: str) -> str | None:
    """Weights that lie in a file are named, for it may have been moved since; others are found by their name."""
    return None if _WORDS.match(weights) else weights


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
    _contradictions(made, marks)
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
            if isinstance(value, str) and not _WORDS.match(value) and mark is not None and mark.name == marks.source:
                section[word] = os.path.normpath(folder / user_path(value))
    return msgspec.json.decode(msgspec.json.encode(found), type=dict[str, Any])


def _contradictions(made: RecipeFile, marks: strict.Marks) -> None:
    recipe = made.recipe()
    if _told(marks, ("backend",), lambda: _check_backend(made.backend)):
        return
    asked: list[tuple[strict.Path, Callable[[], object]]] = [
        (("precision",), lambda: pipeline.check_precision(recipe)),
        (("model", "variant"), lambda: resolve(recipe.variant) if recipe.variant else None),
        (("export",), lambda: trace.check_options(recipe.trace_options(224))),
        (("export", "form"), lambda: _check_form(recipe)),
        (("target",), lambda: pipeline.target_of(recipe)),
        (("quantization",), lambda: _check_quantization(made)),
        (("checks",), lambda: _check_checks(made)),
        (("bench",), lambda: _check_batches(made)),
    ]
    refused = [_told(marks, path, ask) for path, ask in asked]  # all of them, not the first
    if not any(refused):
        backend = backends.get(recipe.backend)
        with suppress(Unavailable):  # it may be built elsewhere
            ask = partial(backend.check, recipe.precision, pipeline.batch_of(recipe), pipeline.target_of(recipe))
            _told(marks, ("target",), ask)


def _told(marks: strict.Marks, path: strict.Path, ask: Callable[[], object]) -> bool:
    """Whether something was refused; it is told of where the key of this section stands that it names first."""
    try:
        ask()
    except BadRequest as error:
        text = re.sub(r"--([a-z][a-z0-9-]+)", lambda found: found[1].replace("-", "_"), str(error))
        known = {place[-1]: place for place in marks.places if place[: len(path)] == path}
        named = next((known[word] for word in re.findall(r"[a-z0-9_]+", text) if word in known), path)
        marks.at(named, text)
        return True
    return False


def _check_backend(name: str) -> None:
    if name not in buildable():
        raise BadRequest(f"backend {name!r}: {nearest(name, buildable())}")


def buildable() -> list[str]:
    """The backends that something is built for."""
    return [name for name in discover.names("exporter.backends") if name != "eager"]


def _check_quantization(made: RecipeFile) -> None:
    eight = made.precision in EIGHT_BITS
    if made.quantization is None and eight:
        raise BadRequest(
            f"precision {made.precision} needs calibration; add 'quantization:' with 'calib:', a manifest, a folder, "
            "an .npz file or 'synthetic'"
        )
    if made.quantization is not None and not eight:
        raise BadRequest(f"quantization is for int8 and fp8, and precision is {made.precision}; take one of them out")
    if eight and made.precision in backends.get(made.backend).precisions:
        int8.check(made.recipe(), made.budget())


def _check_form(recipe: Recipe) -> None:
    if recipe.form not in (None, "auto", *FORMS):
        raise BadRequest(f"--form {recipe.form}: expected {', '.join(FORMS)} or auto")


def _check_checks(made: RecipeFile) -> None:
    checks.check_options(made.verify_options())
    if made.checks.max_drop is not None and (made.checks.data == SYNTHETIC or made.model.task == "features"):
        raise BadRequest("--max-drop: a drop is measured on labelled images with a classifier; give 'checks.data'")


def _check_batches(made: RecipeFile) -> None:
    """The batches that are timed can be run."""
    options, fixed = made.bench_options(), made.export.batch
    if options is None:
        return
    if isinstance(fixed, int) and set(options.batch) != {fixed}:
        raise BadRequest(f"batch {fixed} is all that is exported, and bench asks for {list(options.batch)}")
    profiles = made.target.get("profiles") or []
    beyond = [size for size in options.batch if not any(least <= size <= most for least, _, most in profiles)]
    if profiles and beyond:
        raise BadRequest(f"profiles {profiles} do not hold a batch of {beyond[0]}, which bench asks for")


def check(made: RecipeFile) -> None:
    """Refuse what contradicts itself.

    Raises: BadRequest with every problem.
    """
    marks = strict.Marks("")
    _contradictions(made, marks)
    marks.refuse()


def save(made: RecipeFile, path: Path) -> None:
    """Write a recipe; its paths become relative to it.

    Raises: BadRequest for a recipe that `read` would refuse, or where something else than a recipe stands.
    """
    check(made)
    if path.suffix not in (".yaml", ".yml"):
        raise BadRequest(f"{path}: a recipe is a .yaml file")
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
            elif word in PATHS and not _WORDS.match(section[word]) and not user_path(section[word]).is_absolute():
                section[word] = os.path.relpath(section[word], path.parent)
    text = yaml.dump(whole, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    return f"# convnext-export run {path.name}\n{text}".encode()


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
