"""A cluster gives the bytes of one machine, loses nothing with a worker, and refuses what it cannot do by name."""

import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from PIL import Image

from exporter import machine, predict
from exporter.data import synthetic
from exporter.errors import BadRequest, Unavailable
from exporter.predict import PredictOptions, store
from exporter.run import cluster, distributed, recipes, spread, tasks
from exporter.run.cluster import Cluster
from exporter.run.needs import Need
from exporter.verify import VerifyOptions, shards
from tests import once
from tests.conftest import copy_artifact, snapshot

MARK = "TESTS_RAY"  # in the environment of all processes of a cluster of these tests
RAY = Path(sys.executable).with_name("ray")


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def of_the_cluster(sockets):
    """The processes that were started with this mark, and those that they started, whose environment Ray overwrites."""
    marked = [
        process
        for process in psutil.process_iter(["environ"])
        if process.pid != os.getpid() and (process.info["environ"] or {}).get(MARK) == sockets
    ]
    started = []
    for process in marked:
        with suppress(psutil.NoSuchProcess):  # it has ended since
            started += [process, *process.children(recursive=True)]
    return started


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """The folders of the caches of two Ray nodes."""
    return [tmp_path_factory.mktemp("cache") for _ in range(2)]


@pytest.fixture(scope="module")
def address(tmp_path_factory, caches):
    """Two Ray nodes on this machine, each with room for two workers, and the address of their client server."""
    pytest.importorskip("ray")
    pytest.importorskip("grpc")
    gcs, client = free_ports(2)
    sockets = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # the path of a socket has at most 107 characters
    folder = tmp_path_factory.mktemp("ray")
    settings = {
        "RAY_AUTH_MODE": "disabled",
        **cluster.SETTINGS,
        "OMP_NUM_THREADS": "1",
        MARK: sockets,
    }
    room = ["--num-cpus", "2", "--object-store-memory", "100000000", "--node-ip-address", "127.0.0.1"]
    ports = ["--min-worker-port", "0", "--max-worker-port", "0"]
    head = ["--head", "--port", gcs, "--ray-client-server-port", client, "--include-dashboard=false"]
    commands = [[*head, "--temp-dir", sockets, *ports], ["--address", f"127.0.0.1:{gcs}", *ports]]
    # The client servers of two clusters on one machine take the same ports.
    one_at_a_time = once.locked(once.shared_folder(tmp_path_factory, "ray-clusters") / "one")
    with one_at_a_time, pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        for words, cache in zip(commands, caches, strict=True):
            patch.setenv("XDG_CACHE_HOME", str(cache))
            started = [RAY, "start", *map(str, words), *room]
            subprocess.run(started, check=True, capture_output=True, timeout=120, cwd=folder)
        yield f"ray://127.0.0.1:{client}"
        for process in of_the_cluster(sockets):
            with suppress(psutil.NoSuchProcess):
                process.kill()
    shutil.rmtree(sockets, ignore_errors=True)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for number in range(60):
        folder = root / f"class {number % 10}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(synthetic.dead_leaves(48, number)).save(folder / f"{number}.png")
    (root / "class 3" / "43.png").write_bytes(b"no image")
    return root


@pytest.fixture
def copied(artifacts, tmp_path):
    (tmp_path / "built").mkdir()
    return copy_artifact(artifacts["onnxruntime", "fp32"], tmp_path / "built")


def kill_one_worker(done):
    """Kill the first process that does a task."""
    while not done.is_set():
        for process in psutil.process_iter(["name", "cmdline"]):
            if "ray::_do" in " ".join(process.info["cmdline"] or []):
                process.kill()
                return
        time.sleep(0.01)


@pytest.mark.slow
def test_a_report_and_predictions_have_the_bytes_of_one_machine(address, copied, photos, tmp_path, run, monkeypatch):
    monkeypatch.chdir(photos)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for _ in range(2):
        assert run("verify", copied.path, "--data", photos).code == 0
    report = copied.path.with_name(f"{copied.path.name}.report.json")
    expected = report.read_bytes()
    report.unlink()
    done = threading.Event()
    killer = threading.Thread(target=kill_one_worker, args=(done,))
    killer.start()
    result = run("verify", copied.path, "--data", photos, "--on", address, "--shard-size", 16)
    done.set()
    killer.join()
    assert result.code == 0, result.err
    assert "in 4 shards of up to 16 images" in result.err
    assert report.read_bytes() == expected
    assert not list(report.parent.glob(".*shards")), "the shards are removed at the end"

    assert run("predict", copied.path, ".", "-o", tmp_path / "one.csv").code == 0
    monkeypatch.setattr("exporter.predict.ranges.IMAGES", 16)
    result = run("predict", copied.path, ".", "-o", tmp_path / "several.csv", "--on", address)
    assert result.code == 0, result.err
    assert (tmp_path / "several.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounting a small disk needs root")
