"""Recipes run: built, verified, timed and reported, each step only if something it depends on has changed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from exporter import backends, recipe_file, report
from exporter.artifact import Artifact, read_sidecar
from exporter.artifact.disk import locked, write_file
from exporter.bench import Opener, latency, worker
from exporter.build import int8, pipeline
from exporter.errors import BadRequest, ExporterError, some
from exporter.progress import note, step
from exporter.recipe import EIGHT_BITS
from exporter.recipe_file import RecipeFile
from exporter.report import Finding, Report, judged, rendering
from exporter.run.steps import STEPS, Part, Steps

LIMITS = {"min_speedup": ("speedup", "high"), "max_p50_ms": ("p50_ms", "low")}


@dataclass(frozen=True)
class Job:
    """One recipe to run, under a name that no other of the run has."""

    path: Path
    recipe: RecipeFile
    out: Path

    @property
    def name(self) -> str:
        """`onnxruntime/tiny_int8`."""
        return f"{self.recipe.backend}/{self.path.stem}"

    @property
    def folder(self) -> Path:
        """Where what each step gave is kept."""
        return self.out / "runs" / self.name.replace("/", "_")


@dataclass
class Outcome:
    """What came of a recipe: each step and whether it was done, there already, or why not."""

    name: str
    steps: dict[str, str] = field(default_factory=dict)
    artifact: Artifact | None = None
    report: Report | None = None
    path: Path | None = None
    error: str = ""
    exit_code: int = 0


def jobs_of(paths: Sequence[Path], out: Path, overrides: Sequence[str] = ()) -> list[Job]:
    """The recipes of files, all of them read and checked before any work starts.

    Raises: BadRequest with the problems of every file; for recipes that would write the same artifact.
    """
    jobs, problems = [], []
    for path in paths:
        try:
            jobs.append(Job(path, recipe_file.read(path, overrides), out))
        except BadRequest as error:
            problems.append(str(error))
    if problems:
        raise BadRequest("\n       ".join(problems))
    for told in (_targets(jobs), {job.path: f"runs/{job.name}" for job in jobs}):
        for what, times in Counter(told.values()).items():
            if times > 1:
                same = [str(path) for path, other in told.items() if other == what]
                raise BadRequest(f"{some(same)} would all write {what}; run them apart, each with its own -o")
    if len({job.path.resolve() for job in jobs}) < len(paths):
        raise BadRequest("the same recipe is named twice")
    return jobs


def _targets(jobs: Sequence[Job]) -> dict[Path, str]:
    """What each recipe writes, as far as its words tell."""
    told = {}
    for job in jobs:
        model = job.recipe.model
        what = model.variant or f"the model of {model.weights}"
        told[job.path] = f"{what} {model.task} in {job.recipe.precision} for {job.recipe.backend}"
    return told


def plan(job: Job) -> dict[str, str]:
    """Every step of a recipe and whether its result is there already; nothing is built."""
    steps = Steps(job.recipe, job.out, job.folder)
    made = steps.artifact()
    return {name: _plan(steps, name, made) for name in STEPS}


def _plan(steps: Steps, name: str, made: Artifact | None) -> str:
    if name == "bench" and (why := not_timed(steps.recipe)):
        return why
    return "already there" if steps.part(name, made) is not None else "to do"


def not_timed(recipe: RecipeFile) -> str:
    """Why a recipe is not timed here, or ""."""
    if recipe.bench is None:
        return "not asked for"
    why = backends.get(recipe.backend).unable()
    return f"not timed: {why}" if why else ""


def run(job: Job, opener: Opener = worker.open_arm) -> Outcome:
    """All steps of a recipe; those whose inputs have not changed are skipped.

    Two runs of one recipe in one folder take turns.

    Raises: ExporterError, with what was finished kept, so that the next run goes on there.
    """
    outcome = Outcome(job.name)
    with _alone(job):
        steps = Steps(job.recipe, job.out, job.folder)
        made = _build(job, steps, outcome)
        _verify(job, steps, made, outcome)
        _bench(job, steps, made, outcome, opener)
        made = Artifact(made.path, read_sidecar(made.path))  # with its quality as it was verified
        outcome.artifact, outcome.path = made, made.path.with_name(f"{made.path.name}.report.json")
        outcome.report = _whole(job.recipe, steps, made)
        encoded = report.encode(outcome.report)
        if not outcome.path.is_file() or outcome.path.read_bytes() != encoded:
            write_file(outcome.path, encoded)
    outcome.exit_code = 0 if outcome.report.passed else 5
    return outcome


@contextmanager
def _alone(job: Job) -> Iterator[None]:
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadRequest(f"{job.out}: cannot be written ({error.strerror}); choose another folder with -o") from None
    with locked(job.folder):
        yield


def _build(job: Job, steps: Steps, outcome: Outcome) -> Artifact:
    made = steps.artifact()
    if made is not None:
        note(f"{job.name}: {made.path.name} is already there, from the same weights, images and options")
        outcome.steps["build"] = "already there"
        return made
    key = steps.key("build")
    recipe, found = job.recipe.recipe(), None
    if recipe.precision in EIGHT_BITS:
        made, found = int8.build(recipe, job.out, job.recipe.budget())
    else:
        made = pipeline.build(recipe, job.out)
        found = _static(made)
    # Weights that were not in the Hub's cache before are now.
    steps.keep(
        "build", Part(key=key or steps.key("build"), file=made.path.name, sha256=made.sidecar.sha256, report=found)
    )
    outcome.steps["build"] = "done"
    return made


def _static(made: Artifact) -> Report | None:
    """What is known of an artifact without running it."""
    findings = backends.get(made.sidecar.backend).findings(made, None)
    if not findings:
        return None
    return Report(
        passed=all(finding.passed for finding in findings), recipe=made.sidecar.recipe, artifact=made.to_dict(),
        environment={}, findings=tuple(findings),
    )  # fmt: skip


def _verify(job: Job, steps: Steps, made: Artifact, outcome: Outcome) -> None:
    if steps.part("verify", made) is not None:
        note(f"{job.name}: verified already, on the same images")
        outcome.steps["verify"] = "already there"
        return
    key = steps.key("verify", made)
    found = pipeline.verify(made, job.recipe.verify_options())
    pipeline.record_quality(made, found)
    steps.keep("verify", Part(key=key, file=made.path.name, sha256=made.sidecar.sha256, report=found))
    outcome.steps["verify"] = "done"


def _bench(job: Job, steps: Steps, made: Artifact, outcome: Outcome, opener: Opener) -> None:
    options = job.recipe.bench_options()
    if options is None or (why := not_timed(job.recipe)):
        outcome.steps["bench"] = "not asked for" if options is None else why
        return
    if steps.part("bench", made) is not None:
        note(f"{job.name}: timed already, on this machine")
        outcome.steps["bench"] = "already there"
        return
    key = steps.key("bench", made)
    (found,) = latency.bench([made], options, opener)
    steps.keep("bench", Part(key=key, file=made.path.name, sha256=made.sidecar.sha256, report=found))
    outcome.steps["bench"] = "done"


def _whole(recipe: RecipeFile, steps: Steps, made: Artifact) -> Report:
    """What all the steps found, with the limits of the recipe's own."""
    kept = [steps.part(name, made) for name in STEPS]
    parts = [part.report for part in kept if part is not None and part.report is not None]
    findings: dict[str, list[Finding]] = {}
    for part in parts:
        for check in dict.fromkeys(finding.check for finding in part.findings):
            findings[check] = [finding for finding in part.findings if finding.check == check]
    findings["build"] = _reproducible(made)
    whole = tuple(_limited(finding, recipe) for found in findings.values() for finding in found)
    return Report(
        passed=all(finding.passed for finding in whole),
        recipe={key: value for part in parts for key, value in part.recipe.items()},
        artifact=made.to_dict(),
        environment={key: value for part in parts for key, value in part.environment.items()},
        findings=whole,
    )


