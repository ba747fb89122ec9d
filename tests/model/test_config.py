"""What a configuration states about the network is read or refused by name, as the libraries themselves read it."""

import argparse
import contextlib
import inspect
import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from exporter.errors import BadRequest
from exporter.model import stated
from exporter.model.config import from_training, read_config
from exporter.model.preprocessing import known
from exporter.model.variants import VARIANTS
from tests.reference import library


@pytest.fixture
def of(tmp_path):
    """The configuration of a folder with one file."""

    def of(config, name="config.json"):
        (tmp_path / name).write_text(json.dumps(config))
        return read_config(tmp_path)

    return of


def timm(**args):
    return {"architecture": "convnext_tiny", "model_args": args, "pretrained_cfg": {"input_size": [3, 64, 64]}}


STATED = [
    ({"act_layer": "gelu_tanh"}, {"act": "gelu_tanh"}),
    ({"act_layer": "swish"}, {"act": "silu"}),
    ({"norm_layer": "rmsnorm2d", "norm_eps": 1e-5}, {"norm": "rms", "norm_eps": 1e-5}),
    ({"norm_layer": "simplenorm"}, {"norm": "simple"}),
    ({"global_pool": "catavgmax"}, {"pool": "catavgmax"}),
    ({"global_pool": "fastavgmax"}, {"pool": "avgmax"}),
    ({"global_pool": ""}, {"pool": "none"}),
    ({"output_stride": 8}, {"output_stride": 8}),
    ({"patch_size": 2, "stem_type": "overlap"}, {"patch": 2, "stem": "overlap"}),
    ({"kernel_sizes": 5}, {"kernels": (5, 5, 5, 5)}),
    ({"kernel_sizes": [7, 5, 5, 3]}, {"kernels": (7, 5, 5, 3)}),
    ({"depths": [1, 2, 1, 1], "dims": [8, 16, 32, 64]}, {"depths": (1, 2, 1, 1), "dims": (8, 16, 32, 64)}),
    ({"head_norm_first": True, "head_hidden_size": 32}, {"head_norm_first": True, "head_hidden": 32}),
    ({"in_chans": 1, "num_classes": 0}, {"in_chans": 1, "num_classes": 0}),
    ({"use_grn": True, "conv_bias": False, "ls_init_value": 0}, {"grn": True, "conv_bias": False, "layer_scale": True}),
    ({"conv_mlp": True, "drop_rate": 0.0, "act_layer": None}, {}),
]


@pytest.mark.parametrize(("args", "network"), STATED)
def test_model_args_are_read(args, network, of):
    config = of(timm(**args))
    assert config.network == network
    assert {config.origins[name] for name in network} <= {"config.json"}


def test_every_argument_of_timms_network_is_on_a_list():
    library("timm")
    from timm.models.convnext import ConvNeXt

    arguments = set(inspect.signature(ConvNeXt.__init__).parameters) - {"self"}
    assert arguments == set(stated.MODEL_ARGS) | (set(stated._IDLE_ARGS) & arguments)


