"""The product's networks give the outputs of the libraries that people train with."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from collections import OrderedDict

import pytest
import torch

from benchmarks import libraries
from exporter.artifact.sidecar import OutputSpec
from exporter.errors import BadRequest, Unavailable
from exporter.model import reference, weights
from exporter.model.fit import fit
from exporter.model.layouts import Choices, to_ours
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
    checkpoint = weights.load(str(folder), choices=Choices(**choices))
    spec = OutputSpec(tasks=tuple(task.split(","))) if task else None
    return libraries.outputs(checkpoint.model(spec), pixels), checkpoint


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


class TransferLearning(torch.nn.Module):
    """As Lightning's documentation takes a network apart: all parts but the classifier, and a new linear layer."""

    def __init__(self, model, pool):
        super().__init__()
        self.feature_extractor = torch.nn.Sequential(*[*model.children()][:-1], *pool)
        self.classifier = torch.nn.Linear(libraries.DIMS[-1], 5)

    def forward(self, x):
        return self.classifier(self.feature_extractor(x).flatten(1))


def with_compiled_blocks(model):
    for stage in model.stages:
        for number, block in enumerate(stage.blocks):
            stage.blocks[number] = torch.compile(block, backend="eager")
    return model


def taken_apart():
    """Networks whose parts are numbered, by what was done to them."""
    timm, torchvision = libraries.timm_model(), libraries.torchvision_model()
    pool = torch.nn.AdaptiveAvgPool2d(1)
    parts, width = [*torchvision.children()], libraries.DIMS[-1]
    return {
        "timm": torch.nn.Sequential(*timm.children()),
        "timm behind a layer": torch.nn.Sequential(torch.nn.Identity(), *timm.children()),
        "timm's stages": torch.nn.Sequential(
            timm.stem, *timm.stages, pool, torch.nn.Flatten(), torch.nn.Linear(libraries.DIMS[-1], 5)
        ),
        "compiled blocks": with_compiled_blocks(libraries.timm_model()),
        "torchvision behind a layer": torch.nn.Sequential(torch.nn.Identity(), *torchvision.children()),
        "torchvision's features": torch.nn.Sequential(
            OrderedDict(backbone=torchvision.features, pool=pool, flat=torch.nn.Flatten(), fc=torch.nn.Linear(64, 5))
        ),
        "torchvision": torch.nn.Sequential(*parts),
        "Lightning, torchvision": TransferLearning(torchvision, ()),
        "Lightning, timm": TransferLearning(timm, (pool,)),
        "another classifier": torch.nn.Sequential(
            *parts[:-1], torch.nn.Flatten(), torch.nn.Linear(width, 12), torch.nn.ReLU(), torch.nn.Linear(12, 5)
        ),
        "a norm and a layer": torch.nn.Sequential(
            *parts[:-1], torch.nn.Flatten(), torch.nn.LayerNorm(width, 1e-6), torch.nn.Linear(width, 5)
        ),
    }


def test_a_classifier_without_bias_has_a_note():
    state = libraries.timm_model().state_dict()
    assert not to_ours(state).notes
    del state["head.fc.bias"]
    (note,) = to_ours(state).notes
    assert note.startswith("the classifier 'head' has no bias, as in ArcFace and CosFace; it is read as a linear layer")


@pytest.mark.parametrize("name", taken_apart())
def test_a_network_whose_parts_are_numbered_gives_its_outputs(name, tmp_path):
    model = libraries.randomize(taken_apart()[name])
    torch.save(model.state_dict(), tmp_path / "model.pth")
    choices = {"head_act": "relu"} if name == "another classifier" else {}
    got, checkpoint = ours(tmp_path / "model.pth", libraries.images(), **choices)
    assert checkpoint.task == "classify"
    assert libraries.largest_difference(got, libraries.outputs(model, libraries.images())) < NOISE
    modules = to_ours(model.state_dict(), Choices(**choices)).modules
    assert set(modules.values()) <= set(dict(model.named_modules())), "--reference finds the modules by these names"


