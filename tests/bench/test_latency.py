"""`bench` on real runtimes, small: what it reports, and what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from msgspec.structs import replace

from exporter import backends, report
from exporter.artifact import Artifact
from exporter.artifact.sidecar import Preprocessing, Tensor
from exporter.backends._peak import PeakProduct
from exporter.bench import Arm, Launch, Plan, Timing, check_devices, facts, latency, limits, supervisor, worker
from exporter.compare import artifacts as comparing
from exporter.errors import BadRequest
from exporter.machine import Conditions
from exporter.recipe import Bench
from exporter.report import Finding, Report, tables
from exporter.report.formats import markdown
from tests.conftest import build, copy_artifact

QUICK = ("--duration", "0.5", "--threads", "1")


def found(reported, metric, case=None):
    return next(f for f in reported["findings"] if f["metric"] == metric and case in (None, f["case"]))


@pytest.fixture(scope="module")
def benched(artifacts, tmp_path_factory):
    """One run of `bench` over two artifacts and two batch sizes, as JSON, with its folder."""
    from tests.conftest import type_command

    folder = tmp_path_factory.mktemp("bench")
    made = [copy_artifact(artifacts[key], folder) for key in (("onnxruntime", "fp32"), ("openvino", "fp16"))]
    result = type_command("bench", *(one.path for one in made), "--batch", "1,3", *QUICK, "--json")
    assert result.code == 0, result.err
    return made, json.loads(result.out)


def test_there_is_a_report_for_each_artifact_with_its_samples(benched):
    made, reports = benched
    assert [one["artifact"]["path"] for one in reports] == [str(one.path) for one in made]
    for one, path in zip(reports, made, strict=True):
        assert one["passed"]
        for case in ("batch 1", "batch 3"):
            p50 = found(one, "p50_ms", case)
            assert len(p50["launches"]) == supervisor.PROCESSES
            assert sum(p50["launches"]) == len(p50["samples"]) >= 3 * supervisor.PROCESSES
            assert min(p50["samples"]) > 0
            assert p50["value"] <= found(one, "p90_ms", case)["value"] <= found(one, "p99_ms", case)["value"]
            speed = found(one, "speedup", case)
            assert speed["low"] <= speed["value"] <= speed["high"]
            assert found(one, "eager_p50_ms", case)["samples"]
            assert found(one, "outputs_cosine", case)["value"] > 0.999
        images = found(one, "throughput_ips", "batch 3")["value"]
        mean = sum(found(one, "p50_ms", "batch 3")["samples"]) / len(found(one, "p50_ms", "batch 3")["samples"])
        assert images == pytest.approx(3e3 / mean, rel=0.01)
        assert found(one, "cold_ms")["value"] > found(one, "first_ms")["value"] > 0
        assert found(one, "peak_bytes")["value"] > 20e6
        assert report.load(path.path.with_name(path.path.name + ".report.json")).passed


TIMES = {"p50_ms", "p90_ms", "p99_ms", "throughput_ips", "speedup", "peak_pct", "eager_p50_ms", "cold_ms", "load_ms"}


def test_every_time_names_device_threads_and_hint(benched):
    for one in benched[1]:
        timed = [f for f in one["findings"] if f["unit"] in ("ms", "×", "images/s") or f["metric"] == "peak_pct"]
        assert {f["metric"] for f in timed} >= TIMES
        assert {f["setting"] for f in timed} == {"cpu, 1 thread, latency"}


def test_times_of_disturbed_processes_are_marked_and_a_wide_interval_marks_only_the_ratio():
    def timing(others_pct, ms):
        conditions = Conditions(load=0, others_pct=others_pct, steal_pct=0, throttled=None, mhz=None)
        launches = [
            Launch(
                blocks={"eager": [[4.0]], "a": [[one]]}, cosine={}, streams={"eager": 1, "a": 1}, facts={}, settled={},
                dropped=0, conditions=conditions,
            )
            for one in ms
        ]  # fmt: skip
        arms = tuple(Arm(name=name, path=name, threads=1) for name in ("eager", "a"))
        return Timing(Plan(arms=arms, preprocessing=Preprocessing(size=16, resize=16)), launches)

    def noise(timing):
        findings = [*latency._latency(timing, "a", "batch 1"), *latency._against(timing, "a", "eager", "eager", "")]
        return {finding.metric: finding.noise for finding in findings}

    busy = "other processes used 45 % of the machine"
    assert set(noise(timing(45.0, [2.0] * 6)).values()) == {f"noisy: {busy}"}
    wide = noise(timing(0.0, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    assert (wide.pop("speedup"), set(wide.values())) == ("noisy: interval wider than ±5 %", {""})


def test_work_and_the_share_of_the_machines_peak_are_told(benched):
    made, reports = benched
    for one, name in zip(reports, ("onnxruntime fp32", "openvino fp16"), strict=True):
        assert found(one, "gmacs")["value"] * 1e9 == made[0].sidecar.macs > 1e6
        for case in ("batch 1", "batch 3"):
            share = found(one, "peak_pct", case)
            assert 0 < share["low"] <= share["value"] <= share["high"]
            assert share["value"] < 150
            assert f" on {name}" in share["detail"]
            assert "matrix product" in share["detail"] or "1×1 convolution" in share["detail"]


def test_the_share_of_the_peak_is_work_over_time_against_that_of_the_product(artifacts):
    """A quarter of the product's multiplications for each of two images, in twice its time: a quarter of its rate."""
    weights = PeakProduct(1024, convolution=True)
    made = replace(artifacts["onnxruntime", "fp32"].sidecar, macs=weights.macs // 4)
    made = Artifact(Path("a.onnx"), made)
    peak = latency.peak_name(made)
    conditions = Conditions(load=0, others_pct=0, steal_pct=0, throttled=None, mhz=None)
    launch = Launch(
        blocks={"a.onnx": [[4.0], [4.0]], peak: [[2.0], [2.0]]}, cosine={}, streams={"a.onnx": 1, peak: 1},
        facts={peak: {"macs": str(weights.macs), "product": str(weights)}}, settled={}, dropped=0,
        conditions=conditions,
    )  # fmt: skip
    arms = (Arm(name="a.onnx", path="a.onnx", device="cuda"),)
    timing = Timing(Plan(arms=arms, preprocessing=made.sidecar.preprocessing, batch=2), [launch] * 6)
    (share,) = latency._share_of_peak(timing, "a.onnx", made, "batch 2")
    assert (share.low, share.value, share.high) == pytest.approx((25, 25, 25))
    assert f"of the {2e-6 * weights.macs / 2:.0f} GFLOP/s of a 1×1 convolution of 1024 to 1024 channels" in share.detail
    launches = [
        replace(launch, parts={"a.onnx": {"h2d_ms": 1.0, "compute_ms": ms, "d2h_ms": 0.5}}) for ms in (2.0, 9.0, 3.0)
    ]
    parts = facts.parts(Timing(timing.plan, launches), "a.onnx", "batch 2")
    assert {f.metric: f.value for f in parts} == {"h2d_ms": 1.0, "compute_ms": 3.0, "d2h_ms": 0.5}
    assert {f.setting for f in [share, *parts]} == {"cuda, latency"}
    assert facts.parts(timing, "a.onnx", "batch 2") == []


def test_artifacts_that_take_pixels_in_other_units_are_timed_together(artifacts, tiny, run, tmp_path):
    made = build(tiny, tmp_path, input="uint8")
    (one, other) = run("bench", made.path, artifacts["openvino", "fp32"].path, *QUICK, "-o", tmp_path, "--json").json
    assert found(one, "outputs_cosine")["value"] > 0.99999
    assert found(other, "outputs_cosine")["value"] > 0.99999


def test_the_machine_is_told(benched):
    _, (first, _) = benched
    facts = first["environment"]
    assert facts["cpu"]
    assert facts["cores"] >= 1
    assert "governor" in facts
    assert {"load", "others_pct", "steal_pct", "launches", "dropped_rounds"} <= set(facts["timing"])
    assert 0 <= facts["timing"]["others_pct"] <= 100


def test_verify_and_bench_share_the_report(benched, run):
    (made, _), _ = benched
    path = made.path.with_name(made.path.name + ".report.json")
    before = {finding.metric for finding in report.load(path).findings}
    assert run("verify", made.path, "--samples", "2", "--threads", "1").code == 0
    after = {finding.metric for finding in report.load(path).findings}
    assert before < after
    assert {"p50_ms", "cosine"} <= after


def test_throughput_runs_several_at_once(artifacts, run, tmp_path):
    made = artifacts["onnxruntime", "fp32"]
    options = ("--hint", "throughput", "--threads", "2", "--duration", "0.5", "-o", tmp_path, "--json")
    one = run("bench", made.path, *options).json
    assert "2 batches at once" in found(one, "p50_ms")["detail"]


def test_until_goes_on_until_the_interval_is_narrow_or_for_so_long(artifacts, run, tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "MOST_TIMES", 2)
    made = artifacts["onnxruntime", "fp32"]
    one = run("bench", made.path, *QUICK, "--until", "0.05%", "-o", tmp_path, "--json").json
    timing = one["environment"]["timing"]
    assert timing["launches"] + timing["measured_again"] == 2 * supervisor.PROCESSES
    assert len(found(one, "p50_ms")["launches"]) == timing["launches"]


def test_torch_compile_is_a_row_of_its_own_or_says_why_not(artifacts, run, tmp_path):
    made = artifacts["onnxruntime", "fp32"]
    one = run("bench", made.path, *QUICK, "--also", "torch.compile", "-o", tmp_path, "--json").json
    row = found(one, "compiled_p50_ms")
    assert row["value"] or row["detail"]
    assert found(one, "speedup")["value"] > 0, "the others stand"
    if row["value"]:
        assert found(one, "speedup_over_compiled")["value"] > 0


def test_a_fallen_artifact_fails_its_own_row(artifacts, run, tmp_path, monkeypatch):
    """The second file is damaged between its check and its loading."""
    good, bad = (copy_artifact(artifacts["onnxruntime", p], tmp_path) for p in ("fp32", "fp16"))
    original = latency.time_batch

    def spoil_then_time(*told):
        bad.path.write_bytes(b"spoilt")
        return original(*told)

    monkeypatch.setattr(latency, "time_batch", spoil_then_time)
    result = run("bench", good.path, bad.path, *QUICK, "--json")
    assert result.code == 5
    first, second = json.loads(result.out)
    assert first["passed"]
    assert found(first, "speedup")["value"] > 0
    assert not second["passed"]
    assert "build the artifact again" in found(second, "p50_ms")["detail"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--batch", "0"), "a whole number from 1 to 4096"),
        (("--batch", "1,x"), "a whole number from 1 to 4096"),
        (("--until", "0%"), "a number from 0.05 to 100"),
        (("--hint", "speed"), "latency"),
        (("--also", "fp16"), "on a GPU only; add --device cuda"),
        (("--also", "tf32"), "on a GPU only; add --device cuda"),
    ],
)
def test_words_that_mean_nothing_are_refused(words, said, onnx_copy, refused):
    assert said in refused(2, "bench", onnx_copy.path, *words, folder=onnx_copy.path.parent)