def test_every_activation_of_timm_and_transformers_is_read_or_refused(of):
    library("timm")
    transformers = library("transformers")
    import torch
    from timm.layers import get_act_layer
    from timm.layers.create_act import _ACT_LAYER_DEFAULT

    x = torch.linspace(-6, 6, 1001)
    ours = {name: get_act_layer(name)()(x) for name in ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu")}
    theirs = [(name, timm(act_layer=name), get_act_layer(name)) for name in _ACT_LAYER_DEFAULT]
    theirs += [
        (name, {"model_type": "convnext", "hidden_act": name}, lambda name=name: transformers.activations.ACT2FN[name])
        for name in transformers.activations.ACT2CLS
    ]
    read = 0
    for name, config, make in theirs:
        try:
            act = of(config).network["act"]
        except BadRequest as error:
            assert f"is {name!r}; not supported" in str(error)
            continue
        read += 1
        torch.testing.assert_close(make()(x), ours[act], rtol=0, atol=1e-5)
    assert read == 6 + 11


def test_architectures_of_timm_state_what_the_weights_cannot_tell(of):
    """Every function of timm, built on the meta device, has the activation, norm and eps that are read."""
    library("timm")
    import timm as library_timm
    import torch

    kinds = {"LayerNorm": "layer", "RmsNorm": "rms", "SimpleNorm": "simple"}
    acts = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "SiLU": "silu"}
    names = [name for name in library_timm.list_models("*convnext*") if "convnext_" in name or "convnextv2" in name]
    names = [name for name in names if type_of(library_timm, name) == "ConvNeXt"]
    assert len(names) > 25
    for name in names:
        with torch.device("meta"):
            model = library_timm.create_model(name)
        network = {"act": "gelu", "norm": "layer", "norm_eps": 1e-6, "head_norm_first": False}
        network |= of({"architecture": name, "pretrained_cfg": {"input_size": [3, 64, 64]}}).network
        norm, act = model.stages[0].blocks[0].norm, model.stages[0].blocks[0].mlp.act
        assert network["norm"] == kinds[type(norm).__name__.removesuffix("2d")], name
        assert (network["act"], network["norm_eps"]) == (acts[type(act).__name__], norm.eps), name
        assert network["head_norm_first"] == (type(model.norm_pre).__name__ != "Identity"), name


def type_of(library_timm, name):
    return "ConvNeXt" if library_timm.models.model_entrypoint(name).__module__.endswith("convnext") else ""


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"use_xyz": True}, "model_args.use_xyz is True; not supported"),
        ({"act_layer": "mish"}, "model_args.act_layer is 'mish'; not supported"),
        ({"norm_layer": "batchnorm2d"}, "model_args.norm_layer is 'batchnorm2d'; not supported"),
        ({"global_pool": "abs_attn"}, "model_args.global_pool is 'abs_attn'; not supported"),
        ({"output_stride": 4}, "model_args.output_stride is 4; not supported"),
        ({"kernel_sizes": [7, 7]}, r"model_args.kernel_sizes is \[7, 7\]; not supported"),
        ({"kernel_sizes": 6}, "model_args.kernel_sizes is 6; not supported"),
        ({"norm_eps": "1e-5x"}, "model_args.norm_eps is '1e-5x'; not supported"),
        ({"stem_type": "conv"}, "model_args.stem_type is 'conv'; not supported"),
        ({"patch_size": -4}, "model_args.patch_size is -4; not supported"),
        ({"out_indices": [3]}, r"model_args.out_indices is \[3\]; not supported"),
        ({"use_grn": "yes"}, "model_args.use_grn is 'yes'; not supported"),
    ],
)
def test_model_args_that_are_unknown_or_not_supported_are_refused_by_name(args, message, of):
    with pytest.raises(BadRequest, match=rf"config.json: {message}"):
        of(timm(**args))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"global_pool": "avg"} | timm(global_pool="max"), "global_pool is 'max', but global_pool is 'avg'"),
        ({"num_classes": 10} | timm(num_classes=5), "num_classes is 5, but num_classes is 10"),
        (timm() | {"architecture": "resnet50"}, "architecture is 'resnet50'; expected a ConvNeXt"),
        (timm() | {"pretrained_cfg": {"label_offset": 1}}, "pretrained_cfg.label_offset is 1; not supported"),
        ({"model_type": "convnext", "hidden_act": "mish"}, "hidden_act is 'mish'; not supported"),
        ({"model_type": "convnext", "layer_norm_eps": "x"}, "layer_norm_eps is 'x'; not supported"),
        ({"model_type": "convnext", "patch_size": [4, 2]}, r"patch_size is \[4, 2\]; not supported"),
        ({"model_type": "convnext", "num_stages": 3, "depths": [1, 1]}, "num_stages is 3; but depths has 2"),
        ({"model_type": "convnext", "auto_map": {"AutoModel": "x.Y"}}, "auto_map is .*; code of the repository"),
        ({"model_type": "resnet"}, "model_type is 'resnet'; expected convnext, convnextv2, dinov3_convnext"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps is 1e-05; whose norms depends on model_type"),
        ({"model_type": "detr", "backbone_config": {"model_type": "resnet"}}, "backbone_config.model_type is 'resnet'"),
    ],
)
def test_configurations_that_contradict_themselves_or_are_not_supported_are_refused(config, message, of):
    with pytest.raises(BadRequest, match=message):
        of(config)


