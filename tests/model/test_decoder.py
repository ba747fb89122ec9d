"""Weights of UPerNet: transformers' folders, checkpoints of mmsegmentation and facebookresearch, and other heads."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from exporter.artifact.sidecar import OutputSpec
from exporter.errors import BadRequest
from exporter.model import weights
from tests.model import segmenters
from tests.reference import library

library("transformers")
NOISE = 1e-5  # of the spread: fp32 rounding in another order
SIZES = ((64, 64), (96, 160), (224, 224), (300, 451), (32, 33))


def images(height=96, width=160):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(height))


def difference(network, model, size):
    with torch.inference_mode():
        ours, theirs = network(images(*size)), segmenters.logits(model, images(*size))
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.std()).item()


@pytest.fixture(scope="module")
def model():
    return segmenters.transformers_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return segmenters.save(tmp_path_factory.mktemp("upernet"), model)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dims": (8, 16, 24), "scales": (1, 3)},
        {"dims": (8, 12), "width": 10, "scales": (1, 2, 4, 5, 7)},
        {"kind": "ConvNextV2"},
        {"levels": (0, 1, 2)},
    ],
    ids=["four levels", "three levels", "two levels", "V2", "without the last stage"],
)
def test_a_network_of_transformers_gives_its_logits_at_every_size(settings, tmp_path):
    model = segmenters.transformers_model(**settings)
    checkpoint = weights.load(str(segmenters.save(tmp_path, model)))
    assert checkpoint.task == "segment"
    network = checkpoint.model()
    for size in SIZES:
        assert difference(network, model, size) < NOISE


@pytest.mark.parametrize("library", ["mmsegmentation", "facebookresearch"])
def test_a_checkpoint_of_another_library_gives_the_same(library, model, folder, tmp_path, monkeypatch):
    path, notes = tmp_path / "upernet.pth", []
    monkeypatch.setattr(weights, "note", notes.append)
    text = "model = dict(decode_head=dict(type='UPerHead', pool_scales=(1, 2, 3, 6)), norm=dict(mean=[127.5, 127.5, 51]"
    meta = {"CLASSES": list(segmenters.LABELS), "config": f"crop_size = (640, 640)\n{text}))"}
    torch.save({"meta": meta, "state_dict": segmenters.state_of(model, library)}, path)
    checkpoint = weights.load(str(path))
    assert difference(checkpoint.model(), model, (96, 160)) < NOISE
    assert checkpoint.labels == segmenters.LABELS
    assert checkpoint.preprocessing.mean == (0.5, 0.5, 0.2)
    assert (checkpoint.preprocessing.size, checkpoint.preprocessing.crop) == (640, "squash")
    assert checkpoint.weights.digest == weights.load(str(folder)).weights.digest
    assert "upernet.pth: dropped auxiliary_head (7 tensors): it is only used in training" in notes


def test_the_configuration_in_a_checkpoint_decides_pooling_and_corners(tmp_path):
    model = segmenters.transformers_model(scales=(1, 2, 4, 8))
    path = tmp_path / "upernet.pth"
    text = "decode_head=dict(type='UPerHead', pool_scales=[1, 2, 4, 8], align_corners = {})"
    state = segmenters.state_of(model)
    torch.save({"meta": {"cfg": text.format(False)}, "state_dict": state}, path)
    assert difference(weights.load(str(path)).model(), model, (96, 160)) < NOISE
    torch.save({"meta": {"cfg": text.format(True)}, "state_dict": state}, path)
    with pytest.raises(BadRequest, match="align_corners True for UPerNet's head; not supported"):
        weights.load(str(path))
    for words in ("bgr_to_rgb=False", "to_rgb = False"):
        torch.save({"meta": {"cfg": f"{text.format(False)}, {words}"}, "state_dict": state}, path)
        with pytest.raises(BadRequest, match="the network takes BGR, which is not supported"):
            weights.load(str(path))


def test_labels_and_preprocessing_are_those_of_the_whole_network(model, tmp_path):
    processor = {
        "image_processor_type": "SegformerImageProcessor", "size": {"height": 96, "width": 96}, "resample": 2,
        "image_mean": [0.5, 0.4, 0.3], "do_reduce_labels": False,
    }  # fmt: skip
    checkpoint = weights.load(str(segmenters.save(tmp_path, model, processor)))
    assert checkpoint.labels == segmenters.LABELS, "backbone_config has two labels of its own"
    assert checkpoint.weights.num_classes == len(segmenters.LABELS)
    recipe = checkpoint.preprocessing
    assert (recipe.size, recipe.resize, recipe.crop, recipe.interpolation) == (96, 96, "squash", "bilinear")
    assert recipe.mean == (0.5, 0.4, 0.3)
    (tmp_path / "preprocessor_config.json").unlink()
    assert weights.load(str(tmp_path)).preprocessing.size == 512


def test_without_its_head_the_backbone_gives_maps(folder):
    checkpoint = weights.load(str(folder), choices=weights.Choices(head="none"))
    assert checkpoint.task == "features"
    assert len(checkpoint.model()(images())) == 4
    checkpoint = weights.load(str(folder))
    maps = checkpoint.model(OutputSpec(tasks=("features",)))(images())
    assert [tuple(one.shape[1:]) for one in maps] == [(8, 24, 40), (16, 12, 20), (24, 6, 10), (32, 3, 5)]


@pytest.mark.parametrize(
    ("tasks", "answer", "message"),
    [
        (("classify",), "logits", "no classifier in these weights; --task segment takes them"),
        (("embed",), "logits", "no norm behind the last stage"),
        (("features", "segment"), "logits", "segment cannot be combined with other tasks"),
        (("segment",), "softmax", "--output softmax: task segment takes logits, logits4, labels or scores"),
        (("features",), "labels", "--output labels: it is of each pixel, for --task segment"),
    ],
)
def test_outputs_that_segmenters_do_not_have_are_refused(tasks, answer, message, folder):
    with pytest.raises(BadRequest, match=message):
        weights.load(str(folder)).model(OutputSpec(tasks=tasks, answer=answer))


def test_labels_of_more_than_256_classes_do_not_fit_a_byte(tmp_path):
    model = segmenters.transformers_model(dims=(4, 8), width=4, labels=[str(number) for number in range(257)])
    checkpoint = weights.load(str(segmenters.save(tmp_path, model)))
    with pytest.raises(BadRequest, match="257 classes, and labels are bytes; give --output logits"):
        checkpoint.model(OutputSpec(tasks=("segment",), answer="labels"))


def test_labels_of_one_class_are_refused(tmp_path):
    model = segmenters.transformers_model(dims=(4, 8), width=4, labels=["road"])
    checkpoint = weights.load(str(segmenters.save(tmp_path, model)))
    with pytest.raises(
        BadRequest, match="the network has one class, which every pixel would get; give --output logits"
    ):
        checkpoint.model(OutputSpec(tasks=("segment",), answer="labels"))


def changed(folder, tmp_path, change, config=None):
    """The folder with changed tensors and config."""
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors")
    kept = json.loads((folder / "config.json").read_text()) | (config or {})
    (tmp_path / "config.json").write_text(json.dumps({key: one for key, one in kept.items() if one is not None}))
    return str(tmp_path)


def renamed(old, new):
    def change(state):
        for key in [key for key in state if old in key]:
            state[key.replace(old, new)] = state.pop(key)

    return change


def without(name):
    return lambda state: [state.pop(key) for key in [key for key in state if name in key]]


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (renamed("decode_head.fpn_convs.0.", "decode_head.fpn_gates.0."), {}, "unexpected keys in UPerNet's head: 5"),
        (without("bottleneck.batch_norm.running_var"), {}, "UPerNet's bottleneck has no running_var"),
        (without("decode_head.lateral_convs.1.conv"), {}, "batch norms without convolutions"),
        (without("decode_head.fpn_convs.2."), {}, "missing keys"),
        (without("batch_norm"), {}, "neither a batch norm nor a bias in bottleneck, fpn_bottleneck, fpn_convs.0"),
        (lambda state: None, {"pool_scales": [1, 2]}, "pool_scales .1, 2., but the weights have 4 pooling branches"),
        (lambda state: None, {"pool_scales": [0, 2, 3, 6]}, "pool_scales is .0, 2, 3, 6."),
        (lambda state: None, {"hidden_size": 12}, "hidden_size 12, but the weights have 16"),
        (without("psp_modules.3"), {"pool_scales": [1, 2, 3]}, "wrong shapes"),
        (without("psp_modules.3"), {"pool_scales": None}, "no pool_scales, but the weights have 3 pooling branches"),
    ],
)
def test_a_head_that_is_not_whole_or_not_that_of_the_config_is_refused(change, config, message, folder, tmp_path):
    with pytest.raises(BadRequest, match=message):
        weights.load(changed(folder, tmp_path, change, config))


def test_other_levels_than_those_of_the_config_are_refused(folder, tmp_path):
    inner = json.loads((folder / "config.json").read_text())["backbone_config"]
    config = {"backbone_config": inner | {"out_features": ["stage1", "stage2", "stage4"]}}
    with pytest.raises(BadRequest, match=r"out_features \['stage1', 'stage2', 'stage4'\], but the weights are of"):
        weights.load(changed(folder, tmp_path, lambda state: None, config))


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("decode_head.linear_fuse.weight", "SegFormer"),
        ("decode_head.fusion_conv.conv.weight", "SegFormer"),
        ("model.transformer_module.level_embed.weight", "Mask2Former"),
        ("decode_head.level_embed.weight", "Mask2Former"),
        ("panoptic_head.pixel_decoder.level_embed.weight", "Mask2Former"),
        ("model.transformer_module.queries_embedder.weight", "MaskFormer"),
        ("decode_head.convs.0.conv.weight", "FCN"),
        ("decode_head.aspp_modules.0.conv.weight", "DeepLab"),
        ("decode_head.something.weight", "unknown"),
    ],
)
def test_the_heads_of_other_segmenters_are_left_out_by_name(key, name, folder, tmp_path, monkeypatch):
    notes = []
    monkeypatch.setattr(weights, "note", notes.append)

    def change(state):
        without("_head.")(state)
        state[key] = torch.ones(4, 4)

    checkpoint = weights.load(changed(folder, tmp_path, change))
    with pytest.raises(BadRequest, match=f"the head of these weights is {name}, and --task segment takes UPerNet"):
        checkpoint.model(OutputSpec(tasks=("segment",)))
    assert checkpoint.task == "features"
    assert len(checkpoint.model()(images())) == 4
    assert name == "unknown" or any(f"the head of {name} is left out" in note for note in notes)


def test_a_detector_with_embedded_levels_is_not_mask2former(folder, tmp_path):
    """Deformable DETR has them too."""

    def change(state):
        without("_head.")(state)
        state["model.level_embed"] = torch.ones(4, 4)

    with pytest.raises(BadRequest, match="no head of UPerNet here"):
        weights.load(changed(folder, tmp_path, change)).model(OutputSpec(tasks=("segment",)))


def test_weights_without_a_head_are_refused_for_segmentation():
    with pytest.raises(BadRequest, match="no head of UPerNet here, and --task segment takes UPerNet"):
        weights.load("random:0", "atto").model(OutputSpec(tasks=("segment",)))