def test_a_full_disk_of_one_machine_changes_nothing(address, caches, copied, photos, run, monkeypatch):
    monkeypatch.chdir(photos)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    report = copied.path.with_name(f"{copied.path.name}.report.json")
    assert run("verify", copied.path, "--data", photos).code == 0
    expected = report.read_bytes()
    for cache in caches:
        shutil.rmtree(cache / "convnext-export", ignore_errors=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", caches[1]], capture_output=True).returncode:
        pytest.skip("this machine does not allow to mount")
    try:
        (caches[1] / "filler").write_bytes(bytes(4096))
        result = run("verify", copied.path, "--data", photos, "--on", address, "--shard-size", 16)
        assert [file for file in caches[1].rglob("*") if file.is_file()] == [caches[1] / "filler"]
    finally:
        subprocess.run(["umount", "-l", caches[1]], check=True)
    assert result.code == 0, result.err
    assert report.read_bytes() == expected
    assert len(list(caches[0].rglob("*.sealed"))) < 4, "each machine has measured some of the four batches"


@pytest.mark.slow
def test_rows_of_a_parquet_file_are_answered_on_a_cluster(address, copied, photos, tmp_path, run, monkeypatch):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("exporter.predict.ranges.IMAGES", 8)
    contents = [file.read_bytes() for file in sorted(photos.rglob("*.png"))]
    parquet.write_table(pa.table({"image": contents}), tmp_path / "rows.parquet", row_group_size=20)
    words = ("predict", copied.path, tmp_path / "rows.parquet", "-o")
    assert run(*words, tmp_path / "one.parquet").code == 0
    result = run(*words, tmp_path / "several.parquet", "--on", address)
    assert result.code == 0, result.err
    assert (tmp_path / "several.parquet").read_bytes() == (tmp_path / "one.parquet").read_bytes()
    assert parquet.read_metadata(tmp_path / "one.parquet").num_rows == len(contents)


def write_recipes(folder, weights, bench):
    for precision in ("fp32", "fp16"):
        text = f"backend: onnxruntime\nprecision: {precision}\nmodel: {{weights: {weights}}}\nchecks: {{samples: 4}}\n"
        (folder / f"{precision}.yaml").write_text(f"{text}bench: {bench}\n")


@pytest.mark.slow
def test_recipes_run_on_a_cluster(address, tiny, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_recipes(tmp_path, tiny, "null")
    result = run("run", "fp32.yaml", "fp16.yaml", "-o", "out", "--on", address, "--json")
    assert result.code == 0, result.err
    steps = {"build": "done", "verify": "done", "bench": "not asked for"}
    assert [outcome["steps"] for outcome in result.json] == [steps] * 2
    again = run("run", "fp32.yaml", "fp16.yaml", "-o", "out", "--dry-run", "--on", address, "--json").json
    assert [(state["build"], state["verify"]) for state in again.values()] == [("already there", "already there")] * 2


class OneProcess:
    """A cluster whose tasks run in this process, the last one first; some of its tasks fail."""

    address = cluster.LOCAL

    def __init__(self, failing=()):
        self.called, self.failing = [], failing

    def nodes(self):
        return [("a", "here", {"CPU": 8}), ("b", "there", {"CPU": 2, "GPU": 1})]

    def check(self, job, references, need):
        assert not tasks.check(job, references).error

    def calls(self, function, calls):
        for index, (need, (job, recipe_run)) in reversed(list(enumerate(calls))):
            cpus, gpus, call = min(need.cpus, 8), need.gpus, (function.__name__, recipe_run.path.stem)
            self.called.append((*call, cpus, gpus, need.memory > 0))
            yield index, cluster.LostTask("it was killed") if call in self.failing else function(job, recipe_run)

    def results_of_several(self, jobs, need):
        for index, (job, numbers) in enumerate(jobs):
            for number in reversed(numbers):
                self.called.append((number, job.artifact.stem, need.cpus, need.gpus, False))
                lost = (job.artifact.stem, number) in self.failing
                yield index, number, cluster.LostTask("it was killed") if lost else tasks.do(job, (), number)


@pytest.fixture
def one_process(tiny, tmp_path, monkeypatch):
    """Recipes in fp32 and fp16 in the working folder, and a function that runs them in shards of 2 images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shards, "IMAGES", 2)
    monkeypatch.setattr("exporter.verify.batches.BATCH", 2)

    def use(bench, failing=()):
        write_recipes(tmp_path, tiny, bench)
        of_tests = OneProcess(failing)
        monkeypatch.setattr(recipes, "connected", lambda *_: nullcontext(of_tests))
        return of_tests

    return use


@pytest.mark.slow
def test_artifacts_are_verified_in_shards_after_all_are_built_and_then_timed_alone(one_process, run):
    used = one_process("{duration: 0.5}")
    result = run("run", "fp32.yaml", "fp16.yaml", "-o", "out", "--on", "ray", "--json")
    assert result.code == 0, result.err
    assert [outcome["steps"] for outcome in result.json] == [dict.fromkeys(("build", "verify", "bench"), "done")] * 2
    threads = machine.default_threads()
    assert used.called == [
        ("build", "fp16", 1, 0, True),
        ("build", "fp32", 1, 0, True),
        (1, "custom_fp32", threads, 0, False),
        (0, "custom_fp32", threads, 0, False),
        (1, "custom_fp16", threads, 0, False),
        (0, "custom_fp16", threads, 0, False),
        ("bench", "fp16", 8, 0, False),
        ("bench", "fp32", 8, 0, False),
    ]
    of_one = run("run", "fp32.yaml", "fp16.yaml", "-o", "one", "--json").json
    for ours, theirs in zip(result.json, of_one, strict=True):
        assert not_timed(ours["report"]) == not_timed(theirs["report"])
    again = run("run", "fp32.yaml", "fp16.yaml", "-o", "out", "--json").json
    assert [set(outcome["steps"].values()) for outcome in again] == [{"already there"}] * 2


def not_timed(report):
    return [finding for finding in report["findings"] if finding["check"] != "latency"]


@pytest.mark.slow
def test_a_lost_shard_fails_its_recipe_alone_and_the_same_command_measures_only_that(one_process, run):
    one_process("null", failing=[("custom_fp32", 0)])
    result = run("run", "fp32.yaml", "fp16.yaml", "-o", "out", "--on", "ray", "--json")
    assert result.code == 3
    assert "onnxruntime/fp32: shard 0: the worker process was lost 3 times (it was killed)" in result.err
    failed, whole = result.json
    assert (failed["report"], whole["error"]) == (None, None)
    used = one_process("null")
    result = run("run", "fp32.yaml", "fp16.yaml", "-o", "out", "--on", "ray", "--json")
    assert result.code == 0, result.err
    assert [call[:2] for call in used.called if isinstance(call[0], int)] == [(0, "custom_fp32")]
    assert not list(Path("out/runs").rglob("*.shard"))


@pytest.mark.slow
@pytest.mark.parametrize(("step", "task"), [("build", "build"), ("bench", "timing")])
def test_a_lost_build_or_timing_fails_its_recipe_alone_and_the_same_command_repeats_only_that(
    one_process, run, step, task
):
    one_process("{duration: 0.5}", failing=[(step, "fp32")])
    result = run("run", "fp32.yaml", "fp16.yaml", "-o", "out", "--on", "ray", "--json")
    assert result.code == 3
    assert f"onnxruntime/fp32: {task}: the worker process was lost 3 times (it was killed)" in result.err
    assert [bool(outcome["error"]) for outcome in result.json] == [True, False]
    one_process("{duration: 0.5}")
    result = run("run", "fp32.yaml", "fp16.yaml", "-o", "out", "--on", "ray", "--json")
    assert result.code == 0, result.err
    repeated, whole = (outcome["steps"] for outcome in result.json)
    assert (repeated[step], set(whole.values())) == ("done", {"already there"})


@pytest.mark.slow
def test_an_artifact_that_is_removed_after_its_build_fails_its_recipe_alone(one_process, run, monkeypatch):
    one_process("null")
    create = spread.create_internal
    monkeypatch.setattr(
        spread,
        "create_internal",
        lambda *words: (Path("out/custom_fp32.onnx").unlink(missing_ok=True), create(*words))[1],
    )
    result = run("run", "fp32.yaml", "fp16.yaml", "-o", "out", "--on", "ray", "--json")
    assert result.code == 2
    assert "onnxruntime/fp32: out/custom_fp32.onnx: No such file or directory" in result.err
    assert [bool(outcome["error"]) for outcome in result.json] == [True, False]


@pytest.mark.slow
def test_images_that_cannot_be_read_are_read_again_by_the_same_command(one_process, photos, tmp_path, run):
    one_process("null")
    (tmp_path / "data").mkdir()
    photo, text = photos / "class 0" / "0.png", (tmp_path / "fp32.yaml").read_text()
    (tmp_path / "fp32.yaml").write_text(text.replace("samples: 4", "data: data"))
    for broken in (True, False):
        (tmp_path / "data" / "a.png").write_bytes(bytes(photo.stat().st_size) if broken else photo.read_bytes())
        os.utime(tmp_path / "data" / "a.png", (1, 1))
        result = run("run", "fp32.yaml", "-o", "out", "--on", "ray", "--json")
        assert result.code == (2 if broken else 0), result.err
        assert ("none of its 1 images can be read" in result.err) == broken


def test_a_second_run_of_a_recipe_on_a_cluster_is_refused(one_process, refused):
    one_process("null")
    with spread.alone(Path("out/runs/onnxruntime_fp32/shards"), "a"):
        message = refused(2, "run", "fp16.yaml", "fp32.yaml", "-o", "out", "--on", "ray")
    assert "another process is working on onnxruntime/fp32 in this folder" in message
    assert not list(Path("out").glob("*.onnx"))


@pytest.mark.slow
def test_each_build_has_a_process_of_its_own(address):
    """PyTorch keeps the number of threads of its first task; shards need another one."""
    with cluster.connected(address) as connected:
        processes = dict(connected.calls(lambda: os.getpid(), [(Need(), ())] * 3))
    assert len(set(processes.values())) == 3


@pytest.mark.slow
def test_a_recipe_whose_images_are_missing_has_its_artifact_and_the_error(one_process, tmp_path, run):
    one_process("null")
    (tmp_path / "fp32.yaml").write_text((tmp_path / "fp32.yaml").read_text().replace("samples: 4", "data: nowhere"))
    result = run("run", "fp32.yaml", "-o", "out", "--on", "ray", "--json")
    assert result.code == 2
    (outcome,) = result.json
    assert outcome["steps"] == {"build": "done"}
    assert outcome["artifact"]
    assert "nowhere" in outcome["error"]


@pytest.mark.slow
def test_an_artifact_that_is_missing_on_a_machine_is_named(worker, copied, photos):
    job = cluster.job_of(copied, shards.schedule(copied, VerifyOptions(data=str(photos))))
    gone = replace(job, artifact=job.artifact.with_name("gone.onnx"))
    assert tasks.do(gone, (), 0).error == (
        f"{gone.artifact}: missing on {platform.node()}, or not the artifact that was built; mount the same working "
        "folder on every machine"
    )


@pytest.mark.slow
def test_a_machine_of_another_version_is_refused_by_its_address(address, copied, photos):
    schedule = shards.schedule(copied, VerifyOptions(data=str(photos)))
    job = cluster.job_of(copied, schedule)
    with cluster.connected(address) as connected:
        references = connected.sent(copied)
        connected.check(job, references, Need())
        with pytest.raises(BadRequest) as caught:
            connected.check(replace(job, version="0.0"), references, Need())
    assert len(caught.value.args) == 2
    for line in caught.value.args:
        assert re.fullmatch(r"machine \S+: convnext-export \S+, but the job is of 0.0; install that version", line)


# Lost workers, with a Ray that loses as many as a test wants.


class Lost(Exception):
    """A worker was lost."""


class FakeRay:
    """Does the last submitted task first, and loses some as often as `losses` says."""

    exceptions = SimpleNamespace(RayError=Lost, RayTaskError=KeyError)

    def __init__(self, losses):
        self.losses, self.waiting, self.most = dict(losses), [], 0

    def nodes(self):
        return [{"Alive": True, "NodeID": "a", "NodeManagerAddress": "here", "Resources": {"CPU": 2}}]

    def put(self, job):
        return job

    def remote(self, function=None, **options):
        """A function whose calls are the numbers of tasks, with their job in front if there is one."""
        if options:
            return self.remote
        remote = lambda job, _, number: self.submit(number if job is None else (job, number))  # noqa: E731
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=remote))

    def submit(self, number):
        reference = SubmittedTask(number)
        self.waiting.append(reference)
        self.most = max(self.most, len(self.waiting))
        return reference

    def wait(self, references, timeout):
        assert timeout == cluster.WAIT_S
        assert set(references) == set(self.waiting)
        return [self.waiting.pop()], []

    def get(self, reference):
        if self.losses.get(reference.number, 0) > 0:
            self.losses[reference.number] -= 1
            raise Lost("it was killed")
        return tasks.Result(str(reference.number).encode())


class SubmittedTask:
    def __init__(self, number):
        self.number = number


def results(losses, in_order=False):
    """The numbers of 30 tasks in the order in which their results come, and the error at the end."""
    ray, done = FakeRay(losses), []
    try:
        for number, content in Cluster(ray, "ray").results(None, (), range(30), Need(cpus=1), in_order):
            assert content == b"%d" % number
            done.append(number)
    except Unavailable as error:
        return done, re.search(r"shard (.*): the worker process was lost 3 times (\(.*?\))", str(error)).groups(), ray
    return done, "", ray


@pytest.mark.parametrize("in_order", [False, True])
def test_a_task_is_tried_three_times(in_order):
    done, error, ray = results({3: 2, 29: 1}, in_order=in_order)
    assert not error
    assert sorted(done) == list(range(30))
    assert (done == sorted(done)) == in_order
    assert ray.most <= cluster.AHEAD * 2, "no more tasks than that wait in the cluster"


def test_a_task_that_is_lost_each_time_is_named_and_the_others_stand():
    done, error, _ = results({3: 3, 7: 5})
    assert sorted(done) == [number for number in range(30) if number not in (3, 7)]
    assert error in (("3, 7", "(it was killed)"), ("7, 3", "(it was killed)"))


def test_in_order_nothing_behind_a_lost_task_is_passed_on():
    done, error, _ = results({3: 3}, in_order=True)
    assert done == [0, 1, 2]
    assert error == ("3", "(it was killed)")


def test_lost_tasks_are_named_with_what_to_do():
    ray = FakeRay({7: 3})
    with pytest.raises(Unavailable) as caught:
        list(Cluster(ray, "ray").results(None, [], [3, 7], Need(), True, "range", "Add --resume"))
    assert str(caught.value) == (
        "range 7: the worker process was lost 3 times (it was killed). If memory ran out, use machines with more "
        "memory, or set fewer threads. Add --resume"
    )


def test_calls_are_tried_three_times_as_well():
    calls = [(Need(), (None, [], number)) for number in range(3)]
    results = dict(Cluster(FakeRay({1: 2, 2: 3}), "ray").calls(print, calls))
    assert results == {0: tasks.Result(b"0"), 1: tasks.Result(b"1"), 2: cluster.LostTask("it was killed")}


def test_after_a_lost_task_no_other_of_its_job_is_begun_and_the_other_jobs_go_on():
    ray = FakeRay({("a", 7): 3})
    jobs = [("a", range(30)), ("b", range(30))]
    results = list(Cluster(ray, "ray").results_of_several(jobs, Need(cpus=1)))
    done = {index: [number for job, number, _ in results if job == index] for index in (0, 1)}
    assert sorted(done[1]) == list(range(30))
    assert len(done[0]) <= cluster.AHEAD * 2, "only those that the cluster had"
    assert [(job, number, result) for job, number, result in results if isinstance(result, cluster.LostTask)] == [
        (0, 7, cluster.LostTask("it was killed"))
    ]


CORES, MEMORY, GPU = {"CPU": 64, "memory": 8e9}, {"CPU": 8, "memory": 64e9}, {"CPU": 16, "memory": 8e9, "GPU": 1}


@pytest.mark.parametrize(
    ("need", "machines", "expected"),
    [
        (Need(cpus=4, memory=1 << 40), [{"CPU": 2}], Need(cpus=2)),
        (recipes.ALONE, [CORES, MEMORY, GPU], Need(cpus=64)),
        (replace(recipes.ALONE, gpus=1), [CORES, MEMORY, GPU], Need(cpus=16, gpus=1)),
        (replace(recipes.ALONE, gpus=1), [CORES, MEMORY], Need(cpus=64)),
        (replace(recipes.ALONE, memory=int(30e9)), [CORES, MEMORY, GPU], Need(cpus=8, memory=int(30e9))),
        (replace(recipes.ALONE, memory=int(1e9)), [CORES, MEMORY, GPU], Need(cpus=64, memory=int(1e9))),
        (Need(cpus=8, memory=int(48e9)), [{"memory": 64e9}, {"CPU": 16, "memory": 32e9}], Need(8, 0, int(32e9))),
    ],
)
def test_a_task_needs_no_more_than_one_machine_has(need, machines, expected):
    assert need.within(machines) == expected


# One process, as a worker is.


@pytest.fixture
def worker(monkeypatch, tmp_path):
    """The state that a worker changes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path
    tasks._close()


def contents(artifact):
    return [path.read_bytes for path in cluster.paths_of(artifact)]


def test_a_worker_opens_a_job_once_and_takes_its_folder_and_threads(copied, photos, worker, monkeypatch):
    schedule = shards.schedule(copied, VerifyOptions(data=str(photos)), 16)
    job = replace(cluster.job_of(copied, schedule), threads="", folder=photos)
    opened, real = [], shards.open_worker

    def counted(*arguments):
        opened.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(shards, "open_worker", counted)
    for number in (1, 0):
        result = tasks.do(job, [], number)
        assert not result.error
        assert shards.decode(result.content).number == number
    assert len(opened) == 1
    assert Path.cwd() == photos
    assert "OMP_NUM_THREADS" not in os.environ
    assert tasks.do(replace(job, key="another"), [], 0).content
    assert len(opened) == 2


def test_a_machine_without_the_artifact_gets_a_copy_once(copied, photos, worker):
    schedule = shards.schedule(copied, VerifyOptions(data=str(photos)), 16)
    job = replace(cluster.job_of(copied, schedule), artifact=worker / "nowhere" / copied.path.name)
    copied_files = []

    def content(path):
        copied_files.append(path)
        return path.read_bytes()

    sent = [lambda path=path: content(path) for path in cluster.paths_of(copied)]
    assert tasks.check(job, sent).error == ""
    assert len(copied_files) == 2
    assert tasks.do(job, sent, 0).error == ""
    assert len(copied_files) == 2


def test_a_machine_keeps_the_copies_that_it_used_last(copied, photos, worker, monkeypatch):
    monkeypatch.setattr(tasks, "COPIES", 3)
    schedule = shards.schedule(copied, VerifyOptions(data=str(photos)), 16)
    job = replace(cluster.job_of(copied, schedule), artifact=worker / "nowhere" / copied.path.name)
    kept = worker / "cache" / "convnext-export" / "artifacts"
    for key in ("a", "b", "c", "a", "d"):
        assert tasks.check(replace(job, key=key), contents(copied)).error == ""
        for folder in kept.iterdir():
            os.utime(folder, (0, folder.stat().st_mtime - 100))
    assert sorted(folder.name for folder in kept.iterdir()) == ["a", "c", "d"]
    assert all(len(list(folder.iterdir())) == 2 for folder in kept.iterdir())


def test_a_cache_that_cannot_be_written_is_one_line(copied, photos, worker):
    (worker / "cache").write_bytes(b"a file")
    schedule = shards.schedule(copied, VerifyOptions(data=str(photos)), 16)
    job = replace(cluster.job_of(copied, schedule), artifact=worker / "nowhere" / copied.path.name)
    assert "cache" in tasks.check(job, contents(copied)).error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "9"}, "but the job is of 9; install that version"),
        ({"folder": Path("/no/such/folder")}, "mount it under the same path on every machine"),
    ],
)
def test_a_machine_that_cannot_take_part_says_why(change, message, copied, photos, worker):
    schedule = shards.schedule(copied, VerifyOptions(data=str(photos)))
    result = tasks.check(replace(cluster.job_of(copied, schedule), **change), contents(copied))
    assert message in result.error
    assert result.exit_code == 2