@pytest.mark.parametrize("args", [{"drop_path_rate": 0.1}, {"head_init_scale": 0.001}, {"drop_rate": 0.2}])
def test_arguments_without_effect_are_noted(args, of):
    (name, value), *_ = args.items()
    assert of(timm(**args)).notes == (f"model_args.{name} {value}: has no effect on the outputs",)


def test_eps_of_transformers_is_the_last_norms_alone_but_for_dinov3(of):
    first = of({"model_type": "convnext", "layer_norm_eps": 1e-3, "hidden_act": "relu"})
    assert first.network == {"act": "relu", "norm_eps": 1e-6, "head_eps": 1e-3, "grn": False}
    second = of({"model_type": "convnextv2", "num_channels": 1, "depths": [1, 1], "hidden_sizes": [8, 16]})
    assert second.network["head_eps"] == 1e-12
    assert (second.network["grn"], second.network["in_chans"], second.network["dims"]) == (True, 1, (8, 16))
    assert second.origins["head_eps"] == "default of convnextv2"
    assert of({"model_type": "dinov3_convnext", "layer_norm_eps": 1e-5}).network == {"norm_eps": 1e-5}


@pytest.mark.parametrize("kind", ["ConvNextConfig", "ConvNextV2Config", "DINOv3ConvNextConfig"])
def test_configurations_that_transformers_writes_are_read_without_a_note(kind, of, tmp_path):
    library("torchvision")
    transformers = library("transformers")
    getattr(transformers, kind)(layer_norm_eps=1e-5, num_labels=3).save_pretrained(tmp_path)
    config = read_config(tmp_path)
    assert config.notes == ()
    assert config.network["norm_eps" if kind.startswith("DINO") else "head_eps"] == 1e-5
    assert config.labels == ()


def test_keys_that_no_convnext_reads_are_noted_and_bookkeeping_is_not(of):
    config = of({"model_type": "convnext", "use_mask": True, "torch_dtype": "float32", "transformers_version": "5"})
    assert config.notes == ("config.json: use_mask: no ConvNeXt reads them, so they have no effect",)


def test_timm_wrapper_is_read_like_timm(of):
    wrapper = timm(act_layer="relu") | {"model_type": "timm_wrapper", "num_classes": 2, "initializer_range": 0.02}
    config = of(wrapper | {"label_names": ["a", "b"], "torch_dtype": "float32", "do_pooling": True})
    assert (config.labels, config.network, config.notes) == (("a", "b"), {"act": "relu", "num_classes": 2}, ())


def test_the_backbone_of_a_segmenter_is_read_and_its_own_labels_are_not(of):
    inner = {"model_type": "convnext", "layer_norm_eps": 1e-5, "hidden_act": "relu", "num_labels": 2}
    inner["id2label"] = {"0": "LABEL_0", "1": "LABEL_1"}
    config = of({"model_type": "upernet", "backbone_config": inner, "id2label": {"0": "wall"}})
    assert (config.network["act"], config.network["head_eps"], config.labels) == ("relu", 1e-5, ("wall",))
    assert "num_classes" not in config.network
    assert of({"model_type": "detr", "backbone_config": inner, "id2label": {"0": "cat"}}).labels == ()
    upernet = {"model_type": "upernet", "backbone_config": inner, "hidden_size": 64, "pool_scales": [1, 4], "neck": 2}
    config = of(upernet)
    assert (config.network["decoder_width"], config.network["pool_scales"]) == (64, (1, 4))
    assert config.notes == ("config.json: neck: no ConvNeXt reads them, so they have no effect",)
    with pytest.raises(BadRequest, match="pool_scales is 'all'; not supported"):
        of(upernet | {"pool_scales": "all"})
    inner = {"model_type": "timm_backbone", "backbone": "convnext_tiny", "num_channels": 1, "out_indices": [1, 2, 3]}
    assert of({"model_type": "detr", "backbone_config": inner}).network == {"in_chans": 1}
    # transformers 5 saves the stages of timm by timm's names.
    inner |= {"out_features": ["stages.0", "stages.1", "stages.2", "stages.3"]}
    assert "decoder_levels" not in of({"model_type": "upernet", "backbone_config": inner}).network


