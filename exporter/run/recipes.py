"""Recipes on a Ray cluster, whose machines share the working folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from exporter import backends
from exporter.artifact import Artifact
from exporter.errors import ExporterError
from exporter.progress import note, step, track
from exporter.run import Outcome, RecipeRun, explained, explaining, finish, keep_verified, spread, tasks
from exporter.run.cluster import (
    Cluster,
    Lost,
    Need,
    connected,
    content_of,
    job_of,
    lost_error,
    need_of,
    others_at,
    reach,
)
from exporter.run.distributed import BUILD_BYTES, weight_bytes
from exporter.run.steps import Steps
from exporter.run.tasks import Job
from exporter.verify.shards import Schedule

T = TypeVar("T")


def run_all(runs: Sequence[RecipeRun], address: str) -> list[Outcome]:
    """Run recipes on a cluster.

    Builds run beside each other, as far as the memory of the machines allows. Then the artifacts are verified in
    shards, and each is timed on a machine on which nothing else of the run takes place.

    Raises: as `connected` and `Cluster.check` do; BadRequest where another process runs one of the recipes on a
        cluster.
    """
    reach(address)
    with ExitStack() as locks:
        for run in runs:
            locks.enter_context(spread.alone(_shards_of(run), run.name))
        cluster = locks.enter_context(connected(address))
        cluster.check(Job(), (), Need())
        outcomes, schedules = _build(cluster, runs)
        _verify(cluster, [run for run in runs if run.name in schedules], schedules, outcomes)
        _finish(cluster, [run for run in runs if not outcomes[run.name].error], outcomes)
        for run in runs:
            if not outcomes[run.name].error:
                shutil.rmtree(_shards_of(run), ignore_errors=True)
    return [outcomes[run.name] for run in runs]


def _shards_of(run: RecipeRun) -> Path:
    return run.folder / "shards"


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
    """One artifact in shards: the job and the need of a shard, the folder that stores them, the numbers of those that
    are missing, and the key of the step before it began."""

    run: RecipeRun
    steps: Steps
    key: str
    artifact: Artifact
    job: Job
    need: Need
    folder: spread.Folder
    missing: set[int]
    outcome: Outcome


def _verify(
    cluster: Cluster, runs: Sequence[RecipeRun], schedules: dict[str, Schedule], outcomes: dict[str, Outcome]
) -> None:
    """Verify all artifacts that are not verified yet, and write the results to the outcomes."""
    waiting: list[_Verification] = []
    for run in runs:
        with explaining(outcomes[run.name]):
            one = _opened(run, schedules[run.name], others_at(cluster.address), outcomes[run.name])
            waiting += [] if one is None else [one]
    for need in dict.fromkeys(one.need for one in waiting):
        _measure(cluster, [one for one in waiting if one.need == need], need)


def _opened(run: RecipeRun, schedule: Schedule, address: str, outcome: Outcome) -> _Verification | None:
    """A verification; None if it is done already."""
    artifact, options = outcome.artifact, schedule.options
    assert artifact is not None
    steps = Steps(run.recipe, run.out, run.folder, cluster=address)
    if steps.part("verify", artifact) is not None:
        note(f"{run.name}: verified already, on the same images")
        outcome.steps["verify"] = "already there"
        return None
    folder = spread.create_own(_shards_of(run), schedule)
    need = need_of(artifact, options.device, options.threads)
    job, key = job_of(artifact, schedule), steps.key("verify", artifact)
    return _Verification(run, steps, key, artifact, job, need, folder, set(folder.missing()), outcome)


def _measure(cluster: Cluster, verifications: Sequence[_Verification], need: Need) -> None:
    """Measure the missing shards of several artifacts, and merge those of each artifact when it has all."""
    total = sum(len(one.missing) for one in verifications)
    step(f"verifying {len(verifications)} artifacts in {total} shards")
    for one in verifications:
        _merge_whole(one)
    results = cluster.results_of_several([(one.job, sorted(one.missing)) for one in verifications], need)
    for index, number, result in track(results, total, "shards", lambda _: 1):
        one = verifications[index]
        with explaining(one.outcome):
            if isinstance(result, Lost):
                raise lost_error(f"shard {number}", result.reason)
            one.folder.store(number, content_of(result))
            one.missing.remove(number)
        _merge_whole(one)


def _merge_whole(one: _Verification) -> None:
    """Store the report of an artifact if no shard of it is missing."""
    if one.missing:
        return
    with explaining(one.outcome):
        keep_verified(one.steps, one.artifact, one.key, spread.merged_own(one.folder, one.artifact))
        one.outcome.steps["verify"] = "done"


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
    cluster: Cluster, function: Callable[[Job, RecipeRun], T], runs: Sequence[RecipeRun], needs: Sequence[Need]
) -> Iterator[tuple[RecipeRun, T | Outcome]]:
    """Each recipe with the result of a function, or an outcome with the error if its worker is lost."""
    calls = [(need, (Job(), run)) for run, need in zip(runs, needs, strict=True)]
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
