"""A model that crashes, hangs or raises falls out alone; the process that times is never left behind."""

import itertools
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from msgspec.structs import replace

from exporter import artifact
from exporter.artifact.sidecar import Preprocessing
from exporter.bench import Arm, Plan, Timing, flat, supervisor
from exporter.machine import Conditions
from tests.bench import fakes

pytestmark = pytest.mark.usefixtures("spawned")
IS_DISTURBED = supervisor.is_disturbed  # before `conftest` replaces it
PREPROCESSING = Preprocessing(size=16, resize=16)


def plan(*names, seconds=0.05, batch=1):
    arms = tuple(Arm(name=name, path="", runtime="eager" if name == "eager" else "artifact") for name in names)
    return Plan(arms=arms, preprocessing=PREPROCESSING, seconds=seconds, batch=batch)


def timed(count, *names, hang_s=20.0, **told):
    timing = Timing(plan(*names, **told))
    taken = list(itertools.islice(supervisor.launches(timing, fakes.opened, hang_s), count))
    assert taken == timing.launches
    return timing


def processes():
    """The new interpreters, and what the fork server forked."""
    below = [child for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]
    words = {child: " ".join(child.cmdline()) for child in below}
    servers = [child.pid for child in below if child.ppid() == os.getpid() and "forkserver" in words[child]]
    return {child for child in below if "spawn_main" in words[child] or child.ppid() in servers}


@pytest.fixture
def children():
    """A function that returns the timing processes; those of other tests' fixtures are none."""
    others = processes()
    return lambda: processes() - others


def test_arms_are_timed_in_pairs_and_the_process_is_gone_afterwards(children):
    timing = timed(3, "eager", "a@1", "b@2")
    assert len(timing.launches) == 3
    for launch in timing.launches:
        assert len({len(blocks) for blocks in launch.blocks.values()}) == 1, "every arm in every round"
        ratio = np.median(flat(launch.blocks["b@2"])) / np.median(flat(launch.blocks["a@1"]))
        assert 1.6 < ratio < 2.4
        assert launch.cosine == pytest.approx({"eager": 1.0, "a@1": 1.0, "b@2": 1.0})
    assert not timing.failures
    assert not children()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("crash", "SIGSEGV"),
        ("exit", "exit code 7"),
        ("raise", "failed: out of"),
        ("closed", "failed: no such device"),
        ("hang", "did not respond for 2 s (in "),
    ],
)
def test_an_arm_that_falls_falls_alone(name, reason, children):
    timing = timed(4, "eager", name, "b@1", hang_s=2.0, seconds=0.2)
    assert set(timing.failures) == {name}
    assert reason in timing.failures[name]
    assert len(timing.launches) == 4
    assert set(timing.launches[-1].blocks) == {"eager", "b@1"}
    assert not children()


def test_when_every_arm_falls_it_ends():
    timing = timed(3, "closed 1", "closed 2")
    assert set(timing.failures) == {"closed 1", "closed 2"}
    assert timing.launches == []


def test_all_processes_time_the_product_that_the_first_one_chose():
    timing = Timing(plan("peak@1", "a@1"))
    first, *others = itertools.islice(supervisor.launches(timing, fakes.choosing), 3)
    chosen = first.facts["peak@1"]
    assert chosen["product"] == f"of process {chosen['process']}"
    assert {launch.facts["peak@1"]["product"] for launch in others} == {chosen["product"]}
    assert len({launch.facts["peak@1"]["process"] for launch in (first, *others)}) == 3


@pytest.mark.parametrize("name", ["wrong", "nan"])
def test_other_answers_than_the_first_arms_are_seen(name):
    (launch,) = timed(1, "eager", name).launches
    assert launch.cosine[name] < 0.9
    assert launch.cosine["eager"] == pytest.approx(1.0)


def test_the_same_seed_takes_the_same_inputs_and_none_is_zero():
    from exporter.bench import worker

    batches = worker.inputs(plan("eager", batch=3))
    assert [batch.shape for batch in batches] == [(3, 3, 16, 16)] * 4
    assert min(float(batch.std()) for batch in batches) > 0.1
    assert len({batch.tobytes() for batch in batches}) == 4