def open_clip(**vision):
    vision = {"timm_model_name": "convnext_xxlarge", "timm_pool": "", "timm_proj": "linear", "image_size": 256} | vision
    return {"model_cfg": {"embed_dim": 1024, "vision_cfg": vision}, "preprocess_cfg": {}}


def test_the_vision_tower_of_open_clip_is_read(of, tmp_path):
    name = "open_clip_config.json"
    assert of(open_clip(), name).network == {"norm_eps": 1e-5}
    assert of(open_clip(timm_pool="max"), name).network["pool"] == "max"
    for vision, message in (
        ({"timm_pool": "abs_attn"}, "vision_cfg.timm_pool is 'abs_attn'; not supported"),
        ({"timm_proj": "glu"}, "vision_cfg.timm_proj is 'glu'; not supported"),
        ({"output_tokens": True}, "vision_cfg.output_tokens is True; not supported"),
        ({"timm_model_name": None}, "vision_cfg.timm_model_name is None; expected a ConvNeXt of timm"),
    ):
        with pytest.raises(BadRequest, match=message):
            of(open_clip(**vision), name)


def test_open_clips_file_is_for_its_own_weights(of, tmp_path):
    of(open_clip(), "open_clip_config.json")
    assert of(timm(act_layer="relu")).network == {"act": "relu"}
    assert read_config(tmp_path, tmp_path / "model.safetensors").network == {"act": "relu"}
    assert read_config(tmp_path, tmp_path / "open_clip_model.safetensors").network == {"norm_eps": 1e-5}


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 400)
    | st.floats()
    | st.sampled_from(["", "gelu", "convnext", "n01440764"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["0", "1", "size", "a"]), inner),
    max_leaves=5,
)
TOP = ["model_type", "architecture", "model_args", "pretrained_cfg", "id2label", "label2id", "label_names", "model_cfg"]
TOP += ["backbone_config", "use_timm_backbone", "hidden_act", "layer_norm_eps", "depths", "num_stages", "num_labels"]
TOP += ["layer_scale_init_value", "size", "crop_size", "crop_pct", "image_mean", "resample", "image_processor_type"]
INNER = [
    *stated.MODEL_ARGS,
    "input_size",
    "crop_pct",
    "crop_mode",
    "mean",
    "std",
    "license",
    "model_type",
    "vision_cfg",
]
FILE = st.dictionaries(
    st.sampled_from(TOP), JSON | st.dictionaries(st.sampled_from(INNER), JSON, max_size=4), max_size=5
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=FILE, processor=FILE, clip=FILE, args=st.dictionaries(st.sampled_from([*TOP, *INNER]), JSON, max_size=4))
def test_whatever_files_and_checkpoints_state_they_are_read_or_refused(config, processor, clip, args, tmp_path):
    files = {"config.json": config, "preprocessor_config.json": processor, "open_clip_config.json": clip}
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    for weights in ("model.safetensors", "open_clip_model.safetensors"):
        with contextlib.suppress(BadRequest):
            read_config(tmp_path, tmp_path / weights)
    with contextlib.suppress(BadRequest):
        from_training({"args": args, "meta": config, "hyper_parameters": processor, "class_to_idx": clip})


@pytest.mark.parametrize(
    ("config", "stride"),
    [
        ({"model_type": "detr", "use_timm_backbone": True, "backbone": "convnext_tiny", "dilation": True}, 16),
        ({"model_type": "detr", "use_timm_backbone": True, "backbone": "convnext_tiny", "dilation": False}, None),
        ({"use_timm_backbone": True, "backbone": "convnext_tiny", "dilation": True,
          "backbone_kwargs": {"output_stride": 8}}, 8),
        ({"use_timm_backbone": True, "backbone": "convnext_tiny", "output_stride": 16}, 16),
        ({"use_timm_backbone": False, "dilation": True,
          "backbone_config": {"model_type": "timm_backbone", "backbone": "convnext_tiny"}}, None),
    ],
)  # fmt: skip
def test_the_stride_of_backbones_of_timm_is_read(config, stride, of):
    assert of(config).network.get("output_stride") == stride