def test_a_machine_without_the_images_says_so(copied, photos, worker):
    options = VerifyOptions(data=str(photos))
    schedule = shards.schedule(copied, options)
    gone = type(schedule)(
        **{name: getattr(schedule, name) for name in schedule.__struct_fields__}
        | {"options": VerifyOptions(data=str(worker / "gone"))}
    )
    assert "no such data" in tasks.check(cluster.job_of(copied, gone), contents(copied)).error
    ranges = predict.ranges_of(copied, [str(photos)], PredictOptions(), Path("out.csv"))
    (worker / "few").mkdir()
    Image.fromarray(synthetic.dead_leaves(48, 0)).save(worker / "few" / "a.png")
    other = predict.ranges_of(copied, [str(worker / "few")], PredictOptions(), Path("out.csv"))
    changed = type(ranges)(**{name: getattr(other, name) for name in other.__struct_fields__} | {"images_digest": "x"})
    assert "other images than when the command began" in tasks.check(cluster.job_of(copied, changed), []).error


@pytest.mark.slow
def test_a_cluster_of_its_own_reports_nothing_and_its_workers_are_not_niced(monkeypatch):
    pytest.importorskip("ray")
    for name in cluster.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    with cluster.connected("ray") as connected:
        (niceness,) = connected.calls(niceness_and_reports, [(Need(), ())])
    assert niceness == (0, (0, "0"))
    for name in cluster.SETTINGS:
        monkeypatch.delenv(name)


