"""The product's networks give the outputs of the libraries that people train with."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from benchmarks import libraries
from exporter.errors import BadRequest
from exporter.model import weights
from tests.reference import library

for name in ("torchvision", "timm", "transformers"):
    library(name)
NOISE = 2e-5  # of the spread: fp32 rounding in another order

TIMM = {
    "V1": {},
    "V2": {"use_grn": True, "ls_init_value": None},
    "1×1 convolutions": {"conv_mlp": True},
    "gelu_tanh": {"act_layer": "gelu_tanh"},
    "quick_gelu": {"act_layer": "quick_gelu"},
    "relu": {"act_layer": "relu"},
    "silu": {"act_layer": "silu"},
    "eps": {"norm_eps": 1e-3},
    "max pooling": {"global_pool": "max"},
    "avgmax pooling": {"global_pool": "avgmax"},
    "stride 16": {"output_stride": 16},
    "stride 8": {"output_stride": 8},
    "patch 2": {"patch_size": 2},
    "patch 8": {"patch_size": 8},
    "kernels": {"kernel_sizes": (3, 5, 7, 9)},
    "no layer scale": {"ls_init_value": None},
    "no biases in convolutions": {"conv_bias": False},
    "norm before pooling": {"head_norm_first": True},
    "norm before max pooling": {"head_norm_first": True, "global_pool": "max"},
    "both pools": {"head_norm_first": True, "global_pool": "catavgmax"},
    "hidden layer": {"head_hidden_size": 24},
    "overlap": {"stem_type": "overlap"},
    "overlap_tiered": {"stem_type": "overlap_tiered"},
    "overlap_act": {"stem_type": "overlap_act"},
    "rms": {"norm_layer": "rmsnorm"},
    "simple": {"norm_layer": "simplenorm"},
    "one channel": {"in_chans": 1},
    "twelve channels": {"in_chans": 12},
    "one class": {"num_classes": 1},
    "all at once": {
        "use_grn": True, "act_layer": "silu", "norm_eps": 1e-4, "output_stride": 16, "kernel_sizes": 5, "in_chans": 4,
        "global_pool": "max", "head_hidden_size": 24,
    },
}  # fmt: skip


def ours(folder, pixels, task=None, **choices):
    from exporter.model.layouts import Choices

    checkpoint = weights.load(str(folder), choices=Choices(**choices))
    return libraries.outputs(checkpoint.model(task), pixels), checkpoint


@pytest.mark.parametrize("name", TIMM)
def test_a_network_of_timm_with_its_config_gives_timms_outputs(name, tmp_path):
    model = libraries.timm_model(**TIMM[name])
    config = {"model_args": TIMM[name], "num_classes": model.num_classes}
    pixels = libraries.images(model.in_chans)
    got, _ = ours(libraries.save(tmp_path, model, config), pixels)
    assert libraries.largest_difference(got, libraries.outputs(model, pixels)) < NOISE


def test_norms_without_bias_are_not_guessed(tmp_path):
    folder = libraries.save(tmp_path, libraries.timm_model(norm_layer="simplenorm"))
    with pytest.raises(BadRequest, match=r"--norm rms.*--norm simple"):
        ours(folder, libraries.images())
    for norm, close in (("simple", True), ("rms", False)):
        got, _ = ours(folder, libraries.images(), norm=norm)
        theirs = libraries.outputs(libraries.timm_model(norm_layer="simplenorm"), libraries.images())
        assert (libraries.largest_difference(got, theirs) < NOISE) == close


def test_timms_backbone_without_classes_is_an_embedding(tmp_path):
    model = libraries.timm_model(num_classes=0)
    got, checkpoint = ours(libraries.save(tmp_path, model), libraries.images())
    assert checkpoint.task == "embed"
    assert libraries.largest_difference(got, libraries.outputs(model, libraries.images())) < NOISE


def test_timms_features_only_network_gives_its_maps(tmp_path):
    timm = libraries.library("timm")
    model = timm.create_model("convnext_atto", features_only=True, depths=libraries.DEPTHS, dims=libraries.DIMS)
    libraries.randomize(model)
    got, checkpoint = ours(libraries.save(tmp_path, model), libraries.images())
    assert checkpoint.task == "features"
    assert libraries.largest_difference(got, libraries.outputs(model, libraries.images())) < NOISE


HUGGINGFACE = {
    "V1": ("ConvNextForImageClassification", {}),
    "V2": ("ConvNextV2ForImageClassification", {}),
    "last eps": ("ConvNextForImageClassification", {"layer_norm_eps": 1e-2}),
    "relu": ("ConvNextForImageClassification", {"hidden_act": "relu"}),
    "gelu_new": ("ConvNextV2ForImageClassification", {"hidden_act": "gelu_new"}),
    "patch 2": ("ConvNextForImageClassification", {"patch_size": 2}),
    "three stages": (
        "ConvNextForImageClassification",
        {"num_stages": 3, "hidden_sizes": [8, 16, 32], "depths": [1, 2, 1]},
    ),
    "two channels": ("ConvNextForImageClassification", {"num_channels": 2}),
    "DINOv3": ("DINOv3ConvNextModel", {"layer_norm_eps": 1e-4}),
    "V1 model": ("ConvNextModel", {}),
}


@pytest.mark.parametrize("name", HUGGINGFACE)
def test_a_model_of_transformers_with_its_config_gives_its_outputs(name, tmp_path):
    kind, settings = HUGGINGFACE[name]
    model = libraries.huggingface_model(kind, **settings)
    config = json.loads(model.config.to_json_string())
    pixels = libraries.images(settings.get("num_channels", 3))
    got, _ = ours(libraries.save(tmp_path, model, config), pixels)
    assert libraries.largest_difference(got, libraries.outputs(model, pixels)) < NOISE


def test_a_backbone_with_one_norm_keeps_it_on_the_map_of_its_stage(tmp_path):
    model = libraries.huggingface_model("ConvNextBackbone")
    folder = libraries.save(tmp_path, model, json.loads(model.config.to_json_string()))
    got, checkpoint = ours(folder, libraries.images())
    assert checkpoint.task == "features"
    assert libraries.largest_difference(got[-1:], libraries.outputs(model, libraries.images())) < NOISE


@pytest.mark.parametrize("kind", ["ConvNextBackbone", "ConvNextV2Backbone", "DINOv3ConvNextBackbone"])
def test_a_backbone_of_transformers_gives_its_maps(kind, tmp_path):
    model = libraries.huggingface_model(kind, out_indices=[1, 2, 3, 4])
    folder = libraries.save(tmp_path, model, json.loads(model.config.to_json_string()))
    got, _ = ours(folder, libraries.images(), "features")
    assert libraries.largest_difference(got, libraries.outputs(model, libraries.images())) < NOISE


def test_a_timm_network_wrapped_by_transformers_gives_its_outputs(tmp_path):
    libraries.library("timm")
    transformers = libraries.library("transformers")
    arguments = {"depths": list(libraries.DEPTHS), "dims": list(libraries.DIMS), "act_layer": "gelu_tanh"}
    config = transformers.TimmWrapperConfig(
        architecture="convnext_atto", model_args=arguments, num_labels=libraries.CLASSES, do_pooling=True
    )
    model = libraries.randomize(transformers.TimmWrapperForImageClassification(config))
    folder = libraries.save(tmp_path, model, json.loads(config.to_json_string()))
    got, _ = ours(folder, libraries.images())
    assert libraries.largest_difference(got, libraries.outputs(model, libraries.images())) < NOISE


HEADS = {
    "as it is": (lambda head: head, {}),
    "dropout": (lambda head: torch.nn.Sequential(torch.nn.Dropout(), head), {}),
    "batch norm": (lambda head: torch.nn.Sequential(torch.nn.BatchNorm1d(64), torch.nn.Dropout(), head), {}),
    "two layers": (
        lambda head: torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Dropout(), head),
        {"head_act": "relu"},
    ),
    "batch norm between two layers": (
        lambda head: torch.nn.Sequential(
            torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64), torch.nn.SiLU(), torch.nn.Dropout(), head
        ),
        {"head_act": "silu"},
    ),
    "two layers next to each other": (lambda head: torch.nn.Sequential(torch.nn.Linear(64, 64), head), {}),
    "a norm of its own": (lambda head: torch.nn.Sequential(torch.nn.LayerNorm(64), head), {}),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_of_torchvision_that_was_replaced_gives_its_outputs(name, tmp_path):
    change, choices = HEADS[name]
    model = libraries.torchvision_model()
    model.classifier[2] = change(model.classifier[2])
    libraries.randomize(model)
    got, _ = ours(libraries.save(tmp_path, model), libraries.images(), **choices)
    assert libraries.largest_difference(got, libraries.outputs(model, libraries.images())) < NOISE


@pytest.mark.parametrize("layer", [torch.nn.PReLU(64), torch.nn.RMSNorm(64)])
def test_a_head_of_other_layers_is_refused(layer, tmp_path):
    model = libraries.torchvision_model()
    model.classifier[2] = torch.nn.Sequential(torch.nn.Linear(64, 64), layer, model.classifier[2])
    with pytest.raises(BadRequest, match="a vector without bias"):
        ours(libraries.save(tmp_path, model), libraries.images())


NO_CLASSIFIERS = {
    "a detector's": lambda: torch.nn.Sequential(torch.nn.Conv2d(64, 64, 3), torch.nn.Conv2d(64, 4, 1)),
    "DINO's": lambda: torch.nn.Sequential(
        torch.nn.Linear(64, 32), torch.nn.GELU(), torch.nn.utils.weight_norm(torch.nn.Linear(32, 99))
    ),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of weight_norm, whose names old checkpoints have
@pytest.mark.parametrize("name", NO_CLASSIFIERS)
def test_a_head_that_is_no_classifier_is_left_out_with_a_note(name, tmp_path):
    from exporter.model.fit import fit
    from exporter.model.layouts import Choices

    whole = torch.nn.Module()
    whole.backbone, whole.head = libraries.timm_model(num_classes=0), NO_CLASSIFIERS[name]()
    fitted = fit(whole.state_dict(), {}, Choices())
    assert fitted.num_classes == 0
    assert any("'head' are left out" in note for note in fitted.notes)
    got, checkpoint = ours(libraries.save(tmp_path, whole), libraries.images())
    assert checkpoint.task == "embed"
    assert libraries.largest_difference(got, libraries.outputs(whole.backbone, libraries.images())) < NOISE
    with pytest.raises(BadRequest, match="the head has a"):
        ours(tmp_path, libraries.images(), head="head")


def test_a_network_without_pooling_gives_feature_maps_alone(tmp_path):
    config = {"architecture": "convnext_atto", "model_args": {"dims": libraries.DIMS, "depths": libraries.DEPTHS}}
    model = libraries.timm_model()
    folder = libraries.save(tmp_path, model, config | {"global_pool": ""})
    _, checkpoint = ours(folder, libraries.images())
    assert checkpoint.task == "features"
    for task in ("classify", "embed"):
        with pytest.raises(BadRequest, match="global_pool is none"):
            checkpoint.model(task)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": (10**9, 1, 1, 1)}, "the metadata says stages of"),
        ({"dims": (1,)}, "the metadata says stages of"),
        ({"head_layers": ("linear:x",)}, "the metadata describes no network"),
        ({"kernels": (3,)}, "the metadata describes no network"),
        ({"grn": True}, "missing keys"),
    ],
    ids=["depths", "dims", "head_layers", "kernels", "grn"],
)
def test_metadata_of_our_own_weights_that_does_not_fit_them_is_refused(change, message, tmp_path):
    from msgspec.structs import replace

    from exporter.model import live, written

    fitted = live.read(libraries.timm_model())
    architecture = replace(fitted.variant.architecture, **change)
    wrong = dataclasses.replace(fitted, variant=replace(fitted.variant, architecture=architecture))
    written.write(tmp_path, wrong, None, {})
    with pytest.raises(BadRequest, match=message):
        ours(tmp_path, libraries.images())


def test_an_unknown_tensor_of_a_block_is_refused(tmp_path):
    from tests.conftest import tiny_state, write_tiny

    write_tiny(tmp_path)
    from safetensors.torch import save_file

    save_file({**tiny_state(), "stages.0.0.extra.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(BadRequest, match=r"unexpected keys .* stages\.0\.0\.extra\.weight|not the weights of"):
        ours(tmp_path, libraries.images())


def test_the_activation_of_a_head_is_not_guessed(tmp_path):
    model = libraries.torchvision_model()
    model.classifier[2] = HEADS["two layers"][0](model.classifier[2])
    with pytest.raises(BadRequest, match="--head-act"):
        ours(libraries.save(tmp_path, model), libraries.images())


def test_several_heads_are_several_outputs(tmp_path):
    module = torch.nn.Module()
    module.backbone = libraries.timm_model(num_classes=0)
    module.color, module.shape = torch.nn.Linear(64, 5), torch.nn.Linear(64, 3, bias=False)
    folder = libraries.save(tmp_path, module)
    embedding = libraries.outputs(module.backbone, libraries.images())[0].clone()
    got, checkpoint = ours(folder, libraries.images(), head="color,shape")
    assert checkpoint.task == "classify"
    assert (
        libraries.largest_difference(got, [module.color(embedding).detach(), module.shape(embedding).detach()]) < NOISE
    )
    with pytest.raises(BadRequest, match="--head colour: no such module in these weights; did you mean 'color'"):
        ours(folder, libraries.images(), head="colour")


def test_a_projection_of_openclip_is_part_of_the_embedding(tmp_path):
    trunk = libraries.timm_model(num_classes=0)
    projection = torch.randn(12, 64, generator=torch.Generator().manual_seed(1))
    module = torch.nn.Module()
    module.visual = torch.nn.Module()
    module.visual.trunk = trunk
    module.visual.head = torch.nn.Sequential()
    module.visual.head.add_module("proj", torch.nn.Linear(64, 12, bias=False))
    module.visual.head.proj.weight.data = projection
    module.ln_final = torch.nn.LayerNorm(5)
    got, checkpoint = ours(libraries.save(tmp_path, module), libraries.images())
    expected = libraries.outputs(trunk, libraries.images())[0] @ projection.T
    assert checkpoint.task == "embed"
    assert libraries.largest_difference(got, [expected]) < NOISE
