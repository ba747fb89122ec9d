"""Scale is moved, not changed: exact in every form, and it does what SmoothQuant says."""

import numpy as np
import pytest
import torch

from exporter.model import forms, weights
from exporter.model.convnext import ConvNeXt
from exporter.model.structure import KINDS
from exporter.quantize.smoothing import factors, in_front, layers, smooth
from tests.conftest import PX, tiny_architecture, tiny_state

FOLDED = ("linear", "conv", "nchw")


def network(source, form):
    model = weights.load(str(source)).model()
    return forms.rewrite(model, form).double()


def largest(model, images):
    seen = {}

    def watch(name):
        def hook(module, given):
            x = given[0].movedim(1, -1) if isinstance(module, torch.nn.Conv2d) else given[0]
            seen[name] = x.abs().reshape(-1, x.shape[-1]).amax(0).numpy()

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers(model, frozenset(KINDS)).items()]
    with torch.inference_mode():
        output = model(images)
    for handle in handles:
        handle.remove()
    return seen, output


@pytest.fixture
def images():
    return torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3, PX, PX)))


@pytest.mark.parametrize("form", FOLDED)
@pytest.mark.parametrize("source", ["tiny", "tiny_v2"])
def test_the_function_stays_and_the_channels_are_evened_out(source, form, request, images):
    model = network(request.getfixturevalue(source), form)
    before, expected = largest(model, images)
    found = factors(model, before, 0.5)
    has_grn = source == "tiny_v2"
    assert {name.rpartition(".")[2] for name in found if "stages" in name} == {"pwconv1", "pwconv2"} - (
        set() if has_grn else {"pwconv2"}
    )
    assert any(name.startswith("downsample_layers") for name in found)
    smooth(model, found)
    after, got = largest(model, images)
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6 * float(expected.std()))
    for name, s in found.items():
        assert after[name] == pytest.approx(before[name] / s, rel=1e-4)
        weight = model.get_submodule(name).weight.detach()
        heavy = weight.abs().amax(dim=[0, *range(2, weight.ndim)]).numpy()
        # With α = 0.5 both sides come out alike, up to one factor for all channels (SmoothQuant, section 4).
        ratio = after[name] / heavy
        assert ratio == pytest.approx(np.full_like(ratio, np.median(ratio)), rel=1e-3), name


@pytest.mark.parametrize("form", FOLDED)
def test_the_shift_in_front_of_a_dilated_convolution_is_not_scaled(form, images):
    """Its padding keeps the norm's shift out of the convolution."""
    model = ConvNeXt(tiny_architecture(output_stride=8), 10)
    model.load_state_dict(tiny_state(output_stride=8))
    model = forms.rewrite(model, form).double()
    before, expected = largest(model, images)
    moved = factors(model, before, 0.5)
    assert {name for name in moved if name.startswith("downsample")} == {"downsample_layers.1.1"}
    smooth(model, moved)
    assert torch.allclose(model(images), expected, rtol=1e-5, atol=1e-6 * float(expected.std()))


def test_without_a_share_nothing_is_moved(tiny, images):
    model = network(tiny, "nchw")
    assert factors(model, largest(model, images)[0], 0.0) == {}


def test_gelu_lets_no_scale_through(tiny, tiny_v2):
    assert in_front(network(tiny, "nchw"), "stages.0.0.pwconv2") is None
    assert in_front(network(tiny_v2, "nchw"), "stages.0.0.pwconv2") is not None


def test_layers_come_in_the_order_they_run(tiny):
    names = list(layers(network(tiny, "conv"), frozenset(KINDS)))
    block = [f"stages.0.0.{layer}" for layer in ("dwconv", "pwconv1", "pwconv2")]
    assert names[:6] == ["downsample_layers.0.0", *block, "downsample_layers.1.1", "stages.1.0.dwconv"]
    assert names[-1] == "head"
    assert len(names) == 1 + 3 * 5 + 3 + 1
