"""The devices of OpenVINO: single ones, and groups of which one or several run the model."""

import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import openvino
import pytest

from exporter import backends
from exporter.backends.openvino import OpenVinoOptions
from exporter.backends.openvino import _write as write_ir
from exporter.backends.openvino.devices import members
from exporter.build.resolve import check
from exporter.errors import BadRequest, ExporterError, Unavailable
from exporter.recipe import Bench, Checks
from tests.conftest import build, copy_artifact, needs_bf16, recipe_of

GROUPS = {
    "auto": "AUTO",
    "auto: cpu": "AUTO:CPU",
    "multi:cpu,": "MULTI:CPU",
    "hetero:cpu": "HETERO:CPU",
    "AUTO:CPU,CPU": "AUTO:CPU",
}


def opened(artifact, device):
    return backends.runtime("openvino").open(artifact, OpenVinoOptions(device=device, threads=1))


def answer(artifact, device):
    recipe = artifact.sidecar.preprocessing
    images = np.random.default_rng(0).normal(size=(2, *recipe.shape)).astype(np.float32)
    with opened(artifact, device) as session:
        return session(images)[0].copy(), session.facts


@pytest.mark.parametrize("device", GROUPS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_group_answers_as_its_device_and_says_which_that_is(device, precision, artifacts, monkeypatch):
    needs_bf16("openvino", precision)
    monkeypatch.setattr(openvino.Core, "available_devices", ["CPU"])
    expected, _ = answer(artifacts["openvino", precision], "cpu")
    answers, facts = answer(artifacts["openvino", precision], device)
    assert np.array_equal(answers, expected)
    assert facts == {"device": f"{GROUPS[device]} (CPU)", "arithmetic": precision}


def test_arithmetic_other_than_asked_for_is_found_out_in_a_group_too(artifacts, monkeypatch):
    """Left alone the CPU computes an fp32 IR in bf16."""
    needs_bf16("openvino", "bf16")
    real = openvino.Core.compile_model

    def without_hint(core, model, device, settings):
        return real(core, model, device, settings | {"DEVICE_PROPERTIES": {}})

    monkeypatch.setattr(openvino.Core, "compile_model", without_hint)
    with pytest.raises(Unavailable, match=r"AUTO \(CPU\) computes in bf16 where f32 is set"):
        answer(artifacts["openvino", "fp32"], "auto")


@pytest.mark.parametrize(
    ("device", "error", "said"),
    [
        ("auto:gpu,cpu", Unavailable, "and no GPU"),
        ("auto:-cpu", BadRequest, "no device is left; name some, as in auto:gpu,cpu"),
        ("multi", BadRequest, "no device is left; name some, as in multi:gpu,cpu"),
        ("hetero:", BadRequest, "no device is left"),
        ("auto:-", Unavailable, "no device without a name"),
        ("auto:-xyz", Unavailable, "and no XYZ"),
        ("auto:cpu,-cpu", BadRequest, "a minus is for auto alone, in front of every device"),
        ("hetero:-cpu", BadRequest, "a minus is for auto alone"),
        ("multi:cpu,xpu", Unavailable, "and no XPU"),
        ("gpu.3", Unavailable, "and no GPU.3"),
    ],
)
def test_devices_that_are_not_here_or_not_named_are_refused(device, error, said, artifacts, monkeypatch):
    monkeypatch.setattr(openvino.Core, "available_devices", ["CPU"])
    with pytest.raises(error, match=said):
        answer(artifacts["openvino", "fp32"], device)


@pytest.fixture
def asked(monkeypatch):
    """Devices and settings that models are compiled with, on a machine with two GPUs and an NPU; the CPU takes all."""
    real, compiled = openvino.Core.compile_model, []

    def on_the_cpu(core, model, device, settings):
        compiled.append((device, settings))
        return real(
            core,
            model,
            "CPU" if "DEVICE_PROPERTIES" not in settings else "AUTO:CPU",
            {"INFERENCE_PRECISION_HINT": "f32"},
        )

    monkeypatch.setattr(openvino.Core, "available_devices", ["CPU", "GPU.0", "GPU.1", "NPU"])
    monkeypatch.setattr(openvino.Core, "compile_model", on_the_cpu)
    return compiled


def test_auto_takes_an_npu_only_where_it_is_named():
    available = ["CPU", "GPU.0", "GPU.1", "NPU"]
    assert members("AUTO", available) == ("AUTO", ["CPU", "GPU.0", "GPU.1"])
    assert members("AUTO:-GPU", available) == ("AUTO:-GPU", ["CPU"])
    assert members("AUTO:-GPU.0", ["CPU", "GPU"]) == ("AUTO:-GPU.0", ["CPU"])
    assert members("AUTO:NPU,CPU", available) == ("AUTO:NPU,CPU", ["NPU", "CPU"])


def test_the_name_of_a_device_is_passed_on_as_it_is(asked, artifacts):
    for device in ("gpu", "gpu.1", "auto:gpu.1,cpu", "hetero:gpu,cpu"):
        answer(artifacts["openvino", "fp32"], device)
    assert [device for device, _ in asked] == ["GPU", "GPU.1", "AUTO:GPU.1,CPU", "HETERO:GPU,CPU"]


def test_only_the_cpu_is_given_a_number_of_threads(asked, artifacts):
    for device in ("cpu", "gpu", "multi:gpu,cpu"):
        answer(artifacts["openvino", "fp16" if device == "cpu" else "fp32"], device)
    assert ["INFERENCE_NUM_THREADS" in settings for _, settings in asked[:2]] == [True, False]
    of_each = asked[2][1]["DEVICE_PROPERTIES"]
    assert {device: set(settings) for device, settings in of_each.items()} == {
        "GPU": {"INFERENCE_PRECISION_HINT"},
        "CPU": {"INFERENCE_PRECISION_HINT", "INFERENCE_NUM_THREADS"},
    }


def test_fp16_is_computed_in_fp32_where_the_cpu_alone_computes(artifacts, monkeypatch):
    monkeypatch.setattr(openvino.Core, "available_devices", ["CPU"])
    assert answer(artifacts["openvino", "fp16"], "auto")[1]["arithmetic"] == "fp32"


def test_auto_does_not_answer_from_the_cpu_first(asked, artifacts):
    answer(artifacts["openvino", "fp32"], "auto:gpu")
    assert asked[0][1]["ENABLE_STARTUP_FALLBACK"] is False


def timed(artifact, run, cache):
    words = ("--cache-dir", cache, "--duration", "0.5", "--threads", "1", "--json")
    report = run("bench", artifact.path, *words).json
    return {f["metric"]: f["detail"].rpartition("; ")[2] for f in report["findings"] if f["metric"] in LOADS}


LOADS = ("cold_ms", "load_ms")


def test_bench_tells_a_model_that_is_compiled_from_one_of_the_cache(artifacts, run, tmp_path):
    artifact = copy_artifact(artifacts["openvino", "fp32"], tmp_path)
    kept = "from the cache of compiled models"
    assert timed(artifact, run, tmp_path / "cache") == {"cold_ms": "compiled", "load_ms": kept}
    assert timed(artifact, run, tmp_path / "cache") == {"cold_ms": kept, "load_ms": kept}


def test_a_cache_of_a_runtime_that_has_none_and_what_is_no_folder_are_refused(onnx_copy, artifacts, tmp_path, refused):
    (tmp_path / "ir").mkdir()
    line = refused(2, "bench", onnx_copy.path, "--cache-dir", tmp_path / "cache")
    assert "custom_fp32.onnx is for onnxruntime, which keeps no folder of compiled models" in line
    (tmp_path / "file").touch()
    assert "expected a folder" in refused(2, "bench", onnx_copy.path, "--cache-dir", tmp_path / "file")
    with pytest.raises(BadRequest, match="expected a folder"):
        check(recipe_of("openvino", weights="random:0", bench=Bench(cache_dir="")))
    artifact = copy_artifact(artifacts["openvino", "fp32"], tmp_path / "ir")
    assert "cannot be made" in refused(2, "bench", artifact.path, "--cache-dir", "/proc/nothing")
    with pytest.raises(BadRequest, match="this recipe is for onnxruntime, which keeps no folder of compiled models"):
        check(recipe_of("onnxruntime", weights="random:0", bench=Bench(cache_dir="build/compiled")))


def test_an_npu_takes_fixed_shapes_only(asked, artifacts, tiny, tmp_path):
    with pytest.raises(BadRequest, match=r"custom_fp32.xml: an NPU takes fixed shapes only; build it with --batch"):
        answer(artifacts["openvino", "fp32"], "npu")
    with pytest.raises(BadRequest, match="fixed shapes"):
        answer(artifacts["openvino", "fp32"], "auto:npu,cpu")
    answer(build(tiny, tmp_path, "openvino", batch=2), "npu")


@pytest.mark.parametrize("section", ["checks", "bench"])
def test_a_recipe_for_an_npu_has_fixed_shapes(section):
    for device in ("auto:npu,cpu", "npu"):
        fields = {section: {"checks": Checks, "bench": Bench}[section](device=device)}
        with pytest.raises(BadRequest, match="an NPU takes fixed shapes only; give --batch"):
            check(recipe_of("openvino", weights="random:0", **fields))
    check(recipe_of("openvino", weights="random:0", batch=1, **fields))


def test_a_recipe_for_a_device_that_the_runtime_does_not_take_is_refused():
    with pytest.raises(BadRequest, match="--device npu: this recipe is for onnxruntime, which takes cpu, cuda"):
        check(recipe_of("onnxruntime", weights="random:0", bench=Bench(device="npu")))


TWO_THREADS = """
import sys, threading
from pathlib import Path
import numpy as np
from exporter import artifact, backends

sys.setswitchinterval(1e-6)  # so that both threads are in the first call at once
opened, runtime = artifact.load(Path(sys.argv[1])), backends.runtime("openvino")
with runtime.open(opened, runtime.options(hint="throughput")) as session:
    both, images = threading.Barrier(2), np.zeros((1, 3, 64, 64), np.float32)
    threads = [threading.Thread(target=lambda: (both.wait(), session(images))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
"""


def test_the_first_calls_of_two_threads_do_not_wait_for_each_other(artifacts):
    """In OpenVINO the first conversion of a type does so in most of such processes."""
    words = [sys.executable, "-c", TWO_THREADS, str(artifacts["openvino", "fp32"].path)]
    assert subprocess.run(words, timeout=60, check=False).returncode == 0


def test_only_a_full_disk_is_called_one(tmp_path, monkeypatch):
    """The writer raises the same kind of error for everything."""

    def fail(*_, **__):
        raise RuntimeError("Exception from src/core.cpp:1:\nno attribute 'axis'")

    values = openvino.opset13.parameter([1], np.float32)
    model = openvino.Model([openvino.opset13.relu(values)], [values])
    monkeypatch.setattr(openvino, "save_model", fail)
    with pytest.raises(ExporterError, match=r"a\.xml: OpenVINO cannot write it and read it again: no attribute 'axis'"):
        write_ir(model, tmp_path / "a.xml", compress=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(OSError, match="could not be written whole"):
        write_ir(model, tmp_path / "a.xml", compress=False)
