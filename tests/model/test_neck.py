"""Feature pyramids of detectors: the network, and the checkpoints of mmdet and facebookresearch."""

from __future__ import annotations

import pytest
import torch

from exporter.artifact.sidecar import OutputSpec
from exporter.errors import BadRequest
from exporter.model import weights
from exporter.model.neck import stated_neck
from exporter.model.variants import count_macs, count_params
from tests.model import detectors
from tests.reference import library

library("transformers")
NOISE = 1e-5  # of the spread: fp32 rounding in another order
SIZES = ((64, 64), (96, 160), (300, 451), (33, 47), (32, 32))
RETINANET = "dict(type='FPN', in_channels=[8, 16, 24, 32], out_channels=12, start_level=1, num_outs=5, {more})"


def images(height=96, width=160):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(height))


def difference(network, model, size):
    with torch.inference_mode():
        ours = network(images(*size))
    theirs = detectors.maps(model, images(*size))
    assert [one.shape for one in ours] == [one.shape for one in theirs]
    return max(abs(a.numpy() - b).max() / b.std() for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def model():
    return detectors.detector()


@pytest.mark.parametrize("source", ["mmdet", "facebookresearch"])
def test_a_detector_gives_its_pyramid_at_every_size(source, model, tmp_path, monkeypatch):
    notes = []
    monkeypatch.setattr(weights, "note", notes.append)
    checkpoint = weights.load(str(detectors.save(tmp_path / "mask_rcnn.pth", model, source)))
    assert checkpoint.task == "pyramid"
    assert checkpoint.weights.num_classes == 0
    assert checkpoint.labels == ()
    assert checkpoint.preprocessing.mean == (0.5, 0.5, 0.2)
    assert (checkpoint.preprocessing.size, checkpoint.preprocessing.crop) == ((800, 1344), "border")
    network = checkpoint.model()
    for size in SIZES:
        assert difference(network, model, size) < NOISE, size
    left_out = "mask_rcnn.pth: left out roi_head (2 tensors) and rpn_head (2 tensors): what follows the feature pyramid"
    assert left_out in notes
    assert not any("labels" in note or "classifier" in note for note in notes)


def test_the_way_down_is_that_of_torchvision(model, tmp_path):
    ops = pytest.importorskip("torchvision.ops.feature_pyramid_network", exc_type=ImportError)
    theirs = ops.FeaturePyramidNetwork([8, 16, 24, 32], 12, extra_blocks=ops.LastLevelMaxPool()).eval()
    for level in range(4):
        theirs.inner_blocks[level][0].load_state_dict(model.neck.lateral_convs[level].conv.state_dict())
        theirs.layer_blocks[level][0].load_state_dict(model.neck.fpn_convs[level].conv.state_dict())
    network = weights.load(str(detectors.save(tmp_path / "mask_rcnn.pth", model))).model()
    with torch.inference_mode():
        for size in SIZES:
            stages = dict(zip("abcd", model.backbone(images(*size)).feature_maps, strict=True))
            for ours, expected in zip(network(images(*size)), theirs(stages).values(), strict=True):
                torch.testing.assert_close(ours, expected, atol=NOISE * expected.std().item(), rtol=0)


@pytest.mark.parametrize("added", ["on_input", "on_lateral", "on_output"])
@pytest.mark.parametrize("relu", [False, True])
def test_further_levels_by_convolutions_are_those_of_the_configuration(added, relu, tmp_path):
    model = detectors.detector(start_level=1, added=added, relu=relu)
    neck = RETINANET.format(more=f"add_extra_convs='{added}', relu_before_extra_convs={relu}")
    checkpoint = weights.load(str(detectors.save(tmp_path / "retinanet.pth", model, neck=neck)))
    arch = checkpoint.variant.architecture
    assert arch.pyramid.strides(arch.strides) == (8, 16, 32, 64, 128)
    for size in ((96, 160), (300, 451)):
        assert difference(checkpoint.model(), model, size) < NOISE


@pytest.mark.parametrize(
    ("more", "added"),
    [("add_extra_convs=True", "on_input"), ("add_extra_convs=True, extra_convs_on_inputs=False", "on_output")],
)
def test_old_configurations_are_read(more, added, tmp_path):
    model = detectors.detector(start_level=1, added=added)
    path = detectors.save(tmp_path / "retinanet.pth", model, neck=RETINANET.format(more=more))
    assert difference(weights.load(str(path)).model(), model, (75, 107)) < NOISE


@pytest.mark.parametrize("outs", [4, 6])
def test_another_number_of_maps_is_that_of_the_configuration(outs, tmp_path):
    model = detectors.detector(num_outs=outs)
    neck = detectors.USUAL.replace("num_outs=5", f"num_outs={outs}")
    assert (
        difference(weights.load(str(detectors.save(tmp_path / "a.pth", model, neck=neck))).model(), model, (75, 107))
        < NOISE
    )


def test_without_a_configuration_the_usual_pyramid_has_five_maps(model, tmp_path):
    path = detectors.save(tmp_path / "mask_rcnn.pth", model, neck=None)
    checkpoint = weights.load(str(path))
    assert difference(checkpoint.model(), model, (75, 107)) < NOISE
    assert checkpoint.stated.origins["size"] == "published preprocessing of mmdet"


@pytest.mark.parametrize(
    ("settings", "neck", "message"),
    [
        ({"num_outs": 3, "start_level": 1}, None, "an FPN of 3 lateral_convs and 3 fpn_convs, whose further levels"),
        ({"added": "on_output"}, None, "an FPN of 4 lateral_convs and 5 fpn_convs, whose further levels"),
        ({}, detectors.USUAL.replace("FPN", "PAFPN"), "type 'PAFPN' for the neck; expected FPN"),
        ({}, detectors.USUAL.replace("num_outs", "norm_cfg=dict(type='BN'), num_outs"), "norm_cfg {'type': 'BN'} for"),
        ({}, detectors.USUAL.replace("num_outs", "act_cfg=dict(type='ReLU'), num_outs"), "act_cfg {'type': 'ReLU'}"),
        ({}, detectors.USUAL.replace("num_outs", "upsample_cfg=dict(mode='bilinear'), num_outs"), "upsample_cfg"),
        ({}, detectors.USUAL.replace("num_outs", "gates=3, num_outs"), "gates 3 for the neck; not supported"),
        ({}, detectors.USUAL.replace("5", "'five'"), "num_outs 'five' for the neck; not supported"),
        ({}, detectors.USUAL.replace("5", "3"), "num_outs 3 with add_extra_convs False for the neck, and the weights"),
        ({}, detectors.USUAL.replace("num_outs", "add_extra_convs='on_input', num_outs"), "add_extra_convs on_input"),
        ({}, detectors.USUAL.replace("num_outs", "add_extra_convs='anywhere', num_outs"), "'anywhere' for the neck"),
        ({}, detectors.USUAL.replace("num_outs", "start_level=1, num_outs"), "from start_level 1 on for the neck"),
        ({}, "[dict(type='FPN'), dict(type='BFP')]", "expected one FPN"),
        ({}, "dict(type=open('x'))", "the neck in the configuration of the checkpoint cannot be read"),
        ({}, "dict(", "the neck in the configuration of the checkpoint cannot be read"),
        ({}, f"{detectors.USUAL}, teacher=dict(neck=dict(type='FPN'))", "it has 2 different necks"),
    ],
)  # fmt: skip
def test_a_pyramid_that_is_not_followed_is_refused_by_name(settings, neck, message, tmp_path):
    path = detectors.save(tmp_path / "detector.pth", detectors.detector(**settings), neck=neck)
    with pytest.raises(BadRequest, match=message) as error:
        weights.load(str(path))
    assert "\n" not in str(error.value)
    assert weights.load(str(path), choices=weights.Choices(head="none")).task == "features"


def changed(path, change):
    checkpoint = torch.load(path)
    change(checkpoint["state_dict"])
    torch.save(checkpoint, path)
    return str(path)


def test_norms_in_the_neck_are_refused_by_name(model, tmp_path):
    path = changed(
        detectors.save(tmp_path / "a.pth", model),
        lambda state: state.update({"neck.fpn_convs.0.bn.weight": torch.ones(12)}),
    )
    with pytest.raises(BadRequest, match=r"neck.fpn_convs.0.bn.weight: an FPN with other layers than convolutions"):
        weights.load(path)


@pytest.mark.parametrize(
    ("layer", "message"),
    [(3, "lateral_convs"), (2, r"neck\.lateral_convs\.2 is missing, although neck\.lateral_convs\.3 is there")],
)
def test_a_missing_layer_is_refused(layer, message, model, tmp_path):
    path = changed(
        detectors.save(tmp_path / "a.pth", model), lambda state: state.pop(f"neck.lateral_convs.{layer}.conv.weight")
    )
    with pytest.raises(BadRequest, match=message):
        weights.load(path)


def test_a_neck_of_another_kind_leaves_the_maps_of_the_backbone(model, tmp_path, monkeypatch):
    notes = []
    monkeypatch.setattr(weights, "note", notes.append)
    path = changed(
        detectors.save(tmp_path / "a.pth", model),
        lambda state: state.update({"neck.pafpn_convs.0.conv.weight": torch.ones(12, 12, 3, 3)}),
    )
    checkpoint = weights.load(path)
    assert checkpoint.task == "features"
    left_out = (
        "a.pth: the neck has pafpn_convs, which an FPN does not have: it is left out, and the maps of the backbone"
    )
    assert any(note.startswith(left_out) for note in notes)
    with pytest.raises(BadRequest, match=r"no FPN .* in these weights; --task features takes the maps"):
        checkpoint.model(OutputSpec(tasks=("pyramid",)))


def test_networks_that_take_bgr_are_refused(model, tmp_path):
    with pytest.raises(BadRequest, match="the network takes BGR, which is not supported"):
        weights.load(str(detectors.save(tmp_path / "a.pth", model, rgb=False)))


def test_the_backbone_alone_gives_its_maps(model, tmp_path):
    checkpoint = weights.load(str(detectors.save(tmp_path / "a.pth", model)))
    network = checkpoint.model(OutputSpec(tasks=("features",)))
    assert [one.shape[1] for one in network(images())] == [8, 16, 24, 32]
    assert not any("neck" in key for key in network.state_dict())
    with pytest.raises(BadRequest, match="pyramid cannot be combined with other tasks"):
        checkpoint.model(OutputSpec(tasks=("features", "pyramid")))
    with pytest.raises(BadRequest, match="no classifier in these weights; --task pyramid takes them"):
        checkpoint.model(OutputSpec(tasks=("classify",)))


def test_multiply_accumulates_are_those_that_pytorch_counts(tmp_path):
    from torch.utils.flop_counter import FlopCounterMode

    model = detectors.detector(start_level=1, added="on_output")
    neck = RETINANET.format(more="add_extra_convs='on_output'")
    checkpoint = weights.load(str(detectors.save(tmp_path / "a.pth", model, neck=neck)))
    arch, network = checkpoint.variant.architecture, checkpoint.model()
    assert count_params(arch, 0) == sum(parameter.numel() for parameter in network.parameters())
    for size in ((96, 160), (75, 107)):
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            network(images(*size)[:1])
        assert count_macs(arch, size, 0) == counter.get_total_flops() // 2


def test_a_configuration_is_read_in_both_notations():
    expected = {"type": "FPN", "in_channels": [8], "upsample_cfg": {"mode": "nearest"}}
    assert (
        stated_neck("model = dict(neck=dict(type='FPN', in_channels=[8], upsample_cfg=dict(mode='nearest')))")
        == expected
    )
    assert (
        stated_neck("m = {'neck': {'type': 'FPN', 'in_channels': (8,), 'upsample_cfg': {'mode': 'nearest'}}}")
        == expected
    )
    assert stated_neck("model = dict(backbone=dict(type='ConvNeXt'))") is None


@pytest.mark.parametrize("value", ["-" * 50_000 + "1", "lambda: " * 3000 + "1", "[" * 5000 + "]" * 5000, "1 + " * 9000])
def test_a_configuration_that_python_cannot_parse_is_refused(value):
    """Nested too deep, or no expression; some of the errors of Python have no message."""
    with pytest.raises(BadRequest, match=r"cannot be read \(\w"):
        stated_neck(f"model = dict(neck={value})")
