"""UPerNet: the network, its pooling at every size, and the weights of the libraries that train it."""

from __future__ import annotations

import pytest
import torch
from msgspec.structs import replace
from torch.utils.flop_counter import FlopCounterMode

from exporter.artifact.sidecar import OutputSpec
from exporter.model import levels
from exporter.model.multiscale import MultiscaleConv, SplitMultiscaleConv
from exporter.model.upernet import GridPool, UPerNet, pixel_answers
from exporter.model.variants import VARIANTS, Architecture, Decoder, count_macs, count_params


def test_the_multiply_accumulates_of_the_split_convolution_are_those_that_pytorch_counts():
    sizes = ((32, 24), (16, 12), (8, 6))
    maps = [torch.zeros(1, 8, *size) for size in sizes]
    counts = []
    whole = MultiscaleConv([8, 8, 8], 8)
    for conv in (whole, SplitMultiscaleConv(whole)):
        with FlopCounterMode(display=False) as counter:
            conv(maps)
        counts.append(counter.get_total_flops() // 2)
    assert levels.macs_saved_by_split(8, sizes) == counts[0] - counts[1]


@pytest.mark.parametrize("cells", [1, 2, 3, 4, 6])
def test_pooling_is_that_of_pytorch_at_every_size(cells):
    generator = torch.Generator().manual_seed(cells)
    for side in range(1, 34):
        x = torch.randn(2, 3, side, side + 5, generator=generator)
        expected = torch.nn.functional.adaptive_avg_pool2d(x, cells)
        torch.testing.assert_close(GridPool(cells)(x), expected, atol=1e-6, rtol=0)


def upernet(classes=150, **differences):
    decoder = Decoder(classes=classes, width=512, levels=(0, 1, 2, 3), scales=(1, 2, 3, 6))
    arch = VARIANTS["tiny"].architecture
    return replace(arch, head_norm=False, stage_norms=(0, 1, 2, 3), decoder=replace(decoder, **differences))


def test_multiply_accumulates_of_published_networks_are_those_counted_in_pytorch():
    """Counted layer by layer in transformers' network of 150 classes, at 512 pixels."""
    assert count_macs(upernet(), 512, 0) / 1e9 == pytest.approx(234.6, abs=0.1)
    assert count_macs(upernet(), 512, 0, is_split=True) / 1e9 == pytest.approx(137.3, abs=0.1)
    with torch.device("meta"):
        network = UPerNet(upernet())
    assert count_params(upernet(), 0) == sum(parameter.numel() for parameter in network.parameters())


def test_labels_are_the_most_probable_classes_behind_the_resize():
    logits = torch.randn(2, 7, 9, 11, generator=torch.Generator().manual_seed(1))
    (whole,) = pixel_answers(logits, (36, 45), "logits")
    (labels,) = pixel_answers(logits, (36, 45), "labels")
    assert whole.shape == (2, 7, 36, 45)
    assert labels.dtype == torch.uint8
    assert torch.equal(labels.long(), whole.argmax(1))
    assert pixel_answers(logits, (36, 45), "logits4") == (logits,)


def test_a_network_without_its_head_gives_the_normalized_maps():
    arch = Architecture(
        depths=(1, 1), dims=(4, 8), head_norm=False, stage_norms=(0, 1),
        decoder=Decoder(classes=3, width=4, levels=(0, 1), scales=(1, 2)),
    )  # fmt: skip
    network = UPerNet(arch)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    images = torch.randn(1, 3, 40, 56)
    maps = network.eval().select(OutputSpec(tasks=("features",)))(images)
    assert [tuple(one.shape) for one in maps] == [(1, 4, 10, 14), (1, 8, 5, 7)]
    assert not any("decode_head" in key for key in network.state_dict())
