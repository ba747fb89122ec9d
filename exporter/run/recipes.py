"""Recipes on a Ray cluster, whose machines share the working folder."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from exporter import backends
from exporter.artifact import Artifact
from exporter.errors import ExporterError
from exporter.progress import note, step, track
from exporter.run import Outcome, RecipeRun, keep_verified, recording_error, spread, tasks
from exporter.run.cluster import Cluster, LostTask, connected, content_of, job_of, lost_error, reach
from exporter.run.distributed import BUILD_BYTES, weight_bytes
from exporter.run.needs import Need, need_of
from exporter.run.steps import Steps
from exporter.run.tasks import Job
from exporter.verify.shards import Schedule

T = TypeVar("T")
ALONE = Need(cpus=math.inf)  # lowered to the cores of one machine


def run_all(runs: Sequence[RecipeRun], address: str) -> list[Outcome]:
    """Run recipes on a cluster: the builds of all, then the verifications in shards, then the timings.

    Builds run beside each other, as far as the memory of the machines allows. Each artifact is timed on a machine on
    which nothing else of the run takes place.

    Raises: as `connected` and `Cluster.check` do; BadRequest where another process runs one of the recipes on a
        cluster.
    """
    reach(address)  # before any folder is made
    with ExitStack() as opened:
        for run in runs:
            opened.enter_context(spread.alone(_shards_of(run), run.name))
        cluster = opened.enter_context(connected(address))
        cluster.check(Job(), (), Need())
        outcomes, schedules = _build(cluster, runs)
        _verify(cluster, [run for run in runs if run.name in schedules], schedules, outcomes)
        _bench(cluster, [run for run in runs if not outcomes[run.name].error], outcomes)
        for run in runs:
            if not outcomes[run.name].error:
                shutil.rmtree(_shards_of(run), ignore_errors=True)
    return [outcomes[run.name] for run in runs]


def _shards_of(run: RecipeRun) -> Path:
    return run.folder / "shards"


def _build(cluster: Cluster, runs: Sequence[RecipeRun]) -> tuple[dict[str, Outcome], dict[str, Schedule]]:
    """The outcomes of all builds, and the schedules of the verifications of those without errors, by name."""
    step(f"building {len(runs)} recipes")
    outcomes, schedules = dict[str, Outcome](), dict[str, Schedule]()
    for run, result in _calls(cluster, tasks.build, runs, [_need_of_build(run) for run in runs], "build"):
        outcomes[run.name], schedule = (result, None) if isinstance(result, Outcome) else result
        note(f"{run.name}: build {outcomes[run.name].steps.get('build', 'failed')}")
        if schedule is not None:
            schedules[run.name] = schedule
    return outcomes, schedules


@dataclass(frozen=True)
class _Verification:
    """The verification of one artifact: its steps, the key of this step before it began, the job of the shards and what
    each needs, the folder that stores them, and the numbers of those that are still missing."""

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
    pending: list[_Verification] = []
    problems: dict[tuple[object, ...], ExporterError | None] = {}
    for run in runs:
        with recording_error(outcomes[run.name]):
            verification = _pending(run, schedules[run.name], cluster.address, outcomes[run.name])
            if verification is not None:
                _refuse_machines(cluster, verification, problems)
                pending.append(verification)
    for need in dict.fromkeys(one.need for one in pending):
        _measure(cluster, [one for one in pending if one.need == need], need)


def _pending(run: RecipeRun, schedule: Schedule, address: str, outcome: Outcome) -> _Verification | None:
    """The verification of an artifact; None if it is done already."""
    artifact, options = outcome.artifact, schedule.options
    assert artifact is not None
    steps = Steps(run.recipe, run.out, run.folder, cluster=address)
    if steps.part("verify", artifact) is not None:
        note(f"{run.name}: verified already, on the same images")
        outcome.steps["verify"] = "already there"
        return None
    folder = spread.create_internal(_shards_of(run), schedule)
    need = need_of(artifact, options.device, options.threads)
    job, key = job_of(artifact, schedule), steps.key("verify", artifact)
    return _Verification(steps, key, artifact, job, need, folder, set(folder.missing()), outcome)


def _refuse_machines(
    cluster: Cluster, verification: _Verification, problems: dict[tuple[object, ...], ExporterError | None]
) -> None:
    """Refuse machines with other versions or images, each kind of versions and images once.

    Raises: as `Cluster.check` does.
    """
    schedule = verification.folder.schedule
    kind = (schedule.images_digest, *sorted(schedule.versions.items()), verification.need)
    if kind not in problems:
        problems[kind] = None
        try:
            cluster.check(verification.job, (), verification.need)
        except ExporterError as error:
            problems[kind] = error
    if (problem := problems[kind]) is not None:
        raise problem


def _measure(cluster: Cluster, verifications: Sequence[_Verification], need: Need) -> None:
    """Measure the missing shards of several artifacts, and merge those of each artifact when it has all."""
    total = sum(len(one.missing) for one in verifications)
    step(f"verifying {len(verifications)} artifacts: {total} shards are missing")
    for one in verifications:  # an interrupted command may have stored all
        _merge_if_complete(one)
    results = cluster.results_of_several([(one.job, sorted(one.missing)) for one in verifications], need)
    for index, number, result in track(results, total, "shards", lambda _: 1):
        one = verifications[index]
        with recording_error(one.outcome):
            if isinstance(result, LostTask):
                raise lost_error(f"shard {number}", result.reason)
            one.folder.store(number, content_of(result))
            one.missing.remove(number)
        _merge_if_complete(one)


def _merge_if_complete(one: _Verification) -> None:
    """Store the report of an artifact if no shard of it is missing."""
    if one.missing:
        return
    with recording_error(one.outcome):
        keep_verified(one.steps, one.artifact, one.key, spread.merge_or_discard(one.folder, one.artifact))
        one.outcome.steps["verify"] = "done"


def _bench(cluster: Cluster, runs: Sequence[RecipeRun], outcomes: dict[str, Outcome]) -> None:
    """Time the artifacts that recipes want timed, and write all reports."""
    timed = [run for run in runs if run.recipe.bench is not None]
    if timed:
        step(f"timing {len(timed)} artifacts, each alone on a machine")
    needs = [replace(ALONE, gpus=_gpus(run)) for run in timed]
    results = list(_calls(cluster, tasks.bench, timed, needs, "timing"))
    results += [(run, tasks.bench(Job(), run)) for run in runs if run.recipe.bench is None]
    for run, outcome in results:
        outcome.steps = outcomes[run.name].steps | outcome.steps
        outcomes[run.name] = outcome


def _calls(
    cluster: Cluster,
    function: Callable[[Job, RecipeRun], T],
    runs: Sequence[RecipeRun],
    needs: Sequence[Need],
    task: str,
) -> Iterator[tuple[RecipeRun, T | Outcome]]:
    """Recipes with the result of a function, or an outcome with the error if its workers are lost, as they are done."""
    calls = [(need, (Job(), run)) for run, need in zip(runs, needs, strict=True)]
    for index, result in track(cluster.calls(function, calls), len(runs), "recipes", lambda _: 1):
        if isinstance(result, LostTask):
            error = lost_error(task, result.reason)
            yield runs[index], Outcome(runs[index].name, error=str(error), exit_code=error.exit_code)
        else:
            yield runs[index], result


def _need_of_build(run: RecipeRun) -> Need:
    """Builds in int8 time their artifact, and get a machine for themselves."""
    need = Need() if run.recipe.quantization is None else ALONE
    return replace(need, gpus=_gpus(run), memory=BUILD_BYTES + 4 * weight_bytes(run.recipe.model))


def _gpus(run: RecipeRun) -> int:
    """One GPU for a runtime that uses none but GPUs; `Need.within` drops it where there is none."""
    return int(set(backends.runtime(run.recipe.backend).devices.values()) == {"NVIDIA GPU"})
