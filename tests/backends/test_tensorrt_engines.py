"""Engines on a fake GPU that enforces what NVIDIA's documentation says of profiles, versions and weights."""

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from exporter.artifact import Artifact
from exporter.backends import Options, tensorrt
from exporter.backends.tensorrt import library, runtime
from exporter.bench import batches_of
from exporter.errors import BadRequest, ExporterError
from exporter.recipe import TimingOptions
from tests.backends.fake_tensorrt import Meanings
from tests.backends.test_tensorrt_api import gpu, trt  # noqa: F401  (fixtures)
from tests.conftest import copy_artifact


def images(count):
    """Images whose means are all different."""
    rng = np.random.default_rng(count)
    return (rng.normal(size=(count, 3, 64, 64)) + np.arange(count)[:, None, None, None]).astype(np.float32)


@pytest.fixture
def plan(artifacts, tmp_path):
    """An artifact that says of itself that it is an engine of the graph beside it."""
    made = copy_artifact(artifacts["onnxruntime", "fp32"], tmp_path)

    def write(**target):
        path = tmp_path / "custom_fp32.plan"
        path.write_bytes(b"plan")
        sidecar = replace(made.sidecar, backend="tensorrt", parents=(made.sidecar.sha256,), target=target)
        return Artifact(path, sidecar)

    return write


@pytest.fixture
def opened(trt, gpu, plan):  # noqa: F811
    """Opens an engine of these profiles; gives the session and the fake."""

    def open_plan(*profiles, **built):
        meanings = Meanings(trt.module, profiles, **built)
        return runtime.PlanSession(plan(), trt), meanings

    return open_plan


@pytest.mark.parametrize(
    ("profiles", "count", "runs"),
    [
        ([(1, 8, 8)], 16, [(0, 8), (0, 8)]),
        ([(1, 8, 8)], 5, [(0, 5)]),
        ([(2, 2, 16)], 1, [(0, 2)]),
        ([(2, 4, 4)], 9, [(0, 4), (0, 4), (0, 2)]),
        ([(1, 1, 1), (8, 8, 16)], 1, [(0, 1)]),
        ([(1, 1, 1), (8, 8, 16)], 16, [(1, 16)]),
        ([(1, 1, 1), (8, 8, 16)], 17, [(1, 16), (0, 1)]),
        ([(1, 1, 1), (8, 8, 16)], 3, [(1, 8)]),
        ([(1, 1, 16), (1, 8, 16)], 8, [(1, 8)]),
    ],
)
def test_any_batch_is_run_within_the_profiles_and_gives_its_own_outputs(profiles, count, runs, opened):
    session, meanings = opened(*profiles)
    pixels = images(count)
    (outputs,) = session(pixels)
    assert meanings.enqueued == runs
    np.testing.assert_allclose(outputs, pixels.reshape(count, -1).mean(1)[:, None].repeat(10, 1), rtol=1e-4, atol=1e-5)


def test_a_timed_batch_runs_on_the_profile_that_is_tuned_for_it(opened):
    session, meanings = opened((1, 1, 4), (8, 8, 8))
    bound = session.bind([images(8)])
    assert {profile for profile, _ in meanings.enqueued} == {1}
    np.testing.assert_allclose(bound.outputs()[0][:, 0], images(8).reshape(8, -1).mean(1), rtol=1e-4, atol=1e-5)
    with pytest.raises(BadRequest, match="a batch of"):
        session.bind([images(6)])


@pytest.mark.parametrize(
    ("profiles", "batch"), [([], 1), ([[1, 1, 16]], 1), ([[2, 4, 8]], 2), ([[8, 8, 8], [4, 4, 4]], 4)]
)
def test_without_a_batch_the_smallest_that_the_profiles_take_is_timed(profiles, batch, plan, artifacts):
    timed = [artifacts["onnxruntime", "fp32"], plan(profiles=profiles)]
    assert batches_of(TimingOptions(), timed) == (batch,)
    assert batches_of(TimingOptions(batch=(8,)), timed) == (8,)


