"""What a recipe says against itself, found before any work, all of it at once."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from exporter import backends, discover, strict
from exporter.build import int8, pipeline
from exporter.data.calibration import SYNTHETIC
from exporter.errors import BadRequest, Unavailable, nearest
from exporter.graph import trace
from exporter.model import FORMS
from exporter.model.variants import resolve
from exporter.recipe import EIGHT_BITS, Recipe
from exporter.recipe_file.records import RecipeFile
from exporter.verify import checks


def find(made: RecipeFile, marks: strict.Marks) -> None:
    """Put every contradiction into the marks."""
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
        (("bench",), lambda: _check_bench(made)),
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
    if made.quantization is not None:
        _within("calib_size", made.quantization.calib_size, 1, 10**9)
    if eight and made.precision in backends.get(made.backend).precisions:
        int8.check(made.recipe(), made.budget())


def _check_form(recipe: Recipe) -> None:
    if recipe.form not in (None, "auto", *FORMS):
        raise BadRequest(f"--form {recipe.form}: expected {', '.join(FORMS)} or auto")


def _check_checks(made: RecipeFile) -> None:
    checks.check_options(made.verify_options())
    _within("samples", made.checks.samples, 1, 10**9)
    if made.checks.max_drop is not None and (made.checks.data == SYNTHETIC or made.model.task == "features"):
        raise BadRequest("--max-drop: a drop is measured on labelled images with a classifier; give 'checks.data'")


def _check_bench(made: RecipeFile) -> None:
    """Numbers are within bounds, and the batches that are timed can be run."""
    options, fixed = made.bench_options(), made.export.batch
    if made.bench is None or options is None:
        return
    _within("duration", options.duration, 0.5, 86400)
    _within("threads", options.threads, 1, 512)
    _within("until", options.until, 0.05, 100)
    for size in options.batch:
        _within("batch", size, 1, 4096)
    if isinstance(fixed, int) and set(options.batch) != {fixed}:
        raise BadRequest(f"batch {fixed} is all that is exported, and bench asks for {list(options.batch)}")
    profiles = made.target.get("profiles") or []
    beyond = [size for size in options.batch if not any(least <= size <= most for least, _, most in profiles)]
    if profiles and beyond:
        raise BadRequest(f"profiles {profiles} do not hold a batch of {beyond[0]}, which bench asks for")


def _within(word: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:
        raise BadRequest(f"{word} {value:g}: expected a number from {low:g} to {high:g}")