def test_the_numbered_parts_of_transformers_backbone_are_known(tmp_path):
    model = libraries.huggingface_model("ConvNextModel")
    parts = torch.nn.Sequential(*model.children())
    torch.save(parts.state_dict(), tmp_path / "model.pth")
    got, _ = ours(tmp_path / "model.pth", libraries.images())
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


class OnBackbone(torch.nn.Module):
    """A classifier on the last map of a backbone."""

    def __init__(self, kind, stages):
        super().__init__()
        self.backbone = libraries.huggingface_model(kind, out_indices=stages)
        self.fc = torch.nn.Linear(64, 5)

    def forward(self, x):
        return self.fc(self.backbone(x).feature_maps[-1].mean((-2, -1)))


@pytest.mark.parametrize("stages", [[1, 2, 3, 4], [4], [2, 4]])
@pytest.mark.parametrize("kind", ["ConvNextBackbone", "ConvNextV2Backbone"])
def test_a_classifier_on_a_backbone_takes_its_normalized_map(kind, stages, tmp_path):
    model = libraries.randomize(OnBackbone(kind, stages))
    torch.save(model.state_dict(), tmp_path / "model.pth")
    got, checkpoint = ours(tmp_path / "model.pth", libraries.images())
    assert checkpoint.task == "classify"
    assert libraries.largest_difference(got, libraries.outputs(model, libraries.images())) < NOISE


@pytest.mark.parametrize("kind", ["ConvNextBackbone", "ConvNextV2Backbone", "DINOv3ConvNextBackbone"])
def test_a_backbone_of_transformers_gives_its_maps(kind, tmp_path):
    model = libraries.huggingface_model(kind, out_indices=[1, 2, 3, 4])
    folder = libraries.save(tmp_path, model, json.loads(model.config.to_json_string()))
    got, _ = ours(folder, libraries.images(), "features")
    assert libraries.largest_difference(got, libraries.outputs(model, libraries.images())) < NOISE


def test_tokens_are_those_of_dinov3(tmp_path):
    model = libraries.huggingface_model("DINOv3ConvNextModel")
    folder = libraries.save(tmp_path, model, json.loads(model.config.to_json_string()))
    pixels = libraries.images()
    got, _ = ours(folder, pixels, "embed,tokens")
    with torch.inference_mode():
        theirs = model(pixels)
    assert got[1].shape == theirs.last_hidden_state.shape
    expected = [theirs.pooler_output, theirs.last_hidden_state]
    assert libraries.largest_difference(got, expected) < NOISE


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
    "DINO's": lambda: torch.nn.ModuleDict(
        {
            "mlp": torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.GELU(), torch.nn.Linear(32, 32)),
            "last_layer": torch.nn.utils.weight_norm(torch.nn.Linear(32, 99)),
        }
    ),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of weight_norm, whose names old checkpoints have
@pytest.mark.parametrize("name", NO_CLASSIFIERS)
def test_a_head_that_is_no_classifier_is_left_out_with_a_note(name, tmp_path):
    from exporter.model.fit import fit

    whole = torch.nn.Module()
    whole.backbone, whole.head = libraries.timm_model(num_classes=0), NO_CLASSIFIERS[name]()
    fitted = fit(whole.state_dict(), {}, Choices())
    assert fitted.num_classes == 0
    assert any("'head' are left out" in note for note in fitted.notes)
    got, checkpoint = ours(libraries.save(tmp_path, whole), libraries.images())
    assert checkpoint.task == "embed"
    assert libraries.largest_difference(got, libraries.outputs(whole.backbone, libraries.images())) < NOISE
    with pytest.raises(BadRequest, match="--head head: it"):
        ours(tmp_path, libraries.images(), head="head")