def engine_of(artifact):
    """A TensorRT engine of the same network."""
    return Artifact(Path("x.plan"), replace(artifact.sidecar, backend="tensorrt", precision="fp16"))


@pytest.mark.parametrize("also", [(), ("fp16",)])
def test_an_engine_is_compared_with_eager_pytorch_on_the_gpu(also, artifacts):
    engine = engine_of(artifacts["onnxruntime", "fp32"])
    options = latency.BenchOptions(also=also)
    latency._check([engine], options)
    arms = latency.arms_of([engine], options)
    assert {arm.name: arm.device for arm in arms} == dict.fromkeys(["eager", "x.plan", *also], "cuda")
    assert [arm.device for arm in latency.arms_of([artifacts["openvino", "fp32"]], options)] == ["cpu"] * len(arms)


def test_a_device_that_a_runtime_cannot_honour_is_refused(artifacts):
    graph = artifacts["onnxruntime", "fp32"]
    engine = engine_of(graph)
    with pytest.raises(BadRequest, match=r"--device cpu: x\.plan is for tensorrt, which takes cuda"):
        latency.bench([engine], latency.BenchOptions(device="cpu"))
    with pytest.raises(BadRequest, match=r"fp32\.onnx would run on a CPU and x\.plan on an NVIDIA GPU"):
        latency.bench([engine, graph], latency.BenchOptions())
    with pytest.raises(BadRequest, match="name one device with --device"):
        comparing.check_pair(comparing.Pair(engine, graph), comparing.CompareOptions())
    check_devices([engine, graph], "cuda")