def niceness_and_reports():
    return os.nice(0), os.environ["RAY_USAGE_STATS_ENABLED"]


def test_a_cluster_that_asks_for_a_token_is_explained(monkeypatch, tmp_path):
    def init(address):
        raise ConnectionError("ray client connection timeout")

    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    ray = SimpleNamespace(init=init, shutdown=lambda: None, exceptions=SimpleNamespace(RayError=Lost))
    with pytest.raises(
        Unavailable, match=r"if it asks for a token, copy ~/\.ray/auth_token from its head machine to this one$"
    ):
        cluster._begin(ray, "ray://head:10001", {"address": "ray://head:10001"})


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_a_connection_is_tried_three_times(failures):
    tried = []

    def init(address):
        tried.append(address)
        if len(tried) <= failures:
            raise ConnectionAbortedError("Initialization failure from server")

    ray = SimpleNamespace(init=init, shutdown=lambda: None, exceptions=SimpleNamespace(RayError=Lost))
    if failures == 3:
        with pytest.raises(Unavailable, match=r"does not answer \(Initialization failure from server\)"):
            cluster._begin(ray, "ray", {"address": "local"})
    else:
        cluster._begin(ray, "ray", {"address": "local"})
    assert len(tried) == min(failures + 1, 3)


def test_without_ray_the_line_that_installs_it_is_printed(copied, refused, monkeypatch, tmp_path):
    real = machine.installed
    monkeypatch.setattr(machine, "installed", lambda name: None if name == "ray" else real(name))
    words = ("verify", copied.path, "--on", "ray")
    assert "pip install 'convnext-export[ray]'" in refused(3, *words)


