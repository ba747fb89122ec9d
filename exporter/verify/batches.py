"""One batch of images after another through both models, and what the checks keep of each.

What a check keeps of a batch depends on the batch alone. A process can measure any range of the images; a report needs
all batches, in the order of the images. Which images have thumbnails depends on the range too, but those of the report
are the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from exporter.artifact import Artifact
from exporter.artifact.sidecar import Sidecar
from exporter.backends import Array, Outputs, Session
from exporter.data.samples import Samples
from exporter.errors import BadRequest
from exporter.verify import checks
from exporter.verify.checks import Meter, Rows
from exporter.verify.slide import Windows, sliding
from exporter.verify.thumbnails import Thumbnails

BATCH = 16


@dataclass(frozen=True)
class MeasuredBatch:
    """The names of the readable images of a batch, for each a line with its identity and its classes, and what each
    check keeps, with thumbnails of images that differ more than those before."""

    names: tuple[str, ...]
    lines: tuple[str, ...]
    rows: dict[str, Rows]


@dataclass(frozen=True)
class Pair:
    """An opened artifact and the opened PyTorch model that it is compared with. `reference` is the name of the latter
    where it is not this tool's own network."""

    artifact: Artifact
    original: Session
    candidate: Session
    meters: Mapping[str, Meter]
    windows: Windows | None = None
    reference: str | None = None

    @property
    def size(self) -> int:
        """Images of a batch."""
        return size_of(self.artifact.sidecar, self.windows)

    def measured(self, samples: Samples) -> Iterator[MeasuredBatch]:
        """The batches of these images.

        Raises: BadRequest where both models have outputs of other shapes.
        """
        run = partial(run_batch, self.candidate, fixed=self.artifact.sidecar.batch)
        original, candidate = (sliding(self.windows, one) for one in (self.original, run))
        thumbnails = Thumbnails(self.artifact.sidecar.preprocessing)
        for batch in samples.batches(self.size):
            lines = tuple(
                f"{samples.identity(name)} {_words(label)}\n"
                for name, label in zip(batch.names, batch.labels, strict=True)
            )
            both = original(batch.images), candidate(batch.images)
            self._refuse_other_shapes(*both)
            names = tuple(batch.names)
            rows = checks.measure(self.meters, checks.Seen(batch.labels, *both, names))
            yield MeasuredBatch(names, lines, thumbnails.with_thumbnails(rows, batch.images))

    def _refuse_other_shapes(self, expected: Outputs, got: Outputs) -> None:
        """Raises: BadRequest for a PyTorch model whose outputs have other shapes than those of the artifact."""
        shapes = [[output.shape for output in both] for both in (expected, got)]
        if shapes[0] != shapes[1]:
            model = f"the reference {self.reference}" if self.reference else "the PyTorch model"
            raise BadRequest(
                f"{self.artifact.path}: {model} returns {shapes[0]}, the artifact {shapes[1]}; give the same model"
            )


def _words(label: NDArray[np.int64]) -> str:
    """The classes of an image as text; of a mask its digest."""
    if label.ndim == 2:
        return hashlib.sha256(label.tobytes()).hexdigest()
    return " ".join(map(str, np.ravel(label)))


@dataclass
class Tally:
    """Accumulates measured batches in the order of the images: their number, a digest of their lines, and the checks'
    meters. `skipped` are the images that were not measured, with the reason."""

    meters: Mapping[str, Meter]
    count: int = 0
    skipped: list[str] = field(default_factory=list)
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)

    def add(self, batch: MeasuredBatch) -> None:
        """Accumulate one batch."""
        self.count += len(batch.names)
        for line in batch.lines:
            self.digest.update(line.encode("utf-8", "surrogateescape"))
        checks.add(self.meters, batch.rows, batch.names)


def size_of(sidecar: Sidecar, windows: Windows | None) -> int:
    """Images of a batch of `verify`; one where it is cut into windows."""
    return 1 if windows is not None else batch_size(sidecar, BATCH)


def batch_size(sidecar: Sidecar, most: int) -> int:
    """How many images are read at once for an artifact: at most `most`, but full batches; one picture, and one image
    where outputs of each pixel take 157 MB (150 classes, 512 pixels), and a pyramid 92 MB (800 × 1344)."""
    fixed, most = sidecar.batch, 1 if {"segment", "pyramid"} & {*sidecar.spec.tasks} else most
    if fixed is None:
        return most
    return 1 if sidecar.preprocessing.input == "image" else fixed * max(1, most // fixed)


def run_batch(run: Callable[[Array], Outputs], pixels: Array, fixed: int | None) -> Outputs:
    """The outputs for images (N, …) of a session, or of another function. One with a fixed batch size runs so many at a
    time; the last batch is padded, and its outputs are cut."""
    if fixed is None:
        return run(pixels)
    outputs = []
    for start in range(0, len(pixels), fixed):
        batch = pixels[start : start + fixed]
        count = len(batch)
        if count < fixed:
            batch = np.concatenate([batch, np.repeat(batch[-1:], fixed - count, axis=0)])
        outputs.append(tuple(output[:count].copy() for output in run(batch)))
    return tuple(np.concatenate(parts) for parts in zip(*outputs, strict=True))
