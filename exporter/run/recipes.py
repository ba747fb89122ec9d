"""Recipes on a Ray cluster, whose machines share the working folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from exporter import backends
from exporter.artifact import Artifact
from exporter.errors import ExporterError
from exporter.progress import note, step, track
from exporter.run import Outcome, RecipeRun, explained, finish, keep_verified, spread, tasks
from exporter.run.cluster import LOCAL, Cluster, Lost, Need, connected, content_of, job_of, lost_error, need_of
from exporter.run.distributed import BUILD_BYTES, weight_bytes
from exporter.run.steps import Steps
from exporter.run.tasks import Job
from exporter.verify.shards import Schedule

T = TypeVar("T")


def run_all(runs: Sequence[RecipeRun], address: str) -> list[Outcome]:
    """Run recipes on a cluster.

    Builds run beside each other, as far as the memory of the machines allows. Then the artifacts are verified in
    shards, and each is timed on a machine on which nothing else of the run takes place.

    Raises: as `connected` and `Cluster.check` do.
    """
    with connected(address) as cluster:
        cluster.check(Job(), (), Need())
        outcomes, schedules = _build(cluster, runs)
        _verify(cluster, [run for run in runs if run.name in schedules], schedules, outcomes)
        _finish(cluster, [run for run in runs if not outcomes[run.name].error], outcomes)
    return [outcomes[run.name] for run in runs]


def _build(cluster: Cluster, runs: Sequence[RecipeRun]) -> tuple[dict[str, Outcome], dict[str, Schedule]]:
    """The outcomes of all builds, and the schedules of the verifications of those without errors, by name."""
    step(f"building {len(runs)} recipes")
    alone, gpus = _alone(cluster)
    outcomes, schedules = dict[str, Outcome](), dict[str, Schedule]()
    needs = [_need_of_build(run, alone, gpus) for run in runs]
    for run, result in _calls(cluster, tasks.build, runs, needs):
        outcomes[run.name], schedule = (result, None) if isinstance(result, Outcome) else result
        if schedule is not None:
            schedules[run.name] = schedule
    return outcomes, schedules


@dataclass(frozen=True)
class _Verification:
    """One artifact in shards: the folder that stores them, and the key of the step before it began."""

    run: RecipeRun
    steps: Steps
    key: str
    artifact: Artifact
    folder: spread.Folder
    outcome: Outcome

    @property
    def need(self) -> Need:
        """What each shard needs."""
        options = self.folder.schedule.options
        return need_of(self.artifact, options.device, options.threads)


def _verify(
    cluster: Cluster, runs: Sequence[RecipeRun], schedules: dict[str, Schedule], outcomes: dict[str, Outcome]
) -> None:
    """Verify all artifacts that are not verified yet, and write the results to the outcomes."""
    with ExitStack() as locks:
        waiting: list[_Verification] = []
        for run in runs:
            with _explained(outcomes[run.name]):
                one = _opened(run, schedules[run.name], cluster, outcomes[run.name], locks)
                waiting += [] if one is None else [one]
        needs = dict.fromkeys(one.need for one in waiting)
        for need in needs:
            _measure(cluster, [one for one in waiting if one.need == need], need)


def _opened(
    run: RecipeRun, schedule: Schedule, cluster: Cluster, outcome: Outcome, locks: ExitStack
) -> _Verification | None:
    """A verification, with its folder locked; None if it is done already."""
    artifact, path = outcome.artifact, run.folder / "shards"
    assert artifact is not None
    address = "" if cluster.address == LOCAL else cluster.address
    steps = Steps(run.recipe, run.out, run.folder, cluster=address)
    if steps.part("verify", artifact) is not None:
        note(f"{run.name}: verified already, on the same images")
        outcome.steps["verify"] = "already there"
        return None
    key = steps.key("verify", artifact)
    locks.enter_context(spread.alone(path, artifact.path.name))
    return _Verification(run, steps, key, artifact, spread.create(path, schedule, replace=True), outcome)


def _measure(cluster: Cluster, verifications: Sequence[_Verification], need: Need) -> None:
    """Measure the missing shards of several artifacts, and merge those of each artifact when it has all."""
    jobs, left = [], dict[int, int]()
    for index, one in enumerate(verifications):
        missing = one.folder.missing()
        jobs.append((job_of(one.artifact, one.folder.schedule), missing))
        left[index] = len(missing)
        if not missing:
            _merge(one)
    step(f"verifying {len(verifications)} artifacts in {sum(left.values())} shards")
    results = cluster.results_of_several(jobs, need)
    for index, number, result in track(results, sum(left.values()), "shards", lambda _: 1):
        one = verifications[index]
        with _explained(one.outcome):
            if isinstance(result, Lost):
                raise lost_error(f"shard {number}", result.reason)
            one.folder.store(number, content_of(result))
            left[index] -= 1
            if not left[index]:
                _merge(one)


def _merge(one: _Verification) -> None:
    """Store the report of all shards of an artifact, and remove the shards."""
    with _explained(one.outcome):
        keep_verified(one.steps, one.artifact, one.key, one.folder.merged(one.artifact))
        one.outcome.steps["verify"] = "done"
        shutil.rmtree(one.folder.path, ignore_errors=True)


@contextmanager
def _explained(outcome: Outcome) -> Iterator[None]:
    """Within, the first error of this tool becomes that of the outcome, and the other recipes go on."""
    try:
        yield
    except ExporterError as error:
        if not outcome.error:
            outcome.error, outcome.exit_code = str(error), error.exit_code


def _finish(cluster: Cluster, runs: Sequence[RecipeRun], outcomes: dict[str, Outcome]) -> None:
    """Time the artifacts that recipes want timed, and write all reports."""
    alone, gpus = _alone(cluster)
    timed = [run for run in runs if run.recipe.bench is not None]
    if timed:
        step(f"timing {len(timed)} artifacts, each alone on a machine")
    finished = list(_calls(cluster, tasks.finish, timed, [replace(alone, gpus=_gpus(run, gpus)) for run in timed]))
    finished += [(run, explained(run, partial(finish, run))) for run in runs if run.recipe.bench is None]
    for run, outcome in finished:
        outcome.steps = outcomes[run.name].steps | outcome.steps
        outcomes[run.name] = outcome


def _calls(
    cluster: Cluster, function: Callable[[Path, RecipeRun], T], runs: Sequence[RecipeRun], needs: Sequence[Need]
) -> Iterator[tuple[RecipeRun, T | Outcome]]:
    """Each recipe with the result of a function, or an outcome with the error if its worker is lost."""
    folder = Path(os.getcwd())  # noqa: PTH109  (as the user sees it)
    calls = [(need, (folder, run)) for run, need in zip(runs, needs, strict=True)]
    results = track(cluster.calls(function, calls), len(runs), "recipes", lambda _: 1)
    for run, result in zip(runs, results, strict=True):
        if isinstance(result, ExporterError):
            yield run, Outcome(run.name, error=str(result), exit_code=result.exit_code)
        else:
            yield run, result


def _alone(cluster: Cluster) -> tuple[Need, int]:
    """The need of a task that gets a machine for itself, and 1 if any machine has a GPU."""
    machines = [resources for _, _, resources in cluster.nodes()]
    alone = Need(cpus=max(resources.get("CPU", 1) for resources in machines))
    return alone, int(any(resources.get("GPU") for resources in machines))


def _need_of_build(run: RecipeRun, alone: Need, gpus: int) -> Need:
    """Builds in int8 time their artifact, and get a machine for themselves."""
    need = Need() if run.recipe.quantization is None else alone
    memory = BUILD_BYTES + 4 * weight_bytes(run.recipe.model)
    return replace(need, gpus=_gpus(run, gpus), memory=memory)


def _gpus(run: RecipeRun, gpus: int) -> int:
    """One GPU for a runtime that uses none but GPUs, if the cluster has any."""
    kinds = set(backends.runtime(run.recipe.backend).devices.values())
    return min(gpus, int(kinds == {"NVIDIA GPU"}))
