"""Execution of recipes: each is built, verified, timed and reported; steps whose inputs are unchanged are skipped."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from exporter import backends, build, report, verify
from exporter.artifact import Artifact, forced, read_sidecar
from exporter.artifact.disk import locked, write_file
from exporter.bench import latency, limits
from exporter.build.int8.search import JUDGED
from exporter.errors import BadRequest, ExporterError, Unavailable, file_error, some
from exporter.model import variants, weights
from exporter.model.sources import is_random
from exporter.progress import note, step
from exporter.recipe import Bench, Model, Recipe
from exporter.report import Finding, Report, rendering
from exporter.run.steps import STEPS, Part, Steps, bench_options, verify_options


@dataclass(frozen=True)
class RecipeRun:
    """One recipe to run, under a name that is unique in this run. `force` replaces artifacts of other weights."""

    path: Path
    recipe: Recipe
    out: Path
    force: bool = False

    @property
    def name(self) -> str:
        """`onnxruntime/tiny_int8`."""
        return f"{self.recipe.backend}/{self.path.stem}"

    @property
    def folder(self) -> Path:
        """The folder for the results of its steps."""
        return self.out / "runs" / self.name.replace("/", "_")


@dataclass
class Outcome:
    """The result of a recipe. `steps` says for each step whether it was done, present, or why it was left out."""

    name: str
    steps: dict[str, str] = field(default_factory=dict)
    artifact: Artifact | None = None
    report: Report | None = None
    path: Path | None = None
    error: str = ""
    exit_code: int = 0


def read_all(paths: Sequence[Path], out: Path, overrides: Sequence[str] = (), force: bool = False) -> list[RecipeRun]:
    """Read and check recipes before any work starts.

    Raises: BadRequest with the problems of every file; for recipes that would write the same artifact.
    """
    runs: list[RecipeRun] = []
    problems: list[str] = []
    for path in paths:
        try:
            runs.append(RecipeRun(path, build.read(path, overrides), out, force))
        except BadRequest as error:
            problems.extend(error.args)
    if problems:
        raise BadRequest(*problems)
    _refuse_clashes(runs)
    if len({run.path.resolve() for run in runs}) < len(paths):
        raise BadRequest("the same recipe is named twice")
    return runs


_APART = "run them apart, each with its own -o"


def _refuse_clashes(runs: Sequence[RecipeRun]) -> None:
    """Refuse recipes that would write the same file. Weights are read where only they say which network it is.

    Raises: BadRequest.
    """
    backends_of_several = {name for name, times in Counter(run.recipe.backend for run in runs).items() if times > 1}
    several = [run for run in runs if run.recipe.backend in backends_of_several]
    names = {model: _network(model) for model in {run.recipe.model for run in several}}
    networks = {run.path: f"{names[run.recipe.model]} for {run.recipe.backend}" for run in several}
    artifacts = {run.path: f"{networks[run.path]}, in {run.recipe.precision}" for run in several}
    for targets in (artifacts, {run.path: f"runs/{run.name}" for run in runs}):
        for target, times in Counter(targets.values()).items():
            if times > 1:
                same = [str(path) for path, other in targets.items() if other == target]
                raise BadRequest(f"{some(same)} would all write {target}; {_APART}")
    # Of these the graph's file has no form in its name; a quantized artifact keeps no fp32 graph there.
    named_alike = [run for run in several if run.recipe.backend == backends.ONNX and run.recipe.quantization is None]
    checks = (
        (several, _graph, "their weights, export or preprocessing differ"),
        (named_alike, _form, "their forms differ, or may differ with `form: auto`"),
    )
    for compared, of, reason in checks:
        first: dict[str, RecipeRun] = {}
        for run in compared:
            other = first.setdefault(networks[run.path], run)
            if of(run.recipe) != of(other.recipe):
                raise BadRequest(
                    f"{other.path} and {run.path} would write different graphs of {networks[run.path]} to one file: "
                    f"{reason}; {_APART}"
                )


def _graph(recipe: Recipe) -> tuple[object, ...]:
    """What determines the fp32 graph that every precision of a network is built from."""
    weights_path = Path(recipe.model.weights)
    model = msgspec.structs.replace(recipe.model, weights=str(weights_path.resolve()))
    return model, msgspec.structs.replace(recipe.export, form=None, keep=None), recipe.preprocessing


def _form(recipe: Recipe) -> str:
    """How the network of a recipe without quantization is written; `auto` may choose another form in each precision."""
    if recipe.export.form == "auto":
        return f"auto, {recipe.precision}"
    return recipe.export.form or backends.target(recipe.backend).form(recipe.precision, recipe.fixed_batch)


def _network(model: Model) -> str:
    """The variant and the task of a model; for weights that cannot be read, the names in the recipe."""
    if model.weights == "hub" or is_random(model.weights):
        return f"{variants.resolve(model.variant or 'tiny')[0].name}, task {model.task or 'classify'}"
    with suppress(ExporterError):  # errors of reading are reported when this recipe runs
        if weights.fingerprint(model.weights) is not None:
            choices = weights.choices_of(msgspec.to_builtins(model))
            checkpoint = weights.load(model.weights, model.variant, choices=choices)
            return f"{checkpoint.variant.name}, task {model.task or checkpoint.task}"
    return f"{model.variant or f'the model of {model.weights}'}, task {model.task or 'of the weights'}"


def plan(recipe_run: RecipeRun, cluster: str = "") -> dict[str, str]:
    """Each step of a recipe, and whether its result is present; nothing is built.

    Args:
        recipe_run: the recipe.
        cluster: as in `Steps`. Whether it is timed already is answered for this machine.
    """
    steps = Steps(recipe_run.recipe, recipe_run.out, recipe_run.folder, cluster=cluster)
    artifact = steps.artifact()
    return {name: _plan(steps, name, artifact) for name in STEPS}


def _plan(steps: Steps, name: str, artifact: Artifact | None) -> str:
    if name == "bench" and (why := not_timed(steps.recipe)):
        return why
    return "already there" if steps.part(name, artifact) is not None else "to do"


def not_timed(recipe: Recipe) -> str:
    """Why a recipe is not timed here, or ""."""
    if recipe.bench is None:
        return "not asked for"
    why = backends.runtime(recipe.backend).unable()
    return f"not timed: {why}" if why else ""


def run(recipe_run: RecipeRun) -> Outcome:
    """Run the steps of a recipe; steps whose inputs are unchanged are skipped.

    Two runs of one recipe in one folder take turns.

    Raises: ExporterError, with what was finished kept, so that the next run goes on there.
    """
    outcome = Outcome(recipe_run.name)
    with _alone(recipe_run):
        steps = Steps(recipe_run.recipe, recipe_run.out, recipe_run.folder)
        artifact = _build(recipe_run, steps, outcome)
        _verify(recipe_run, steps, artifact, outcome)
        _bench(recipe_run, steps, artifact, outcome)
        _write_report(recipe_run, steps, artifact, outcome)
    return outcome


def build_only(recipe_run: RecipeRun) -> Outcome:
    """Build the artifact of a recipe, unless its inputs are unchanged.

    Raises: as `run` does.
    """
    outcome = Outcome(recipe_run.name)
    with _alone(recipe_run):
        outcome.artifact = _build(recipe_run, Steps(recipe_run.recipe, recipe_run.out, recipe_run.folder), outcome)
    return outcome


def bench_and_report(recipe_run: RecipeRun) -> Outcome:
    """Time the artifact of a recipe that other processes of the same run built and verified, and write the report.

    Raises: as `run` does; BadRequest where the artifact is gone.
    """
    outcome = Outcome(recipe_run.name)
    with _alone(recipe_run):
        steps = Steps(recipe_run.recipe, recipe_run.out, recipe_run.folder, done=("build", "verify"))
        artifact = steps.artifact()
        if artifact is None:
            raise BadRequest(
                f"{recipe_run.out}: the artifact was removed or replaced after its build; run the same command again"
            )
        _bench(recipe_run, steps, artifact, outcome)
        _write_report(recipe_run, steps, artifact, outcome)
    return outcome


def _write_report(recipe_run: RecipeRun, steps: Steps, artifact: Artifact, outcome: Outcome) -> None:
    artifact = Artifact(artifact.path, read_sidecar(artifact.path))  # with its quality as it was verified
    outcome.artifact, outcome.path = artifact, artifact.path.with_name(f"{artifact.path.name}.report.json")
    outcome.report = _merged(recipe_run.recipe, steps, artifact)
    encoded = report.encode(outcome.report)
    if not outcome.path.is_file() or outcome.path.read_bytes() != encoded:
        write_file(outcome.path, encoded)
    outcome.exit_code = 0 if outcome.report.passed else 5


@contextmanager
def _alone(recipe_run: RecipeRun) -> Iterator[None]:
    if not recipe_run.folder.is_dir():  # weights and images that are missing are refused before anything is written
        build.check_sources(recipe_run.recipe)
    try:
        recipe_run.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadRequest(
            f"{recipe_run.out}: cannot be written ({error.strerror}); choose another folder with -o"
        ) from None
    with locked(recipe_run.folder):
        yield


def _build(recipe_run: RecipeRun, steps: Steps, outcome: Outcome) -> Artifact:
    artifact = steps.artifact()
    if artifact is not None:
        note(f"{recipe_run.name}: {artifact.path.name} is already there, from the same weights, images and options")
        outcome.steps["build"] = "already there"
        return artifact
    key = steps.key("build")
    with forced(recipe_run.force):
        built = build.build(recipe_run.recipe, recipe_run.out)
    key = key or steps.key("build")  # weights that were not in the Hub's cache are there now
    file, sha256 = built.artifact.path.name, built.artifact.sidecar.sha256
    steps.keep("build", Part(key=key, file=file, sha256=sha256, report=built.report))
    outcome.steps["build"] = "done"
    return built.artifact


def _verify(recipe_run: RecipeRun, steps: Steps, artifact: Artifact, outcome: Outcome) -> None:
    if steps.part("verify", artifact) is not None:
        note(f"{recipe_run.name}: verified already, on the same images")
        outcome.steps["verify"] = "already there"
        return
    key = steps.key("verify", artifact)
    verified = verify.verify(artifact, verify_options(recipe_run.recipe))
    keep_verified(steps, artifact, key, verified)
    outcome.steps["verify"] = "done"


def keep_verified(steps: Steps, artifact: Artifact, key: str, verified: Report) -> None:
    """Store the report of a verification, and the quality of the artifact beside it.

    Args:
        steps: of the recipe.
        artifact: what was verified.
        key: of the step, from before it was done, so that images that change meanwhile are noticed.
        verified: the report.
    """
    verify.record_quality(artifact, verified)
    steps.keep("verify", Part(key=key, file=artifact.path.name, sha256=artifact.sidecar.sha256, report=verified))


def _bench(recipe_run: RecipeRun, steps: Steps, artifact: Artifact, outcome: Outcome) -> None:
    options = bench_options(recipe_run.recipe)
    if options is None or (why := not_timed(recipe_run.recipe)):
        outcome.steps["bench"] = "not asked for" if options is None else why
        return
    if steps.part("bench", artifact) is not None:
        note(f"{recipe_run.name}: timed already, on this machine")
        outcome.steps["bench"] = "already there"
        return
    key = steps.key("bench", artifact)
    (timed,) = latency.bench([artifact], options)
    steps.keep("bench", Part(key=key, file=artifact.path.name, sha256=artifact.sidecar.sha256, report=timed))
    outcome.steps["bench"] = "done"


def _merged(recipe: Recipe, steps: Steps, artifact: Artifact) -> Report:
    """The reports of all steps as one, judged by the recipe's limits."""
    kept = {name: steps.part(name, artifact) for name in STEPS}
    reports = {name: part.report for name, part in kept.items() if part is not None and part.report is not None}
    findings: dict[str, list[Finding]] = {}
    failed: list[Finding] = []
    if {"build", "verify"} <= reports.keys():
        built = reports["build"]
        reports["build"] = _without_search(built)
        failed = _failed_in_search(built, reports["verify"])
    parts = list(reports.values())
    for part in parts:
        for check in dict.fromkeys(finding.check for finding in part.findings):
            findings[check] = [finding for finding in part.findings if finding.check == check]
    findings |= {"search": failed, "build": _reproducible(artifact)}
    if recipe.bench is not None and (why := not_timed(recipe)):
        findings["latency"] = limits.without_timing(recipe.bench, why)
    merged = Report(
        passed=True,
        recipe={key: value for part in parts for key, value in part.recipe.items()},
        artifact=artifact.to_dict(),
        environment={key: value for part in parts for key, value in part.environment.items()},
        findings=tuple(finding for listed in findings.values() for finding in listed),
        pictures=tuple(picture for part in parts for picture in part.pictures),
        differences=next((part.differences for part in reversed(parts) if part.differences is not None), None),
    )
    return limits.with_limits(merged, recipe.bench or Bench())


