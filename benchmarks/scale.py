"""The scheduler of `--on ray` with 10 million images on 100 to 1,600 machines, in simulated time.

    python -m benchmarks.scale -o benchmarks/results/<machine>/scale.json

`Cluster._results` schedules and repeats the tasks as in the product; Ray is replaced by machines that take the measured
time for each range, and fail. The process where the command was typed is measured with real answers: `predict` receives
them, stores them and writes the file.
"""

from __future__ import annotations

import argparse
import heapq
import json
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np

from benchmarks.provenance import RESULTS, environment
from exporter.artifact.disk import write_file
from exporter.artifact.sidecar import Record
from exporter.predict import ranges, store, writers
from exporter.predict.answers import Answers, Output
from exporter.predict.sources import open_images
from exporter.recipe import Checks
from exporter.run.cluster import Cluster
from exporter.run.needs import Need
from exporter.run.tasks import Result as TaskResult

IMAGES, MACHINES, CORES, THREADS = 10_000_000, 100, 8, 2
OPEN_S = 10.0  # a new worker imports its libraries and opens the models
DETECT_S, AWAY_S = 30.0, 600.0  # until Ray notices that a machine is gone, and until it is back
RAY_S = 0.002  # of the driver for each task: submit, wait and get
SPREAD = 0.05  # standard deviation of the time of a task, as a part of it
NAME = "photos/train/n01440764/n01440764_10026.JPEG"
BATCH, TOP, CLASSES = 4, 5, 1000
ARTIFACT_BYTES = 114 << 20  # ConvNeXt-T in fp32
RUNS = (
    (100, 512, 0.0, True), (100, 512, 0.01, True), (100, 512, 0.01, False), (100, 512, 0.1, True),
    (100, 4096, 0.01, True), (400, 512, 0.01, True), (400, 128, 0.01, True), (1600, 512, 0.01, True),
)  # fmt: skip


class Run(Record, frozen=True):
    """One run: machines, images of a range, the part of the machines that fail in an hour, whether results are passed
    on in order; seconds of the run and of an ideal one, tasks that were lost, and the most results that waited."""

    machines: int
    size: int
    failures: float
    in_order: bool
    seconds: float
    ideal_s: float
    lost: int
    waiting: int


class Driver(Record, frozen=True):
    """The process where the command was typed: images, seconds to receive and store their answers, seconds to write the
    file, the peak of resident memory, and the bytes of the answers as they are sent."""

    images: int
    receive_s: float
    write_s: float
    peak_bytes: int
    sent_bytes: int


class Result(Record, frozen=True):
    """All runs; `costs_ms`: of an image on two cores, by the kind of machine."""

    environment: dict[str, Any]
    costs_ms: dict[str, float]
    drivers: tuple[Driver, ...]
    runs: tuple[Run, ...]
    schema: int = 1

    def table(self) -> str:
        """A row for each run."""
        write_s = self.drivers[-1].write_s / self.drivers[-1].images * IMAGES
        lines = [
            "| machines | images per range | machines failing per hour | results | tasks lost "
            "| peak of waiting results | seconds | ideal seconds | ideal / seconds | with writing the file |",
            "|--:|--:|--:|---|--:|--:|--:|--:|--:|--:|",
        ]
        for run in self.runs:
            order = "in order" if run.in_order else "in any order"
            with_file = f"{run.ideal_s / (run.seconds + write_s):.2f}" if run.in_order else ""
            lines.append(
                f"| {run.machines:,} | {run.size:,} | {run.failures:.0%} | {order} | {run.lost:,} | {run.waiting:,} "
                f"| {run.seconds:,.0f} | {run.ideal_s:,.0f} | {run.ideal_s / run.seconds:.2f} | {with_file} |"
            )
        return "\n".join(lines) + "\n"

    def driver_table(self) -> str:
        """What the process where the command was typed needs, measured and for all images."""
        few, many = self.drivers[0], self.drivers[-1]
        each = (many.peak_bytes - few.peak_bytes) / (many.images - few.images)
        sent = many.sent_bytes / many.images
        waits = max(
            run.waiting * run.size for run in self.runs if (run.machines, run.size) == (MACHINES, ranges.IMAGES)
        )
        name = sys.getsizeof(NAME) + 8
        slowest = max(self.costs_ms.values())
        rows = {
            "an image on two cores": "; ".join(f"{name} {cost:.0f} ms" for name, cost in self.costs_ms.items()),
            "a range on the slowest machines": f"{ranges.IMAGES * slowest / 1000:.0f} s",
            "peak of resident memory": f"{many.peak_bytes / 1e6:,.0f} MB with {many.images:,} images, {each:.0f} bytes "
            f"more for each further image, {(many.peak_bytes + each * (IMAGES - many.images)) / 1e9:.1f} GB for all",
            "results that wait for their turn, at most": f"{waits * sent / 1e6:,.0f} MB",
            "names of a folder, in each process": f"{name} bytes an image, {name * IMAGES / 1e9:.1f} GB; 0 for a "
            "Parquet file of image bytes",
            "answers through the object store": f"{sent:.0f} bytes an image, {sent * IMAGES / 1e9:.2f} GB in all",
            "artifact through the object store": f"{ARTIFACT_BYTES * MACHINES / 1e9:.1f} GB, once to each machine",
            "receiving and storing": f"{1e6 * many.receive_s / many.images:.1f} µs an image",
            "a range in Ray, and stored": f"{1000 * RAY_S:.0f} ms (assumed), and "
            f"{1000 * ranges.IMAGES * many.receive_s / many.images:.1f} ms",
            "writing the file at the end": f"{1e6 * many.write_s / many.images:.1f} µs an image",
        }
        return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items())]) + "\n"


