"""`--cpu`: number formats by class of CPU, and what is said on a machine of another class."""

import json

import numpy as np
import onnx_ir as ir
import pytest

from exporter.build import resolve
from exporter.errors import BadRequest
from exporter.quantize import cpus
from exporter.quantize.rounding import MAX_SUM
from tests.conftest import recipe_of

VNNI = ("some Xeon", ["avx512f", "avx512_vnni", "avx2"])
AVX2 = ("some EPYC", ["avx2"])


def machine_of(monkeypatch, cpu=AVX2, architecture="x86_64"):
    monkeypatch.setattr("exporter.machine.cpu", lambda: cpu)
    monkeypatch.setattr("platform.machine", lambda: architecture)


@pytest.mark.parametrize(
    ("cpu", "architecture", "expected"),
    [
        (VNNI, "x86_64", "vnni"),
        (AVX2, "x86_64", "portable"),
        (("Neoverse", []), "aarch64", "arm"),
        (AVX2, "AMD64", "portable"),
    ],
)
def test_the_class_of_this_machine(cpu, architecture, expected, monkeypatch):
    machine_of(monkeypatch, cpu, architecture)
    assert cpus.of_this_machine() == expected


def built(run, tiny, out, cpu, *words):
    done = run("onnx", "--int8", "--cpu", cpu, "--weights", tiny, "--calib-size", 8, "-o", out, "--json", *words)
    assert done.code in (0, 5), done.err
    return done.json


@pytest.mark.slow
def test_formats_differ_and_the_sidecar_says_which(tiny, run, tmp_path, monkeypatch):
    monkeypatch.setattr("exporter.build.int8.speed.SECONDS_EACH", 0.3)
    facts = {cpu: built(run, tiny, tmp_path / cpu, cpu) for cpu in ("portable", "vnni", "arm")}
    assert {cpu: one["artifact"]["quantization"]["cpu"] for cpu, one in facts.items()} == {cpu: cpu for cpu in facts}
    sums = {cpu: largest_sum(one["report"]) for cpu, one in facts.items()}
    assert sums["portable"] <= MAX_SUM < sums["vnni"]
    assert activations(tmp_path / "portable") == activations(tmp_path / "vnni") == {np.dtype(np.uint8)}
    assert activations(tmp_path / "arm") == {np.dtype(np.int8)}


def largest_sum(report):
    (finding,) = [one for one in report["findings"] if one["metric"] == "saturation"]
    return int(finding["detail"].partition("products: ")[2].partition(" ")[0])


def activations(folder):
    model = ir.load(folder / "custom_int8.onnx")
    return {node.outputs[0].dtype.numpy() for node in model.graph if node.op_type == "QuantizeLinear"}


@pytest.mark.slow
def test_another_machine_is_told(tiny, run, tmp_path, monkeypatch):
    monkeypatch.setattr("exporter.build.int8.speed.SECONDS_EACH", 0.3)
    machine_of(monkeypatch, VNNI)
    at_home = built(run, tiny, tmp_path, "this")
    assert at_home["artifact"]["quantization"]["cpu"] == "vnni", "resolved when it was built"
    assert not [one for one in at_home["report"]["findings"] if one["metric"] == "other_cpu"]
    machine_of(monkeypatch, AVX2)
    path = tmp_path / "custom_int8.onnx"
    verified = run("verify", path, "--samples", 4, "--json").json
    (finding,) = [one for one in verified["findings"] if one["metric"] == "other_cpu"]
    assert "this CPU has no VNNI" in finding["detail"]
    timed = run("bench", path, "--duration", 0.5)
    assert "this CPU has no VNNI" in timed.err
    assert "built for" in run("inspect", path).out
    assert json.loads(run("inspect", path, "--json").out)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("openvino", "--cpu", "arm"), "use --fp16"),
        (("trt", "--cpu", "vnni"), "one format for all devices"),
        (("onnx", "--cpu", "avx2"), "vnni"),
    ],
)
def test_what_has_no_format_is_refused(words, expected, tiny, run, tmp_path):
    done = run(*words, "--int8", "--weights", tiny, "-o", tmp_path / "out")
    assert done.code == 2
    assert expected in done.err
    assert not (tmp_path / "out").exists()


def test_without_int8_it_is_refused(tiny, run, tmp_path):
    done = run("onnx", "--cpu", "vnni", "--weights", tiny, "-o", tmp_path)
    assert done.code == 2
    assert "--cpu is for int8" in done.err


def test_a_recipe_with_this_names_the_class(tiny, tmp_path, monkeypatch):
    machine_of(monkeypatch, VNNI)
    recipe = recipe_of(precision="int8", weights=str(tiny), cpu="this")
    assert resolve(recipe, tmp_path).recipe.quantization.cpu == "vnni"
    with pytest.raises(BadRequest, match="--cpu arm"):
        resolve(recipe_of(backend="openvino", precision="int8", weights=str(tiny), cpu="arm"), tmp_path)