def _without_search(built: Report) -> Report:
    """The report of a build without what the search of int8 measured on images: `verify` measures it again, perhaps on
    other images."""
    findings = tuple(finding for finding in built.findings if finding.check not in JUDGED)
    return msgspec.structs.replace(built, findings=findings, pictures=(), differences=None)


def _failed_in_search(built: Report, verified: Report) -> list[Finding]:
    """What failed in the search of int8 and not in the verification, whose images may be others."""
    failed = {finding.metric for finding in verified.findings if not finding.passed}
    others = [one for one in built.findings if one.check in JUDGED and not one.passed and one.metric not in failed]
    return [msgspec.structs.replace(one, detail=f"the images of the search of int8; {one.detail}") for one in others]


def _reproducible(artifact: Artifact) -> list[Finding]:
    """A finding for an artifact whose build is not reproducible byte for byte."""
    if backends.target(artifact.sidecar.backend).reproducible:
        return []
    detail = (
        f"{artifact.sidecar.backend} chooses kernels at each build, so the file may differ; its graph does not (sha256 "
        f"{', '.join(parent[:12] for parent in artifact.sidecar.parents)})"
    )
    return [Finding(check="build", metric="reproducible", value=0, detail=detail)]


def run_all(runs: Sequence[RecipeRun]) -> list[Outcome]:
    """Run recipes in turn. Where one cannot be run, its outcome says why, and the others go on."""
    outcomes = []
    for index, recipe_run in enumerate(runs, 1):
        if len(runs) > 1:
            step(f"{recipe_run.name} ({index} of {len(runs)})")
        outcomes.append(run_or_explain(recipe_run))
    return outcomes


def run_or_explain(recipe_run: RecipeRun) -> Outcome:
    """Run a recipe. Where it cannot be run, its outcome says why."""
    failed = Outcome(recipe_run.name)
    with recording_error(failed):
        return run(recipe_run)
    return failed


@contextmanager
def recording_error(outcome: Outcome) -> Iterator[None]:
    """Store the first error that a user can fix in the outcome in place of raising it, so that other recipes go on."""
    try:
        yield
    except (ExporterError, OSError, MemoryError) as raised:
        error = file_error(raised) if isinstance(raised, OSError) else raised
        if isinstance(error, MemoryError):
            error = Unavailable("the memory of this machine has run out; use fewer --jobs, or a smaller batch")
        if error is None:
            raise
        if not outcome.error:
            outcome.error, outcome.exit_code = str(error), error.exit_code


def report_page(outcomes: Sequence[Outcome], out: Path) -> Path | None:
    """Write one page for all reports, if there are any."""
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
