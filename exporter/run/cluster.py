"""Tasks on a Ray cluster: files are sent to each machine once, and a task whose worker is lost is tried again."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from exporter import artifact as artifacts
from exporter import backends, machine
from exporter.artifact import Artifact, sidecar_path
from exporter.build.int8.workers import CalibrationPass
from exporter.errors import BadRequest, CheckFailed, Unavailable, first_line, some
from exporter.predict import Ranges
from exporter.progress import step
from exporter.run import tasks
from exporter.run.needs import Need
from exporter.run.tasks import Job, Result
from exporter.verify import graphs_of
from exporter.verify.shards import Schedule

TaskKey = TypeVar("TaskKey")
"""The number of a task, or the index of its job and its number."""
LOCAL = "ray"
TRIES = 3
AHEAD = 4  # tasks that wait in the cluster, for each one that can run
STORE_BYTES = 256 << 20
CONNECT_S = 5.0
TOKEN = "~/.ray/auth_token"
WAIT_S = 1.0  # so that Ctrl-C is not late
KEPT = "The results of the other tasks are stored: run the same command again"
SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
"""Of the clusters that this tool starts: no usage reports, and workers get as much of a core as other processes."""


def check_address(address: str) -> None:
    """Raises: BadRequest unless the address is `ray` or `ray://HOST:PORT`."""
    if address == LOCAL:
        return
    parts = urlsplit(address)
    try:
        is_address = parts.scheme == "ray" and parts.hostname and parts.port
    except ValueError:
        is_address = False
    if not is_address:
        raise BadRequest(f"--on {address}: expected ray, ray://HOST:PORT, or for verify files:DIR")


@contextmanager
def connected(address: str, needed_bytes: int = 0) -> Iterator[Cluster]:
    """A cluster: one of its own on this machine for `ray`, else the one at `ray://HOST:PORT`.

    Args:
        address: `ray` or `ray://HOST:PORT`.
        needed_bytes: of everything that is sent to its machines.

    Raises: Unavailable where Ray is not installed or the cluster cannot be reached.
    """
    reach(address)
    import logging

    for name, setting in SETTINGS.items():
        os.environ.setdefault(name, setting)
    if address != LOCAL and _has_token():  # Ray's client sends it only then; a cluster without tokens ignores it
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        import ray
    except ImportError as error:
        raise Unavailable(f"ray cannot be imported ({first_line(error)}); install it again") from None

    logging.getLogger("ray").setLevel(logging.ERROR)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if address == LOCAL:
        step("starting a Ray cluster on this machine")
        options |= {"address": "local", "num_cpus": machine.cores(), "include_dashboard": False}
        options |= {"object_store_memory": STORE_BYTES + 2 * needed_bytes, "_node_ip_address": "127.0.0.1"}
    else:
        options |= {"address": address}
    _begin(ray, address, options)
    for number, handler in handlers.items():  # Ray puts its own in their place, which abort the process
        if threading.current_thread() is threading.main_thread():
            signal.signal(number, handler)
    try:
        yield Cluster(ray, address)
    finally:
        ray.shutdown()


def _begin(ray: Any, address: str, options: dict[str, Any]) -> None:
    """Connect. Ray's processes are given up by each other where they start slowly on a busy machine, so it is tried
    again.

    Raises: Unavailable where the cluster does not answer.
    """
    for left in reversed(range(TRIES)):
        try:
            ray.init(**options)
            return
        except (OSError, RuntimeError, ray.exceptions.RayError) as error:
            ray.shutdown()
            if not left:
                may_need_token = address != LOCAL and not _has_token()
                hint = f"; if it asks for a token, copy {TOKEN} from its head machine to this one"
                raise Unavailable(
                    f"--on {address}: the cluster does not answer ({first_line(error)}){hint if may_need_token else ''}"
                ) from None


def _has_token() -> bool:
    """Whether Ray finds a token for clusters that ask for one, as those of Ray 2.60 do by default."""
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(named) or Path(TOKEN).expanduser().is_file()


def reach(address: str) -> None:
    """Check that a cluster can be used, without connecting.

    Raises: BadRequest for an address of another form; Unavailable where Ray is not installed, and where nothing listens
        at the address, for which Ray itself would wait for half a minute.
    """
    check_address(address)
    backends.require("ray", "ray")
    if address == LOCAL:
        return
    parts = urlsplit(address)
    try:
        socket.create_connection((parts.hostname or "", parts.port or 0), CONNECT_S).close()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise Unavailable(
            f"--on {address}: nothing answers there ({reason}); `ray start --head` prints the port of the Ray client "
            "server, 10001 if no other is set"
        ) from None


@dataclass(frozen=True)
class LostTask:
    """In place of the result of a task that was given up after `TRIES` lost workers: the reason."""

    reason: str


class Cluster:
    """A connected cluster."""

    def __init__(self, ray: Any, address: str) -> None:
        self.ray, self.address = ray, address

    def nodes(self) -> list[tuple[str, str, dict[str, float]]]:
        """The id, the address and the resources of each machine.

        Raises: Unavailable where there is none.
        """
        alive = [node for node in self.ray.nodes() if node["Alive"]]
        if not alive:
            raise Unavailable(f"--on {self.address}: the cluster has no machine")
        return [(node["NodeID"], node["NodeManagerAddress"], node["Resources"]) for node in alive]

    def resources(self) -> list[dict[str, float]]:
        """The resources of each machine.

        Raises: as `nodes` does.
        """
        return [resources for _, _, resources in self.nodes()]

    def sent(self, artifact: Artifact) -> tuple[Any, ...]:
        """References to the content of the files of an artifact, in the order of `files_of`."""
        return tuple(self.ray.put(path.read_bytes()) for path in paths_of(artifact))

    def check(self, job: Job, references: Sequence[Any], need: Need) -> None:
        """Refuse a cluster with a machine that lacks the versions, files or images of a job. Machines without cores or
        with fewer GPUs than needed are left out, because no task runs there.

        Raises: BadRequest or Unavailable with the address of each, and what it lacks.
        """
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        gpus = need.within(self.resources()).gpus
        nodes = [node for node in self.nodes() if node[2].get("GPU", 0) >= gpus]
        nodes = [node for node in nodes if node[2].get("CPU")] or nodes
        strategies = [NodeAffinitySchedulingStrategy(node, soft=False) for node, _, _ in nodes]
        remote = self.ray.remote(_check)
        waiting = [
            remote.options(num_cpus=0, max_retries=0, scheduling_strategy=strategy).remote(job, list(references))
            for strategy in strategies
        ]
        problems, code = [], 2
        for (_, where, _), reference in zip(nodes, waiting, strict=True):
            try:
                result = self.ray.get(reference)
            except self.ray.exceptions.RayError as error:
                result = Result(error=f"convnext-export does not start there ({_reason(error)})", exit_code=3)
            if result.error:
                problems.append(f"machine {where}: {result.error}")
                code = max(code, result.exit_code)
        if problems:
            raise Unavailable(*problems) if code == Unavailable.exit_code else BadRequest(*problems)

    def results(
        self,
        job: Job,
        references: Sequence[Any],
        numbers: Iterable[int],
        need: Need,
        in_order: bool = False,
        task: str = "shard",
        remedy: str = KEPT,
    ) -> Iterator[tuple[int, bytes]]:
        """Numbers of tasks with their results, as they are done or in order.

        A task whose worker is lost is tried `TRIES` times. The others go on.

        Args:
            job: of the tasks.
            references: of the contents that they need.
            numbers: of the tasks.
            need: of each task.
            in_order: whether results are passed on in order.
            task, remedy: for the message about lost tasks.

        Raises: what the task raised; at the end Unavailable, with the tasks that were lost each time.
        """
        need, lost = need.within(self.resources()), dict[int, str]()
        submit = self._submitter(job, references, need)
        for number, result in self._results(submit, deque(numbers), need, in_order):
            if isinstance(result, LostTask):
                lost[number] = result.reason
                if in_order:
                    break
            else:
                yield number, content_of(result)
        if lost:
            raise lost_error(f"{task} {some(map(str, lost))}", next(iter(lost.values())), remedy)

    def results_of_several(
        self, jobs: Sequence[tuple[Job, Sequence[int]]], need: Need
    ) -> Iterator[tuple[int, int, Result | LostTask]]:
        """The index of a job, the number of one of its tasks, and the result, as the tasks are done. After an error or
        a lost task the remaining tasks of that job are not submitted.

        Args:
            jobs: with the numbers of their tasks. Their artifacts are in the working folder of every machine.
            need: of each task.
        """
        need = need.within(self.resources())
        submits = [self._submitter(job, (), need) for job, _ in jobs]
        waiting = deque((index, number) for index, (_, numbers) in enumerate(jobs) for number in numbers)
        for (index, number), result in self._results(lambda key: submits[key[0]](key[1]), waiting, need):
            yield index, number, result
            if isinstance(result, LostTask) or result.error:
                others = [task for task in waiting if task[0] != index]
                waiting.clear()
                waiting.extend(others)

    def _submitter(self, job: Job, references: Sequence[Any], need: Need) -> Callable[[int], Any]:
        return partial(self.ray.remote(_do).options(**need.options()).remote, self.ray.put(job), list(references))

    def calls(
        self, function: Callable[..., Any], calls: Sequence[tuple[Need, tuple[Any, ...]]]
    ) -> Iterator[tuple[int, Any]]:
        """The index of each call of a function, with its result or a `LostTask`, as they are done.

        Args:
            function: what is called.
            calls: what each call needs, and its arguments.
        """
        # One process for each call: PyTorch keeps its first number of threads, and other tasks get another number.
        remote = self.ray.remote(max_calls=1)(function)
        machines = self.resources()
        submits = [partial(remote.options(**need.within(machines).options()).remote, *words) for need, words in calls]
        return self._results(lambda index: submits[index](), deque(range(len(calls))), Need())

    def _results(
        self, submit: Callable[[TaskKey], Any], waiting: deque[TaskKey], need: Need, in_order: bool = False
    ) -> Iterator[tuple[TaskKey, Any]]:
        """Tasks with their results or a `LostTask`. The caller may remove tasks from `waiting`, unless the results are
        in order."""
        window = AHEAD * sum(max(1, int(node.get("CPU", 1) // (need.cpus or 1))) for _, _, node in self.nodes())
        running, done, order = dict[Any, TaskKey](), dict[TaskKey, Any](), deque(waiting)
        losses = Counter[TaskKey]()
        while waiting or running or done:
            while waiting and len(running) + len(done) < window:
                task = waiting.popleft()
                running[submit(task)] = task
            ready, _ = self.ray.wait(list(running), timeout=WAIT_S) if running else ([], [])
            for reference in ready:
                task = running.pop(reference)
                try:
                    done[task] = self.ray.get(reference)
                except self.ray.exceptions.RayTaskError:
                    raise
                except self.ray.exceptions.RayError as error:
                    losses[task] += 1
                    if losses[task] < TRIES:
                        waiting.appendleft(task)
                    else:
                        done[task] = LostTask(_reason(error))
            yield from _released(done, order, in_order)


def _released(done: dict[TaskKey, Any], order: deque[TaskKey], in_order: bool) -> Iterator[tuple[TaskKey, Any]]:
    """Take the results that can be passed on."""
    while done and (not in_order or order[0] in done):
        task = order.popleft() if in_order else next(iter(done))
        yield task, done.pop(task)


def content_of(result: Result) -> bytes:
    """The content of a result.

    Raises: its error.
    """
    if result.error:
        kinds = (BadRequest, Unavailable, CheckFailed)
        raise next(kind for kind in kinds if kind.exit_code == result.exit_code)(result.error)
    return result.content


def lost_error(tasks_in_words: str, reason: str, remedy: str = KEPT) -> Unavailable:
    """The error for tasks that were given up after `TRIES` lost workers."""
    return Unavailable(
        f"{tasks_in_words}: the worker process was lost {TRIES} times ({reason}). If memory ran out, use machines with "
        f"more memory, or set fewer threads. {remedy}"
    )


def _reason(error: BaseException) -> str:
    return first_line(getattr(error, "cause", None) or error)


def _do(job: Job, references: Sequence[Any], number: int) -> Result:
    """In a worker."""
    return tasks.do(job, _contents(references), number)


def _check(job: Job, references: Sequence[Any]) -> Result:
    """In a worker."""
    return tasks.check(job, _contents(references))


def _contents(references: Sequence[Any]) -> list[Callable[[], bytes]]:
    import ray

    def reader_of(reference: Any) -> Callable[[], bytes]:
        return lambda: bytes(ray.get(reference))

    return [reader_of(reference) for reference in references]


def paths_of(artifact: Artifact) -> list[Path]:
    """The files of an artifact, and of the ONNX graph that runs where the artifact cannot, with their sidecars."""
    return [path for one in (artifact, *graphs_of(artifact)) for path in (*one.files, sidecar_path(one.path))]


def job_of(artifact: Artifact, schedule: Schedule | Ranges) -> Job:
    """The job of a schedule."""
    files = tuple((path.name, artifacts.sha256_file(path)) for path in paths_of(artifact))
    key = hashlib.sha256(repr((schedule, files)).encode("utf-8", "surrogateescape")).hexdigest()
    return Job(schedule=schedule, artifact=artifact.path.resolve(), files=files, key=key)


def calibration_job(calibration_pass: CalibrationPass, ranges: bytes) -> Job:
    """The job of a pass over calibration images that needs these ranges."""
    key = hashlib.sha256(repr(calibration_pass).encode("utf-8", "surrogateescape") + ranges).hexdigest()
    return Job(schedule=calibration_pass, artifact=Path(), files=(), key=key)