def test_a_network_without_pooling_gives_feature_maps_alone(tmp_path):
    config = {"architecture": "convnext_atto", "model_args": {"dims": libraries.DIMS, "depths": libraries.DEPTHS}}
    model = libraries.timm_model()
    folder = libraries.save(tmp_path, model, config | {"global_pool": ""})
    _, checkpoint = ours(folder, libraries.images())
    assert checkpoint.task == "features"
    for task in ("classify", "embed"):
        with pytest.raises(BadRequest, match="global_pool is none"):
            checkpoint.model(OutputSpec(tasks=(task,)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": (10**9, 1, 1, 1)}, "the metadata says stages of"),
        ({"dims": (1,)}, "the metadata says stages of"),
        ({"head_layers": ("linear:x",)}, "the metadata describes no network"),
        ({"kernels": (3,)}, "the metadata describes no network"),
        ({"grn": True}, "missing keys"),
        ({"norm_eps": -1.0}, "the metadata says eps"),
        ({"output_stride": 3}, "the metadata says eps"),
    ],
    ids=["depths", "dims", "head_layers", "kernels", "grn", "norm_eps", "output_stride"],
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


def test_args_that_name_a_model_of_timm_have_its_preprocessing():
    from timm.data import resolve_data_config
    from timm.models.convnext import default_cfgs

    from exporter.model.config import from_training

    names = [name for name, cfgs in default_cfgs.items()]
    tagged = [(f"{name}.{tag}", cfg) for name in names for tag, cfg in default_cfgs[name].cfgs.items() if tag]
    for name, cfg in [*((name, default_cfgs[name].default) for name in names), *tagged]:
        expected = resolve_data_config({}, pretrained_cfg=cfg.to_dict())
        args = argparse.Namespace(model=name, img_size=None, crop_pct=None, mean=None, std=None, interpolation="")
        got = from_training({"args": args}).preprocessing
        assert got.size == expected["input_size"][-1], name
        assert (got.resize, got.crop) == (int(got.size / expected["crop_pct"]), expected["crop_mode"]), name
        assert got.interpolation == expected["interpolation"]
        assert got.mean == pytest.approx(expected["mean"])
        assert got.std == pytest.approx(expected["std"])


class Neck(torch.nn.Module):
    """A network with a layer between backbone and classifier."""

    def __init__(self, name, layer):
        super().__init__()
        self.backbone = libraries.timm_model(num_classes=0)
        setattr(self, name, layer)
        self.head = torch.nn.Linear(64, 10)


@pytest.mark.parametrize("name", ["neck", "bottleneck", "bn", "pool", "attn", "temperature"])
def test_layers_that_may_stand_in_front_of_the_classifier_are_refused_until_it_is_named(name, tmp_path):
    whole = Neck(name, torch.nn.BatchNorm1d(64))
    folder = libraries.save(tmp_path, whole)
    with pytest.raises(BadRequest, match=rf"{name} lies beside the classifier 'head'.*--head head"):
        ours(folder, libraries.images())
    assert ours(folder, libraries.images(), head="head")[1].task == "classify"


@pytest.mark.parametrize("name", ["fc1", "proj", "hidden", "semantic_attn", "mean_pool"])
@pytest.mark.parametrize("layer", [torch.nn.Linear(64, 64), torch.nn.Conv2d(64, 64, 1)])
def test_a_layer_that_fits_in_front_of_the_classifier_is_refused_whatever_its_name(name, layer, tmp_path):
    folder = libraries.save(tmp_path, Neck(name, layer))
    with pytest.raises(BadRequest, match=rf"{name} lies beside the classifier 'head'"):
        ours(folder, libraries.images())


def test_a_mean_and_std_that_the_model_holds_are_named():
    from exporter.model.fit import fit

    whole = Neck("unused", torch.nn.Identity())
    whole.register_buffer("mean", torch.full((1, 3, 1, 1), 0.5))
    whole.register_buffer("norm_std", torch.tensor([0.25]))
    whole.bn = torch.nn.Module()
    whole.bn.register_buffer("running_mean", torch.zeros(3))
    state = whole.state_dict()
    notes = " ".join(fit(state, {}, Choices(head="head")).notes)
    assert "the file holds mean = 0.5,0.5,0.5; if the model normalizes with it, give --mean" in notes
    assert "holds norm_std = 0.25; if the model normalizes with it, give --std" in notes
    assert "holds bn.running_mean" not in notes


class Behind(torch.nn.Module):
    """A backbone that keeps its classifier of 10 classes, and a layer behind it."""

    def __init__(self, name):
        super().__init__()
        self.backbone = libraries.timm_model(num_classes=10)
        setattr(self, name, torch.nn.Linear(10, 2))


@pytest.mark.parametrize("name", ["linear", "out", "fc", "classifier"])
def test_a_layer_behind_a_classifier_that_was_kept_is_refused(name, tmp_path):
    folder = libraries.save(tmp_path, Behind(name))
    with pytest.raises(BadRequest, match=f"'{name}' takes the outputs of the classifier 'backbone.head'; give --head "):
        ours(folder, libraries.images())


class TwoLayers(torch.nn.Module):
    """A backbone, and two layers as attributes of their own."""

    def __init__(self, middle=12):
        super().__init__()
        self.backbone = libraries.timm_model(num_classes=0)
        self.fc1, self.fc2 = torch.nn.Linear(64, middle), torch.nn.Linear(middle, 5)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(self.backbone(x))))


