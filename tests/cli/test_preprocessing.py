"""Options of preprocessing and labels reach the artifact, and its sidecar says where each value comes from."""

import json

import pytest

from exporter import build
from exporter.artifact import load
from tests.conftest import write_tiny

WORDS = ("--mean", "0.5,0.5,0.5", "--std", "0.25", "--resize", "80", "--crop-mode", "border", "--interpolation", "box")


@pytest.fixture
def folder(tmp_path):
    """A tiny network with an image processor that is not known, and no labels."""
    folder = write_tiny(tmp_path / "w")
    (folder / "config.json").write_text(json.dumps({"model_type": "convnext", "num_labels": 10}))
    processor = {"image_processor_type": "LevitImageProcessor", "size": 64, "image_mean": [0.1] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    (folder / "labels.csv").write_text("index,name\n" + "\n".join(f"{i},class {i}" for i in range(10)))
    return folder


def test_an_unknown_processor_stops_the_build_until_options_replace_it(folder, run, tmp_path):
    words = ("onnx", "--weights", folder, "-o", tmp_path / "out")
    refused = run(*words)
    assert refused.code == 2
    assert "image processor LevitImageProcessor is not known" in refused.err
    assert "give --resize N --crop-mode center|squash|border" in refused.err
    assert not (tmp_path / "out").exists()
    built = run(*words, *WORDS, "--labels", folder / "labels.csv")
    assert built.code == 0, built.err
    sidecar = load(tmp_path / "out" / "custom_fp32.onnx").sidecar
    preprocessing = sidecar.preprocessing
    assert (preprocessing.size, preprocessing.resize, preprocessing.crop) == (64, 80, "border")
    assert (preprocessing.mean, preprocessing.std, preprocessing.interpolation) == ((0.5,) * 3, (0.25,) * 3, "box")
    assert sidecar.labels[9] == "class 9"
    assert sidecar.origins.items() >= {
        "size": "preprocessor_config.json", "resize": "--resize", "crop": "--crop-mode", "mean": "--mean",
        "std": "--std", "interpolation": "--interpolation", "labels": "--labels",
    }.items()  # fmt: skip
    shown = run("inspect", tmp_path / "out" / "custom_fp32.onnx")
    assert "size: preprocessor_config.json" in shown.out
    assert "labels: --labels" in shown.out
    assert run("verify", tmp_path / "out" / "custom_fp32.onnx", "--samples", 2).code == 0


def test_options_of_preprocessing_are_kept_in_a_recipe(tmp_path, run):
    path = tmp_path / "my.yaml"
    assert run("onnx", "--weights", "random:0", *WORDS, "--save-config", path, "--dry-run").code == 0
    options = build.read(path).preprocessing
    assert (options.mean, options.std, options.resize, options.crop_mode) == ((0.5, 0.5, 0.5), (0.25,), 80, "border")
    assert build.read(path, ["preprocessing.crop_pct=0.9", "preprocessing.resize=null"]).preprocessing.crop_pct == 0.9


def test_options_that_contradict_each_other_are_refused_before_weights_are_read(tmp_path, run):
    refused = run("onnx", "--weights", "random:0", "--resize", 256, "--crop-pct", 0.9, "--dry-run")
    assert refused.code == 2
    assert "--resize 256 and --crop-pct 0.9: give one of them" in refused.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--std", "0.2,0,0.2"), "expected a list, each a number above 0"),
        (("--mean", "a,b,c"), "expected a list, each a number"),
        (("--crop-pct", "1.5"), "expected a number above 0"),
        (("--crop-mode", "random"), "is not one of 'center', 'squash', 'border'"),
        (("--interpolation", "random"), "is not one of 'bicubic'"),
    ],
)
def test_options_out_of_bounds_are_refused(words, message, run, tmp_path):
    refused = run("onnx", "--weights", "random:0", *words, "-o", tmp_path / "out")
    assert refused.code == 2
    assert message in " ".join(refused.err.split())