@pytest.mark.parametrize("device", ["cuda", "gpuu"])
def test_a_device_of_another_runtime_is_one_clear_line(device, artifacts, tmp_path, refused):
    made = copy_artifact(artifacts["openvino", "fp32"], tmp_path)
    line = refused(2, "bench", made.path, "--device", device, folder=tmp_path)
    assert f"--device {device}" in line
    assert "openvino, which takes cpu, gpu, npu" in line


def test_what_cannot_be_timed_together_is_refused(artifacts, tiny_v2, tmp_path, refused, onnx_copy):
    other = build(tiny_v2, tmp_path / "v2")
    assert "other weights" in refused(2, "bench", onnx_copy.path, other.path)
    onnx = onnx_copy.path
    assert "twice" in refused(2, "bench", onnx, onnx)
    namesake = shutil.copytree(onnx.parent, tmp_path / "other") / onnx.name
    same = refused(2, "bench", onnx, namesake, "-o", tmp_path / "reports")
    assert f"{tmp_path}/reports/{onnx.name}.report.json: the reports of 2 artifacts would be this file" in same
    assert "twice" in refused(2, "bench", onnx, "--also", "torch.compile", "--also", "torch.compile")
    latency._check([onnx_copy, other], latency.BenchOptions(eager=False))  # nothing is shared
    weights = artifacts["onnxruntime", "fp32"].sidecar.recipe["model"]["weights"]
    two = build(weights, tmp_path / "two", batch=2)
    three = build(weights, tmp_path / "three", batch=3)
    assert "--batch 2" in refused(2, "bench", two.path, "--batch", 1)
    assert "bench it alone" in refused(2, "bench", two.path, three.path)


