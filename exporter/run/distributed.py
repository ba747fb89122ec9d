"""Commands whose work is spread over a Ray cluster: `verify`, `predict`, and builds in int8."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from exporter import build as builds
from exporter import machine
from exporter import predict as predictions
from exporter.artifact import Artifact
from exporter.build import Built
from exporter.build.int8.workers import CalibrationPass, decode, encode
from exporter.errors import BadRequest, ExporterError
from exporter.model import variants
from exporter.model.sources import is_random
from exporter.predict import PredictOptions, Summary, writers
from exporter.predict.store import Chunk
from exporter.progress import step, track
from exporter.recipe import Model, Recipe
from exporter.report import Report
from exporter.run import spread
from exporter.run.cluster import KEPT, Cluster, calibration_job, check_address, connected, job_of, paths_of, reach
from exporter.run.needs import Need, need_of
from exporter.verify import VerifyOptions, shards

if TYPE_CHECKING:
    from exporter.quantize.statistics import Statistics

BUILD_BYTES = 800 << 20  # memory of a build, in addition to four times the weights


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
        folder = spread.create_internal(_shards_of(out), schedule)
        try:
            _measure(folder, artifact, folder.missing(), address)
        except ExporterError:
            if len(folder.missing()) == schedule.count:  # nothing to continue with
                shutil.rmtree(_shards_of(out), ignore_errors=True)
            raise
        except KeyboardInterrupt:
            state = f"{schedule.count - len(folder.missing())} of {schedule.count} shards are stored"
            raise KeyboardInterrupt(f"{state}; the same command continues") from None
        return spread.merge_or_discard(folder, artifact)


def remove_shards(out: Path) -> None:
    """Remove the shards of a report that is written."""
    with suppress(BadRequest), spread.alone(_shards_of(out), out.name):  # another process may have begun
        shutil.rmtree(_shards_of(out), ignore_errors=True)


def _shards_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.shards")


def _measure(folder: spread.Folder, artifact: Artifact, missing: Sequence[int], address: str) -> None:
    if not missing:
        return
    with connected(address, _bytes(artifact)) as cluster:
        for number, content in _shards(cluster, folder.schedule, artifact, missing):
            folder.store(number, content)


def _shards(
    cluster: Cluster, schedule: shards.Schedule, artifact: Artifact, numbers: Sequence[int], remedy: str = KEPT
) -> Iterator[tuple[int, bytes]]:
    """Shards by their number, as they are measured; `remedy` as for `Cluster.results`."""
    job, need = job_of(artifact, schedule), need_of(artifact, schedule.options.device, schedule.options.threads)
    references = cluster.sent(artifact)
    cluster.check(job, references, need)
    step(f"verifying {artifact.path.name} in {len(numbers)} shards of up to {schedule.size} images")
    results = cluster.results(job, references, numbers, need, remedy=remedy)
    yield from track(results, len(numbers), "shards", lambda _: 1)


def build(recipe: Recipe, out: Path, address: str) -> Built:
    """Build in int8 or fp8. A cluster runs the calibration images and verifies candidates on `quantization.data`; the
    rest of the build takes place in this process. The cluster is left before the artifact is timed.

    The artifact has the bytes of `exporter.build.build` on one machine of the same kind. Statistics of calibration
    images are cached, so that the same command continues.

    Args:
        recipe, out: as for `exporter.build.build`.
        address: of the cluster.

    Raises: as `exporter.build.build`, `connected` and `Cluster.results` do; BadRequest for other precisions.
    """
    builds.check(recipe)
    if recipe.quantization is None:
        raise BadRequest(f"--on {address}: {recipe.precision} needs no images, so nothing can be spread; leave it out")
    reach(address)
    workers = _ClusterWorkers(recipe, address)
    try:
        return builds.build(recipe, out, workers=workers)
    finally:
        workers.close()


class _ClusterWorkers:
    """The workers of a cluster, which is connected when it is first needed."""

    def __init__(self, recipe: Recipe, address: str) -> None:
        self.recipe, self.address, self.connection = recipe, address, ExitStack()
        self.cluster: Cluster | None = None

    def _connected(self) -> Cluster:
        if self.cluster is None:
            sent = 2 * weight_bytes(self.recipe.model)  # a candidate, and the ONNX graph that may run in its place
            self.cluster = self.connection.enter_context(connected(self.address, sent))
        return self.cluster

    def statistics(self, calibration_pass: CalibrationPass, ranges: Statistics, done: int) -> Iterator[Statistics]:
        """The statistics of each batch after the first `done` images, in order."""
        cluster, content = self._connected(), encode(ranges)
        job, references = calibration_job(calibration_pass, content), [cluster.ray.put(content)]
        memory = BUILD_BYTES + 4 * weight_bytes(self.recipe.model)  # the network in fp32 and in fp64: three times
        need = Need(cpus=machine.default_threads(), memory=memory)
        cluster.check(job, references, need)
        numbers, remedy = calibration_pass.remaining(done), "Earlier batches are cached: run the same command again"
        for _, part in cluster.results(job, references, numbers, need, True, "batch", remedy):
            yield decode(part)

    def verify(self, artifact: Artifact, options: VerifyOptions) -> Report:
        """The report of `exporter.verify.verify`."""
        schedule, remedy = shards.schedule(artifact, options), "Run the same command again"
        contents = dict(_shards(self._connected(), schedule, artifact, range(schedule.count), remedy=remedy))
        return shards.merged(schedule, artifact, lambda number: shards.decode(contents[number]))

    def close(self) -> None:
        """Leave the cluster."""
        self.connection.close()
        self.cluster = None


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
        cluster.check(job, references, need)

        def chunks(done: int) -> Iterator[Chunk]:
            """The answers after the first `done` images."""
            numbers, remedy = schedule.numbers(done), "What others did is stored: add --resume"
            for _, content in cluster.results(job, references, numbers, need, True, "range", remedy):
                every = msgspec.msgpack.decode(content, type=list[Chunk])
                yield from (chunk.after(done) for chunk in every if chunk.end > done)

        return predictions.predict(artifact, sources, options, out, resume, overwrite, elsewhere=chunks)


def weight_bytes(model: Model) -> int:
    """The size of the weights: of a file or folder, else of the variant."""
    path = Path(model.weights)
    if is_random(model.weights) or not path.exists():
        return 4 * variants.resolve(model.variant or "tiny")[0].params
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _bytes(artifact: Artifact) -> int:
    return sum(path.stat().st_size for path in paths_of(artifact))
