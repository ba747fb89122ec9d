"""The simulated network is the one that is built, and what is done with it helps."""

import dataclasses
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from exporter import backends
from exporter.model.structure import part
from exporter.quantize import simulation
from exporter.quantize.statistics import in_double
from tests.conftest import prepared, recipe_of

BACKENDS = ("onnxruntime", "openvino")


def work(source, backend="onnxruntime", **told):
    recipe = recipe_of(backend, "int8", weights=str(source), **{"calib_size": 32, **told})
    with tempfile.TemporaryDirectory() as folder:
        return prepared(recipe, Path(folder))


def noise(expected, got):
    return float(((got - expected) ** 2).mean() / expected.var())


def few(work, count=8):
    return next(iter(work.images.batches(count))).images


@pytest.fixture
def batch(request):
    return few(work(request.getfixturevalue("tiny")))


@pytest.mark.parametrize(
    ("backend", "part_of"),
    [
        *((backend, part_of) for backend in BACKENDS for part_of in ("stages.0.0", "stages.3.0")),
        ("openvino", "downsample_layers.2"),
    ],
)
@pytest.mark.parametrize("source", ["tiny", "tiny_v2"])
def test_it_gives_what_the_built_graph_gives(source, backend, part_of, request, tmp_path):
    check_simulation(work(request.getfixturevalue(source), backend), backend, part_of, tmp_path)


@pytest.mark.parametrize(
    "part_of", ["decode_head.lateral_convs.1", "decode_head.fpn_convs.0", "decode_head.fpn_bottleneck"]
)
def test_of_the_head_of_upernet_too(tiny_upernet, part_of, tmp_path):
    ready = work(tiny_upernet, "openvino", output="logits4", calib_size=4)
    check_simulation(ready, "openvino", part_of, tmp_path)


def check_simulation(ready, backend, part_of, folder):
    """The difference to the runtime's numbers is far below what rounding itself changes.

    Of one part: with all of them the least difference before a rounding goes on to the next, and tells nothing.
    """
    batch = few(ready, 1)
    ready = dataclasses.replace(ready, plan={name: how for name, how in ready.plan.items() if part(name) == part_of})
    artifact = ready.make((), folder)
    runtime = backends.runtime(backend)
    with runtime.open(artifact, runtime.options()) as session:
        got = session(batch)[0].copy()
    model = ready.network.model
    with torch.inference_mode():
        exact = model(torch.from_numpy(batch)).numpy()
        with simulation.rounded(model, ready.plan):
            simulated = model(torch.from_numpy(batch)).numpy()
        assert np.array_equal(model(torch.from_numpy(batch)).numpy(), exact), "the network is as it was"
    assert noise(exact, simulated) > 1e-7
    assert noise(simulated, got) < 0.02 * noise(exact, simulated)


@pytest.mark.parametrize(
    ("source", "backend", "name"),
    [
        ("tiny", "onnxruntime", "stages.2.1.pwconv2"),
        ("tiny_upernet", "openvino", "decode_head.fpn_convs.0"),  # with ReLU behind its bias
        ("tiny_upernet", "openvino", "decode_head.fpn_bottleneck.products.0"),  # without a bias
    ],
)
def test_biases_make_up_for_the_mean(source, backend, name, request):
    """Each layer's mean output is nearer to that of fp32: fast a little, full exactly on the images it looked at.

    It runs in fp64 like the bias correction: in fp32, differences in the last bits put some inputs on another step.
    """
    means = {}
    for how in ("none", "fast", "full"):
        ready = work(request.getfixturevalue(source), backend, bias_correction=how, calib_size=4)
        model, batch = ready.network.model, torch.from_numpy(few(ready, 4)).double()
        seen = []
        handle = model.get_submodule(name).register_forward_hook(partial(keep_mean, seen))
        with torch.inference_mode():
            with in_double(model):
                model(batch)
            with simulation.rounded(model, ready.plan), in_double(model):
                model(batch)
        handle.remove()
        means[how] = np.abs(seen[1] - seen[0]).max()
        shifts = [rounding.shift for rounding in ready.plan.values()]
        assert any(shift.any() for shift in shifts) == (how != "none")
    assert means["full"] < 1e-5 < means["none"]
    assert means["fast"] < means["none"]


def keep_mean(seen, module, inputs, output):
    """Keep the mean of each channel of a layer's output, in front of ReLU."""
    if isinstance(module, torch.nn.Conv2d):
        output = torch.nn.functional.conv2d(
            inputs[0], module.weight, module.bias, module.stride, module.padding
        ).movedim(1, -1)
    seen.append(output.mean((0, 1, 2)).numpy())


def test_harm_is_found_where_it_was_done(tiny):
    ready = work(tiny)
    plan = dict(ready.plan)
    bad = plan["stages.2.0.pwconv2"]
    plan["stages.2.0.pwconv2"] = dataclasses.replace(bad, scale=40 * bad.scale)
    found = simulation.sensitivities(ready.network.model, plan, ready.images)
    assert next(iter(found)) == "stages.2.0"
    assert set(found) == set(map(part, plan))
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_nothing_is_rounded_that_was_not_planned(tiny, batch):
    ready = work(tiny)
    model = ready.network.model
    with torch.inference_mode(), simulation.rounded(model, {}):
        got = model(torch.from_numpy(batch))
        assert torch.equal(got, model(torch.from_numpy(batch)))


def test_the_recipe_is_what_is_done(tiny):
    """Methods and smoothing change the plan; the same recipe gives the same plan."""

    def scales(**told):
        with tempfile.TemporaryDirectory() as folder:
            ready = prepared(recipe_of("onnxruntime", "int8", weights=str(tiny), **told), Path(folder))
        return [rounding.scale for rounding in ready.plan.values()]

    own = scales()
    assert scales() == own
    others = [scales(calib_method=method) for method in ("percentile", "mse", "entropy")] + [scales(smoothing=0.0)]
    assert all(other != own for other in others)
    assert all(np.mean(np.array(other) <= np.array(own) + 1e-12) == 1 for other in others[:3]), "inside what was seen"