class LinearNorm(torch.nn.Module):
    """A linear layer and a norm, whose names are in the other order by the alphabet."""

    def __init__(self, before, after):
        super().__init__()
        self.linear, self.bn = torch.nn.Linear(before, after), torch.nn.BatchNorm1d(after)

    def forward(self, x):
        return torch.relu(self.bn(self.linear(x)))


@pytest.mark.parametrize("width", [64, 32])
@pytest.mark.parametrize("kind", ["safetensors", "pth", "sorted"])
def test_modules_within_a_module_of_the_head_run_in_their_order(kind, width, tmp_path):
    model = libraries.huggingface_model()
    model.classifier = torch.nn.Sequential(LinearNorm(64, width), torch.nn.Linear(width, 5))
    libraries.randomize(model)
    state = {key: value for key, value in model.state_dict().items() if value.is_floating_point()}
    if kind == "safetensors":
        path = libraries.save(tmp_path, model) / "model.safetensors"
    else:
        path = tmp_path / "model.pth"
        torch.save(dict(sorted(state.items())) if kind == "sorted" else state, path)
    if kind != "pth" and width == 64:
        with pytest.raises(BadRequest, match=r"the order of the layers of the head .* is not known"):
            ours(path, libraries.images(), head_act="none,relu")
    else:
        got, _ = ours(path, libraries.images(), head_act="none,relu")
        assert libraries.largest_difference(got, libraries.outputs(model, libraries.images())) < NOISE


