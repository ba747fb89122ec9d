"""Pixels are those of torchvision's transforms, timm's, and the image processors of transformers."""

import json

import numpy as np
import pytest
from PIL import Image

from exporter.data import images, synthetic
from exporter.errors import BadRequest
from exporter.model.config import read_config
from exporter.model.preprocessing import known
from exporter.model.variants import VARIANTS
from exporter.recipe import PreprocessingOptions
from tests.reference import library

FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
SIZES = [(97, 61), (60, 101), (64, 64), (33, 40), (131, 130)]


def pictures():
    for index, (width, height) in enumerate(SIZES):
        yield Image.fromarray(synthetic.dead_leaves(max(width, height), index)).crop((0, 0, width, height))


def of_folder(folder, config=None, processor=None, open_clip=None):
    """The preprocessing that the files of a folder state."""
    files = {"config.json": config, "preprocessor_config.json": processor, "open_clip_config.json": open_clip}
    for name, content in files.items():
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return read_config(folder)


def assert_same(recipe, transform, within=1e-5):
    for picture in pictures():
        ours, theirs = images.preprocess(picture, recipe), np.asarray(transform(picture), np.float32)
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() <= within


def assert_near(recipe, transform, interpolation, mean=0.1):
    """Fast processors round other intermediate values: bilinear by at most a level of 255; bicubic overshoots at edges,
    which Pillow clips after the first of two passes."""
    levels = 255 * np.reshape(recipe.std, (3, 1, 1))
    off = [np.abs(images.preprocess(picture, recipe) - transform(picture)) * levels for picture in pictures()]
    assert np.mean([one.mean() for one in off]) < mean
    if interpolation == "bilinear":
        assert max(one.max() for one in off) < 1.01


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("pct", [0.875, 0.9, 1.0, 0.73])
@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_pixels_are_those_of_timm(mode, pct, interpolation, tmp_path):
    library("timm")
    from timm.data import create_transform, resolve_data_config

    cfg = {"input_size": [3, 51, 51], "crop_pct": pct, "crop_mode": mode, "interpolation": interpolation}
    cfg |= {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "architecture": "convnext_tiny"}
    config = of_folder(tmp_path, {"architecture": "convnext_tiny", "pretrained_cfg": cfg})
    assert_same(config.preprocessing, create_transform(**resolve_data_config({}, pretrained_cfg=cfg)))


@pytest.mark.parametrize("size", [40, 384])
def test_a_size_of_ones_own_keeps_the_crop_of_timm(size, tmp_path):
    library("timm")
    from timm.data import create_transform, resolve_data_config

    cfg = {"input_size": [3, 64, 64], "crop_pct": 0.9}
    config = of_folder(tmp_path, {"architecture": "convnext_tiny", "pretrained_cfg": cfg})
    recipe, origins = known(config, "timm", VARIANTS["tiny"], "x").resolve(size=size)
    assert_same(recipe, create_transform(**resolve_data_config({"img_size": size}, pretrained_cfg=cfg)))
    assert origins["size"] == "--imgsz"


