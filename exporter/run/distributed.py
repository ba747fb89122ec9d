"""Commands whose work is spread over a Ray cluster: `verify`, `predict`, `run`, and builds in int8."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from exporter import backends, machine
from exporter import build as builds
from exporter import predict as predictions
from exporter.artifact import Artifact
from exporter.build import Built
from exporter.build.int8.calibration import Calibration, decode, encode
from exporter.errors import BadRequest, ExporterError
from exporter.model import variants
from exporter.model.sources import is_random
from exporter.predict import PredictOptions, Summary, writers
from exporter.predict.store import Chunk
from exporter.progress import step, track
from exporter.recipe import Model, Recipe
from exporter.report import Report
from exporter.run import Outcome, RecipeRun, spread, tasks
from exporter.run.cluster import (
    Cluster,
    Need,
    calibration_job,
    check_address,
    connected,
    job_of,
    need_of,
    paths_of,
)
from exporter.verify import VerifyOptions, shards

if TYPE_CHECKING:
    from exporter.quantize.statistics import Statistics

BUILD_BYTES = 800 << 20  # of a build, beside four times the weights


def verify(artifact: Artifact, options: VerifyOptions, address: str, out: Path, size: int | None = None) -> Report:
    """Verify on a cluster. The report has the bytes of `verify` on one machine of the same kind.

    Shards are stored in a folder beside the report until `remove_shards`, and the same command continues there.

    Args:
        artifact, options: as for `verify`.
        address: of the cluster.
        out: the report.
        size: images of a shard.

    Raises: as `verify`, `connected` and `Cluster.results` do.
    """
    check_address(address)
    schedule = shards.schedule(artifact, options, size)
    with spread.alone(_shards_of(out), artifact.path.name):
        folder = spread.create(_shards_of(out), schedule, replace=True)
        try:
            _measure(folder, artifact, folder.missing(), address)
        except ExporterError:
            if len(folder.missing()) == schedule.count:  # nothing to continue with
                shutil.rmtree(folder.path, ignore_errors=True)
            raise
        except KeyboardInterrupt:
            state = f"{schedule.count - len(folder.missing())} of {schedule.count} shards are stored"
            raise KeyboardInterrupt(f"{state}; the same command continues") from None
        return folder.merged(artifact)


def remove_shards(out: Path) -> None:
    """Remove the shards of a report that is written."""
    with suppress(BadRequest), spread.alone(_shards_of(out), out.name):  # another process may have begun
        shutil.rmtree(_shards_of(out), ignore_errors=True)


def _shards_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.shards")


def _measure(folder: spread.Folder, artifact: Artifact, missing: Sequence[int], address: str) -> None:
    if missing:
        with connected(address, _bytes(artifact)) as cluster:
            _measure_on(cluster, folder, artifact, missing)


def _measure_on(cluster: Cluster, folder: spread.Folder, artifact: Artifact, missing: Sequence[int]) -> None:
    schedule = folder.schedule
    job, need = job_of(artifact, schedule), need_of(artifact, schedule.options.device, schedule.options.threads)
    references = cluster.sent(artifact)
    cluster.check(job, references)
    step(f"verifying {artifact.path.name} in {len(missing)} shards of up to {schedule.size} images")
    results = cluster.results(job, references, missing, need)
    for number, content in track(results, len(missing), "shards", lambda _: 1):
        folder.store(number, content)


def build(recipe: Recipe, out: Path, address: str) -> Built:
    """Build in int8. A cluster runs the calibration images and verifies the candidates on `quantization.data`; the rest
    of the build is computed, and the artifact is timed, by this process.

    The artifact has the bytes of `exporter.build.build` on one machine. What was measured on calibration images is
    cached, so that the same command continues.

    Args:
        recipe, out: as for `exporter.build.build`.
        address: of the cluster.

    Raises: as `exporter.build.build`, `connected` and `Cluster.results` do.
    """
    check_address(address)
    builds.check(recipe)
    with connected(address, 2 * _weight_bytes(recipe.model)) as cluster:
        return builds.build(recipe, out, spread=_Spread(cluster, recipe))


@dataclass(frozen=True)
class _Spread:
    """A cluster that computes parts of a build."""

    cluster: Cluster
    recipe: Recipe

    def statistics(self, calibration: Calibration, scaled: Statistics, done: int) -> Iterator[Statistics]:
        """The statistics of each batch after the first `done` images, in order."""
        content = encode(scaled)
        job, reference = calibration_job(calibration, content), self.cluster.ray.put(content)
        memory = BUILD_BYTES + 4 * _weight_bytes(self.recipe.model)  # fp32 and fp64 are three times the weights
        need = Need(cpus=machine.default_threads(), memory=memory)
        self.cluster.check(job, [reference])
        results = self.cluster.results(job, [reference], calibration.numbers(done), need, in_order=True)
        return (decode(part) for _, part in results)

    def verify(self, artifact: Artifact, options: VerifyOptions) -> Report:
        """The report of `exporter.verify.verify`."""
        schedule = shards.schedule(artifact, options)
        folder = spread.create(_shards_of(artifact.path), schedule)
        _measure_on(self.cluster, folder, artifact, folder.missing())
        return folder.merged(artifact)


def predict(
    artifact: Artifact,
    sources: Sequence[str],
    options: PredictOptions,
    address: str,
    out: Path,
    resume: bool = False,
    overwrite: bool = False,
) -> Summary:
    """Predict on a cluster. The output has the bytes of `predict` on one machine of the same kind.

    Args:
        artifact, sources, options, out, resume, overwrite: as for `predict`.
        address: of the cluster.

    Raises: as `predict`, `connected` and `Cluster.results` do; BadRequest for standard input and for folders of masks.
    """
    check_address(address)
    writers.check(out)
    schedule = predictions.ranges_of(artifact, sources, options, out)
    job, need = job_of(artifact, schedule), need_of(artifact, options.device, options.threads)

    with connected(address, _bytes(artifact)) as cluster:
        references = cluster.sent(artifact)
        cluster.check(job, references)

        def chunks(done: int) -> Iterator[Chunk]:
            """The answers after the first `done` images."""
            for _, content in cluster.results(job, references, schedule.numbers(done), need, in_order=True):
                every = msgspec.msgpack.decode(content, type=list[Chunk])
                yield from (chunk.after(done) for chunk in every if chunk.end > done)

        return predictions.predict(artifact, sources, options, out, resume, overwrite, elsewhere=chunks)


def run_all(runs: Sequence[RecipeRun], address: str) -> list[Outcome]:
    """Run recipes on a cluster, whose machines share the working folder.

    Builds and verifications run beside each other, as far as the memory of the machines allows. Each artifact is then
    timed on a machine on which nothing else of the run takes place.

    Raises: as `connected` does.
    """
    check_address(address)
    with connected(address) as cluster:
        machines = [resources for _, _, resources in cluster.nodes()]
        alone = Need(cpus=max(resources.get("CPU", 1) for resources in machines))
        gpus = int(any(resources.get("GPU") for resources in machines))
        step(f"running {len(runs)} recipes")
        needs = [_need_of_build(run, alone, gpus) for run in runs]
        built = _outcomes(cluster, [replace(run, timed=False) for run in runs], needs)
        timed = [run for run, one in zip(runs, built, strict=True) if not one.error and run.recipe.bench is not None]
        step(f"timing {len(timed)} artifacts, each alone on a machine")
        again = _outcomes(cluster, timed, [replace(alone, gpus=_gpus(run, gpus)) for run in timed])
    latest = {outcome.name: outcome for outcome in again}
    return [_joined(outcome, latest.get(outcome.name)) for outcome in built]


def _outcomes(cluster: Cluster, runs: Sequence[RecipeRun], needs: Sequence[Need]) -> list[Outcome]:
    folder = Path(os.getcwd())  # noqa: PTH109  (as the user sees it)
    calls = [(need, (folder, run)) for run, need in zip(runs, needs, strict=True)]
    results = track(cluster.calls(tasks.recipe, calls), len(runs), "recipes", lambda _: 1)
    return [
        Outcome(run.name, error=str(result), exit_code=result.exit_code)
        if isinstance(result, ExporterError)
        else result
        for run, result in zip(runs, results, strict=True)
    ]


def _joined(built: Outcome, timed: Outcome | None) -> Outcome:
    """The outcome of a recipe after its timing, with the steps that were done before."""
    if timed is None:
        return built
    timed.steps |= {name: state for name, state in built.steps.items() if name != "bench"}
    return timed


def _need_of_build(run: RecipeRun, alone: Need, gpus: int) -> Need:
    """Builds in int8 time their artifact, and get a machine for themselves."""
    need = Need() if run.recipe.quantization is None else alone
    memory = BUILD_BYTES + 4 * _weight_bytes(run.recipe.model)
    return replace(need, gpus=_gpus(run, gpus), memory=memory)


def _gpus(run: RecipeRun, gpus: int) -> int:
    """One GPU for a runtime that uses none but GPUs, if the cluster has any."""
    kinds = set(backends.runtime(run.recipe.backend).devices.values())
    return min(gpus, int(kinds == {"NVIDIA GPU"}))


def _weight_bytes(model: Model) -> int:
    """The size of the weights: of a file or folder, else of the variant."""
    path = Path(model.weights)
    if is_random(model.weights) or not path.exists():
        return 4 * variants.resolve(model.variant or "tiny")[0].params
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _bytes(artifact: Artifact) -> int:
    return sum(path.stat().st_size for path in paths_of(artifact))