REFUSED_HEADS = {
    "heads of other widths": (
        torch.nn.ModuleList([torch.nn.Linear(64, 5), torch.nn.Linear(64, 3)]), r"name them: --head A,B"
    ),
    "a convolution before the pooling": (
        torch.nn.Sequential(torch.nn.Conv2d(64, 64, 1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 5)),
        r"a convolution in front of other layers \(0\), perhaps before the pooling",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_HEADS)
def test_heads_that_can_be_read_in_two_ways_are_refused(name, tmp_path):
    model = libraries.timm_model(num_classes=0)
    model.fc, said = REFUSED_HEADS[name]
    torch.save(libraries.randomize(model).state_dict(), tmp_path / "model.pth")
    with pytest.raises(BadRequest, match=said):
        ours(tmp_path / "model.pth", libraries.images())


def test_two_layers_that_may_be_two_heads_have_a_note():
    model = libraries.timm_model(num_classes=0)
    model.fc = torch.nn.ModuleList([torch.nn.Linear(64, 64), torch.nn.Linear(64, 3)])
    (note, _) = to_ours(model.state_dict()).notes
    assert note.startswith("0 and 1 of the classifier are read as one layer behind the other; if they are heads of")


def test_a_gap_behind_a_batch_norm_has_a_note():
    model = libraries.torchvision_model()
    layers = [torch.nn.Flatten(), torch.nn.BatchNorm1d(64), torch.nn.ReLU(), torch.nn.Linear(64, 5)]
    model.classifier = torch.nn.Sequential(*layers)
    libraries.randomize(model)
    state = {key: value for key, value in model.state_dict().items() if value.is_floating_point()}
    assert any("between 1 and 3 of the classifier no activation is assumed" in note for note in to_ours(state).notes)
    assert not any("no activation" in note for note in to_ours(state, Choices(head_act="relu")).notes)


class TimmBody(torch.nn.Module):
    """As fastai wraps a network of timm."""

    def __init__(self):
        super().__init__()
        self.model = libraries.timm_model(num_classes=0)

    def forward(self, x):
        return self.model.forward_features(x)


class AdaptiveConcatPool2d(torch.nn.Module):
    """As fastai pools: the largest values first."""

    def forward(self, x):
        return torch.cat([x.amax((-2, -1), keepdim=True), x.mean((-2, -1), keepdim=True)], 1)


def fastai_model(body="timm", concat=True, hidden=(12,)):
    """What `vision_learner` makes, with statistics in its batch norms."""
    bodies = {"timm": TimmBody, "torchvision": lambda: torch.nn.Sequential(libraries.torchvision_model().features)}
    widths = [2 * libraries.DIMS[-1] if concat else libraries.DIMS[-1], *hidden, 5]
    layers = [AdaptiveConcatPool2d() if concat else torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
    for before, after in itertools.pairwise(widths):
        layers += [torch.nn.BatchNorm1d(before), torch.nn.Dropout(), torch.nn.Linear(before, after, bias=False)]
        layers += [torch.nn.ReLU()] if after != widths[-1] else []
    model = libraries.randomize(torch.nn.Sequential(bodies[body](), torch.nn.Sequential(*layers)))
    for layer in model[1]:
        if isinstance(layer, torch.nn.BatchNorm1d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize("body", ["timm", "torchvision"])
@pytest.mark.parametrize("concat", [True, False])
@pytest.mark.parametrize("hidden", [(12,), (), (24, 12)])
def test_a_network_of_fastai_gives_its_outputs(body, concat, hidden, tmp_path):
    model = fastai_model(body, concat, hidden)
    torch.save({"model": model.state_dict(), "opt": {}}, tmp_path / "model.pth")
    got, checkpoint = ours(tmp_path / "model.pth", libraries.images())
    assert checkpoint.weights.num_classes == 5
    assert libraries.largest_difference(got, libraries.outputs(model, libraries.images())) < NOISE
    state = {key: tensor for key, tensor in model.state_dict().items() if tensor.is_floating_point()}
    chosen = fit(state, {}, Choices(head="1"))
    assert set(chosen.modules.values()) <= set(dict(model.named_modules()))


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_layers_that_are_named_in_a_chain_run_one_after_the_other(suffix, tmp_path):
    model = libraries.randomize(TwoLayers())
    path = tmp_path / f"model.{suffix}"
    if suffix == "pth":
        torch.save(model.state_dict(), path)
    else:
        libraries.save(tmp_path, model)
    alone = fit(model.state_dict(), {}, Choices())
    assert "no classifier of a usual name; --head fc1+fc2 takes one" in alone.notes
    got, checkpoint = ours(path, libraries.images(), head="fc1+fc2", head_act="relu")
    assert checkpoint.weights.num_classes == 5
    assert libraries.largest_difference(got, libraries.outputs(model, libraries.images())) < NOISE
    chosen = fit(model.state_dict(), {}, Choices(head="fc1"))
    assert "'fc2' takes the outputs of 'fc1', and is left out; --head fc1+fc2 takes both" in chosen.notes
    assert fit(model.state_dict(), {}, Choices(head="fc1+fc2", head_act="relu")).modules["head"] == "fc2"
    with pytest.raises(BadRequest, match="between fc1 and fc2, and weights do not show it; give --head-act relu"):
        ours(path, libraries.images(), head="fc1+fc2")


def test_a_kept_classifier_and_the_layer_behind_it_run_one_after_the_other(tmp_path):
    model = libraries.randomize(Behind("linear"))
    libraries.save(tmp_path, model)
    got, _ = ours(tmp_path, libraries.images(), head="backbone.head+linear", head_act="none")
    expected = model.linear(model.backbone(libraries.images()))
    assert libraries.largest_difference(got, [expected.detach()]) < NOISE


def test_a_norm_that_fits_in_front_of_the_classifier_is_refused(tmp_path):
    with pytest.raises(BadRequest, match="ln lies beside the classifier 'head'"):
        ours(libraries.save(tmp_path, Neck("ln", torch.nn.LayerNorm(64))), libraries.images())


@pytest.mark.parametrize("name", ["target", "avg_model", "shadow"])
def test_a_copy_of_the_network_is_no_layer_in_front_of_the_classifier(name, tmp_path):
    both = torch.nn.Module()
    both.model, copy = Neck("unused", torch.nn.Identity()), Neck("unused", torch.nn.Identity())
    setattr(both, name, copy)
    folder = libraries.save(tmp_path, both)
    assert ours(folder, libraries.images(), prefix="model.backbone")[1].task == "classify"


@pytest.mark.parametrize("name", ["temperature", "logit_scale"])
def test_a_learned_number_beside_the_classifier_is_refused(name, tmp_path):
    whole = Neck("unused", torch.nn.Identity())
    whole.register_parameter(name, torch.nn.Parameter(torch.tensor(1.5)))
    with pytest.raises(BadRequest, match=f"{name} lies beside the classifier 'head'"):
        ours(libraries.save(tmp_path, whole), libraries.images())


@pytest.mark.parametrize("layers", [(64, 128, 32), (64, 16)])
def test_a_projection_to_another_width_is_left_out_with_a_note(layers, tmp_path):
    projector = torch.nn.Sequential(*(torch.nn.Linear(*pair) for pair in itertools.pairwise(layers)))
    whole = Neck("contrast", projector)
    assert ours(libraries.save(tmp_path, whole), libraries.images())[1].task == "classify"


def parameters(**tensors):
    module = torch.nn.Module()
    for name, tensor in tensors.items():
        module.register_parameter(name, torch.nn.Parameter(tensor))
    return module


USED = {
    "eca": torch.nn.Conv1d(1, 1, 3),  # attention over channels
    "gate": torch.nn.Conv2d(2, 1, 7),  # and over pixels
    "dw": torch.nn.Conv2d(64, 64, 3, groups=64),
    "local": torch.nn.Sequential(torch.nn.Conv2d(64, 64, 3, groups=64), torch.nn.BatchNorm2d(64)),
    "factor": parameters(gamma=torch.ones(1, 64, 1, 1)),
    "rnn": torch.nn.GRU(64, 64),
    "feat_mean": parameters(value=torch.ones(64)),
    "mask_conv": torch.nn.Conv2d(64, 64, 1),
    "aux_proj": torch.nn.Linear(64, 64),
    "decoder": torch.nn.TransformerDecoderLayer(64, 2, 64),
    "pre": torch.nn.Conv2d(1, 3, 3),
    "adapt": torch.nn.Conv2d(3, 3, 1),
}


@pytest.mark.parametrize("name", USED)
def test_a_layer_that_may_be_used_beside_the_classifier_is_refused(name, tmp_path):
    with pytest.raises(BadRequest, match=rf"{name} lies beside the classifier 'head'.*--head head"):
        ours(libraries.save(tmp_path, Neck(name, USED[name])), libraries.images())
    got, _ = ours(tmp_path, libraries.images(), head="head")
    assert got[0].shape == (2, 10)


def test_two_layers_that_fit_together_beside_the_classifier_are_refused(tmp_path):
    whole = Neck("down", torch.nn.Linear(64, 16))
    whole.up = torch.nn.Linear(16, 64)
    with pytest.raises(BadRequest, match="down, up lies beside the classifier 'head'"):
        ours(libraries.save(tmp_path, whole), libraries.images())


@pytest.mark.parametrize("layer", [torch.nn.BatchNorm1d(10), torch.nn.Linear(10, 10), torch.nn.Linear(10, 2)])
def test_a_layer_behind_the_classifier_is_refused(layer, tmp_path):
    with pytest.raises(
        BadRequest, match=r"'calib' takes the outputs of the classifier 'head'; give --head head\+calib"
    ):
        ours(libraries.save(tmp_path, Neck("calib", layer)), libraries.images())


@pytest.mark.parametrize("name", ["linear", "cls", "fc_new"])
def test_a_new_classifier_of_another_name_beside_the_backbones_own_is_refused(name, tmp_path):
    whole = torch.nn.Module()
    whole.backbone = libraries.timm_model(num_classes=20)
    setattr(whole, name, torch.nn.Linear(64, 5))
    with pytest.raises(BadRequest, match=rf"choose one: --head backbone\.head or {name}"):
        ours(libraries.save(tmp_path, whole), libraries.images())


def test_a_second_classifier_of_the_same_shape_is_refused(tmp_path):
    with pytest.raises(BadRequest, match=r"choose one: --head head or head_dist"):
        ours(libraries.save(tmp_path, Neck("head_dist", torch.nn.Linear(64, 10))), libraries.images())


@pytest.mark.parametrize("name", ["mean", "std", "pixel_mean", "class_weights"])
def test_colours_and_weights_of_classes_beside_the_classifier_are_left_out(name, tmp_path):
    whole = Neck("unused", torch.nn.Identity())
    whole.register_buffer(name, torch.ones(10 if "weights" in name else 3))
    assert ours(libraries.save(tmp_path, whole), libraries.images())[1].task == "classify"


@pytest.mark.parametrize("name", ["criterion", "loss_fn", "aux_head", "train_acc", "decoder"])
def test_what_only_training_uses_is_left_out_with_a_note(name, tmp_path):
    assert ours(libraries.save(tmp_path, Neck(name, torch.nn.Linear(64, 10))), libraries.images())[1].task == "classify"


def test_a_backbone_that_keeps_its_own_classifier_is_left_without_it(tmp_path):
    whole = torch.nn.Module()
    whole.backbone, whole.classifier = libraries.timm_model(num_classes=20), torch.nn.Linear(64, 10)
    folder = libraries.save(tmp_path, whole)
    with pytest.raises(BadRequest, match=r"choose one: --head backbone\.head or classifier"):
        ours(folder, libraries.images())
    (got,), _ = ours(folder, libraries.images(), head="classifier")
    features = whole.backbone.forward_head(whole.backbone.forward_features(libraries.images()), pre_logits=True)
    assert libraries.largest_difference([got], [whole.classifier(features).detach()]) < NOISE


def mlp(hidden):
    """Layers whose names are not in alphabetical order."""
    layers = torch.nn.Linear(64, hidden), torch.nn.BatchNorm1d(hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, 10)
    return torch.nn.Sequential(OrderedDict(zip(("proj", "bn", "act", "out"), layers, strict=True)))


def test_layers_of_a_head_run_in_the_order_of_the_file_or_of_their_widths(tmp_path):
    for hidden in (64, 24):
        whole = torch.nn.Sequential(OrderedDict(backbone=libraries.timm_model(num_classes=0), head=mlp(hidden)))
        libraries.randomize(whole)
        expected = libraries.outputs(whole, libraries.images())
        torch.save(whole.state_dict(), tmp_path / "weights.pth")
        got, _ = ours(tmp_path / "weights.pth", libraries.images(), head_act="none,relu")
        assert libraries.largest_difference(got, expected) < NOISE
        folder = libraries.save(tmp_path / str(hidden), whole)
        if hidden == 64:
            with pytest.raises(BadRequest, match=r"the order of the layers of the head .* is not known"):
                ours(folder, libraries.images(), head_act="none,relu")
        else:
            got, _ = ours(folder, libraries.images(), head_act="none,relu")
            assert libraries.largest_difference(got, expected) < NOISE


@pytest.mark.parametrize(
    ("layers", "head_act", "message"),
    [
        (
            [torch.nn.Linear(64, 64), None, torch.nn.BatchNorm1d(64), torch.nn.ReLU()],
            "relu",
            "between 0 and 2, between",
        ),
        ([], "relu", "no place for an activation"),
        ([torch.nn.Linear(64, 64), torch.nn.ReLU()], "rellu", "no activation 'rellu'; did you mean 'relu'"),
        ([torch.nn.Linear(64, 64), torch.nn.ReLU()], "relu,relu", "give --head-act relu"),
    ],
)
def test_an_activation_without_a_clear_place_is_refused(layers, head_act, message, tmp_path):
    whole = torch.nn.Module()
    whole.backbone = libraries.timm_model(num_classes=0)
    whole.head = torch.nn.Sequential(*(layer or torch.nn.Dropout() for layer in layers), torch.nn.Linear(64, 10))
    with pytest.raises(BadRequest, match=message):
        ours(libraries.save(tmp_path, whole), libraries.images(), head_act=head_act)


def test_a_hidden_layer_without_a_classifier_is_refused(tmp_path):
    model = libraries.timm_model(head_hidden_size=24)
    model.reset_classifier(0)
    with pytest.raises(BadRequest, match=r"hidden layer \(pre_logits.fc\), without a classifier"):
        ours(libraries.save(tmp_path, model), libraries.images())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_batch_norm_of_half_precision_is_folded_in_fp32(dtype, tmp_path):
    head = torch.nn.Sequential(torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 10))
    whole = libraries.randomize(
        torch.nn.Sequential(OrderedDict(backbone=libraries.timm_model(num_classes=0), head=head))
    )
    whole.to(dtype)
    got, _ = ours(libraries.save(tmp_path, whole), libraries.images())
    assert libraries.largest_difference(got, libraries.outputs(whole.float(), libraries.images())) < NOISE


def test_eps_of_a_norm_in_the_head_and_of_transformers_are_their_defaults(tmp_path):
    model = libraries.timm_model()
    model.head = torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.Linear(64, 10))
    _, checkpoint = ours(libraries.save(tmp_path / "own", model), libraries.images())
    assert checkpoint.variant.architecture.head_eps == 1e-5
    _, checkpoint = ours(libraries.save(tmp_path / "hf", libraries.huggingface_model()), libraries.images())
    assert checkpoint.variant.architecture.head_eps == 1e-12


def test_a_layer_scale_that_the_config_switches_off_is_a_contradiction(tmp_path):
    model = libraries.huggingface_model()
    config = json.loads(model.config.to_json_string()) | {"layer_scale_init_value": 0.0}
    with pytest.raises(BadRequest, match="the config says layer_scale False, but the weights have True"):
        ours(libraries.save(tmp_path, model, config), libraries.images())


def test_a_kind_of_norm_that_the_weights_do_not_have_is_refused(tmp_path):
    with pytest.raises(BadRequest, match="--norm rms: the norms of these weights are of the kind layer"):
        ours(libraries.save(tmp_path, libraries.timm_model()), libraries.images(), norm="rms")


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


def test_a_note_names_the_whole_module_of_a_head_without_a_usual_name():
    layers = torch.nn.BatchNorm1d(64), torch.nn.Dropout(), torch.nn.Linear(64, 5)
    whole = torch.nn.Sequential(libraries.timm_model(num_classes=0), torch.nn.Sequential(*layers))
    assert any("--head 1 takes one" in note for note in fit(whole.state_dict(), {}, Choices()).notes)


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("operator torchvision::nms does not exist", "the installed torchvision was built for another torch"),
        ("bad interpreter", "it is installed and cannot be imported"),
    ],
)
def test_a_library_that_cannot_be_imported_is_named_with_its_remedy(reason, said, monkeypatch):
    def fail(name):
        raise RuntimeError(reason)

    monkeypatch.setattr(reference.importlib, "import_module", fail)
    with pytest.raises(Unavailable, match=said):
        reference.load("timm", weights.load("random:0", "atto"), "random:0")
