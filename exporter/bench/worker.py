"""The timing process. It reports the active arm before running it, so that the supervisor can attribute a crash.

It waits until each message is acknowledged, so the supervisor draws no progress during timing."""

from __future__ import annotations

import faulthandler
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter import artifact as artifacts
from exporter import backends, machine
from exporter.artifact import Artifact
from exporter.artifact.sidecar import Tensor
from exporter.backends import Array, Bound, Options, Outputs, Runtime, Session
from exporter.bench import Arm, Cold, Launch, Opener, Plan, timing
from exporter.data import images, synthetic
from exporter.errors import first_line

INPUTS = 4
HEARTBEAT_S = 0.5
WARM_UP_S = 0.2, 3.0  # each model runs at least and at most so long before it is timed
PART_RUNS = 20
CLASSES = ("classes", "labels")  # outputs that are numbers of classes, which have no cosine
CLOCK: timing.Clock = time.perf_counter_ns


@cache
def checked(path: str) -> Artifact:
    """An artifact whose digests were checked, once in a process: outside the timed section.

    Raises: BadRequest for a missing, changed or damaged file or sidecar.
    """
    return artifacts.load(Path(path))


def runtime_of(arm: Arm) -> Runtime[Options]:
    """The runtime of an arm.

    Raises: BadRequest as `checked` does.
    """
    in_pytorch = arm.runtime not in ("artifact", "peak")
    return backends.runtime("eager") if in_pytorch else backends.runtime_of(checked(arm.path))


@contextmanager
def open_arm(arm: Arm) -> Iterator[Session]:
    """Open the session of an arm.

    Raises: the errors of its runtime.
    """
    artifact, runtime = checked(arm.path), runtime_of(arm)
    options: dict[str, Any] = {"device": arm.device, "threads": arm.threads, "hint": arm.hint}
    options |= {"cache_dir": arm.cache_dir} if arm.cache_dir else {}
    if arm.runtime not in ("artifact", "peak"):
        options |= {"weights": arm.weights, "compiled": arm.runtime == "torch.compile", "reference": arm.reference}
        options |= {"arithmetic": arm.runtime} if arm.runtime in ("tf32", "fp16", "bf16") else {}
    if arm.runtime == "peak":
        assert runtime.peak is not None
        opened = runtime.peak(artifact, runtime.options(**options), arm.product)
    else:
        opened = runtime.open(artifact, runtime.options(**options))
    with opened as session:
        yield session


class Line:
    """The worker's end of the connection to its supervisor: the active arm, and messages that wait for an answer."""

    def __init__(self, connection: Connection, active: Any, plan: Plan) -> None:
        self.connection, self.active = connection, active
        self.index = {arm.name: index for index, arm in enumerate(plan.arms)}
        self.heard = time.monotonic()

    def starting(self, name: str) -> None:
        """Report the active arm by one store to shared memory, and from time to time by a message."""
        self.active.value = self.index[name]
        if time.monotonic() - self.heard > HEARTBEAT_S:
            self.tell("alive", None)

    def tell(self, kind: str, content: Any) -> None:
        """Send a message and wait for its acknowledgement."""
        self.connection.send((kind, content))
        self.connection.recv()
        self.heard = time.monotonic()


