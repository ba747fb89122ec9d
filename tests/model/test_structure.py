"""Names of modules are understood in one place, and as the network itself has them."""

import re

import pytest
from torch import nn

from exporter.model import structure, variants
from exporter.model.convnext import GRN, ConvNeXt, Norm
from tests.conftest import ROOT

SOURCES = [path for path in (ROOT / "exporter").rglob("*.py") if "model" not in path.parts]


def network_of(variant):
    import torch

    with torch.device("meta"):
        return ConvNeXt(variants.VARIANTS[variant].architecture)


@pytest.fixture(scope="module", params=["v2_atto", "isotropic_small"])
def network(request):
    return network_of(request.param)


@pytest.mark.parametrize("variant", ["v2_atto", "isotropic_small", "atto_ols", "zepto_rms_ols"])
def test_kinds_cover_every_layer_with_weights(variant):
    network = network_of(variant)
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(layers) > 30
    assert {structure.kind(name) for name in layers} <= set(structure.KINDS)


def test_norms_are_told_from_layers(network):
    for name, module in network.named_modules():
        if isinstance(module, Norm):
            assert structure.is_norm(name)
        elif isinstance(module, GRN):
            assert structure.is_response_norm(name)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            assert not structure.is_norm(name)
            assert not structure.is_response_norm(name)


def test_layers_are_sorted_as_they_run(network):
    names = ["head", "stages.1.0.pwconv1", "downsample_layers.1.1", "stages.0.10.pwconv1", "stages.0.2.pwconv1"]
    assert sorted(names, key=structure.order) == [
        "stages.0.2.pwconv1", "stages.0.10.pwconv1", "downsample_layers.1.1", "stages.1.0.pwconv1", "head",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "part", "block", "group"),
    [
        ("stages.2.10.pwconv1", "stages.2.10", "stages.2.10", "stages.2.10"),
        ("stages.2.1", "stages.2", "stages.2.1", "stages.2.1"),
        ("downsample_layers.1.1", "downsample_layers.1", "", "downsample_layers.1"),
        ("head", "head", "", "head"),
        ("decode_head.fpn_convs.0", "decode_head.fpn_convs.0", "", "decode_head"),
        ("decode_head.fpn_bottleneck.products.1", "decode_head.fpn_bottleneck", "", "decode_head"),
        ("", "", "", ""),
    ],
)
def test_a_module_has_a_part_a_block_and_a_group(name, part, block, group):
    assert (structure.part(name), structure.block(name), structure.group(name)) == (part, block, group)


@pytest.mark.parametrize("levels", [2, 4])
def test_every_part_of_a_decoder_has_quantized_layers_and_no_other_has(levels):
    parts = structure.decoder_parts(levels)
    assert {kind for name in parts for kind in structure.kinds_of(name)} == {"decoder"}
    assert len(parts) == 2 * (levels - 1) + 1
    assert structure.kinds_of("decode_head.psp_modules.0") == structure.kinds_of("decode_head.classifier") == set()


@pytest.mark.parametrize(
    ("module", "wanted", "is_in"),
    [
        ("decode_head.fpn_convs.0", ["head"], True),
        ("decode_head.fpn_convs.0", ["decode_head.fpn_convs.0"], True),
        ("decode_head.fpn_convs.10", ["decode_head.fpn_convs.1"], False),
        ("decode_head.fpn_bottleneck.products.1", ["decode_head.fpn_bottleneck"], True),
        ("stages.0.0.pwconv1", ["head", "decode_head.fpn_convs.0"], False),
    ],
)
def test_a_layer_of_a_decoder_is_in_its_part_and_in_the_head(module, wanted, is_in):
    assert structure.is_in(module, wanted) == is_in


@pytest.mark.parametrize(
    ("operators", "module"),
    [
        ("stages.0.0.pwconv1/Conv,stages.0.0/Gelu", "stages.0.0.pwconv1"),
        ("Reorder_7,head_layers.0/Gemm", "head_layers.0"),
        ("logits", "head"),
        ("images", ""),
    ],
)
def test_the_module_of_fused_operators_is_that_of_the_first(operators, module):
    assert structure.module_of(operators) == module


def test_no_other_file_takes_names_apart():
    taking_apart = re.compile(
        r"re\.\w+\(.*(stages|downsample)|startswith\(.*(stages|downsample|pwconv|norm)|split\(\"\.\"\)"
    )
    assert len(SOURCES) > 50
    names = {path.name for path in SOURCES for line in path.read_text().splitlines() if taking_apart.search(line)}
    assert names <= {"strict.py", "library.py", "runtime.py"}, "keys of recipes, compute capabilities and versions"