def test_only_a_version_compatible_engine_may_bring_host_code(trt, gpu, plan):  # noqa: F811
    Meanings(trt.module, version_compatible=True)
    with pytest.raises(ExporterError, match="cannot load it"):
        runtime.PlanSession(plan(), trt)
    runtime.PlanSession(plan(version_compatible=True), trt)


@pytest.mark.parametrize(
    ("built", "here", "runs"),
    [
        ("10.8.0", "10.16.1", True),
        ("10.16.1", "10.8.0", False),
        ("11.0.0", "11.4.1", True),
        ("10.16.1", "11.0.0", True),
        ("8.6.1", "10.0.1", True),
        ("8.6.1", "11.0.0", False),
        ("11.0.0", "10.16.1", False),
        ("unknown", "10.16.1", False),
    ],
)
def test_a_version_compatible_engine_runs_on_the_versions_that_the_support_matrix_has(built, here, runs):
    assert runtime.runs_later(built, here) == runs


@pytest.fixture
def on(monkeypatch, trt):  # noqa: F811
    """Checks an engine on a GPU of a compute capability."""
    monkeypatch.setattr(runtime, "unable", lambda: "")

    def check(plan, capability=(8, 6)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        runtime.check(plan, trt)

    return check


def test_an_engine_is_taken_to_the_gpus_and_versions_that_it_was_built_for_and_no_others(on, plan, trt):  # noqa: F811
    facts = {"flavor": trt.flavor, "os": library.OS, "version": trt.version, "compute_capability": ["8.6"]}
    older = {**facts, "version": trt.version.partition(".")[0] + ".0.0"}
    on(plan(**facts))
    on(plan(**older, version_compatible=True))
    on(plan(**facts, hardware_compat="ampere+"), capability=(9, 0))
    for refused, capability in [
        (older, (8, 6)),
        (facts, (9, 0)),
        ({**facts, "hardware_compat": "same"}, (8, 9)),
        ({**facts, "hardware_compat": "ampere+"}, (7, 5)),
        ({**facts, "version": "99.0.0", "version_compatible": True}, (8, 6)),
        ({**older, "version_compatible": True, "os": "plan9"}, (8, 6)),
    ]:
        with pytest.raises(BadRequest, match="built for"):
            on(plan(**refused), capability)


def test_an_engine_without_weights_takes_them_from_the_graph_beside_it(trt, gpu, plan):  # noqa: F811
    meanings = Meanings(trt.module, stripped=True, weights=(("a", "b"), ("a", "b", "c")))
    session = runtime.PlanSession(plan(strip_weights=True), trt)
    session(images(2))
    assert meanings.enqueued == [(0, 2)]


def test_weights_that_the_graph_has_not_are_named(trt, gpu, plan):  # noqa: F811
    Meanings(trt.module, stripped=True, weights=(("a", "b"), ("a",)))
    with pytest.raises(ExporterError, match=r"custom_fp32.onnx cannot be put into it: weights are missing: b"):
        runtime.PlanSession(plan(strip_weights=True), trt)


@pytest.mark.parametrize("spoil", ["missing", "changed", "another"])
def test_an_engine_without_weights_is_refused_without_its_graph(spoil, trt, gpu, plan, tmp_path):  # noqa: F811
    Meanings(trt.module, stripped=True)
    stripped = plan(strip_weights=True)
    graph = tmp_path / "custom_fp32.onnx"
    if spoil == "missing":
        graph.unlink()
    elif spoil == "changed":
        graph.write_bytes(graph.read_bytes()[:-1] + b"x")
    else:
        stripped = replace_parents(stripped)
    (tmp_path / "old.onnx").write_bytes(b"")
    (tmp_path / "old.onnx.json").write_text("{}")
    with pytest.raises(BadRequest, match="the ONNX graph that has them"):
        runtime.PlanSession(stripped, trt)


def replace_parents(plan):
    return Artifact(plan.path, replace(plan.sidecar, parents=("0" * 64,)))


def test_another_gpu_than_the_first_is_refused(plan):
    with (
        pytest.raises(BadRequest, match="--device cuda:1: engines run on the first GPU; set CUDA_VISIBLE_DEVICES=1"),
        tensorrt.session(plan(), Options(device="cuda:1")),
    ):
        pass