def test_channels_of_a_backbone_of_timm_are_those_of_its_arguments(of):
    config = {"use_timm_backbone": True, "backbone": "convnext_tiny", "num_channels": 3}
    assert of(config).network["in_chans"] == 3
    assert of(config | {"backbone_kwargs": {"in_chans": 1}}).network["in_chans"] == 1


def test_what_a_name_of_timm_stands_for_is_known_behind_a_prefix():
    config = from_training({"args": {"model": "hf-hub:timm/test_convnext.r160_in1k", "model_kwargs": {}}})
    assert (config.network["act"], config.network["norm_eps"]) == ("gelu_tanh", 1e-5)


def test_dinov3_without_a_processor_has_its_own_preprocessing(of):
    stated = known(of({"model_type": "dinov3_convnext"}), "dinov3", VARIANTS["tiny"], "")
    assert (stated.preprocessing.crop, stated.preprocessing.interpolation) == ("squash", "bilinear")
    assert (stated.preprocessing.size, stated.preprocessing.resize) == (224, 224)


@pytest.mark.parametrize("mean", [0.25, "0.25", [0.25], "0.25,0.25,0.25"])
def test_one_number_or_text_in_args_is_a_mean(mean):
    config = from_training({"args": {"img_size": 320, "mean": mean, "model": "convnext_nano"}})
    assert known(config, "timm", VARIANTS["nano"], "x").resolve()[0].mean == (0.25, 0.25, 0.25)


@pytest.mark.parametrize("name", ["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"])
def test_pillows_number_of_a_filter_in_args_is_its_name(name):
    number = int(Image.Resampling[name.upper()])
    config = from_training({"args": {"img_size": 320, "interpolation": number, "model": "convnext_nano"}})
    assert known(config, "timm", VARIANTS["nano"], "x").resolve()[0].interpolation == name


def test_args_of_timms_script_are_read():
    args = argparse.Namespace(img_size=320, mean=[0.5], std=None, crop_pct=1.0, interpolation="", model="convnext_nano")
    config = from_training({"args": args, "arch": "convnext_nano"})
    recipe, origins = known(config, "timm", VARIANTS["nano"], "x").resolve()
    assert (recipe.size, recipe.resize, recipe.mean, recipe.interpolation) == (320, 320, (0.5, 0.5, 0.5), "bicubic")
    assert (origins["size"], origins["std"]) == ("args of the checkpoint", "timm's preprocessing of convnext_nano")
    args = {"img_size": None, "mean": None, "gp": "max", "num_classes": 3, "model_kwargs": {"act_layer": "relu"}}
    config = from_training({"args": args})
    assert (config.preprocessing, config.network) == (None, {"act": "relu", "pool": "max", "num_classes": 3})
    with pytest.raises(BadRequest, match=r"the checkpoint: args.model_kwargs.use_xyz is 1; not supported"):
        from_training({"args": {"model_kwargs": {"use_xyz": 1}}})


@pytest.mark.parametrize("sizes", [(288, 320), (240, None), (None, 320)])
def test_args_of_torchvisions_script_are_read(sizes):
    crop, resize = sizes
    config = from_training({"args": argparse.Namespace(val_crop_size=crop, val_resize_size=resize)})
    recipe, origins = known(config, "torchvision", VARIANTS["tiny"], "x").resolve()
    assert (recipe.size, recipe.resize, recipe.interpolation) == (crop or 224, resize or 256, "bilinear")
    assert origins["interpolation"] == "default of torchvision's references"


MMPRETRAIN = """
data_preprocessor = dict(mean=[127.5, 127.5, 51], num_classes=10, std=[51.0, 51.0, 51.0], to_rgb=True)
model = dict(
    backbone=dict(act_cfg=dict(type='ReLU'), arch='atto', norm_cfg=dict(eps=1e-5, type='LN2d'), type='ConvNeXt'),
    head=dict(type='LinearClsHead', num_classes=10),
    type='ImageClassifier')
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(backend='pillow', edge='short', interpolation='bilinear', scale=300, type='ResizeEdge'),
    dict(crop_size=288, type='CenterCrop'),
    dict(type='PackInputs'),
]
"""