def _reproducible(made: Artifact) -> list[Finding]:
    """Said of an artifact that another build would not give byte for byte."""
    if backends.get(made.sidecar.backend).reproducible:
        return []
    detail = (
        f"{made.sidecar.backend} chooses anew at each build, so the file may differ; what it was built from does not "
        f"(sha256 {', '.join(parent[:12] for parent in made.sidecar.parents)})"
    )
    return [Finding(check="build", metric="reproducible", value=0, detail=detail)]


def _limited(finding: Finding, recipe: RecipeFile) -> Finding:
    for word, (metric, better) in LIMITS.items():
        limit = getattr(recipe.bench, word, None)
        if limit is not None and finding.check == "latency" and finding.metric == metric:
            return judged(finding, limit, better)  # type: ignore[arg-type]
    return finding


def run_all(jobs: Sequence[Job], opener: Opener = worker.open_arm) -> list[Outcome]:
    """Every recipe in turn; one that cannot be run is told of, and the others go on."""
    outcomes = []
    for index, job in enumerate(jobs, 1):
        if len(jobs) > 1:
            step(f"{job.name} ({index} of {len(jobs)})")
        outcomes.append(run_or_tell(job, opener))
    return outcomes


def run_or_tell(job: Job, opener: Opener = worker.open_arm) -> Outcome:
    """A recipe run; why it could not be is its outcome."""
    try:
        return run(job, opener)
    except ExporterError as error:
        return Outcome(job.name, error=str(error), exit_code=error.exit_code)


def report_page(outcomes: Sequence[Outcome], out: Path) -> Path | None:
    """One page for the lot, if there is anything to show."""
    paths = [outcome.path for outcome in outcomes if outcome.path is not None]
    if not paths:
        return None
    text, _ = rendering.rendered(paths, "html")
    page = out / "report.html"
    write_file(page, text.encode())
    return page


def to_dict(outcome: Outcome) -> dict[str, object]:
    """An outcome, as `--json` prints it."""
    return {
        "recipe": outcome.name,
        "steps": outcome.steps,
        "artifact": outcome.artifact and outcome.artifact.to_dict(),
        "report": outcome.report and msgspec.to_builtins(outcome.report),
        "report_path": outcome.path and os.fspath(outcome.path),
        "error": outcome.error or None,
    }
