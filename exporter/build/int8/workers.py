"""Parts of an int8 build that other processes compute: statistics of batches of the calibration images, and reports of
candidates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec
from msgspec.structs import replace

from exporter import backends
from exporter.artifact import Artifact
from exporter.artifact.outputs import OutputSpec
from exporter.artifact.sidecar import Preprocessing
from exporter.artifact.tensors import Tensor, tensor_of
from exporter.build.resolve import Job
from exporter.data import calibration
from exporter.data.calibration import CalibrationSet, Manifest
from exporter.data.fingerprint import fingerprint
from exporter.errors import BadRequest
from exporter.recipe import Model, Quantization
from exporter.report import Report
from exporter.verify import VerifyOptions

if TYPE_CHECKING:
    from exporter.model.convnext import ConvNeXt
    from exporter.quantize.statistics import Measure, Pass, Statistics


@dataclass(frozen=True)
class ImageOptions:
    """How calibration images are opened: arguments of `calibration.open_calibration`."""

    calib: str
    size: int | None
    seed: int
    preprocessing: Preprocessing
    classes: int | None
    dense: bool

    def open(self, manifest: Manifest | None = None) -> CalibrationSet:
        """The calibration set; with `manifest` its images, which are not compared with their digests.

        Raises: BadRequest for images that cannot be used.
        """
        if manifest is not None:
            return calibration.of_manifest(self.calib, manifest, self.preprocessing)
        return calibration.open_calibration(
            self.calib, self.preprocessing, self.classes, self.size, self.seed, self.dense
        )


@dataclass(frozen=True)
class CalibrationPass:
    """Inputs that all batches of one pass over the calibration images share."""

    which: Pass
    # The network.
    weights: Model
    weights_digest: str
    spec: OutputSpec
    form: str
    kinds: frozenset[str]  # of the layers
    # The images. The manifest is None for an archive of arrays and for synthetic images.
    images: ImageOptions
    manifest: Manifest | None
    images_digest: str
    total: int
    batch_size: int
    # What every machine must have: the versions that compute, and fingerprints of the sources of images, by option.
    versions: dict[str, str]
    fingerprints: tuple[tuple[str, str, str], ...]

    def remaining(self, done: int) -> range:
        """The numbers of the batches after the first `done` images."""
        return range(done // self.batch_size, -(-self.total // self.batch_size))


class Workers(Protocol):
    """Other processes that compute parts of a build."""

    def statistics(self, calibration_pass: CalibrationPass, ranges: Statistics, done: int) -> Iterator[Statistics]:
        """The statistics of each batch after the first `done` images, in order; `ranges` as for `open_batches`."""

    def verify(self, artifact: Artifact, options: VerifyOptions) -> Report:
        """The report of `exporter.verify.verify`."""

    def close(self) -> None:
        """End the processes, before the artifact is timed."""


def measure_on(workers: Workers, job: Job, model: ConvNeXt, options: ImageOptions, images: CalibrationSet) -> Measure:
    """A `Measure` whose batches workers compute.

    Args:
        workers: the processes.
        job: of the build.
        model: its network, in its form.
        options: by which the images were opened.
        images: the calibration set.
    """
    from exporter.quantize.statistics import Statistics, batch_size

    quantization = job.recipe.quantization
    assert job.placement is not None
    assert quantization is not None
    first = CalibrationPass(
        which="extremes",
        weights=replace(job.recipe.model, reference=None),  # the network is compared with it in this process
        weights_digest=job.sidecar.weights.digest,
        spec=job.trace.spec,
        form=job.form,
        kinds=job.placement.kinds,
        images=options,
        manifest=images.manifest,
        images_digest=images.ordered_digest,
        total=images.total,
        batch_size=batch_size(model),
        versions=backends.computing_versions(job.runtime),
        fingerprints=_fingerprints(quantization),
    )

    def measure(which: Pass, statistics: Statistics) -> Iterator[Statistics]:
        ranges = Statistics()
        if which == "histogram":
            ranges = Statistics(low=statistics.low, high=statistics.high, factor=statistics.factor)
        calibration_pass = dataclasses.replace(first, which=which)
        return workers.statistics(calibration_pass, ranges, statistics.done(which))

    return measure


def _fingerprints(quantization: Quantization) -> tuple[tuple[str, str, str], ...]:
    """The option, the path and the fingerprint of each source of images."""
    sources = (("--calib", quantization.calib), ("--data", quantization.data))
    return tuple((option, path, fingerprint(path, times=False)) for option, path in sources if path is not None)


def refuse_others(calibration_pass: CalibrationPass) -> None:
    """Raises: BadRequest where this process has other versions or other images. The weights are not read."""
    backends.refuse_other_versions(calibration_pass.versions)
    for option, path, expected in calibration_pass.fingerprints:
        if fingerprint(path, times=False) != expected:
            raise BadRequest(_other(f"{option} {path}", "images"))


def _other(source: str, what: str) -> str:
    return f"{source}: not the {what} with which the command began; {calibration.RESTORE}"


@contextmanager
def open_batches(calibration_pass: CalibrationPass, ranges: Statistics) -> Iterator[Callable[[int], Statistics]]:
    """A function that measures the statistics of a batch by its number, with the network and the images opened.

    Args:
        calibration_pass: the pass.
        ranges: for histograms, minimum, maximum and factor of each channel over all images.

    Raises: BadRequest for other versions, weights or images than those of the pass.
    """
    from exporter.model import forms, weights
    from exporter.quantize.statistics import in_double, measure_batches

    backends.refuse_other_versions(calibration_pass.versions)
    chosen, manifest = calibration_pass.weights, calibration_pass.manifest
    images = calibration_pass.images.open(manifest)
    if images.ordered_digest != calibration_pass.images_digest:
        raise BadRequest(_other(f"--calib {images.source}", "images"))
    labels = Path(chosen.labels) if chosen.labels else None
    checkpoint = weights.load(chosen.weights, chosen.variant, labels, weights.choices_of(msgspec.to_builtins(chosen)))
    if checkpoint.weights.digest != calibration_pass.weights_digest:
        raise BadRequest(_other(chosen.weights, "weights"))
    model = checkpoint.model(calibration_pass.spec)
    checkpoint.state.clear()  # else every weight that a form changes would be in memory twice
    forms.rewrite(model, calibration_pass.form)

    def measure(number: int) -> Statistics:
        first = number * calibration_pass.batch_size
        last = min(first + calibration_pass.batch_size, calibration_pass.total)
        if manifest is not None:
            calibration.refuse_changed(images.source, manifest, first, last)
        (part,) = measure_batches(model, calibration_pass.kinds, images, calibration_pass.which, ranges, first, last)
        return part

    with in_double(model):
        yield measure


def encode(statistics: Statistics) -> bytes:
    """Statistics as bytes."""
    return msgspec.msgpack.encode({name: tensor_of(array) for name, array in statistics.arrays().items()})


def decode(content: bytes) -> Statistics:
    """Statistics from their bytes."""
    from exporter.quantize.statistics import Statistics

    tensors = msgspec.msgpack.decode(content, type=dict[str, Tensor])
    # PyTorch warns of arrays that cannot be written to.
    return Statistics.of_arrays({name: tensor.array().copy() for name, tensor in tensors.items()})