def test_alone_and_cold(artifacts):
    arm = Arm(name="a@5", path=str(artifacts["onnxruntime", "fp32"].path))
    found = supervisor.measure_cold(arm, plan("a@5"), fakes.opened, 20.0)
    assert not isinstance(found, str), found
    assert found.first_ms == pytest.approx(5, rel=0.1)
    assert found.cold_ms >= 5
    assert 10e6 < found.peak_bytes < 10e9
    assert not isinstance(supervisor.measure_cold(arm, plan("a@5"), fakes.alone_in_memory, 20.0), str)
    closed = Arm(name="closed", path=arm.path)
    assert "no such device" in str(supervisor.measure_cold(closed, plan("closed"), fakes.opened, 20.0))


def test_no_clock_runs_while_digests_are_checked_and_the_file_is_read_from_the_disk(artifacts, monkeypatch):
    """The kernel forgets the file after its digest was read, and before the clock starts."""
    from exporter.bench import worker

    events = []
    monkeypatch.setattr(worker, "CLOCK", lambda: events.append("clock") or time.perf_counter_ns())
    digest, evict = artifact._check, os.posix_fadvise
    monkeypatch.setattr(artifact, "_check", lambda *told: events.append("digest") or digest(*told))
    monkeypatch.setattr(os, "posix_fadvise", lambda *told: events.append("forget") or evict(*told))
    worker.checked.cache_clear()
    made = artifacts["onnxruntime", "fp32"]
    arm = Arm(name="a", path=str(made.path), threads=1)
    line = SimpleNamespace(starting=lambda name: None, tell=lambda kind, content: events.append(kind))
    worker.time_cold(line, replace(plan("a"), arms=(arm,), preprocessing=made.sidecar.preprocessing), worker.open_arm)
    assert events == ["digest", "forget", *["clock"] * 5, "cold"]


def test_a_caller_that_stops_early_leaves_nothing_behind(children):
    timing = Timing(plan("a@1"))
    launches = supervisor.launches(timing, fakes.opened, 20.0)
    next(launches)
    assert not children()
    launches.close()
    assert not children()


def test_every_launch_opens_every_arm_anew_in_a_process_of_its_own(children):
    names = ["eager", "a@1", "b@2"]
    timing = timed(4, *names)
    opened = [launch.facts for launch in timing.launches]
    assert len({facts["eager"]["process"] for facts in opened}) == 4
    assert all(len({one["process"] for one in facts.values()}) == 1 for facts in opened)
    assert all({one["opened"] for one in facts.values()} == {"1", "2", "3"} for facts in opened)
    assert len({tuple(sorted(names, key=lambda name: facts[name]["opened"])) for facts in opened}) > 1, "random order"
    assert not children()


FORKED = """
import json, os, sys
from pathlib import Path
from msgspec.structs import replace
from exporter import artifact
from exporter.bench import Arm, Plan, Timing, supervisor
from tests.bench import fakes

model = artifact.load(Path(sys.argv[1]))
arm = Arm(name=sys.argv[2], path=str(model.path), device=sys.argv[3], threads=1)
plan = Plan(arms=(arm,), preprocessing=model.sidecar.preprocessing, seconds=0.05)
if sys.argv[2] == "cold":
    facts = {"loaded": supervisor.measure_cold(arm, plan, fakes.opened).cold_from}
else:
    timing = Timing(plan)
    launches = supervisor.launches(timing, fakes.opened)
    first, second = (next(launches).facts[arm.name] for _ in range(2))
    facts = {**first, "apart": first["process"] != second["process"], "same": first["parent"] == second["parent"]}
print(json.dumps({**facts, "own": os.getpid()}))
"""


def in_a_process_of_its_own(*words):
    answer = subprocess.run([sys.executable, "-c", FORKED, *words], capture_output=True, text=True, check=True)
    return json.loads(answer.stdout)