@pytest.mark.usefixtures("spawned")
def test_a_fixed_batch_is_timed_without_being_named(artifacts, tmp_path, run):
    weights = artifacts["onnxruntime", "fp32"].sidecar.recipe["model"]["weights"]
    two = build(weights, tmp_path, batch=2)
    done = run("bench", two.path, "--duration", 0.5, "--json")
    assert done.code == 0, done.err
    assert {f["case"] for f in done.json["findings"] if f["metric"] == "p50_ms"} == {"batch 2"}


def test_no_report_is_written_over_an_artifact(onnx_copy, tmp_path, refused):
    shutil.copy(
        onnx_copy.path.with_name(onnx_copy.path.name + ".json"), tmp_path / f"{onnx_copy.path.name}.report.json.json"
    )
    assert "artifact" in refused(2, "bench", onnx_copy.path, "-o", tmp_path)


def test_an_interrupt_leaves_no_process_and_no_report(onnx_copy):
    """Ctrl-C in a terminal reaches the whole group of processes."""
    folder = onnx_copy.path.parent
    words = [Path(sys.executable).with_name("convnext-export"), "bench", onnx_copy.path, "--duration", "60"]
    running = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    for line in running.stderr:
        if "timing" in line:
            break
    until = time.monotonic() + 60
    while not (workers := psutil.Process(running.pid).children()) and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(2)
    os.killpg(running.pid, signal.SIGINT)
    assert running.wait(30) == 4
    assert "interrupted" in running.stderr.read()
    assert workers
    time.sleep(0.5)
    assert not [one for one in workers if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    assert not list(folder.glob("*.report.json"))


def test_a_device_that_is_not_here_is_refused_before_anything_is_timed(artifacts, refused, tmp_path, monkeypatch):
    monkeypatch.setattr("openvino.Core.available_devices", ["CPU"])
    made = copy_artifact(artifacts["openvino", "fp32"], tmp_path)
    assert "and no NPU" in refused(3, "bench", made.path, "--device", "npu", folder=tmp_path)
    plan = copy_artifact(artifacts["tensorrt", "fp16"], tmp_path)
    assert "an engine runs only on a GPU" in refused(3, "bench", plan.path, folder=tmp_path)


WITHOUT_PYTORCH = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnxscript"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
if __name__ == "__main__":
    from exporter.bench import supervisor
    from exporter.cli import main
    supervisor.PROCESSES = 2
    main()
"""


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_inspect_bench_and_report_work_where_pytorch_cannot_be_imported(backend, artifacts, tmp_path):
    script = tmp_path / "typed.py"  # a file: timing processes run it too, and are blocked as well
    script.write_text(WITHOUT_PYTORCH)
    path = copy_artifact(artifacts[backend, "fp32"], tmp_path).path
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    for words in (
        ["inspect", path],
        ["bench", path, "--no-eager", *QUICK],
        ["report", f"{path}.report.json", "--format", "markdown"],
    ):
        command = [sys.executable, str(script), *map(str, words)]
        answer = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert answer.returncode == 0, answer.stderr
    findings = json.loads(Path(f"{path}.report.json").read_text())["findings"]
    metrics = {finding["metric"] for finding in findings}
    assert {"p50_ms", "throughput_ips", "cold_ms"} <= metrics
    assert not metrics & {"speedup", "eager_p50_ms", "outputs_cosine"}


def test_without_pytorch_nothing_is_compared_with_it(artifacts):
    with pytest.raises(BadRequest, match="--no-eager: --also, --until and --min-speedup are about PyTorch"):
        latency.bench([artifacts["onnxruntime", "fp32"]], latency.BenchOptions(eager=False, min_speedup=1.0))


def test_a_speed_up_that_was_not_measured_is_below_its_limit():
    findings = (
        Finding(check="latency", metric="eager_p50_ms", case="batch 1", value=None, detail="its weights are missing"),
        Finding(check="latency", metric="p50_ms", case="batch 1", value=4.0),
    )
    one = Report(passed=True, recipe={}, artifact={"path": "a.onnx"}, environment={}, findings=findings)
    assert limits.with_limits(one, Bench()) == one
    limited = limits.with_limits(one, Bench(min_speedup=2.0))
    assert not limited.passed
    assert limited.find("speedup").detail == "PyTorch could not be timed: its weights are missing"
    assert "**fails**" in markdown.render([limited])


@pytest.mark.parametrize(
    ("first", "second", "share"), [([0, 1, 200, 3], [0, 1, 200, 4], 0.75), ([0], [0], 1), ([3], [5], 0)]
)
def test_classes_of_pixels_are_compared_by_their_equal_share(first, second, share, monkeypatch):
    """Sessions return them as floats; all zeros have no cosine, and those of two constant maps is 1."""
    monkeypatch.setattr(worker, "_outputs", lambda arm: (Tensor(name="labels", shape=(1, "n"), holds="labels"),))
    bounds = {
        name: SimpleNamespace(run=lambda: None, outputs=lambda values=values: (np.array([values], np.float32),))
        for name, values in (("eager", first), ("artifact", second))
    }
    arms = [Arm(name=name, path="labels.onnx") for name in bounds]
    shares = worker._cosines(bounds, arms, SimpleNamespace(starting=lambda name: None))
    assert shares == {"eager": 1, "artifact": share}


def test_of_several_outputs_the_worst_is_compared():
    """The second has a thousandth of the values of the first, and the wrong signs."""
    large, small = np.arange(1.0, 3001.0), np.array([1.0, -2.0, 1.0])
    assert worker._cosine((large, small), (large, small)) == pytest.approx(1)
    assert worker._cosine((large, small), (large, -small)) == pytest.approx(-1)


def test_every_way_of_pytorch_has_a_row():
    one = Report(
        passed=True, recipe={}, artifact={"path": "a.onnx"}, environment={},
        findings=tuple(
            Finding(check="latency", metric=f"{prefix}p50_ms", case="batch 1", value=4.0)
            for prefix in ("", *(f"{name}_" for name in latency.OTHERS.values()))
        ),
    )  # fmt: skip
    assert len(tables.latency([one]).rows) == 1 + len(latency.OTHERS)


def test_devices_may_be_in_capitals(artifacts):
    assert backends.device_of(artifacts["openvino", "fp32"], "CPU") == "cpu"
