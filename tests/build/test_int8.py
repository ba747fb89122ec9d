"""INT8 end to end on a tiny model: the budget, the search, the gain, and what is refused."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from exporter import artifact, backends, machine
from exporter.bench import Arm, Launch, Plan, Timing
from exporter.build import build as build_recipe
from exporter.build import resolve
from exporter.build.int8 import speed, work
from exporter.build.int8.search import Candidate, search
from exporter.errors import BadRequest
from exporter.machine import Conditions
from exporter.precision import PRECISIONS
from exporter.recipe import Model, Quantization, Recipe
from exporter.report import Finding, Report, tables
from exporter.verify import VerifyOptions, verify
from tests.build.networks import FRAGILE, write_fragile, write_labelled
from tests.conftest import ROOT, recipe_of, snapshot, write_tiny

BACKENDS = ("onnxruntime", "openvino")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(speed, "SECONDS_EACH", 0.3)


def verb(backend):
    return "onnx" if backend == "onnxruntime" else backend


@pytest.fixture(scope="module")
def fragile(tmp_path_factory):
    return write_fragile(tmp_path_factory.mktemp("fragile"))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return write_labelled(tmp_path_factory.mktemp("data") / "images.npz")


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_command_builds_judges_and_times(backend, tiny, run, tmp_path):
    done = run(verb(backend), "--int8", "--weights", tiny, "--calib-size", 24, "--threads", 1, "-o", tmp_path, "--json")
    assert done.code == 0, done.err
    made = artifact.load(tmp_path / done.json["artifact"]["path"].rpartition("/")[2])
    told = made.sidecar.quantization
    assert (told.calib, told.synthetic, told.images, told.kept) == ("synthetic", True, 24, ())
    report = json.loads((tmp_path / f"{made.path.name}.report.json").read_text())
    assert report == done.json["report"]
    found = {f["metric"]: f for f in report["findings"]}
    assert report["findings"][0]["metric"] == "gain"
    assert found["gain"]["case"] == backends.target(backend).above_int8()
    assert found["gain"]["value"] > 0
    assert found["gain"]["setting"] == found["int8_speedup"]["setting"] == "cpu, 1 thread, latency, batch 1"
    assert "dead leaves" in found["calibration"]["detail"]
    share = 100 * sum(told.layers.values()) / made.sidecar.macs
    assert found["quantized_macs_pct"]["value"] == pytest.approx(share)
    assert found["cosine"]["value"] > 0.998
    assert sorted(path.name for path in tmp_path.glob("*.onnx")) == (
        ["custom_int8.onnx"] if backend == "onnxruntime" else ["custom_nchw_int8.onnx"]
    ), "the Q/DQ graph stays"


def test_inspect_says_how_it_was_calibrated(artifacts, run):
    shown = run("inspect", artifacts["openvino", "int8"].path).out
    assert "16 images of synthetic (made from seeds, no photographs)" in shown
    assert "kept in higher precision: nothing" in shown


@pytest.mark.parametrize("told", [{}, {"batch": 2}, {"imgsz": "dynamic"}, {"task": "features"}, {"input": "uint8"}])
@pytest.mark.parametrize("backend", BACKENDS)
def test_whatever_fp32_can_be_built_as(backend, told, tiny_v2, tmp_path):
    from tests.conftest import build

    made = build(tiny_v2, tmp_path, backend, "int8", **told)
    report = verify(made, VerifyOptions(samples=8))
    assert report.passed, [f for f in report.findings if not f.passed]
    assert report.value("cosine") < 1 - 1e-9, "something was rounded"
    assert report.value("quantized_macs_pct") > 50


def test_sensitive_parts_are_found_and_kept_in_higher_precision(fragile, photographs, run, tmp_path):
    words = ("--max-drop", 0.05, "--calib", photographs, "--data", photographs)
    done = run("onnx", "--int8", "--weights", fragile, *words, "-o", tmp_path, "--json")
    assert done.code == 0, done.err
    assert set(done.json["artifact"]["quantization"]["kept"]) == set(FRAGILE)
    findings = done.json["report"]["findings"]
    kept = {f["case"]: f for f in findings if f["metric"] == "kept_back"}
    harms = {f["case"]: f["value"] for f in findings if f["metric"] == "sensitivity"}
    assert set(kept) == set(FRAGILE) == set(list(harms)[:2])
    assert min(harms[block] for block in FRAGILE) > 10 * max(v for block, v in harms.items() if block not in FRAGILE)
    assert all("% latency" in finding["detail"] for finding in kept.values()), "each was timed alone"
    assert {f["case"] for f in findings if f["metric"] == "tried_ms"} >= {"0 kept", "2 kept"}
    assert "fully quantized, it fails" in done.err
    page = run("report", tmp_path / "custom_int8.onnx.report.json", "--format", "html").out
    assert "Accuracy loss of int8 by latency" in page
    assert "kept in higher precision" in run("report", tmp_path / "custom_int8.onnx.report.json").out


def test_the_cost_of_synthetic_images_is_told_where_there_are_others(tiny, photographs, tmp_path):
    report = build_recipe(
        recipe_of(precision="int8", weights=str(tiny), max_drop=20, data=str(photographs)), tmp_path
    ).report
    cost = report.find("synthetic_cost")
    assert "when calibrated on 20 of" in cost.detail
    assert report.find("top1_drop").limit == 20


def test_data_that_cannot_be_calibrated_with_is_no_reason_to_fail(tiny, photographs, tmp_path):
    arrays = np.load(photographs)
    (tmp_path / "val").mkdir()
    lines = ["path\tlabel"]
    for index, (pixels, label) in enumerate(zip(arrays["images"], arrays["labels"], strict=True)):
        Image.fromarray(pixels).save(tmp_path / "val" / f"{index}.png")
        lines.append(f"{index}.png\t{label}")
    (tmp_path / "val" / "list.tsv").write_text("\n".join(lines))
    data = str(tmp_path / "val" / "list.tsv")
    report = build_recipe(recipe_of(precision="int8", weights=str(tiny), max_drop=20, data=data), tmp_path).report
    assert "not measured" in report.find("synthetic_cost").detail
    assert "has no sha256" in report.find("synthetic_cost").detail


def test_no_choice_that_holds_is_exit_code_5_with_the_best(tiny, photographs, run, tmp_path, monkeypatch):
    monkeypatch.setitem(
        PRECISIONS, "int8", replace(PRECISIONS["int8"], limits=replace(PRECISIONS["int8"].limits, cosine=1.1))
    )  # no cosine is above one
    done = run("onnx", "--int8", "--weights", tiny, "--calib", photographs, "-o", tmp_path)
    assert done.code == 5
    assert "FAILED: the artifact is the best candidate" in done.out
    assert artifact.load(tmp_path / "custom_int8.onnx")


def candidate(kept, holds, loss=0.0):
    finding = Finding(check="accuracy", metric="top1_drop", value=loss, limit=0.5, passed=holds)
    return Candidate(kept, None, Report(passed=holds, recipe={}, artifact={}, environment={}, findings=(finding,)))


@pytest.mark.parametrize("needed", [0, 1, 2, 3, 5, 6, 7])
def test_the_fewest_parts_are_kept_in_higher_precision(needed):
    order = [f"stages.2.{i}" for i in range(8)]
    asked = []

    def judge(work, kept):
        asked.append(len(kept))
        return candidate(kept, len(kept) >= needed)

    found = search(None, judge, lambda: dict.fromkeys(order, 0.1))
    assert found.best.kept == tuple(order[:needed])
    assert len(asked) == len(set(asked)) <= 7
    assert found.limit == 0.5


def test_fewer_parts_than_already_failed_are_not_tried():
    counts = []

    def judge(work, kept):
        counts.append(len(kept))
        return candidate(kept, len(kept) >= 20)

    search(None, judge, lambda: {f"stages.2.{i}": 0.1 for i in range(21)})
    assert counts == [0, 1, 2, 4, 8, 16, 20, 18, 19]


def test_when_nothing_holds_the_one_that_loses_least_is_best():
    order = [f"stages.2.{i}" for i in range(5)]
    losses = {0: 4.0, 1: 3.0, 2: 1.0, 4: 2.0}
    found = search(
        None, lambda work, kept: candidate(kept, False, losses[len(kept)]), lambda: dict.fromkeys(order, 0.1)
    )
    assert found.best.kept == tuple(order[:2])
    assert not found.best.report.passed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--calib", "nowhere"), "no such data"),
        (("--calib-size", 30, "--calib", "{photographs}"), "20 images, 30 were asked for"),
        (("--form", "plain"), "int8 for onnxruntime is written in the form linear"),
        (("--form", "auto"), "int8 for onnxruntime is written in the form linear"),
        (("--max-drop", -1), "expected a number from 0 to 100"),
        (("--max-drop", 0.5), "only synthetic images, on which no loss can be measured"),
        (("--max-drop", 0.5, "--data", "{photographs}", "--weights", "random:0"), "the weights are random"),
        (("--smoothing", 1.5), "expected a number from 0 to 1"),
        (("--data", "nowhere"), "no such data"),
        (("--fp16",), "one precision at a time"),
    ],
)
def test_bad_requests_change_nothing(words, said, tiny, photographs, tmp_path, refused):
    (tmp_path / "mine").write_text("precious")
    words = [str(word).format(photographs=photographs) for word in words]
    assert said in refused(2, "onnx", "--int8", "--weights", tiny, "-o", tmp_path, *words, folder=tmp_path)


def test_a_file_whose_name_begins_with_random_has_a_budget(tmp_path):
    from exporter.build import budget
    from exporter.recipe import Quantization

    for weights, points in (("random_x.safetensors", 0.3), ("random", None), ("random:7", None)):
        given = Quantization(max_drop=points)
        assert budget.points(given, "int8", str(tmp_path), weights) == points
    with pytest.raises(BadRequest, match="the weights are random"):
        budget.points(Quantization(max_drop=0.3), "int8", str(tmp_path), "random:7")


@pytest.mark.parametrize(
    "words", [("--calib", "x"), ("--max-drop", 1), ("--bias-correction", "full"), ("--threads", 1)]
)
def test_words_about_int8_are_not_passed_over(words, tiny, refused, tmp_path):
    assert f"{words[0]} is for int8" in refused(2, "onnx", "--weights", tiny, "-o", tmp_path, *words)


def test_images_of_another_size_are_refused(tiny, refused, tmp_path):
    np.savez(tmp_path / "small.npz", images=np.zeros((4, 3, 32, 32), np.float32))
    assert "images are float32 (4, 3, 32, 32)" in refused(
        2, "onnx", "--int8", "--weights", tiny, "--calib", tmp_path / "small.npz", "-o", tmp_path
    )


def test_an_interrupt_leaves_nothing_and_the_next_run_goes_on(tiny, run, tmp_path, monkeypatch):
    from exporter.quantize import simulation

    monkeypatch.setattr(simulation, "plan", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    words = ("onnx", "--int8", "--weights", tiny, "--calib-size", 17, "-o", tmp_path / "out")
    assert run(*words).code == 4
    assert not (tmp_path / "out").exists() or snapshot(tmp_path / "out") == {}
    monkeypatch.undo()
    monkeypatch.setattr(speed, "SECONDS_EACH", 0.3)
    done = run(*words)
    assert done.code == 0
    assert "statistics of these 17 images are cached" in done.err


def test_an_interrupt_of_the_timing_leaves_the_artifact(tiny, run, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "time", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    stopped = run("onnx", "--int8", "--weights", tiny, "--calib-size", 17, "-o", tmp_path)
    assert stopped.code == 4
    assert "custom_int8.onnx is complete; convnext-export bench times it" in " ".join(stopped.err.split())
    sidecar = artifact.load(tmp_path / "custom_int8.onnx").sidecar
    assert (sidecar.precision, sidecar.quality["passed"]) == ("int8", "yes")


def test_int8_that_is_not_faster_is_reported_first(tiny, run, tmp_path, monkeypatch):
    """A rival that is the artifact itself cannot be beaten."""
    monkeypatch.setattr(machine, "disturbances", lambda conditions: [])  # by other tests
    monkeypatch.setattr(speed.Timed, "ratio", lambda self, made, over: (0.9, 0.8, 0.95))
    done = run("onnx", "--int8", "--weights", tiny, "--calib-size", 16, "-o", tmp_path)
    assert done.code == 0, "it holds; whether it is used is the user's choice"
    assert "int8 is slower than fp32 here" in done.out
    assert "speed-up over eager PyTorch" in done.out.replace("\n", " ")
    assert "int8_speedup" not in done.out
    path = tmp_path / "custom_int8.onnx.report.json"
    assert "int8 is slower than fp32" in run("report", path).out.splitlines()[0]
    assert "int8 is slower than fp32" in run("report", path, "--format", "html").out
    assert "::warning" in run("report", path, "--format", "github").out


@pytest.mark.parametrize(
    ("int8_ms", "said"),
    [
        ((0.53, 0.60, 0.50, 0.55, 0.57), "no difference measurable: 0.55 ms, 0.55 ms in fp32, cpu, 2 threads, latency"),
        ((0.80, 0.81, 0.79, 0.80, 0.82), "int8 is slower than fp32 here: 0.80 ms, 0.55 ms in fp32"),
        ((0.40, 0.41, 0.39, 0.40, 0.42), "0.40 ms, 0.55 ms in fp32, cpu, 2 threads, latency, batch 1"),
    ],
)
def test_int8_is_called_slower_only_if_the_interval_excludes_one(int8_ms, said, artifacts):
    timed, search = timed_as(artifacts, int8_ms, [0.55] * 5, others_pct=0.0)
    gain = speed.findings(timed, search, [])[0]
    assert gain.detail.startswith(said)
    assert ("slower" in gain.detail) == (gain.high < 1)
    assert ("no difference" in gain.detail) == (gain.low <= 1 <= gain.high)
    assert gain.setting == "cpu, 2 threads, latency, batch 1"


def test_a_ratio_that_others_disturbed_is_marked_in_the_int8_table(artifacts):
    """Eager PyTorch waited for a busy core: 267 times as slow."""
    eager = [107.0, 103.0, 110.0, 2.4, 120.0]
    timed, search = timed_as(artifacts, [0.40, 0.41, 0.39, 0.40, 0.42], eager, others_pct=45.0)
    gain, over_eager = speed.findings(timed, search, [])[:2]
    assert "noisy: other processes used 45 % of the machine" in gain.detail
    assert gain.detail.startswith("no verdict, the timing was disturbed: 0.40 ms, 0.55 ms in fp32")
    assert over_eager.detail == "no verdict, the timing was disturbed"
    assert "interval wider" in over_eager.remarks
    calibration = Finding(check="int8", metric="calibration", value=16.0)
    made = artifacts["onnxruntime", "int8"].to_dict()
    report = Report(passed=True, recipe={}, artifact=made, environment={}, findings=(gain, over_eager, calibration))
    assert gain.low > 1
    assert tables.warnings([report]) == [f"{tables.name(report)}: {gain.detail}"], "no verdict is not 'faster'"
    (row,) = tables.int8([report]).rows
    assert "noisy: other processes used 45 % of the machine" in row[-1]
    assert "× eager noisy: interval wider than ±5 %" in row[-1]
    assert row[-1].count("other processes used 45 %") == 1
    assert "cpu, 2 threads, latency, batch 1" in row


def test_a_build_of_int8_leaves_the_fp32_graph_beside_it(tiny, tmp_path):
    recipe = Recipe(
        backend="onnxruntime", precision="int8", model=Model(weights=str(tiny)), quantization=Quantization()
    )
    assert [path.name for path in resolve(recipe, tmp_path).files] == ["custom_int8.onnx"]


@pytest.mark.parametrize(("profiles", "batch"), [([[2, 4, 8]], 2), ([[1, 1, 16]], 1)])
def test_an_engine_is_timed_at_a_batch_that_it_runs(profiles, batch, artifacts, monkeypatch):
    made = artifacts["onnxruntime", "int8"]
    engine = artifact.Artifact(made.path, msgspec.structs.replace(made.sidecar, target={"profiles": profiles}))
    search = SimpleNamespace(best=Candidate((), engine, None), tried=[Candidate((), engine, None)])
    work = SimpleNamespace(job=SimpleNamespace(recipe=recipe_of(precision="int8")))
    monkeypatch.setattr(speed.latency, "time_batch", lambda arms, made, batch, *rest, **others: batch)
    timed = speed.Timed(work, search, engine, None)
    assert (timed.batch, timed.timing) == (batch, batch)


def timed_as(artifacts, int8_ms, eager_ms, others_pct):
    """A timing in five processes, in which fp32 takes 0.55 ms."""
    made, baseline = artifacts["onnxruntime", "int8"], artifacts["onnxruntime", "fp32"]
    names = {"eager": eager_ms, str(baseline.path): [0.55] * 5, str(made.path): int8_ms}
    arms = tuple(Arm(name=name, path=name, threads=2) for name in names)
    conditions = Conditions(load=0, others_pct=others_pct, steal_pct=0, throttled=None, mhz=None)
    launches = [
        Launch(
            blocks={name: [[ms[turn]] * 3] * 3 for name, ms in names.items()}, cosine={}, facts={}, settled={},
            streams=dict.fromkeys(names, 1), dropped=0, conditions=conditions,
        )
        for turn in range(5)
    ]  # fmt: skip
    timed = object.__new__(speed.Timed)
    timed.above, timed.baseline, timed.alone, timed.batch = "fp32", baseline, {}, 1
    timed.timing = Timing(Plan(arms=arms, preprocessing=made.sidecar.preprocessing), launches)
    best = Candidate((), made, None)
    return timed, SimpleNamespace(precision="int8", best=best, tried=[best], sensitivities={}, limit=None)


def test_parts_that_the_user_keeps_have_no_cost_and_others_theirs(artifacts, monkeypatch):
    artifact_int8 = artifacts["onnxruntime", "int8"]
    timed, search = timed_as(artifacts, [0.5] * 5, [1.0] * 5, 0)
    monkeypatch.setattr(timed, "ratio", lambda one, over: (1 / 1.5, 0.6, 0.7))
    first = Candidate(("stages.2.0",), artifact_int8, None)
    for kept, cost in ((("stages.2.0",), []), (("stages.2.0", "stages.1.0"), ["+50.0 % latency"])):
        search.best = Candidate(kept, artifact_int8, None)
        search.tried = [first, search.best]
        assert [row.detail for row in speed._kept(timed, search)] == ["named by --keep", *cost]


def test_layers_that_are_not_computed_in_int8_are_named(tiny, tmp_path):
    from tests.conftest import build

    made = build(tiny, tmp_path, "onnxruntime", "int8")
    best = Candidate((), made, None)
    layers = backends.runtime("onnxruntime").layers(made, backends.Options())
    assert "all 10 quantized layers are computed in int8" in speed._reason(best, layers)
    fewer = [layer for layer in layers if layer.module != "stages.2.0.pwconv1"]
    assert speed._reason(best, fewer) == "not computed in int8: stages.2.0.pwconv1"


INSTRUCTION_SETS = (
    {"OMP_NUM_THREADS": "2"},
    {"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
)
BUILD = """
import os, sys
from pathlib import Path
import pytest
from tests import once
from tests.conftest import build
once.remember_traces(Path(os.environ[once.GRAPHS]), pytest.MonkeyPatch())
for backend, correction in (("onnxruntime", "fast"), ("openvino", "full")):
    print(build(sys.argv[1], Path(sys.argv[2]), backend, "int8", bias_correction=correction).sidecar.sha256)
