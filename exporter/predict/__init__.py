"""Predictions of an artifact for images: classes with their probabilities, values or feature vectors.

PyTorch is not needed: the sidecar has the preprocessing, the labels and what the outputs are.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import msgspec
import numpy as np

from exporter import artifact as artifacts
from exporter import backends
from exporter.artifact import Artifact
from exporter.artifact.sidecar import Record
from exporter.backends import Outputs, Session
from exporter.data.samples import Read, Samples
from exporter.errors import BadRequest, escaped, some
from exporter.predict import masks, store, writers
from exporter.predict.answers import Answers, answers_of, check_top
from exporter.predict.sources import STDIN, Images, open_images
from exporter.predict.store import Chunk, Job
from exporter.progress import note, step, track
from exporter.recipe import Checks, Count, Device, OutputKind, RuntimeThreads
from exporter.recipe.fields import about
from exporter.verify import batch_size, run_batch
from exporter.verify.checks.segmentation import classes_of

TOP = 5  # classes of each image, where no number is given
BATCH = 16
RANGE = 512  # images that another process predicts at once
CPU_BATCH = 4  # images of a batch on a CPU, where a batch runs on each core


class PredictOptions(Record, frozen=True):
    """Options of `predict`."""

    top: Annotated[Count | None, about("Number of classes for each image.", metavar="N", default="5")] = None
    outputs: Annotated[
        OutputKind | None,
        about(
            "What a head computes: scores of classes, one of which is right; of labels, each right or not "
            "(multilabel); or values of a regression.",
            default="values for a head with one output, else classes",
        ),
    ] = None
    threshold: Annotated[
        Annotated[float, msgspec.Meta(gt=0, lt=1)] | None,
        about("Multi-label: probability from which an image has a label.", metavar="P", default="0.5"),
    ] = None
    device: Device = None
    threads: RuntimeThreads = None


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
    if "segment" in artifact.sidecar.spec.tasks and not out.suffix:
        if elsewhere:
            raise BadRequest(
                f"-o {out}: masks are written on one machine; give a name that ends in .npz, or leave --on out"
            )
        return predict_masks(artifact, sources, options, out, resume, overwrite, stdin)
    writers.check(out)
    artifacts.check_output(out)
    answers = _answers(artifact, options, whole=out.suffix.lower() == ".npz")
    writers.check_kinds(out, answers)
    images = open_images(sources, artifact.sidecar.preprocessing, stdin)
    job = Job(
        artifact=artifact.sidecar.sha256,
        images=images.key,
        total=images.samples.total,
        options={"format": out.suffix.lower(), **msgspec.to_builtins(options), "top": options.top or TOP},
    )
    with store.opened(out, job, resume, overwrite) as kept:
        done, began = kept.done(), time.monotonic()
        if done < job.total:
            step(f"predicting {job.total - done:,} images with {artifact.path.name}")
        try:
            chunks = elsewhere(done) if elsewhere else _chunks(artifact, answers, images, options, done)
            for chunk in track(chunks, job.total - done, "images", _count):
                kept.add(chunk)
        except KeyboardInterrupt:
            reached = f"{kept.done():,} of {job.total:,} images"
            raise KeyboardInterrupt(f"{out} has {reached}; --resume added to the same command continues it") from None
        finally:
            kept.flush()
        seconds = time.monotonic() - began
        unreadable = _unreadable(kept.chunks())
        if len(unreadable) == job.total:
            kept.discard()
        _report(unreadable, job.total)
        write = writers.WRITERS[out.suffix.lower()]
        kept.finish(lambda file: write(file, answers, kept.chunks))
    return Summary(total=job.total, now=job.total - done, unreadable=unreadable, seconds=seconds)


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
        have one name, and a folder that is not empty; Unavailable when the runtime is missing, or the disk is full.
    """
    if resume:
        raise BadRequest("--resume continues a file, and masks are a folder; give --overwrite")
    if out.is_file():
        raise BadRequest(f"-o {out}: is a file; give a folder for the masks, or a name that ends in .npz")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise BadRequest(f"-o {out}: expected a new or empty folder for the masks; --overwrite replaces them")
    if artifact.sidecar.spec.answer == "logits4":
        raise BadRequest(f"{artifact.path}: --output logits4 has no classes of pixels; build with labels or logits")
    recipe, answers = artifact.sidecar.preprocessing, _answers(artifact, options, whole=False)
    images = open_images(sources, recipe, stdin)
    total, began, unreadable = images.samples.total, time.monotonic(), list[str]()
    masks.check_names(out, (name for name, *_ in images.samples.items()))
    step(f"predicting {total:,} masks with {artifact.path.name}")
    for chunk in track(_chunks(artifact, answers, images, options, 0), total, "images", _count):
        unreadable += _unreadable(iter([chunk]))
        good = [name for name, error in zip(chunk.names, chunk.errors, strict=True) if not error]
        arrays = chunk.arrays() if good else {answers.outputs[0].name: ()}
        for name, pixels in zip(good, arrays[answers.outputs[0].name], strict=True):
            masks.write(masks.path_of(out, name), classes_of(pixels[None])[0], images.file(name), recipe)
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
    answers = _answers(artifact, options, whole=False)
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


