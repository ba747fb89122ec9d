"""The convolutions of UPerNet's head over resized maps: the form at the maps' own sizes is the same function."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.artifact.sidecar import OutputSpec
from exporter.model import FORMS, forms
from exporter.model.multiscale import MultiscaleConv, ShiftedResize, SplitMultiscaleConv
from exporter.model.upernet import UPerNet
from exporter.model.variants import Architecture, Decoder

SIDES = st.tuples(st.integers(1, 12), st.integers(1, 12))


def pytorchs(conv, maps):
    """The convolution over the concatenated maps, by PyTorch's own functions."""
    size = maps[0].shape[-2:]
    resized = [F.interpolate(one, size=size, mode="bilinear", align_corners=False) for one in maps]
    return F.relu(F.conv2d(torch.cat(resized, 1), conv.weight, conv.bias, padding=1))


def maps_of(widths, sizes, seed, count=2):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(count, width, *size, generator=generator, dtype=torch.float64)
        for width, size in zip(widths, sizes, strict=True)
    ]


@given(levels=st.lists(st.tuples(st.integers(1, 4), SIDES), min_size=1, max_size=4), after=st.integers(1, 5),
       seed=st.integers(0, 1000))  # fmt: skip
@settings(max_examples=60, deadline=None, derandomize=True)
def test_products_before_the_resize_are_the_convolution_behind_it_at_all_sizes(levels, after, seed):
    """In double precision; the sizes have no ratio in common, and maps may be larger than the first."""
    widths, sizes = zip(*levels, strict=True)
    torch.manual_seed(seed)
    conv = MultiscaleConv(widths, after).double().requires_grad_(False)
    maps = maps_of(widths, sizes, seed)
    expected = pytorchs(conv, maps)
    scale = float(conv.weight.abs().sum() * max(one.abs().max() for one in maps))
    assert torch.equal(conv(maps), expected)
    assert float((SplitMultiscaleConv(conv)(maps) - expected).abs().max()) <= 1e-14 * scale


@pytest.mark.parametrize("side", [512, 513, 640, 451, 33])
def test_sizes_of_a_pyramid_are_exact_to_twelve_digits(side):
    sizes = [(side // stride, (side + 64) // stride) for stride in (4, 8, 16, 32)]
    torch.manual_seed(side)
    conv = MultiscaleConv([2, 3, 4, 5], 6).double().requires_grad_(False)
    maps = maps_of([2, 3, 4, 5], sizes, side, count=1)
    expected = pytorchs(conv, maps)
    assert float((SplitMultiscaleConv(conv)(maps) - expected).abs().max() / expected.std()) <= 1e-12


@given(before=st.integers(1, 200), after=st.integers(1, 200))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_matrix_is_pytorchs_resize_shifted(before, after):
    one = torch.eye(before, dtype=torch.float64)[None]
    resized = F.interpolate(one[:, :, None], size=(1, after), mode="bilinear", align_corners=False)[0, :, 0].T
    padded = F.pad(resized, (0, 0, 1, 1))
    expected = torch.cat([padded[shift : shift + after] for shift in range(3)], 1)
    torch.testing.assert_close(ShiftedResize()(before, after, one), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("form", FORMS)
def test_a_whole_network_is_the_same_in_every_form(form):
    arch = Architecture(
        depths=(1, 1, 1), dims=(4, 8, 12), head_norm=False, stage_norms=(0, 1, 2),
        decoder=Decoder(classes=3, width=4, levels=(0, 1, 2), scales=(1, 2)),
    )  # fmt: skip
    torch.manual_seed(0)
    network = UPerNet(arch).eval().requires_grad_(False)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    network.select(OutputSpec(tasks=("segment",)))
    images = torch.randn(2, 3, 75, 107)
    expected = network(images)
    rewritten = forms.rewrite(network, form)
    split = [layer for layer in rewritten.modules() if isinstance(layer, SplitMultiscaleConv)]
    assert len(split) == (form != "plain")
    assert float((rewritten(images) - expected).abs().max() / expected.std()) < 2e-5