def test_timing_processes_are_forked_from_one_that_has_imported_the_runtime(artifacts):
    seen = in_a_process_of_its_own(str(artifacts["onnxruntime", "fp32"].path), "a", "cpu")
    assert seen["imported"] == "onnxruntime"
    assert seen["apart"]
    assert seen["same"]
    assert seen["parent"] != str(seen["own"])


IMPORTED = """
import os, sys, time
from importlib import import_module
import torch  # it and NumPy have threads of their own, which survive a fork
from exporter import backends
from exporter.bench import worker
before = len(os.listdir("/proc/self/task"))
for runtime in sys.argv[1:]:
    for name in backends.runtime(runtime).modules:
        import_module(name)
time.sleep(0.2)
print(len(os.listdir("/proc/self/task")) - before, "openvino_telemetry.main" in sys.modules)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_process_that_timing_processes_are_forked_from_has_no_threads_of_runtimes():
    """A forked process lacks the threads of its parent, and can wait for them forever."""
    answer = subprocess.run([sys.executable, "-c", IMPORTED, "onnxruntime", "openvino"], capture_output=True, text=True)
    assert answer.stdout.split() == ["0", "False"], answer.stderr


def test_beside_a_gpu_timing_processes_are_new_interpreters(artifacts):
    seen = in_a_process_of_its_own(str(artifacts["onnxruntime", "fp32"].path), "a", "cuda")
    assert seen["imported"] == ""
    assert seen["parent"] == str(seen["own"])


def test_a_cold_start_imports_the_runtime(artifacts):
    assert in_a_process_of_its_own(str(artifacts["onnxruntime", "fp32"].path), "cold", "cpu")["loaded"] == "imported: "


def conditions(others_pct=0.0, steal_pct=0.0, waited_pct=0.0, throttled=0):
    return Conditions(
        load=1.0, others_pct=others_pct, steal_pct=steal_pct, throttled=throttled, mhz=None, waited_pct=waited_pct
    )


@pytest.mark.parametrize("field", ["others_pct", "steal_pct", "waited_pct", "throttled"])
def test_what_others_stretched_is_measured_again_and_left_out(field, monkeypatch):
    """The second of three processes had to share its cores."""
    monkeypatch.setattr(supervisor, "is_disturbed", IS_DISTURBED)
    first = timed(1, "eager").launches[0]
    made = [replace(first, conditions=conditions(**told)) for told in ({}, {field: 40}, {}, {}, {})]
    monkeypatch.setattr(supervisor, "launches", lambda timing, *rest: added(timing, made))
    timing = Timing(plan("eager"))
    supervisor.measure(timing, fakes.opened, 3)
    assert timing.launches == [made[0], made[2], made[3]]
    assert timing.disturbed == 1


def test_where_all_are_disturbed_each_is_measured_again_once_and_all_are_kept(monkeypatch):
    monkeypatch.setattr(supervisor, "is_disturbed", IS_DISTURBED)
    launch = replace(timed(1, "eager").launches[0], conditions=conditions(others_pct=50))
    monkeypatch.setattr(supervisor, "launches", lambda timing, *rest: added(timing, [launch] * 20))
    timing = Timing(plan("eager"))
    supervisor.measure(timing, fakes.opened, 3)
    assert len(timing.launches) == 6
    assert timing.disturbed == 0


def added(timing, made):
    for launch in made:
        timing.launches.append(launch)
        yield launch


def test_the_intervals_of_the_launches_that_are_kept_decide(monkeypatch):
    """Beside disturbed launches the interval is narrow; without them it is not yet."""
    monkeypatch.setattr(supervisor, "is_disturbed", lambda launch: launch in disturbed)
    disturbed, seen = [], []

    def launches(timing, *_):
        for number in range(12):
            timing.launches.append(number)
            disturbed.extend([number] if number % 2 else [])
            yield number

    def enough():
        seen.append(list(timing.launches))
        return len(timing.launches) >= 4

    timing = Timing(None, [], {})
    monkeypatch.setattr(supervisor, "launches", launches)
    supervisor.measure(timing, None, count=2, most=12, enough=enough)
    assert timing.launches == [0, 2, 4, 6]
    assert all(not set(one) & set(disturbed) for one in seen)