class Lost(Exception):
    """The machine of a task failed."""


@dataclass(eq=False)
class Machine:
    """A machine: seconds of an image on each of its slots, the tasks that run there, and how often it failed."""

    seconds: float
    running: set[Task] = field(default_factory=set)
    failed: int = 0


@dataclass(eq=False)
class Task:
    """A submitted task."""

    number: int
    lost: bool = False


class SimulatedRay:
    """Machines in simulated time, with the part of Ray's interface that `Cluster` uses."""

    exceptions = SimpleNamespace(RayError=Lost, RayTaskError=KeyError)

    def __init__(self, machines: list[Machine], size: int, failures: float, driver_s: float) -> None:
        self.machines, self.size, self.driver_s, self.failures = machines, size, driver_s, failures
        self.random, self.now, self.order = random.Random(0), 0.0, count()
        self.events: list[tuple[float, int, Any]] = []
        self.queue, self.done = deque[Task](), deque[Task]()
        self.free = deque((machine, True) for _ in range(CORES // THREADS) for machine in machines)
        self.lost = 0
        for machine in machines:
            self._fail_later(machine, 0.0)

    def nodes(self) -> list[dict[str, Any]]:
        """The machines, as Ray lists them."""
        resources = {"CPU": float(CORES)}
        every = enumerate(self.machines)
        return [{"Alive": True, "NodeID": n, "NodeManagerAddress": str(n), "Resources": resources} for n, _ in every]

    def submit(self, number: int) -> Task:
        """Queue a task."""
        task = Task(number)
        self.queue.append(task)
        self._start(self.now)
        return task

    def wait(self, _: list[Task], timeout: float) -> tuple[list[Task], list[Task]]:
        """The next task that is done, as Ray returns it."""
        end = self.now + timeout
        while True:
            while self.events and self.events[0][0] <= self.now:
                self._next()
            if self.done:
                return [self.done.popleft()], []
            if not self.events or self.events[0][0] > end:
                self.now = end
                return [], []
            self.now = self.events[0][0]

    def get(self, task: Task) -> TaskResult:
        """The result of a task."""
        self.now += self.driver_s
        if task.lost:
            raise Lost("the machine failed")
        return TaskResult()

    def _next(self) -> None:
        at, _, action = heapq.heappop(self.events)
        action(at)
        self._start(at)

    def _at(self, when: float, action: Any) -> None:
        heapq.heappush(self.events, (when, next(self.order), action))

    def _start(self, at: float) -> None:
        while self.queue and self.free:
            machine, is_new = self.free.popleft()
            task = self.queue.popleft()
            machine.running.add(task)
            took = self.size * machine.seconds * max(0.5, self.random.gauss(1, SPREAD)) + OPEN_S * is_new
            self._at(at + took, self._finishing(machine, task, machine.failed))

    def _finishing(self, machine: Machine, task: Task, failed: int) -> Any:
        def finish(_: float) -> None:
            if machine.failed == failed:
                machine.running.discard(task)
                self.done.append(task)
                self.free.append((machine, False))

        return finish

    def _fail_later(self, machine: Machine, at: float) -> None:
        if self.failures:
            self._at(at + self.random.expovariate(self.failures / 3600), lambda when: self._fail(machine, when))

    def _fail(self, machine: Machine, at: float) -> None:
        machine.failed += 1
        self.free = deque(slot for slot in self.free if slot[0] is not machine)
        lost, machine.running = list(machine.running), set()
        self.lost += len(lost)

        def notice(_: float) -> None:
            for task in lost:
                task.lost = True
            self.done += lost

        def come_back(when: float) -> None:
            self.free += [(machine, True)] * (CORES // THREADS)
            self._fail_later(machine, when)

        self._at(at + DETECT_S, notice)
        self._at(at + AWAY_S, come_back)


def costs() -> dict[str, float]:
    """Milliseconds of ConvNeXt-T (fp32, 224 × 224, ONNX Runtime, two cores) by processor: two were measured; the third
    one is between them. Decoding and preprocessing are added."""
    curves = json.loads((RESULTS / "epyc-milan-2-cores/rivals/sizes.json").read_text())["curves"]
    slow = next(c for c in curves if (c["network"], c["runtime"]) == ("ConvNeXt-T", "onnxruntime"))["milliseconds"][0]
    rows = json.loads((RESULTS / "xeon-amx-2-cores/peers/tiny-b1.json").read_text())["rows"]
    fast = next(row for row in rows if row["name"] == "ours, ONNX Runtime fp32")["launches"]
    rates = json.loads((RESULTS / "epyc-milan-2-cores/predict.json").read_text())["rates"]["decoding"]
    low, high = (median(chain.from_iterable(samples)) for samples in (fast, slow))
    decoding = 1000 / median(rates)
    return {
        "EPYC Milan": high + decoding,
        "between (assumed)": (low * high) ** 0.5 + decoding,
        "Xeon with AMX": low + decoding,
    }


def simulate(run: tuple[int, int, float, bool], costs_ms: dict[str, float], driver_s: float) -> Run:
    """One run of all images; `driver_s` of the driver for each image."""
    count_, size, failures, in_order = run
    kinds = [cost / 1000 for cost in costs_ms.values()]
    machines = [Machine(kinds[number % len(kinds)]) for number in range(count_)]
    ray = SimulatedRay(machines, size, failures, RAY_S + driver_s * size)
    numbers, submitted, waiting = deque(range(-(-IMAGES // size))), 0, 0

    def submit(number: int) -> Task:
        nonlocal submitted
        submitted += 1
        return ray.submit(number)

    passed = 0
    total = len(numbers)
    for number, _ in Cluster(ray, "ray")._results(submit, numbers, Need(cpus=THREADS), in_order):
        passed += 1
        running = len(ray.queue) + len(ray.done) + sum(len(machine.running) for machine in machines)
        waiting = max(waiting, submitted - ray.lost - passed - running)
        assert not in_order or number == passed - 1
    assert passed == total
    ideal = IMAGES / sum(CORES // THREADS / machine.seconds for machine in machines)
    return Run(
        machines=count_, size=size, failures=failures, in_order=in_order,
        seconds=ray.now, ideal_s=ideal, lost=ray.lost, waiting=waiting,
    )  # fmt: skip


def answers_from(start: int, images: int, size: int, name: str) -> Iterator[bytes]:
    """The answers of ranges as workers send them."""
    draw = np.random.default_rng(0)
    for first in range(start, images, size):
        chunks = []
        for begin in range(first, min(first + size, images), BATCH):
            end = min(begin + BATCH, images)
            arrays = {
                "logits.classes": draw.integers(0, CLASSES, (end - begin, TOP), dtype=np.int32),
                "logits.probabilities": draw.random((end - begin, TOP), dtype=np.float32),
            }
            names = [f"{name}[{row}]" for row in range(begin, end)]
            chunks.append(store.chunk_of(begin, names, [""] * len(names), arrays))
        yield msgspec.msgpack.encode(chunks)


def drive(images: int, results: Any) -> None:
    """Receive, store and write the answers for rows of a Parquet file, as `predict --on ray` does."""
    import pyarrow as pa
    from pyarrow import parquet

    from exporter.artifact.sidecar import Preprocessing

    answers = Answers((Output("logits", 0, "logits", "classes", CLASSES, ()),), TOP, Checks())
    with tempfile.TemporaryDirectory() as folder:
        table, out = Path(folder) / "rows.parquet", Path(folder) / "answers.parquet"
        parquet.write_table(pa.table({"image": pa.array([b"a"] * images)}), table, row_group_size=1000)
        opened = open_images([str(table)], Preprocessing(size=224, resize=224))
        job = store.Job(artifact="", images=opened.key, total=opened.samples.total, options={})
        sent = unreadable = 0
        received_s = 0.0
        with store.opened(out, job, resume=False, overwrite=False) as kept:
            for content in answers_from(0, images, ranges.IMAGES, str(table)):
                began = time.perf_counter()
                for chunk in msgspec.msgpack.decode(content, type=list[store.Chunk]):
                    kept.add(chunk)
                    unreadable += sum(bool(error) for error in chunk.errors)
                received_s += time.perf_counter() - began
                sent += len(content)
            began = time.perf_counter()
            kept.finish(lambda file: writers.write_parquet(file, answers, kept.chunks))
            write_s = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    results.put(Driver(images=images, receive_s=received_s, write_s=write_s, peak_bytes=peak, sent_bytes=sent))


def driven(images: int) -> Driver:
    """`drive` in a process of its own."""
    fresh = multiprocessing.get_context("spawn")
    results = fresh.Queue()
    process = fresh.Process(target=drive, args=(images, results))
    process.start()
    driver: Driver = results.get()
    process.join()
    return driver


def main() -> None:
    """Measure the driver, simulate all runs, write the result, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", type=Path, default=Path("build/scale.json"))
    parser.add_argument("--driver-images", type=int, nargs="+", default=[50_000, 400_000])
    options = parser.parse_args()
    facts, costs_ms = environment(), costs()
    drivers = tuple(map(driven, options.driver_images))
    driver_s = drivers[-1].receive_s / drivers[-1].images
    runs = tuple(simulate(run, costs_ms, driver_s) for run in RUNS)
    result = Result(environment=facts, costs_ms=costs_ms, drivers=drivers, runs=runs)
    write_file(options.o, msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    print(result.table())
    print(result.driver_table())


if __name__ == "__main__":
    main()