def test_the_configuration_of_mmpretrain_is_read():
    config = from_training({"meta": {"cfg": MMPRETRAIN}})
    assert (config.network["act"], config.network["norm_eps"], config.network["stage_eps"]) == ("relu", 1e-5, 1e-5)
    recipe, origins = known(config, "openmmlab", VARIANTS["atto"], "x").resolve()
    assert (recipe.size, recipe.resize, recipe.crop, recipe.interpolation) == (288, 300, "center", "bilinear")
    assert (recipe.mean, recipe.std) == ((0.5, 0.5, 0.2), (0.2, 0.2, 0.2))
    assert set(origins.values()) == {"configuration in the checkpoint"}


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ("dict(type='Resize', scale=384, backend='pillow', interpolation='bicubic')", (384, 384, "squash", "bicubic")),
        ("dict(type='Resize', size=(256, -1), backend='pillow'), dict(type='CenterCrop', crop_size=224)",
         (224, 256, "center", "bilinear")),
        ("dict(type='ResizeEdge', scale=256, backend='cv2'), dict(type='mmpretrain.CenterCrop', crop_size=(224, 224))",
         (224, 256, "center", "bilinear")),
    ],
)  # fmt: skip
def test_test_pipelines_of_mmpretrain_are_read(steps, expected):
    config = from_training(
        {"meta": {"config": f"model = dict(type='ImageToImageRetriever')\ntest_pipeline = [{steps}]"}}
    )
    recipe, _ = known(config, "openmmlab", VARIANTS["tiny"], "x").resolve()
    assert (recipe.size, recipe.resize, recipe.crop, recipe.interpolation) == expected
    assert any("OpenCV" in note for note in config.notes) == ("cv2" in steps)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("act_cfg=None", r"decode_head\.act_cfg is None; not supported"),
        ("act_cfg=dict(type='LeakyReLU')", r"decode_head\.act_cfg is {'type': 'LeakyReLU'}; not supported"),
        ("norm_cfg=dict(type='SyncBN', eps=1e-3)", r"decode_head\.norm_cfg is .*0\.001.*; not supported"),
        ("norm_cfg=dict(type='GN', num_groups=32)", r"decode_head\.norm_cfg is .*'GN'.*; not supported"),
        ("conv_cfg=dict(type='DCN')", r"decode_head\.conv_cfg is .*; not supported"),
    ],
)
def test_heads_of_segmenters_with_other_layers_are_refused(settings, message):
    usual = "norm_cfg=dict(type='SyncBN', requires_grad=True), act_cfg=dict(type='ReLU'), conv_cfg=None"
    text = "model = dict(decode_head=dict(type='UPerHead', {}))"
    other = "norm_cfg=dict(type='BN2d'), conv_cfg=dict(type='Conv2d')"
    for settings_of_the_head in (usual, other, "norm_cfg=None"):
        assert from_training({"meta": {"cfg": text.format(settings_of_the_head)}}).preprocessing is not None
    with pytest.raises(BadRequest, match=message):
        from_training({"meta": {"cfg": text.format(settings)}})


@pytest.mark.parametrize(
    ("text", "note"),
    [
        (
            "model = dict(backbone=dict(type='ConvNeXt'), hook=<class 'x'>)",
            "checkpoint: cannot be read .invalid syntax",
        ),
        (
            "cfg = 3\nmodel = dict(backbone=dict(type='ConvNeXt', norm_cfg=cfg))",
            "backbone cannot be read .malformed node",
        ),
    ],
)
def test_a_configuration_that_cannot_be_read_is_noted(text, note):
    (said,) = from_training({"meta": {"cfg": text}}).notes
    assert re.search(note, said)