@pytest.mark.parametrize("null", ["crop_pct", "crop_mode", "mean", "std", "interpolation", "input_size"])
def test_null_is_timms_default(null, tmp_path):
    library("timm")
    from timm.data import create_transform, resolve_data_config

    cfg = {"input_size": [3, 64, 64], "crop_pct": 0.9, "crop_mode": "squash", "mean": [0.1] * 3, "std": [0.2] * 3}
    cfg[null] = None
    config = of_folder(tmp_path, {"architecture": "convnext_tiny", "pretrained_cfg": cfg})
    assert_same(config.preprocessing, create_transform(**resolve_data_config({}, pretrained_cfg=cfg)))


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(("size", "resize"), [(51, 58), (51, 51), (40, 61)])
def test_pixels_are_those_of_torchvision(size, resize, interpolation, tmp_path):
    library("torchvision")
    from torchvision import transforms

    from exporter.model.config import from_training

    args = {"val_crop_size": size, "val_resize_size": resize, "interpolation": interpolation}
    theirs = transforms.Compose(
        [
            transforms.Resize(resize, interpolation=transforms.InterpolationMode(interpolation)),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    assert_same(from_training({"args": args}).preprocessing, theirs)


PROCESSORS = {
    "ConvNextImageProcessor": [
        {"size": {"shortest_edge": 50}, "crop_pct": 0.9},
        {"size": 51, "crop_pct": None},
        {"size": {"shortest_edge": 384}},
        {"size": {"shortest_edge": 50}, "image_mean": None},
        {"size": {"shortest_edge": 51}, "do_center_crop": True, "crop_size": 51},
    ],
    "ViTImageProcessor": [
        {"size": 51},
        {"size": {"height": 50, "width": 50}, "crop_pct": 0.5},
        {"size": [40, 40]},
        {"size": 61, "do_center_crop": True, "crop_size": 50},
        {"size": {"shortest_edge": 61}, "do_center_crop": True, "crop_size": 50},
    ],
    "CLIPImageProcessor": [
        {"size": {"shortest_edge": 50}, "crop_size": {"height": 50, "width": 50}},
        {"size": 61, "crop_size": 50},
        {"size": {"shortest_edge": 58}, "crop_size": 51, "resample": None},
        {"size": {"height": 51, "width": 51}, "do_center_crop": False},
    ],
    "BitImageProcessor": [{"size": {"shortest_edge": 57}, "crop_size": {"height": 50, "width": 50}}],
    "SegformerImageProcessor": [{"size": {"height": 51, "width": 51}}, {"size": 50, "do_reduce_labels": True}],
    "EfficientNetImageProcessor": [
        {"size": 50},
        {"size": 61, "do_center_crop": True, "crop_size": 50, "include_top": False},
    ],
}
CASES = [(name, case) for name, cases in PROCESSORS.items() for case in cases]


def transformed(processor):
    return lambda picture: processor(images=picture, return_tensors="np")["pixel_values"][0]


def written(kind, case, interpolation):
    return {"resample": FILTERS[interpolation], "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]} | case


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(("kind", "case"), CASES, ids=[f"{name}-{index}" for index, (name, _) in enumerate(CASES)])
def test_pixels_are_those_of_transformers(kind, case, interpolation, tmp_path):
    library("torchvision")
    transformers = library("transformers")
    values = written(kind, case, interpolation)
    plain = {key: value for key, value in values.items() if value is not None}  # these versions fail on null
    recipe = of_folder(tmp_path, processor={"image_processor_type": kind, **values}).preprocessing
    short = kind.removesuffix("ImageProcessor").lower()
    module = __import__(f"transformers.models.{short}.image_processing_pil_{short}", fromlist=["x"])
    assert_same(recipe, transformed(getattr(module, f"{kind}Pil")(**plain)))
    if interpolation in ("bilinear", "bicubic"):
        assert_near(recipe, transformed(getattr(transformers, kind)(**plain)), interpolation)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_pixels_are_those_of_dinov3_but_for_its_rounding(interpolation, tmp_path):
    """It scales to 0…1 before it resizes, so no pixel is rounded."""
    library("torchvision")
    transformers = library("transformers")
    values = written("", {"size": {"height": 51, "width": 51}}, interpolation)
    processor = {"image_processor_type": "DINOv3ViTImageProcessorFast", **values}
    recipe = of_folder(tmp_path, processor=processor).preprocessing
    assert_near(recipe, transformed(transformers.DINOv3ViTImageProcessor(**values)), interpolation, mean=0.5)


def test_defaults_are_those_of_the_processor(tmp_path):
    library("torchvision")
    transformers = library("transformers")
    for kind in [*PROCESSORS, "DINOv3ViTImageProcessor"]:
        config = of_folder(tmp_path, processor={"image_processor_type": kind})
        theirs = getattr(transformers, kind)()
        assert FILTERS[config.preprocessing.interpolation] == theirs.resample, kind
        assert config.preprocessing.mean == tuple(theirs.image_mean), kind
        assert config.origins["mean"] == f"default of {kind}"


@pytest.mark.parametrize("kind", [*PROCESSORS, "DINOv3ViTImageProcessor"])
def test_files_that_transformers_writes_are_read(kind, tmp_path):
    library("torchvision")
    transformers = library("transformers")
    case = {"size": {"height": 48, "width": 48}} if "size" not in PROCESSORS.get(kind, [{}])[0] else PROCESSORS[kind][0]
    processor = getattr(transformers, kind)(**case)
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "preprocessor_config.json").is_file()
    assert_near(read_config(tmp_path).preprocessing, transformed(processor), "", mean=0.5)


@pytest.mark.parametrize("suffix", ["ImageProcessor", "ImageProcessorFast", "FeatureExtractor"])
def test_old_and_fast_names_of_processors_are_read(suffix, tmp_path):
    key = "feature_extractor_type" if suffix == "FeatureExtractor" else "image_processor_type"
    recipe = of_folder(tmp_path, processor={key: f"ViT{suffix}", "size": 96}).preprocessing
    assert (recipe.size, recipe.resize, recipe.crop) == (96, 96, "squash")


def test_a_processor_without_a_type_follows_convnexts_rule_and_says_so(tmp_path):
    config = of_folder(tmp_path, processor={"size": 224, "image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    assert (config.preprocessing.resize, config.preprocessing.crop) == (256, "center")
    assert config.origins["size"] == "preprocessor_config.json (ConvNeXt's rule)"


UNCLEAR = [
    ({"image_processor_type": "LevitImageProcessor", "size": 224}, "image processor LevitImageProcessor is not known"),
    ({"image_processor_type": "CLIPImageProcessor", "do_center_crop": False}, "without do_center_crop, which gives"),
    ({"image_processor_type": "ViTImageProcessor", "do_resize": False}, "do_resize is False: images keep their size"),
]


@pytest.mark.parametrize(("processor", "message"), UNCLEAR)
def test_a_resize_that_is_not_followed_is_refused_until_options_replace_it(processor, message, tmp_path):
    stated = known(of_folder(tmp_path, processor=processor), "huggingface", VARIANTS["tiny"], "w.pth")
    with pytest.raises(BadRequest, match=message):
        stated.resolve()
    with pytest.raises(BadRequest, match=message):
        stated.resolve(PreprocessingOptions(resize=256))
    recipe, origins = stated.resolve(PreprocessingOptions(resize=256, crop_mode="center"))
    assert (recipe.resize, recipe.crop, origins["resize"], origins["crop"]) == (
        256,
        "center",
        "--resize",
        "--crop-mode",
    )


@pytest.mark.parametrize("change", [{"do_normalize": False}, {"do_rescale": False}, {"rescale_factor": 1.0}])
def test_a_scale_that_is_not_followed_is_refused_until_options_replace_it(change, tmp_path):
    stated = known(of_folder(tmp_path, processor=change | {"size": 224}), "huggingface", VARIANTS["tiny"], "w.pth")
    with pytest.raises(BadRequest, match=f"w.pth: {next(iter(change))} is .*; give --mean and --std"):
        stated.resolve()
    assert stated.resolve(PreprocessingOptions(mean=(0.5,), std=(0.25,)))[0].std == (0.25, 0.25, 0.25)


def test_masks_that_count_from_one_are_noted(tmp_path):
    processor = {"image_processor_type": "SegformerImageProcessor", "size": 64, "do_reduce_labels": True}
    assert any("--reduce-zero-label" in note for note in of_folder(tmp_path, processor=processor).notes)
    processor["do_reduce_labels"] = False
    assert not any("--reduce-zero-label" in note for note in of_folder(tmp_path, processor=processor).notes)


def test_a_height_and_a_width_are_read(tmp_path):
    processor = {"image_processor_type": "SegformerImageProcessor", "size": {"height": 96, "width": 64}}
    recipe = of_folder(tmp_path, processor=processor).preprocessing
    assert (recipe.size, recipe.resize, recipe.crop) == ((96, 64), (96, 64), "squash")


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        ({"image_processor_type": "ViTImageProcessor", "feature_extractor_type": "CLIPFeatureExtractor"}, "two types"),
        ({"size": {"height": 224, "width": 320}}, "expected a square"),
        (
            {"size": {"shortest_edge": 224, "longest_edge": 320}},
            "expected a number, shortest_edge, or height and width",
        ),
        ({"image_processor_type": "CLIPImageProcessor", "size": 224, "crop_size": 256}, "crop 256: expected 1 ≤ crop"),
        ({"do_pad": True}, "do_pad is True"),
        ({"resample": 9}, "KeyError: 9"),
    ],
)
def test_processors_that_cannot_be_followed_are_refused(processor, message, tmp_path):
    with pytest.raises(BadRequest, match=rf"preprocessor_config.json: cannot be understood .*{message}"):
        of_folder(tmp_path, processor=processor)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"interpolation": "random"}, "Invalid enum value 'random'"),
        ({"crop_mode": "rrc"}, "Invalid enum value 'rrc'"),
    ],
)
def test_preprocessing_of_timm_that_cannot_be_followed_is_refused(cfg, message, tmp_path):
    with pytest.raises(BadRequest, match=rf"config.json: cannot be understood .*{message}"):
        of_folder(tmp_path, {"architecture": "convnext_tiny", "pretrained_cfg": cfg})


