"""Which form is fastest on this very machine's CPU: every form built, timed in turn, and the choice remembered.

A choice is kept in the user's cache folder, a file for each machine, runtime and model shape; without the file it is
made again.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping
from math import exp, log
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from exporter import backends, machine
from exporter.artifact import Artifact
from exporter.artifact.disk import cache_folder, write_file
from exporter.artifact.sidecar import Record
from exporter.bench import Opener, Timing, latency, worker
from exporter.errors import ExporterError
from exporter.model import FORMS, weights
from exporter.progress import note, step
from exporter.recipe import Recipe
from exporter.stats import Center, center
from exporter.verify.checks.parity import LIMITS

SECONDS = 12.0
LEAST_GAIN = 1.02  # the best of several equals passes 1 by chance more often than its own interval says
Build = Callable[[Recipe, Path], Artifact]


class Choice(Record, frozen=True):
    """A form, what was tried, and for what: how many times faster than `plain` each form is, with its 95 % interval,
    and why forms fell out."""

    form: str
    gains: dict[str, tuple[float, float, float]]
    fell: dict[str, str]
    facts: dict[str, Any]

    def __str__(self) -> str:
        tried = [f"{form} {gain:.2f}× ({low:.2f}–{high:.2f})" for form, (gain, low, high) in self.gains.items()]
        tried += [f"{form} fell out: {reason}" for form, reason in self.fell.items()]
        return f"{self.form}; over plain: {', '.join(tried)}"


def fastest(recipe: Recipe, build: Build, opener: Opener = worker.open_arm) -> str:
    """The form that a recipe's model runs fastest in on this machine, remembered or measured.

    Args:
        recipe: with `form` auto.
        build: makes a recipe's artifact in a folder.
        opener: opens an arm, in the timing process.

    Raises: what building raises; ExporterError when not even `plain` can be timed.
    """
    facts = _facts(recipe)
    path = cache_folder() / "forms" / f"{hashlib.sha256(msgspec.json.encode(facts)).hexdigest()[:24]}.json"
    choice = _remembered(path, facts)
    if choice is None:
        with tempfile.TemporaryDirectory(prefix="convnext-export-forms-") as folder:
            made = {form: build(replace(recipe, form=form), Path(folder) / form) for form in FORMS}
            choice = _choose(made, recipe, facts, opener)
        if not choice.fell:  # what fell for want of memory, say, may stand another time
            _remember(path, choice)
    note(f"--form auto: {choice} ({path})")
    return choice.form


def _facts(recipe: Recipe) -> dict[str, Any]:
    """Everything that may change the answer: machine, runtime and model shape, but not the weights."""
    checkpoint = weights.load(recipe.weights, recipe.variant)
    cpu, isa = machine.cpu()
    asked = ("backend", "precision", "task", "imgsz", "batch", "opset", "simplify", "input")
    return {
        **{key: getattr(recipe, key) for key in asked},
        "architecture": msgspec.to_builtins(checkpoint.variant.architecture),
        "size": checkpoint.preprocessing.size,
        "cpu": cpu,
        "isa": isa,
        "cores": machine.cores(),
        "versions": machine.versions(),
    }


def _remembered(path: Path, facts: dict[str, Any]) -> Choice | None:
    """The choice in a file, if it is whole and for the same facts."""
    try:
        if not path.is_file():
            return None
        choice = msgspec.json.decode(path.read_bytes(), type=Choice)
    except (msgspec.DecodeError, UnicodeDecodeError, OSError):
        note(f"{path} cannot be read; the forms are measured again")
        return None
    same = msgspec.json.encode(choice.facts) == msgspec.json.encode(facts)
    return choice if same and choice.form in FORMS else None


def _remember(path: Path, choice: Choice) -> None:
    """Keep a choice; a cache that cannot be written is no reason to build nothing."""
    try:
        write_file(path, msgspec.json.format(msgspec.json.encode(choice)))
    except ExporterError:
        note(f"{path.parent} cannot be written, so the choice will not be remembered")


def _choose(made: Mapping[str, Artifact], recipe: Recipe, facts: dict[str, Any], opener: Opener) -> Choice:
    batch = recipe.batch if isinstance(recipe.batch, int) else 1
    step(f"--form auto: timing {', '.join(made)}")
    options = latency.BenchOptions(batch=(batch,), duration=SECONDS)
    artifacts = list(made.values())
    timing = latency.time_batch(latency.arms_of(artifacts, options), artifacts[0], batch, options, opener)
    names = {form: str(artifact.path) for form, artifact in made.items()}
    fell = {form: why for form, name in names.items() if (why := _fell(timing, name, recipe.precision))}
    standing = {form: name for form, name in names.items() if form not in fell}
    if "plain" in fell or not standing:
        raise ExporterError(f"--form auto: nothing to hold the forms against: plain {fell.get('plain', 'fell out')}")

    def over(form: str, base: str) -> Center:
        return center(latency.speedups(timing, names[form], names[base]))

    own = backends.get(recipe.backend).form(recipe.precision, batch)
    own = own if own in standing else "plain"
    best = max(standing, key=lambda form: over(form, own).value)
    form = best if over(best, own).low > log(LEAST_GAIN) else own  # an equal is not better than the backend's own
    found = {form: over(form, "plain") for form in standing if form != "plain"}
    gains = {form: (exp(gain.value), exp(gain.low), exp(gain.high)) for form, gain in found.items()}
    return Choice(form=form, gains=gains, fell=fell, facts=facts)


def _fell(timing: Timing, name: str, precision: str) -> str:
    """Why a form cannot be chosen: it crashed, or gave something else than eager PyTorch."""
    if latency.EAGER in timing.failures:
        return f"cannot be held against eager PyTorch, which {timing.failures[latency.EAGER]}"
    if name in timing.failures:
        return timing.failures[name]
    cosines = [launch.cosine[name] for launch in timing.launches if name in launch.cosine]
    least = LIMITS[precision].cosine
    if not cosines or not min(cosines) >= least:
        return f"cosine {min(cosines, default=float('nan')):.6f} to eager, expected {least}"
    return ""
