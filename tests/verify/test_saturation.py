"""Int8 sums that can saturate without VNNI are computed from an artifact's weights, and reported."""

import dataclasses

import numpy as np
import pytest

from exporter import backends, machine
from exporter.build import resolve
from exporter.build.int8.work import prepare
from exporter.verify import VerifyOptions, verify
from exporter.verify.checks.structure import saturation
from tests.conftest import recipe_of

RUNTIMES = ("onnxruntime", "openvino")


@pytest.fixture
def unbounded(tiny, tmp_path, request):
    """An int8 artifact as it was built before adjacent weights had a bound."""
    job = resolve(recipe_of(request.param, "int8", weights=str(tiny)), tmp_path)
    job = dataclasses.replace(job, placement=dataclasses.replace(job.placement, exact_pairs=False))
    return prepare(job, tmp_path).make((), tmp_path)


def layers(made):
    backend = backends.runtime(made.sidecar.backend)
    return backend.layers(made, backend.options())


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_int8_builds_cannot_saturate(runtime, artifacts):
    made = artifacts[runtime, "int8"]
    found = layers(made)
    assert {layer.module for layer in found if layer.pair_sum is not None} == set(made.sidecar.quantization.layers)
    (finding,) = saturation(found)
    assert finding.value == 0
    assert "none of" in finding.detail


@pytest.mark.parametrize("unbounded", RUNTIMES, indirect=True)
def test_saturating_layers_are_counted_and_named(unbounded, run, monkeypatch):
    sums = {layer.module: layer.pair_sum for layer in layers(unbounded) if layer.pair_sum is not None}
    assert set(sums) == set(unbounded.sidecar.quantization.layers)
    beyond = [name for name, value in sums.items() if value > np.iinfo(np.int16).max]
    monkeypatch.setattr(machine, "cpu", lambda: ("of long ago", ["avx2"]))
    report = verify(unbounded, VerifyOptions(samples=4))
    found = report.find("saturation")
    assert found.value == len(beyond) > 5
    assert f"{len(beyond)} of {len(sums)} layers can saturate on x86 CPUs without VNNI" in found.detail
    assert "this CPU has no VNNI" in found.detail
    assert max(sums, key=sums.get) in found.detail
    assert f"{max(sums.values())}" in found.detail
    monkeypatch.setattr(machine, "cpu", lambda: ("of today", ["avx512_vnni", "avx2"]))
    assert "this CPU has no VNNI" not in saturation(layers(unbounded))[0].detail
    shown = " ".join(run("inspect", unbounded.path).out.split())
    assert f"saturation {len(beyond)} layers" in shown


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_pair_sums_match_the_qdq_graph(runtime, artifacts):
    """Recomputed from the weights in the Q/DQ graph."""
    import onnx
    from onnx import numpy_helper

    made = artifacts[runtime, "int8"]
    name = "custom_int8.onnx" if runtime == "onnxruntime" else "custom_nchw_int8.onnx"
    graph = onnx.load(made.path.with_name(name)).graph
    whole = {t.name.removesuffix(".weight_int8"): numpy_helper.to_array(t) for t in graph.initializer}
    for layer in layers(made):
        if layer.pair_sum is not None:
            weight = whole[layer.module].astype(int)
            rows = weight if weight.ndim == 2 else np.moveaxis(weight, 1, 0)
            positive, negative = (np.maximum(sign * rows, 0) for sign in (1, -1))
            worst = max((part[0::2] + part[1::2]).max() for part in (positive, negative))
            assert layer.pair_sum == 255 * worst


def test_layers_of_one_module_are_counted_separately():
    layers = [
        backends.Layer(name=name, module="m", operator="MatMul", precision="int8", pair_sum=value)
        for name, value in (("a", 64770), ("b", 100), ("c", None))
    ]
    (finding,) = saturation(layers)
    assert finding.value == 1
    assert "1 of 2 layers can saturate" in finding.detail
    assert "unknown for m: weights are not int8 constants" in finding.detail


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_fp32_and_fp16_have_no_saturation_finding(precision, artifacts):
    assert saturation(layers(artifacts["onnxruntime", precision])) == []


def test_tensorrt_has_no_saturation_finding(artifacts):
    assert saturation(layers(artifacts["tensorrt", "int8"])) == []
    assert not any(placement.exact_pairs for placement in backends.target("tensorrt").placements.values())