def test_timm_and_transformers_that_disagree_are_refused(tmp_path):
    config = {"architecture": "convnext_tiny", "pretrained_cfg": {"input_size": [3, 224, 224], "crop_pct": 1.0}}
    with pytest.raises(BadRequest, match=r"resize is 224 in config.json, but 256 in preprocessor_config.json"):
        of_folder(tmp_path, config, {"image_processor_type": "ConvNextImageProcessor", "size": 224})


def test_the_size_that_timm_tests_with_is_noted(tmp_path):
    cfg = {"input_size": [3, 224, 224], "test_input_size": [3, 288, 288], "test_crop_pct": 1.0}
    config = of_folder(tmp_path, {"architecture": "convnext_tiny", "pretrained_cfg": cfg})
    assert config.notes == ("timm also publishes this model for --imgsz 288 --crop-pct 1.0",)


def test_open_clip_squashes_or_crops_as_its_file_says(tmp_path):
    vision = {"timm_model_name": "convnext_base", "timm_pool": "", "timm_proj": "linear", "image_size": 256}
    file = {"model_cfg": {"embed_dim": 640, "vision_cfg": vision}, "preprocess_cfg": {"mean": [0.5] * 3}}
    config = of_folder(tmp_path, open_clip=file)
    assert (config.preprocessing.size, config.preprocessing.resize, config.preprocessing.crop) == (256, 256, "center")
    assert (config.origins["mean"], config.origins["std"]) == ("open_clip_config.json", "default of OpenCLIP")
    file["preprocess_cfg"]["resize_mode"] = "squash"
    assert of_folder(tmp_path, open_clip=file).preprocessing.crop == "squash"
    file["preprocess_cfg"]["resize_mode"] = "longest"
    with pytest.raises(BadRequest, match=r"preprocess_cfg.resize_mode is 'longest'; not supported"):
        of_folder(tmp_path, open_clip=file)