"""


@pytest.mark.slow
def test_instruction_set_and_threads_do_not_change_the_bytes(tiny_v2, tmp_path):
    """Environment variables restrict PyTorch, oneDNN and MKL to older instruction sets."""
    digests = []
    for index, settings in enumerate(INSTRUCTION_SETS):
        command = [sys.executable, "-c", BUILD, str(tiny_v2), str(tmp_path / "out")]
        environment = {**os.environ, **settings, "XDG_CACHE_HOME": str(tmp_path / f"cache{index}")}
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
        digests.append(done.stdout.split())
    assert len(digests[0]) == 2
    assert digests[0] == digests[1]


@pytest.mark.parametrize("backend", [*BACKENDS, "tensorrt"])
def test_biases_of_zero_which_the_simplifier_removes_are_corrected_too(backend, tmp_path):
    """Every network that was just initialized has them."""
    folder = write_tiny(tmp_path / "weights", grn=True, layer_scale=False)
    state = load_file(folder / "model.safetensors")
    for name in [name for name in state if name.endswith("bias") and ("pwconv" in name or name.startswith("head"))]:
        state[name].zero_()
    save_file(state, folder / "model.safetensors")
    built = build_recipe(recipe_of(backend, "int8", weights=str(folder), calib_size=4), tmp_path)
    assert built.report.passed
    assert built.artifact.sidecar.quantization.kept == ()


def test_statistics_of_another_network_with_the_same_weights_are_not_taken(artifacts):
    sidecar = artifacts["onnxruntime", "int8"].sidecar
    other = msgspec.structs.replace(sidecar, architecture={**sidecar.architecture, "norm_eps": 1e-3})
    assert work._cache_key(sidecar) != work._cache_key(other)


def test_parts_of_a_head_that_is_kept_are_not_tried_again():
    tried = []

    def judge(_, kept):
        tried.append(kept)
        finding = Finding(check="parity", metric="cosine", value=0.1, passed="stages.1.0" in kept)
        report = Report(passed=finding.passed, recipe={}, artifact={}, environment={}, findings=(finding,))
        return Candidate(kept, None, report)

    measured = {"decode_head.fpn_convs.0": 3.0, "stages.1.0": 2.0, "stages.0.0": 1.0, "stages.2.0": 0.5}
    result = search(None, judge, lambda: measured, ("head",))
    assert result.best.kept == ("head", "stages.1.0")
    assert not any("decode_head.fpn_convs.0" in kept for kept in tried)
