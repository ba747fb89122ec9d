"""The form that is fastest on this machine's CPU: every form built, timed in turn, and the choice stored.

Choices are stored in the user's cache folder, a file for each machine, runtime and model shape. If the file is deleted
the forms are timed again.
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
from exporter.bench import Opener, Timing, batches_of, latency, worker
from exporter.build.resolve import Job
from exporter.errors import ExporterError, Unavailable
from exporter.model import FORMS
from exporter.progress import note, step
from exporter.recipe import Recipe
from exporter.stats import Center, center

SECONDS = 12.0
LEAST_GAIN = 1.02  # the best of several equals passes 1 by chance more often than its own interval says
Build = Callable[[Recipe, Path], Artifact]


class Choice(Record, frozen=True):
    """The fastest form, and the measurements.

    gains: how many times faster than `plain` each form is, with the ends of the 95 % interval.
    failures: why a form could not be chosen.
    facts: machine, runtime and model shape.
    """

    form: str
    gains: dict[str, tuple[float, float, float]]
    failures: dict[str, str]
    facts: dict[str, Any]

    def __str__(self) -> str:
        lines = [f"{form} {gain:.2f}× ({low:.2f}–{high:.2f})" for form, (gain, low, high) in self.gains.items()]
        lines += [f"{form} failed: {reason}" for form, reason in self.failures.items()]
        return f"{self.form}; over plain: {', '.join(lines)}"


def fastest(job: Job, build: Build, opener: Opener = worker.open_arm) -> str:
    """The form that a job's model runs fastest in on this machine, stored or measured.

    Args:
        job: with the form `auto`.
        build: builds a recipe's artifact in a folder.
        opener: opens an arm, in the timing process.

    Raises: what building raises; Unavailable where the runtime cannot run here; ExporterError when not even `plain` can
        be timed.
    """
    if why := job.runtime.unable():
        raise Unavailable(f"--form auto: the forms cannot be timed here ({why}); give one of {', '.join(FORMS)}")
    facts = _facts(job)
    path = cache_folder() / "forms" / f"{hashlib.sha256(msgspec.json.encode(facts)).hexdigest()[:24]}.json"
    choice = _stored(path, facts)
    if choice is None:
        with tempfile.TemporaryDirectory(prefix="convnext-export-forms-") as folder:
            artifacts = {form: build(_in_form(job.recipe, form), Path(folder) / form) for form in FORMS}
            choice = _choose(job, artifacts, facts, opener)
        if not choice.failures:  # a form that failed for want of memory, say, may run another time
            _store(path, choice)
    note(f"--form auto: {choice} ({path})")
    return choice.form


def _in_form(recipe: Recipe, form: str) -> Recipe:
    return replace(recipe, export=replace(recipe.export, form=form))


def _facts(job: Job) -> dict[str, Any]:
    """Everything that may change the answer: machine, runtime and model shape, but not the weights."""
    recipe, checkpoint = job.recipe, job.checkpoint
    return {
        "target": recipe.target,
        "backend": recipe.backend,
        "precision": recipe.precision,
        "task": recipe.model.task,
        "export": msgspec.to_builtins(recipe.export),
        "architecture": msgspec.to_builtins(checkpoint.variant.architecture),
        "size": checkpoint.stated.preprocessing.size,
        "machine": machine.identity(),
        "versions": backends.versions(),
    }


def _stored(path: Path, facts: dict[str, Any]) -> Choice | None:
    """The choice in a file, if the file is whole and for the same facts."""
    try:
        if not path.is_file():
            return None
        choice = msgspec.json.decode(path.read_bytes(), type=Choice)
    except (msgspec.DecodeError, UnicodeDecodeError, OSError):
        note(f"{path} cannot be read; the forms are measured again")
        return None
    same = msgspec.json.encode(choice.facts) == msgspec.json.encode(facts)
    return choice if same and choice.form in FORMS else None


def _store(path: Path, choice: Choice) -> None:
    """Store a choice. A cache folder that cannot be written does not stop the build."""
    try:
        write_file(path, msgspec.json.format(msgspec.json.encode(choice)))
    except ExporterError:
        note(f"{path.parent} cannot be written, so the choice is not stored")


def _choose(job: Job, artifacts: Mapping[str, Artifact], facts: dict[str, Any], opener: Opener) -> Choice:
    step(f"--form auto: timing {', '.join(artifacts)}")
    options = latency.BenchOptions(duration=SECONDS)
    listed = list(artifacts.values())
    batch = batches_of(options, listed)[0]
    timing = latency.time_batch(latency.arms_of(listed, options), listed[0], batch, options, opener)
    names = {form: str(artifact.path) for form, artifact in artifacts.items()}
    failures = {form: reason for form, name in names.items() if (reason := _failure(job, timing, name))}
    standing = {form: name for form, name in names.items() if form not in failures}
    if "plain" in failures or not standing:
        failed = failures.get("plain", "failed")
        raise ExporterError(f"--form auto: the form plain, which others are compared with, {failed}")

    def over(form: str, base: str) -> Center:
        return center(latency.speedups(timing, names[form], names[base]))

    own = job.target.form(job.recipe.precision, batch)
    own = own if own in standing else "plain"
    best = max(standing, key=lambda form: over(form, own).value)
    form = best if over(best, own).low > log(LEAST_GAIN) else own  # an equal is not better than the backend's own
    centers = {form: over(form, "plain") for form in standing if form != "plain"}
    gains = {form: (exp(gain.value), exp(gain.low), exp(gain.high)) for form, gain in centers.items()}
    return Choice(form=form, gains=gains, failures=failures, facts=facts)


def _failure(job: Job, timing: Timing, name: str) -> str:
    """Why a form cannot be chosen: it crashed, or its outputs differ from PyTorch's; or ""."""
    if latency.EAGER in timing.failures:
        return f"cannot be compared with eager PyTorch, which {timing.failures[latency.EAGER]}"
    if name in timing.failures:
        return timing.failures[name]
    cosines = [launch.cosine[name] for launch in timing.launches if name in launch.cosine]
    least, measure = job.precision.limits.cosine, "cosine"
    if job.trace.spec.answer == "labels":
        least, measure = job.precision.limits.pixels.agreement_pct / 100, "share of equal pixels"
    if not cosines or not min(cosines) >= least:
        return f"{measure} {min(cosines, default=float('nan')):.6f} to eager, expected {least}"
    return ""
