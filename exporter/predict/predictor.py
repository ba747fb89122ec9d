"""An opened artifact that answers images, a batch at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from exporter import backends
from exporter.artifact import Artifact
from exporter.artifact.sidecar import Record
from exporter.backends import Outputs, Session
from exporter.data.samples import Read, Samples
from exporter.errors import BadRequest, escaped
from exporter.predict import store
from exporter.predict.answers import Answers, answers_of, check_top
from exporter.predict.store import Chunk
from exporter.recipe import Checks, Count, Device, OutputKind, RuntimeThreads
from exporter.recipe.fields import about
from exporter.verify import batch_size, run_batch

TOP = 5  # classes of each image, where no number is given
BATCH = 16
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


def answers_for(artifact: Artifact, options: PredictOptions, whole: bool) -> Answers:
    """What is kept of the outputs of an artifact; `whole`: the outputs as they are.

    Raises: BadRequest for options that these outputs do not have.
    """
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
def opened(artifact: Artifact, answers: Answers, options: PredictOptions) -> Iterator[Predictor]:
    """An artifact, opened. On a CPU ONNX Runtime runs each batch in one thread."""
    runtime, device = backends.runtime_of(artifact), backends.device_of(artifact, options.device)
    hint: Literal["latency", "throughput"] = "throughput" if _is_on_cpu(artifact, options) else "latency"
    with runtime.open(artifact, runtime.options(device=device, threads=options.threads, hint=hint)) as session:
        yield Predictor(session, size_of(artifact, options), artifact.sidecar.batch, answers)


def _is_on_cpu(artifact: Artifact, options: PredictOptions) -> bool:
    return backends.device_kind(artifact, backends.device_of(artifact, options.device)) == "CPU"


def size_of(artifact: Artifact, options: PredictOptions) -> int:
    """Images of a batch. Batches begin at the same images every time."""
    return batch_size(artifact.sidecar, CPU_BATCH if _is_on_cpu(artifact, options) else BATCH)


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