def work(
    task: Callable[..., None], connection: Connection, active: Any, plan: Plan, opener: Opener, stack: Connection
) -> None:
    """The body of the timing process: run the task, and send the message of an error to the supervisor. SIGUSR1 makes
    it write its Python stack to a pipe."""
    if hasattr(faulthandler, "register"):  # not on Windows
        faulthandler.register(signal.SIGUSR1, stack.fileno(), all_threads=False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor decides what an interrupt means
    try:
        task(Line(connection, active, plan), plan, opener)
        connection.send(("done", None))
        os._exit(0)  # all sessions are closed; an orderly end of the interpreter takes up to a second
    except (EOFError, BrokenPipeError):  # nobody is watching any more
        raise SystemExit(1) from None
    except Exception as error:
        connection.send(("failed", first_line(error)))
        raise SystemExit(1) from error


def time_arms(line: Line, plan: Plan, opener: Opener) -> None:
    """Open every arm, in random order, and time them in turn."""
    shuffle = random.Random(plan.seed)
    # Forked processes share addresses; padding of random size moves the models in memory.
    padding = np.empty(4096 * shuffle.randrange(1, 4096), np.uint8), bytearray(shuffle.randrange(1 << 14))
    with ExitStack() as stack:
        sessions = {arm.name: _open(arm, line, opener, stack) for arm in shuffle.sample(plan.arms, len(plan.arms))}
        launch = _launch(line, plan, sessions, shuffle)
    del padding
    line.tell("launch", launch)


def _open(arm: Arm, line: Line, opener: Opener, stack: ExitStack) -> Session:
    line.starting(arm.name)
    return stack.enter_context(opener(arm))


def _launch(line: Line, plan: Plan, sessions: dict[str, Session], shuffle: random.Random) -> Launch:
    names, batches = [arm.name for arm in plan.arms], inputs(plan)
    bounds: dict[str, Bound] = {}
    paces: dict[str, timing.Pace] = {}
    with timing.undisturbed():
        for name in shuffle.sample(names, len(names)):
            line.starting(name)
            bounds[name] = sessions[name].bind(batches)
            paces[name] = timing.settle(bounds[name].run, *WARM_UP_S, CLOCK)
        watch = machine.Watch()
        runs = {name: bounds[name].run for name in names}
        rounds = timing.interleave(runs, paces, plan.seconds, shuffle, line.starting, CLOCK)
        conditions = watch.conditions()
    return Launch(
        blocks=rounds.blocks,
        cosine=_cosines(bounds, [arm for arm in plan.arms if plan.compared and arm.runtime != "peak"], line),
        streams={name: bounds[name].streams for name in names},
        facts={name: sessions[name].facts for name in names},
        settled={name: paces[name].settled for name in names},
        dropped=rounds.dropped,
        conditions=conditions,
        parts={name: _parts(bound.parts) for name, bound in bounds.items() if bound.parts},
    )


def _parts(measured: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The median of each part over some runs."""
    runs = [measured() for _ in range(PART_RUNS)]
    return {part: median(run[part] for run in runs) for part in runs[0]}


def inputs(plan: Plan) -> list[NDArray[Any]]:
    """Different batches of images with the statistics of photographs; or pictures of one size."""
    recipe = plan.preprocessing
    if recipe.input == "image":
        size = synthetic.picture_size(1)
        return [synthetic.dead_leaves(size, turn, recipe.channels)[None] for turn in range(INPUTS)]
    pixels = [synthetic.dead_leaves(recipe.size, seed, recipe.channels) for seed in range(4)]
    scenes = [images.normalise(one, recipe) for one in pixels]
    return [
        np.ascontiguousarray(np.stack([np.roll(scenes[(turn + i) % 4], i, axis=-1) for i in range(plan.batch)]))
        for turn in range(INPUTS)
    ]


def _cosines(bounds: dict[str, Bound], arms: list[Arm], line: Line) -> dict[str, float]:
    """The smallest cosine between outputs of an arm and the nearest output of the first arm.

    The nearest is taken because arms are at different places in the rotation of inputs.
    """
    numbers = {arm.name: _class_numbers(arm) for arm in arms}
    answers = {name: [_answer(bounds[name], name, line, numbers[name]) for _ in range(INPUTS)] for name in numbers}
    reference = next(iter(answers.values()), [])
    similar = _equal_share if any(map(_holds_classes_alone, arms)) else _cosine
    return {name: min(max(similar(got, one) for one in reference) for got in own) for name, own in answers.items()}


def _class_numbers(arm: Arm) -> set[int]:
    """The places of outputs that are numbers of classes, which have no cosine; none for an arm without a file, and none
    where no other output is left."""
    tensors = _outputs(arm)
    places = {place for place, tensor in enumerate(tensors) if tensor.holds in CLASSES}
    return places if len(places) < len(tensors) else set()


def _holds_classes_alone(arm: Arm) -> bool:
    tensors = _outputs(arm)
    return bool(tensors) and all(tensor.holds in CLASSES for tensor in tensors)


def _outputs(arm: Arm) -> tuple[Tensor, ...]:
    """The outputs that the sidecar of an arm lists; none for an arm without a file."""
    has_sidecar = arm.path and artifacts.sidecar_path(Path(arm.path)).exists()
    return artifacts.read_sidecar(Path(arm.path)).outputs if has_sidecar else ()


def _answer(bound: Bound, name: str, line: Line, left_out: set[int]) -> Outputs:
    """The outputs of a run, without those at some places."""
    line.starting(name)
    bound.run()
    return tuple(output for place, output in enumerate(bound.outputs()) if place not in left_out)


def _equal_share(first: Outputs, second: Outputs) -> float:
    """The share of equal numbers of classes."""
    if [output.shape for output in first] != [output.shape for output in second]:
        return -1.0
    return float(np.mean(np.concatenate([(a == b).ravel() for a, b in zip(first, second, strict=True)])))


def _cosine(first: Outputs, second: Outputs) -> float:
    """The smallest cosine of an output; −1 where one is zero everywhere or not finite."""
    if [output.shape for output in first] != [output.shape for output in second]:
        return -1.0
    return min(map(_cosine_of_one, first, second))


def _cosine_of_one(first: Array, second: Array) -> float:
    a, b = (output.ravel().astype(np.float64) for output in (first, second))
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if np.isfinite(scale) and scale > 0 else -1.0


def time_cold(line: Line, plan: Plan, opener: Opener) -> None:
    """Time the only arm of the plan from a cold start, then warm."""
    (arm,) = plan.arms
    line.starting(arm.name)
    batches = inputs(plan)
    _evict(checked(arm.path))
    cold, cold_from = _run_once(arm, opener, batches)
    begin = CLOCK()
    with opener(arm) as session:
        loaded = CLOCK()
        session.bind(batches).run()
        first = CLOCK()
        line.tell(
            "cold",
            Cold(
                cold_ms=cold / 1e6,
                load_ms=(loaded - begin) / 1e6,
                first_ms=(first - loaded) / 1e6,
                peak_bytes=machine.peak_memory_bytes(),
                cold_from=cold_from,
                load_from=session.facts.get("loaded", ""),
            ),
        )


def _run_once(arm: Arm, opener: Opener, batches: list[NDArray[Any]]) -> tuple[int, str]:
    """The nanoseconds of loading and one run, and where the model was loaded from. No reference to the session is left,
    so that it is not in memory beside the next one."""
    begin = CLOCK()
    with opener(arm) as session:
        session.bind(batches).run()
        return CLOCK() - begin, session.facts.get("loaded", "")


def _evict(artifact: Artifact) -> None:
    """Ask the kernel to forget the files of an artifact, whose digests were just read, so that they are read from the
    disk again."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in artifact.files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