def _answers(artifact: Artifact, options: PredictOptions, whole: bool) -> Answers:
    checks = Checks(outputs=options.outputs, threshold=options.threshold)
    answers = answers_of(artifact.sidecar, checks, options.top or TOP, whole)
    for option, value in (("--top", options.top), ("--threshold", options.threshold)):
        if value is not None and whole:
            raise BadRequest(f"{option} {value:g}: .npz files hold the outputs as they are; leave it out")
    check_top(options.top, answers.outputs)
    return answers


@dataclass(frozen=True)
class Predictor:
    """An opened artifact: its session, the images of a batch, and the answers that it gives."""

    session: Session
    size: int
    fixed: int | None
    answers: Answers

    def chunks(self, samples: Samples, start: int) -> Iterator[Chunk]:
        """The answers for images, the first of which is number `start` of all, a batch at a time, in order. As many
        batches run at once as the runtime has streams."""
        with ThreadPoolExecutor(streams := self.session.streams) as pool:
            run, waiting = partial(run_batch, self.session, fixed=self.fixed), deque[Future[Chunk]]()
            try:
                for group in samples.groups(self.size):
                    waiting.append(pool.submit(_answered, self.answers, group, run, start))
                    start += len(group)
                    if len(waiting) > 2 * streams:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)


@contextmanager
def _opened(artifact: Artifact, answers: Answers, options: PredictOptions) -> Iterator[Predictor]:
    """An artifact, opened. On a CPU ONNX Runtime runs each batch in one thread."""
    runtime, device = backends.runtime_of(artifact), backends.device_of(artifact, options.device)
    hint: Literal["latency", "throughput"] = "throughput" if _is_on_cpu(artifact, options) else "latency"
    with runtime.open(artifact, runtime.options(device=device, threads=options.threads, hint=hint)) as session:
        yield Predictor(session, _size(artifact, options), artifact.sidecar.batch, answers)


def _is_on_cpu(artifact: Artifact, options: PredictOptions) -> bool:
    return backends.device_kind(artifact, backends.device_of(artifact, options.device)) == "CPU"


def _size(artifact: Artifact, options: PredictOptions) -> int:
    """Images of a batch. Batches begin at the same images every time."""
    return batch_size(artifact.sidecar, CPU_BATCH if _is_on_cpu(artifact, options) else BATCH)


def _chunks(
    artifact: Artifact, answers: Answers, images: Images, options: PredictOptions, done: int
) -> Iterator[Chunk]:
    """The answers after the first `done` images."""
    with _opened(artifact, answers, options) as predictor:
        yield from predictor.chunks(images.after(done), done)


class Ranges(Record, frozen=True):
    """Ranges of images that other processes predict: the sources, the options, the name of the output, a digest of the
    images (`Images.key`), their number, the images of a range, and the versions that compute."""

    sources: tuple[str, ...]
    options: PredictOptions
    out: str
    images: str
    total: int
    size: int
    versions: dict[str, str]

    def numbers(self, done: int) -> range:
        """The numbers of the ranges that have images after the first `done`."""
        return range(done // self.size, -(-self.total // self.size))


def ranges(artifact: Artifact, sources: Sequence[str], options: PredictOptions, out: Path, size: int = RANGE) -> Ranges:
    """The ranges of a prediction; `size` is rounded up to full batches.

    Raises: as `predict` does; BadRequest for standard input.
    """
    if STDIN in sources:
        raise BadRequest("-: other processes cannot read standard input; give files, folders or a manifest")
    images, batch = open_images(sources, artifact.sidecar.preprocessing), _size(artifact, options)
    return Ranges(
        sources=tuple(sources),
        options=options,
        out=str(out),
        images=images.key,
        total=images.samples.total,
        size=-(-size // batch) * batch,
        versions=backends.computing_versions(artifact),
    )


def refuse_others(ranges: Ranges, artifact: Artifact) -> Images:
    """The images of ranges.

    Raises: BadRequest where this process has other versions or other images.
    """
    backends.refuse_other_versions(ranges.versions, artifact)
    images = open_images(ranges.sources, artifact.sidecar.preprocessing)
    if images.key != ranges.images:
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
    answers = _answers(artifact, ranges.options, whole=Path(ranges.out).suffix.lower() == ".npz")

    def chunks(number: int) -> Iterator[Chunk]:
        start = number * ranges.size
        return predictor.chunks(images.samples.between(start, start + ranges.size), start)

    with _opened(artifact, answers, ranges.options) as predictor:
        yield chunks


def _answered(answers: Answers, group: Sequence[Read], run: partial[Outputs], start: int) -> Chunk:
    """The answers for the images of a batch. One whose outputs are not finite has an error in place of an answer."""
    errors, kept = np.array([read.reason for read in group], dtype=object), dict[str, Any]()
    readable = np.flatnonzero([read.array is not None for read in group])
    if len(readable):
        values = run(np.stack([read.array for read in group if read.array is not None]))
        finite = np.logical_and.reduce([np.isfinite(value).reshape(len(value), -1).all(1) for value in values])
        errors[readable[~finite]] = "the outputs are not finite"
        kept = answers.of(tuple(value[finite] for value in values))
    return store.chunk_of(start, [escaped(read.name) for read in group], errors.tolist(), kept)
