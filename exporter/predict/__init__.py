"""Predictions of an artifact for images: classes with their probabilities, values or feature vectors.

PyTorch is not needed: the sidecar has the preprocessing, the labels and what the outputs are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

import msgspec

from exporter import artifact as artifacts
from exporter import backends
from exporter.artifact import Artifact
from exporter.artifact.sidecar import Record
from exporter.errors import BadRequest, some
from exporter.predict import masks, store, writers
from exporter.predict.answers import Answers
from exporter.predict.image_list import Images
from exporter.predict.predictor import TOP as TOP
from exporter.predict.predictor import PredictOptions as PredictOptions
from exporter.predict.predictor import answers_for, opened
from exporter.predict.ranges import Ranges as Ranges
from exporter.predict.ranges import open_ranges as open_ranges
from exporter.predict.ranges import ranges_of as ranges_of
from exporter.predict.ranges import refuse_others as refuse_others
from exporter.predict.sources import open_images, refuse_source
from exporter.predict.store import Chunk, Job
from exporter.progress import note, step, track


class Summary(Record, frozen=True):
    """The images in all, those of them that this run read, `NAME: reason` of each that has no answer, and the seconds
    of this run."""

    total: int
    now: int
    unreadable: tuple[str, ...]
    seconds: float


def predict(
    artifact: Artifact,
    sources: Sequence[str],
    options: PredictOptions,
    out: Path,
    resume: bool = False,
    overwrite: bool = False,
    stdin: IO[bytes] | None = None,
    elsewhere: Callable[[int], Iterator[Chunk]] | None = None,
) -> Summary:
    """Write the answers for all images to a file, in the order of the sources.

    Only the names of all images are in memory. The file is written at the end; until then the answers are in the
    folder `.NAME.partial` beside it.

    Args:
        artifact: the one to run.
        sources: as for `open_images`.
        options: what is kept of the outputs, the device and the threads.
        out: ends in `.csv`, `.jsonl`, `.parquet` or `.npz`; or a folder for masks (`predict_masks`).
        resume: continue an unfinished output.
        overwrite: replace an output, finished or not.
        stdin: read for the source `-`.
        elsewhere: returns the answers that other processes compute, from an image on, by its number.

    Raises: BadRequest for sources without images, none of which can be read, or an output that cannot be written;
        Unavailable when the runtime or pyarrow is missing, or the disk is full.
    """
    if "segment" in artifact.sidecar.spec.tasks and (not out.suffix or out.is_dir()):
        if elsewhere:
            raise BadRequest(f"-o {out}: one machine writes masks; give a name that ends in .npz, or leave --on out")
        return predict_masks(artifact, sources, options, out, resume, overwrite, stdin)
    writers.check(out)
    artifacts.check_output(out)
    refuse_source(out, sources)
    answers = answers_for(artifact, options, whole=out.suffix.lower() == ".npz")
    writers.check_kinds(out, answers)
    images = open_images(sources, artifact.sidecar.preprocessing, stdin)
    job = _job(artifact, images, options, out)
    with store.opened(out, job, resume, overwrite) as kept:
        done, began = kept.done(), time.monotonic()
        if done < job.total:
            step(f"predicting {job.total - done:,} images with {artifact.path.name}")
        chunks = elsewhere(done) if elsewhere else _chunks(artifact, answers, images, options, done)
        unreadable = _unreadable(kept.chunks()) + _keep(kept, track(chunks, job.total - done, "images", _count))
        seconds = time.monotonic() - began
        if len(unreadable) == job.total:
            kept.discard()
        _report(unreadable, job.total)
        write = writers.WRITERS[out.suffix.lower()]
        kept.finish(lambda file: write(file, answers, kept.chunks))
    return Summary(total=job.total, now=job.total - done, unreadable=unreadable, seconds=seconds)


def _job(artifact: Artifact, images: Images, options: PredictOptions, out: Path) -> Job:
    """What a resumed run must have in common with this one."""
    versions = backends.computing_versions(backends.runtime_of(artifact))
    facts = {
        "format": out.suffix.lower(),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    return Job(
        artifact=artifact.sidecar.sha256,
        images=images.key,
        total=images.samples.total,
        options={**facts, **msgspec.to_builtins(options), "top": options.top or TOP},
    )


def _keep(kept: store.Store, chunks: Iterator[Chunk]) -> tuple[str, ...]:
    """Store the chunks as they come, and return what in them is unreadable.

    Raises: KeyboardInterrupt, with what was stored until then.
    """
    unreadable: list[str] = []
    try:
        for chunk in chunks:
            kept.add(chunk)
            unreadable += _unreadable(iter([chunk]))
        return tuple(unreadable)
    except KeyboardInterrupt:
        kept.flush()  # so that the last chunks are counted
        reached = f"{kept.out} has {kept.done():,} of {kept.job.total:,} images"
        raise KeyboardInterrupt(
            f"{reached}; the same command with --resume (and without --overwrite) continues it"
        ) from None
    finally:
        kept.flush()


def predict_masks(
    artifact: Artifact,
    sources: Sequence[str],
    options: PredictOptions,
    out: Path,
    resume: bool = False,
    overwrite: bool = False,
    stdin: IO[bytes] | None = None,
) -> Summary:
    """Write the masks of all images to a folder, each beside the image in the colours of its classes (`masks.write`).

    Args:
        artifact: with an output of each pixel.
        sources, options, stdin: as for `predict`.
        out: the folder.
        overwrite: replace masks in a folder that is not empty.

    Raises: BadRequest for `resume`, for sources without images, none of which can be read, two images whose masks would
        have one name, a mask that would replace an image of the sources, and a folder that is not empty; Unavailable
        when the runtime is missing, or the disk is full.
    """
    if resume:
        raise BadRequest("--resume continues a file, and masks are a folder; give --overwrite")
    if out.is_file():
        raise BadRequest(f"-o {out}: is a file; give a folder for the masks, or a name that ends in .npz")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise BadRequest(f"-o {out}: expected a new or empty folder for the masks; --overwrite replaces them")
    if artifact.sidecar.spec.answer == "logits4":
        raise BadRequest(f"{artifact.path}: --output logits4 has no classes of pixels; build with labels or logits")
    masks.refuse_one_class(artifact)
    recipe, outputs = artifact.sidecar.preprocessing, answers_for(artifact, options, whole=False)
    answers = masks.Classes(outputs.outputs, outputs.top, outputs.checks)
    images, num_classes = open_images(sources, recipe, stdin), artifact.sidecar.weights.num_classes
    total, began, unreadable = images.samples.total, time.monotonic(), list[str]()
    named = list(images.named())
    masks.check_names(out, named)
    step(f"predicting {total:,} masks with {artifact.path.name}")
    waiting = iter(named)  # in the names of a chunk some characters are escaped
    try:
        for chunk in track(_chunks(artifact, answers, images, options, 0), total, "images", _count):
            unreadable += _unreadable(iter([chunk]))
            each = zip(islice(waiting, len(chunk.names)), chunk.errors, strict=True)
            good = [one for one, error in each if not error]
            arrays = chunk.arrays() if good else {answers.outputs[0].name: ()}
            for (name, path), classes in zip(good, arrays[answers.outputs[0].name], strict=True):
                masks.write(masks.path_of(out, name), classes, num_classes, images.file(name, path), recipe)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{out}: masks are missing; run the same command with --overwrite") from None
    _report(unreadable, total)
    return Summary(total=total, now=total, unreadable=tuple(unreadable), seconds=time.monotonic() - began)


def _count(chunk: Chunk) -> int:
    return len(chunk.names)


def _unreadable(chunks: Iterator[Chunk]) -> tuple[str, ...]:
    both = ((name, error) for chunk in chunks for name, error in zip(chunk.names, chunk.errors, strict=True))
    return tuple(f"{name}: {error}" for name, error in both if error)


def answer(
    artifact: Artifact, sources: Sequence[str], options: PredictOptions, stdin: IO[bytes] | None = None
) -> Iterator[dict[str, Any]]:
    """The answers for all images as dictionaries, as a line of a `.jsonl` file has them.

    Raises: as `predict` does.
    """
    answers = answers_for(artifact, options, whole=False)
    if any(output.is_map for output in answers.outputs):
        if "segment" in artifact.sidecar.spec.tasks:
            outputs, folder = "of each pixel", "-o FOLDER as masks, or with "
        else:
            outputs, folder = "maps or tokens", ""
        raise BadRequest(f"{artifact.path}: the outputs are {outputs}; write them with {folder}-o FILE.npz")
    images = open_images(sources, artifact.sidecar.preprocessing, stdin)
    total, unreadable = images.samples.total, list[str]()
    step(f"predicting {total:,} images with {artifact.path.name}")
    for chunk in track(_chunks(artifact, answers, images, options, 0), total, "images", _count):
        unreadable += _unreadable(iter([chunk]))
        yield from writers.records(answers, iter([chunk]))
    _report(unreadable, total)


def _report(unreadable: Sequence[str], total: int) -> None:
    """Say which images could not be read.

    Raises: BadRequest when none could.
    """
    if len(unreadable) == total:
        raise BadRequest(f"none of {total} images can be read ({unreadable[0]})")
    if unreadable:
        note(f"{len(unreadable)} of {total:,} images have no answer: {some(unreadable)}")


def as_text(record: Mapping[str, Any]) -> str:
    """An answer on one line."""
    return f"{record['image']}  {_text({key: value for key, value in record.items() if key != 'image'})}"


def _text(answers: Mapping[str, Any]) -> str:
    if "error" in answers:
        return f"no answer: {answers['error']}"
    if all(isinstance(answer, dict) for answer in answers.values()):  # several outputs
        return "; ".join(f"{name}: {_text(answer)}" for name, answer in answers.items())
    if "embedding" in answers:
        vector = answers["embedding"]
        return f"{len(vector)} numbers: {' '.join(f'{value:.4g}' for value in vector[:4])} …"
    if "values" in answers:
        return " ".join(f"{value:.6g}" for value in answers["values"])
    first = (f"{one.get('label', one['class'])} {100 * one['probability']:.1f} %" for one in answers["predictions"])
    decided = f"[{', '.join(answers['labels'])}] " if "labels" in answers else ""
    return decided + ", ".join(first)


def as_json(record: Mapping[str, Any]) -> str:
    """An answer as a line of JSON."""
    return msgspec.json.encode(record).decode()


def _chunks(
    artifact: Artifact, answers: Answers, images: Images, options: PredictOptions, done: int
) -> Iterator[Chunk]:
    """The answers after the first `done` images."""
    with opened(artifact, answers, options) as predictor:
        yield from predictor.chunks(images.samples.after(done), done)