def test_a_cluster_that_cannot_be_reached_is_one_line(copied, refused, photos, tmp_path):
    pytest.importorskip("ray")
    (port,) = free_ports(1)
    words = ("predict", copied.path, photos, "-o", tmp_path / "a.csv", "--on", f"ray://127.0.0.1:{port}")
    assert f"--on ray://127.0.0.1:{port}: nothing answers there" in refused(3, *words, folder=tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predict", "ARTIFACT", "-", "-o", "a.csv", "--on", "ray"], "cannot read standard input"),
        (["predict", "ARTIFACT", "PHOTOS", "--on", "ray"], "add -o FILE"),
        (["predict", "ARTIFACT", "PHOTOS", "-o", "a.csv", "--on", "slurm"], "expected ray, ray://HOST:PORT"),
        (["run", "onnxruntime/tiny_fp16", "--on", "ray", "--jobs", "2"], "leave one out"),
        (["run", "onnxruntime/tiny_fp16", "--on", "files:a"], "expected ray, ray://HOST:PORT"),
        (["onnx", "--weights", "random:0", "--on", "ray"], "--on is for int8; add --int8, or leave it out"),
        (["onnx", "--weights", "random:0", "--int8", "--on", "slurm"], "expected ray, ray://HOST:PORT"),
    ],
)
def test_bad_words_are_refused(words, message, copied, photos, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    real = {"ARTIFACT": copied.path, "PHOTOS": photos}
    assert message in refused(2, *(real.get(word, word) for word in words), folder=tmp_path)


def test_two_verifications_of_one_report_do_not_meet(copied, photos, refused, tmp_path):
    report = copied.path.with_name(f"{copied.path.name}.report.json")
    with spread.alone(report.with_name(f".{report.name}.shards"), "a"):
        before = snapshot(tmp_path)
        message = refused(2, "verify", copied.path, "--on", "ray")
    assert "another process is working on custom_fp32.onnx in this folder" in message
    assert snapshot(tmp_path) == before


def test_an_interrupted_verification_goes_on_with_the_missing_shards(copied, photos, run, monkeypatch):
    submitted = []

    class OneMachine:
        """Does the tasks in this process; Ctrl-C comes after two of them."""

        def sent(self, artifact):
            return contents(artifact)

        def check(self, job, references, need):
            assert not tasks.check(job, references).error

        def results(self, job, references, numbers, need, *_, **__):
            del need
            for done, number in enumerate(numbers):
                if done == 2 and not submitted[2:]:
                    raise KeyboardInterrupt
                submitted.append(number)
                yield number, tasks.do(job, references, number).content

    monkeypatch.setattr(distributed, "connected", lambda *_: nullcontext(OneMachine()))
    words = ("verify", copied.path, "--data", photos, "--on", "ray", "--shard-size", 16)
    result = run(*words)
    assert result.code == 4
    assert "2 of 4 shards are stored; the same command continues" in result.err
    own = next(copied.path.parent.glob(".*.shards"))
    (own / "of others" / "shards").mkdir(parents=True)  # as a killed process leaves it
    (own / ".schedule.json.1.new").touch()
    assert run(*words).code == 0
    assert sorted(submitted) == [0, 1, 2, 3]
    tasks._close()


def test_shards_of_images_that_were_replaced_since_are_measured_again(copied, photos, tmp_path):
    folder, own = tmp_path / "photos", tmp_path / "own"
    shutil.copytree(photos, folder)
    schedule = shards.schedule(copied, VerifyOptions(data=str(folder)), 16)
    spread.create_internal(own, schedule).store(0, b"a shard")
    assert spread.create_internal(own, schedule).missing() == [1, 2, 3]
    changed = next(folder.rglob("*.png"))
    os.utime(changed, (1, 1))
    assert shards.schedule(copied, VerifyOptions(data=str(folder)), 16) == schedule, "copies may have other times"
    assert spread.create_internal(own, schedule).missing() == [0, 1, 2, 3]
    assert not list(own.rglob("*.shard"))


def test_an_output_is_continued_in_the_middle_of_a_batch(copied, photos, tmp_path, monkeypatch):
    """As after a part that had batches of another size: no image is answered twice."""
    out, whole = tmp_path / "a.csv", tmp_path / "whole.csv"
    predict.predict(copied, [str(photos)], PredictOptions(), whole)

    class OneMachine:
        """Does the tasks in this process."""

        sent, check = (lambda *_: [] for _ in range(2))

        def results(self, job, references, numbers, need, in_order, *_, **__):
            del need
            assert in_order
            for number in numbers:
                yield number, tasks.do(job, references, number).content

    def part(done):
        schedule = predict.ranges_of(copied, [str(photos)], PredictOptions(), out)
        with predict.open_ranges(schedule, copied) as chunks:
            first = next(iter(chunks(0)))
        assert len(first.names) == 4
        yield replace_chunk(first)
        raise KeyboardInterrupt

    def replace_chunk(chunk):
        rows = {name: array[:2] for name, array in chunk.arrays().items()}
        return store.chunk_of(0, list(chunk.names[:2]), ["", ""], rows)

    monkeypatch.setattr(distributed, "connected", lambda *_: nullcontext(OneMachine()))
    with pytest.raises(KeyboardInterrupt):
        predict.predict(copied, [str(photos)], PredictOptions(), out, elsewhere=part)
    distributed.predict(copied, [str(photos)], PredictOptions(), "ray", out, resume=True)
    assert out.read_bytes() == whole.read_bytes()
    tasks._close()