@pytest.mark.parametrize(
    "text",
    [
        # As configs/_base_/models/upernet_convnext.py of mmsegmentation and mask-rcnn_convnext-t of mmdetection.
        "model = dict(data_preprocessor=dict(bgr_to_rgb=True), backbone=dict(type='mmpretrain.ConvNeXt', "
        "gap_before_final_norm=False), decode_head=dict(type='UPerHead'), auxiliary_head=dict(type='FCNHead'))",
        "model = dict(backbone=dict(type='mmpretrain.ConvNeXt', gap_before_final_norm=False), rpn_head=dict(), "
        "roi_head=dict(bbox_head=dict()))\ntest_pipeline = [dict(type='Resize', scale=(1333, 800), keep_ratio=True)]",
        "model = dict(backbone=dict(type='ConvNeXt'), decode_head=dict(type='FCNHead'))\n"
        "test_pipeline = [dict(type='Resize', scale=(2048, 512), keep_ratio=True)]",
        "data_preprocessor = dict(mean=[33.46], std=[78.87])\nmodel = dict(type='ImageClassifier')",
    ],
)  # fmt: skip
def test_configurations_without_a_pooled_network_in_colour_are_taken(text):
    config = from_training({"meta": {"cfg": text}})
    assert config.unclear == ()
    assert config.notes == ()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("to_rgb=True", "to_rgb=False", "says to_rgb False: the network takes BGR"),
        (", to_rgb=True", "", "a data_preprocessor without to_rgb, which is False by default: the network takes BGR"),
        ("ReLU", "HSwish", r"backbone\.act_cfg is {'type': 'HSwish'}; not supported"),
        ("LN2d", "BN", r"backbone\.norm_cfg is .*'BN'.*; not supported"),
        ("arch='atto'", "arch='atto', gap_before_final_norm=False", r"backbone\.gap_before_final_norm is False; not"),
        ("edge='short'", "edge='long'", "test_pipeline .* is not followed"),
        ("dict(crop_size=288, type='CenterCrop'),", "", "is not followed .it has no CenterCrop.; give --resize N"),
        ("PackInputs", "Pad", "is not followed .Pad.; give --resize N --crop-mode"),
    ],
)
def test_settings_of_mmpretrain_that_are_not_followed_are_refused(old, new, message):
    with pytest.raises(BadRequest, match=message):
        known(
            from_training({"meta": {"cfg": MMPRETRAIN.replace(old, new)}}), "openmmlab", VARIANTS["atto"], "x"
        ).resolve()


@pytest.mark.parametrize(
    ("size", "pct", "expected"),
    [
        (224, None, (256, "center")),
        (224, 0.9, (248, "center")),
        (384, 0.9, (384, "squash")),
        (32, None, (32, "center")),
    ],
)
def test_args_of_facebooks_script_are_read(size, pct, expected):
    config = from_training({"args": {"input_size": size, "crop_pct": pct, "imagenet_default_mean_and_std": False}})
    assert (config.preprocessing.resize, config.preprocessing.crop) == expected
    assert config.preprocessing.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    "beside",
    [
        {"class_to_idx": {"dog": 1, "cat": 0}},
        {"args": {"class_to_idx": {"dog": 1, "cat": 0}}},
        {"hyper_parameters": {"class_to_idx": {"cat": 0, "dog": 1}}},
        {"hyper_parameters": {"class_names": ["cat", "dog"], "lr": 1e-3}},
        {"meta": {"dataset_meta": {"classes": ("cat", "dog")}}},
        {"meta": {"CLASSES": ("cat", "dog")}},
    ],
)
def test_labels_in_training_checkpoints_are_read(beside):
    config = from_training(beside)
    assert config.labels == ("cat", "dog")
    assert config.origins["labels"].endswith(" of the checkpoint")


@pytest.mark.parametrize(
    "beside",
    [
        {"hyper_parameters": {"classes": {"train": 10, "val": 10}}},
        {"class_to_idx": {"cat": 3, "dog": 7}},
        {"args": {"class_to_idx": {"cat": 3, "dog": 7}}},
    ],
)
def test_names_that_are_no_labels_are_noted(beside):
    config = from_training(beside)
    assert config.labels == ()
    (said,) = config.notes
    assert "of the checkpoint is not read as labels: " in said


