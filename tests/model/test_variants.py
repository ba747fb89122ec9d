import json

import msgspec
import pytest
import torch

from exporter.artifact.sidecar import sides
from exporter.errors import BadRequest
from exporter.model.convnext import ConvNeXt
from exporter.model.variants import VARIANTS, count_macs, count_params, named, resolve

PUBLISHED = {  # parameters in millions and GMACs at 224, from the papers and timm's model cards
    "tiny": (28.6, 4.5),
    "small": (50.2, 8.7),
    "base": (88.6, 15.4),
    "large": (197.8, 34.4),
    "xlarge": (350.2, 60.9),
    "v2_atto": (3.7, 0.55),
    "v2_nano": (15.6, 2.45),
    "v2_huge": (660.3, 115.0),
    "isotropic_small": (22.3, 4.3),
    "isotropic_base": (87.1, 16.9),
    "isotropic_large": (305.9, 59.7),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_counted_without_torch_are_those_of_the_network(name):
    arch = VARIANTS[name].architecture
    with torch.device("meta"):
        model = ConvNeXt(arch, 21841)
    assert count_params(arch, 21841) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("size", [112, (225, 301), (131, 163)])
@pytest.mark.parametrize("name", ["tiny", "atto_ols", "v2_atto", "isotropic_small", "large_mlp", "zepto_rms_ols"])
def test_macs_counted_without_torch_are_those_that_torch_counts(name, size):
    from torch.utils.flop_counter import FlopCounterMode

    arch = VARIANTS[name].architecture
    with torch.device("meta"):
        model, images = ConvNeXt(arch, 1000), torch.empty(1, 3, *sides(size))
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(images)
    assert count_macs(arch, size, 1000) == counter.get_total_flops() // 2


def test_macs_of_a_dilated_network_with_odd_maps_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    for change in ({"output_stride": 8}, {"output_stride": 16}, {"stem_downsample": True, "stem": "overlap"}):
        arch = msgspec.structs.replace(VARIANTS["atto"].architecture, **change)
        with torch.device("meta"):
            model, images = ConvNeXt(arch, 10), torch.empty(1, 3, 225, 301)
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            model(images)
        assert count_macs(arch, (225, 301), 10) == counter.get_total_flops() // 2, change


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_table_agrees_with_what_was_published(name):
    params, gmacs = PUBLISHED[name]
    assert VARIANTS[name].params / 1e6 == pytest.approx(params, abs=0.06)
    assert VARIANTS[name].gmacs == pytest.approx(gmacs, rel=0.02)


@pytest.mark.parametrize(
    ("name", "variant", "repository"),
    [
        ("tiny", "tiny", None),
        ("convnext_tiny", "tiny", None),
        ("convnext-tiny", "tiny", None),
        ("convnextv2_tiny", "v2_tiny", None),
        ("v2_tiny", "v2_tiny", None),
        ("isotropic_small", "isotropic_small", None),
        ("convnext_isotropic_small", "isotropic_small", None),
        ("tiny.fb_in22k", "tiny", "timm/convnext_tiny.fb_in22k"),
        ("v2_tiny.fcmae", "v2_tiny", "timm/convnextv2_tiny.fcmae"),
        ("convnext_tiny.fb_in1k", "tiny", "timm/convnext_tiny.fb_in1k"),
        ("convnextv2_atto.fcmae_ft_in1k", "v2_atto", "timm/convnextv2_atto.fcmae_ft_in1k"),
    ],
)
def test_the_names_people_know_are_accepted(name, variant, repository):
    found, hub = resolve(name)
    assert (found.name, hub) == (variant, repository)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(BadRequest, match="did you mean 'v2_tiny'"):
        resolve("v2_tinny")


@pytest.mark.parametrize("name", VARIANTS)
def test_an_architecture_finds_its_own_name(name):
    assert named(VARIANTS[name].architecture).name == name


def test_variants_json_has_every_row(run):
    rows = run("variants", "--json").json
    assert [row["name"] for row in rows] == list(VARIANTS)
    tiny = next(row for row in rows if row["name"] == "tiny")
    assert tiny["params"] == 28589128
    assert tiny["weights"] == "hf-hub:timm/convnext_tiny.fb_in1k"
    assert json.dumps(rows)


def test_variants_prints_every_row(run):
    table = run("variants").out
    assert all(name in table for name in VARIANTS)