@pytest.mark.parametrize(
    ("size", "expected"),
    [(224, (256, "center")), (320, (365, "center")), (383, (437, "center")), (384, (384, "squash"))],
)
def test_a_bare_file_follows_the_published_rule_of_its_size(size, expected, tmp_path):
    stated = known(read_config(tmp_path), "facebook", VARIANTS["tiny"], "w.pth")
    recipe, origins = stated.resolve(size=size)
    assert (recipe.resize, recipe.crop) == expected
    assert origins["mean"] == "published preprocessing of tiny"


def test_options_replace_values_and_say_so(tmp_path):
    stated = known(read_config(tmp_path), "facebook", VARIANTS["tiny"], "w.pth")
    options = PreprocessingOptions(crop_pct=0.9, crop_mode="squash", interpolation="box", mean=(0.1, 0.2, 0.3))
    recipe, origins = stated.resolve(options, 100)
    assert (recipe.size, recipe.resize, recipe.crop, recipe.interpolation) == (100, 111, "squash", "box")
    assert {origins[name] for name in ("size", "resize", "crop", "interpolation", "mean")} == {
        "--imgsz", "--crop-pct", "--crop-mode", "--interpolation", "--mean",
    }  # fmt: skip
    assert origins["std"] == "published preprocessing of tiny"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize": 256, "crop_pct": 0.9}, "--resize 256 and --crop-pct 0.9: give one of them"),
        ({"resize": 100}, "--resize 100: smaller than the input size 224"),
        ({"mean": (0.1, 0.2)}, "--mean: 2 values, but the network has 3 channels"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message, tmp_path):
    stated = known(read_config(tmp_path), "facebook", VARIANTS["tiny"], "w.pth")
    with pytest.raises(BadRequest, match=message):
        stated.resolve(PreprocessingOptions(**options))
