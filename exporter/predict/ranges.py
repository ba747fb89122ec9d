"""Ranges of images that other processes predict. Their batches are those of `predict` on one machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from exporter import backends
from exporter.artifact import Artifact
from exporter.artifact.sidecar import Record
from exporter.errors import BadRequest, some
from exporter.predict.image_list import Images
from exporter.predict.predictor import PredictOptions, answers_for, opened, size_of
from exporter.predict.sources import STDIN, open_images
from exporter.predict.store import Chunk

IMAGES = 512
"""Of a range, where no number is given."""


class Ranges(Record, frozen=True):
    """Ranges of images that other processes predict: the sources, the options, the name of the output, a digest of the
    images (`Images.key`), the number of images in all and of a range, and the versions that compute."""

    sources: tuple[str, ...]
    options: PredictOptions
    out: str
    images_digest: str
    total: int
    size: int
    versions: dict[str, str]

    def numbers(self, done: int) -> range:
        """The numbers of the ranges that have images after the first `done`."""
        return range(done // self.size, -(-self.total // self.size))


def ranges_of(
    artifact: Artifact, sources: Sequence[str], options: PredictOptions, out: Path, size: int | None = None
) -> Ranges:
    """The ranges of a prediction; `size` is rounded up to full batches.

    Raises: as `predict` does; BadRequest for standard input.
    """
    if STDIN in sources:
        raise BadRequest("-: other processes cannot read standard input; give files, folders or a manifest")
    images, batch = open_images(sources, artifact.sidecar.preprocessing), size_of(artifact, options)
    return Ranges(
        sources=tuple(sources),
        options=options,
        out=str(out),
        images_digest=images.key,
        total=images.samples.total,
        size=-(-(size or IMAGES) // batch) * batch,
        versions=backends.computing_versions(backends.runtime_of(artifact)),
    )


def refuse_others(ranges: Ranges, artifact: Artifact) -> Images:
    """The images of ranges.

    Raises: BadRequest where this process has other versions or other images.
    """
    backends.refuse_other_versions(ranges.versions)
    images = open_images(ranges.sources, artifact.sidecar.preprocessing)
    if images.key != ranges.images_digest:
        raise BadRequest(
            f"{some(ranges.sources)}: other images than when the command began; restore them, or begin anew"
        )
    return images


@contextmanager
def open_ranges(ranges: Ranges, artifact: Artifact) -> Iterator[Callable[[int], Iterator[Chunk]]]:
    """A function that returns the answers for a range by its number.

    Raises: as `refuse_others` and `predict` do.
    """
    images = refuse_others(ranges, artifact)
    answers = answers_for(artifact, ranges.options, whole=Path(ranges.out).suffix.lower() == ".npz")

    def chunks(number: int) -> Iterator[Chunk]:
        start = number * ranges.size
        return predictor.chunks(images.samples.between(start, start + ranges.size), start)

    with opened(artifact, answers, ranges.options) as predictor:
        yield chunks
