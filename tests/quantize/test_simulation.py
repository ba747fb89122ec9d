"""The simulated network is the one that is built, and what is done with it helps."""

import dataclasses
import tempfile
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


@pytest.fixture
def batch(request):
    images = work(request.getfixturevalue("tiny")).images
    return next(iter(images.batches(8))).images


@pytest.mark.parametrize(
    ("backend", "part_of"),
    [
        *((backend, part_of) for backend in BACKENDS for part_of in ("stages.0.0", "stages.3.0")),
        ("openvino", "downsample_layers.2"),
    ],
)
@pytest.mark.parametrize("source", ["tiny", "tiny_v2"])
def test_it_gives_what_the_built_graph_gives(source, backend, part_of, request, batch, tmp_path):
    """The difference to the runtime's numbers is far below what rounding itself changes.

    Of one part: with all of them the least difference before a rounding goes on to the next, and tells nothing.
    """
    ready = work(request.getfixturevalue(source), backend)
    ready = dataclasses.replace(ready, plan={name: how for name, how in ready.plan.items() if part(name) == part_of})
    made = ready.make((), tmp_path)
    runtime = backends.runtime(backend)
    with runtime.open(made, runtime.options()) as session:
        got = session(batch)[0].copy()
    model = ready.network.model
    with torch.inference_mode():
        exact = model(torch.from_numpy(batch)).numpy()
        with simulation.rounded(model, ready.plan):
            simulated = model(torch.from_numpy(batch)).numpy()
        assert np.array_equal(model(torch.from_numpy(batch)).numpy(), exact), "the network is as it was"
    assert noise(exact, simulated) > 1e-7
    assert noise(simulated, got) < 0.02 * noise(exact, simulated)


def test_biases_make_up_for_the_mean(tiny, batch):
    """Each layer's mean output is nearer to that of fp32: fast a little, full exactly on the images it looked at.

    It runs in fp64 like the bias correction: in fp32, differences in the last bits put some inputs on another step.
    """
    means = {}
    name = "stages.2.1.pwconv2"
    for how in ("none", "fast", "full"):
        ready = work(tiny, bias_correction=how)
        model, images = ready.network.model, next(iter(ready.images.batches(32))).images
        seen = []
        handle = model.get_submodule(name).register_forward_hook(
            lambda module, given, output, seen=seen: seen.append(output.mean((0, 1, 2)).numpy())
        )
        doubles = torch.from_numpy(images).double()
        with torch.inference_mode():
            with in_double(model):
                model(doubles)
            with simulation.rounded(model, ready.plan), in_double(model):
                model(doubles)
        handle.remove()
        means[how] = np.abs(seen[1] - seen[0]).max()
        shifts = [rounding.shift for rounding in ready.plan.values()]
        assert any(shift.any() for shift in shifts) == (how != "none")
    assert means["full"] < 1e-5 < means["none"]
    assert means["fast"] < means["none"]


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