def test_an_input_size_of_any_script_does_not_make_its_other_steps_those_of_timm():
    config = from_training({"args": {"img_size": 320, "lr": 1e-3}})
    assert config.preprocessing.size == 320
    assert config.origins["size"] == "args of the checkpoint"
    assert {config.origins[name] for name in ("resize", "crop", "mean", "std")} == {"default"}
    named = from_training({"args": {"img_size": 320, "model": "convnext_base.clip_laion2b"}})
    assert named.origins["mean"] == "published preprocessing of convnext_base.clip_laion2b"
    train = {"img_size": 320, "crop_pct": None, "interpolation": "", "mean": None, "std": None}
    assert from_training({"args": train | {"model": "convnext_base"}}).origins["mean"].startswith("timm's")


@pytest.mark.parametrize(
    ("step", "size"),
    [
        ("dict(type='Resize', scale=(640, 640), keep_ratio=True)", 640),
        ("dict(type='Resize', scale=(-1, 800), keep_ratio=True)", (800, 1344)),
        ("dict(type='MultiScaleFlipAug', img_scale=(1000, 600), flip=False)", (608, 1024)),
        ("dict(type='Resize', scale=[(640, 640), (800, 800)], keep_ratio=True)", (800, 1344)),
    ],
)
def test_the_size_of_a_detectors_images_is_that_of_its_pipeline(step, size):
    text = "model = dict(rpn_head=dict(), backbone=dict(type='mmpretrain.ConvNeXt', gap_before_final_norm=False))\n"
    recipe = from_training({"meta": {"cfg": f"{text}test_pipeline = [{step}]"}}).preprocessing
    assert (recipe.size, recipe.resize, recipe.crop) == (size, size, "border")


@pytest.mark.parametrize("text", ["data = dict(reduce_zero_label=True)", "data = {'reduce_zero_label': True}"])
def test_masks_that_count_from_1_are_noted(text):
    head = "model = dict(backbone=dict(type='mmpretrain.ConvNeXt'), decode_head=dict(type='UPerHead'))\n"
    (said,) = from_training(
        {"meta": {"cfg": f"{head}data = {{'a': dict({text})}}" if "=" in text else f"{head}data = {{{text}}}"}}
    ).notes
    assert said == (
        "reduce_zero_label is True in the configuration in the checkpoint: masks number classes from 1; give verify "
        "--reduce-zero-label"
    )


@pytest.mark.parametrize(
    "beside",
    [
        {},
        {"epoch": 3, "meta": {}, "hyper_parameters": {"name": "convnext_tiny", "classes": 10}},
        {"args": {"lr": 1e-3, "model": "convnext_tiny"}},
        {"args": "--lr 1e-3"},
    ],
)
def test_checkpoints_that_state_nothing_give_nothing(beside):
    config = from_training(beside)
    assert (config.labels, config.preprocessing, config.network) == ((), None, {})


def test_the_image_processor_of_a_whole_processor_counts_first(of):
    of({"image_processor_type": "ViTImageProcessor", "size": {"height": 96, "width": 96}}, "preprocessor_config.json")
    inner = {"image_processor_type": "ViTImageProcessor", "size": {"height": 160, "width": 160}}
    config = of({"processor_class": "OneFormerProcessor", "image_processor": inner}, "processor_config.json")
    assert (config.preprocessing.size, config.origins["size"]) == (160, "processor_config.json")
    assert of({"processor_class": "OneFormerProcessor"}, "processor_config.json").preprocessing.size == 96


def test_the_image_size_of_transformers_is_used_where_no_file_states_a_preprocessing(of):
    def size_and_origin(config):
        preprocessing = known(config, "transformers", VARIANTS["tiny"], "")
        return preprocessing.preprocessing.size, preprocessing.origins["size"]

    own = {"model_type": "convnext", "image_size": 112}
    assert size_and_origin(of(own)) == (112, "image_size of config.json")
    assert size_and_origin(of(own | {"image_size": 224})) == (224, "published preprocessing of tiny"), "its default"
    assert size_and_origin(of(own | {"image_size": [112, 112]}))[0] == 112
    assert size_and_origin(of({"image_size": 112})) == (224, "published preprocessing of tiny"), "of another library"
    with pytest.raises(BadRequest, match="image_size 'large': expected a number of pixels"):
        of(own | {"image_size": "large"})
    of(own)
    processor = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}}
    assert size_and_origin(of(processor, "preprocessor_config.json")) == (384, "preprocessor_config.json")
