"""Parts of an int8 build that other processes compute: statistics of batches of the calibration images, and reports of
candidates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
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
from exporter.data.calibration import CalibrationSet, open_calibration
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
    """How the calibration images of a build are opened: `classes` and `dense` as for `open_calibration`."""

    quantization: Quantization
    preprocessing: Preprocessing
    classes: int | None
    dense: bool

    def open(self) -> CalibrationSet:
        """The calibration set.

        Raises: BadRequest for images that cannot be used.
        """
        chosen = self.quantization
        return open_calibration(
            chosen.calib, self.preprocessing, self.classes, chosen.calib_size, chosen.calib_seed, self.dense
        )


@dataclass(frozen=True)
class Calibration:
    """What all batches of a pass over the calibration images have in common.

    which: the pass. model, spec, form: of the network. kinds: of the layers. images: as they are opened. total: the
    number of images. batch: images of a batch. weights_digest, images_digest: of their contents. fingerprint: of the
    source of the images. versions: of this tool and of the libraries that compute.
    """

    which: Pass
    model: Model
    spec: OutputSpec
    form: str
    kinds: frozenset[str]
    images: ImageOptions
    total: int
    batch: int
    weights_digest: str
    images_digest: str
    fingerprint: str
    versions: dict[str, str]

    def numbers(self, done: int) -> range:
        """The numbers of the batches after the first `done` images."""
        return range(done // self.batch, -(-self.total // self.batch))


class Spread(Protocol):
    """Other processes that compute parts of a build."""

    def statistics(self, calibration: Calibration, scaled: Statistics, done: int) -> Iterator[Statistics]:
        """The statistics of each batch after the first `done` images, in order; `scaled` as for `open_batches`."""

    def verify(self, artifact: Artifact, options: VerifyOptions) -> Report:
        """The report of `exporter.verify.verify`."""


def measure_by(
    spread: Spread, job: Job, model: ConvNeXt, kinds: frozenset[str], images: ImageOptions, opened: CalibrationSet
) -> Measure:
    """A function for `statistics.collect` whose batches other processes run.

    Args:
        spread: the processes.
        job: of the build.
        model: its network, in its form.
        kinds: of the layers whose statistics are measured.
        images: how the images are opened.
        opened: the images.
    """
    from exporter.quantize.statistics import Statistics, batch_size

    calibration = Calibration(
        which="extremes",
        model=replace(job.recipe.model, reference=None),  # the network is compared with it in this process
        spec=job.trace.spec,
        form=job.form,
        kinds=kinds,
        images=images,
        total=opened.total,
        batch=batch_size(model),
        weights_digest=job.sidecar.weights.digest,
        images_digest=opened.digest,
        fingerprint=fingerprint(images.quantization.calib, times=False),
        versions=backends.computing_versions(None),
    )

    def measure(which: Pass, statistics: Statistics) -> Iterator[Statistics]:
        scaled = Statistics()
        if which == "histogram":
            scaled = Statistics(low=statistics.low, high=statistics.high, factor=statistics.factor)
        return spread.statistics(dataclasses.replace(calibration, which=which), scaled, statistics.done(which))

    return measure


def refuse_others(calibration: Calibration) -> None:
    """Raises: BadRequest where this process has other versions or other images. The weights are not read."""
    backends.refuse_other_versions(calibration.versions, None)
    source = calibration.images.quantization.calib
    if fingerprint(source, times=False) != calibration.fingerprint:
        raise BadRequest(f"--calib {source}: other images than where the command was typed; copy those")


def open_batches(calibration: Calibration, scaled: Statistics) -> Callable[[int], Statistics]:
    """A function that measures the statistics of a batch by its number, with the network and the images opened.

    Args:
        calibration: the pass.
        scaled: as for `statistics.of_batches`.

    Raises: BadRequest for other weights or images than those of the calibration.
    """
    from exporter.model import forms, weights
    from exporter.quantize.statistics import of_batches

    refuse_others(calibration)
    model, images = calibration.model, calibration.images.open()
    labels = Path(model.labels) if model.labels else None
    checkpoint = weights.load(model.weights, model.variant, labels, weights.choices_of(msgspec.to_builtins(model)))
    if checkpoint.weights.digest != calibration.weights_digest:
        raise BadRequest(f"{model.weights}: other weights than where the command was typed; copy those")
    if images.digest != calibration.images_digest:
        raise BadRequest(f"--calib {images.source}: other images than where the command was typed; copy those")
    network = checkpoint.model(calibration.spec)
    checkpoint.state.clear()
    forms.rewrite(network, calibration.form)
    batches = partial(of_batches, network, calibration.kinds, images, calibration.which, scaled)
    return lambda number: next(batches(number * calibration.batch, (number + 1) * calibration.batch))


def encode(statistics: Statistics) -> bytes:
    """Statistics as bytes."""
    return msgspec.msgpack.encode({name: tensor_of(array) for name, array in statistics.arrays().items()})


def decode(content: bytes) -> Statistics:
    """Statistics from their bytes."""
    from exporter.quantize.statistics import Statistics

    tensors = msgspec.msgpack.decode(content, type=dict[str, Tensor])
    return Statistics.of_arrays({name: tensor.array().copy() for name, tensor in tensors.items()})  # can be written to
