"""Export of live modules, and artifacts that are held against the user's own model."""

from __future__ import annotations

import json
import runpy
import sys
from collections import OrderedDict

import pytest
import torch
from msgspec.structs import replace

from benchmarks import libraries
from exporter import export
from exporter.artifact.sidecar import Preprocessing
from exporter.build.int8 import speed
from exporter.errors import BadRequest, CheckFailed
from exporter.model import live, reference
from exporter.model.fit import empty
from exporter.recipe import Checks, Export, Model, Quantization, Recipe
from tests.artifact.test_sealed import notes
from tests.conftest import ROOT, snapshot
from tests.model.test_libraries import HEADS, HUGGINGFACE, NOISE, TIMM

SMALL = Recipe(backend="onnxruntime", precision="fp32", export=Export(imgsz=64))


def rebuilt(module):
    """The product's network with what is read from a live module."""
    fitted = live.read(module)
    network = empty(fitted.variant.architecture, len(fitted.state["head.weight"]))
    network.load_state_dict(fitted.state, assign=True)
    return network.eval()


@pytest.mark.parametrize("name", TIMM)
def test_a_live_network_of_timm_is_read_from_the_module_alone(name):
    model = libraries.timm_model(**TIMM[name])
    pixels = libraries.images(model.in_chans)
    got = libraries.outputs(rebuilt(model), pixels)
    assert libraries.largest_difference(got, libraries.outputs(model, pixels)) < NOISE


@pytest.mark.parametrize("name", [name for name, (kind, _) in HUGGINGFACE.items() if kind.endswith("Classification")])
def test_a_live_model_of_transformers_is_read_from_the_module_alone(name):
    kind, settings = HUGGINGFACE[name]
    model = libraries.huggingface_model(kind, **settings)
    pixels = libraries.images(settings.get("num_channels", 3))
    got = libraries.outputs(rebuilt(model), pixels)
    assert libraries.largest_difference(got, libraries.outputs(model, pixels)) < NOISE


@pytest.mark.parametrize("name", HEADS)
def test_the_head_of_a_live_model_of_torchvision_is_read_with_its_activation(name):
    model = libraries.torchvision_model()
    model.classifier[2] = HEADS[name][0](model.classifier[2])
    libraries.randomize(model)
    got = libraries.outputs(rebuilt(model), libraries.images())
    assert libraries.largest_difference(got, libraries.outputs(model, libraries.images())) < NOISE


def test_an_activation_that_is_not_known_is_refused_by_name():
    with pytest.raises(BadRequest, match="activation LeakyReLU is not supported"):
        live.read(libraries.timm_model(act_layer="leaky_relu"))


def test_a_live_model_is_exported_and_compared_and_left_as_it_was(tmp_path):
    model = libraries.timm_model(act_layer="silu", global_pool="max").train()
    model.stages[1].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    built = export(model, tmp_path, SMALL, labels=[f"c{i}" for i in range(10)])
    sidecar = built.artifact.sidecar
    assert built.report.passed
    assert "timm.models.convnext.ConvNeXt (timm" in sidecar.reference
    assert sidecar.architecture["act"] == "silu"
    assert sidecar.labels[3] == "c3"
    assert model.training
    assert not model.stages[1].training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_exported_model_is_verified_later_from_its_weights(tmp_path, run):
    built = export(libraries.timm_model(global_pool="max"), tmp_path, SMALL)
    result = run("verify", built.artifact.path, "--samples", 4, "--json")
    assert result.code == 0, result.err


def test_int8_is_judged_against_the_live_model(tmp_path):
    quantization = Quantization(calib_size=4)
    recipe = Recipe(backend="onnxruntime", precision="int8", export=Export(imgsz=64), quantization=quantization)
    model = libraries.timm_model()
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    built = export(model, tmp_path, recipe)
    assert built.artifact.sidecar.precision == "int8"
    assert len(calls) > 1  # the probe, and the images that it is judged on


def test_int8_is_also_held_to_the_recipes_other_checks(tmp_path):
    recipe = Recipe(
        backend="onnxruntime", precision="int8", export=Export(imgsz=64), quantization=Quantization(calib_size=4),
        checks=Checks(min_cosine=0.999999),
    )  # fmt: skip
    built = export(libraries.timm_model(), tmp_path, recipe)
    cosine = built.report.find("cosine")
    assert (cosine.limit, cosine.passed, built.report.passed) == (0.999999, False, False)
    assert built.report.find("calibration") is not None
    assert len([finding for finding in built.report.findings if finding.metric == "cosine"]) == 1


def test_an_interrupt_of_the_timing_of_int8_leaves_its_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "time", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    recipe = replace(SMALL, precision="int8", quantization=Quantization(calib_size=4))
    with pytest.raises(KeyboardInterrupt):
        export(libraries.timm_model(), tmp_path, recipe)
    assert {path.name for path in tmp_path.iterdir()} >= {"custom_int8.onnx", "custom.weights"}


def test_a_module_that_does_something_else_stops_the_build_at_the_first_that_differs(tmp_path):
    model = libraries.timm_model()
    model.stages[2].blocks[1].mlp.fc2.register_forward_hook(lambda module, inputs, output: output * 1.01)
    with pytest.raises(CheckFailed, match=r"stages\.2\.1\.pwconv2 \(stages\.2\.blocks\.1\.mlp\.fc2 in the reference\)"):
        export(model, tmp_path, SMALL)
    assert not list(tmp_path.iterdir())


def test_a_failed_export_leaves_the_weights_of_the_one_before(tmp_path):
    model = libraries.timm_model()
    built = export(model, tmp_path, SMALL)
    before = snapshot(tmp_path)
    model.head.register_forward_hook(lambda module, inputs, output: output * 2)
    for parameter in model.parameters():
        parameter.data *= 0.5
    with pytest.raises(CheckFailed):
        export(model, tmp_path, SMALL)
    assert snapshot(tmp_path) == before
    assert built.artifact.sidecar.weights.source.endswith("custom.weights")


def test_a_failed_export_after_a_killed_one_leaves_the_weights_of_the_one_before(tmp_path):
    """The killed export had moved the weights away, and had written a part of its own."""
    model = libraries.timm_model()
    export(model, tmp_path, SMALL)
    before = snapshot(tmp_path)
    (tmp_path / "custom.weights").rename(tmp_path / "custom.weights.before")
    (tmp_path / "custom.weights").mkdir()
    (tmp_path / "custom.weights" / "config.json").write_text("{}")
    model.head.register_forward_hook(lambda module, inputs, output: output * 2)
    with pytest.raises(CheckFailed):
        export(model, tmp_path, SMALL)
    assert snapshot(tmp_path) == before


def test_artifacts_whose_weights_an_export_replaces_are_named(tmp_path):
    model = libraries.timm_model()
    export(model, tmp_path, replace(SMALL, precision="fp16"))
    for parameter in model.parameters():
        parameter.data *= 0.9
    with notes() as noted:
        export(model, tmp_path, SMALL)
    assert any("made from the earlier weights in custom.weights: custom_fp16.onnx;" in line for line in noted)


@pytest.fixture
def factory(tmp_path, monkeypatch):
    """`mine:make` returns the model whose weights are in the folder `weights`."""
    model = libraries.timm_model(act_layer="relu")
    config = {"model_args": {"act_layer": "relu", "dims": libraries.DIMS, "depths": libraries.DEPTHS,
                             "conv_mlp": False},
              "architecture": "convnext_atto", "num_classes": 10}  # fmt: skip
    libraries.save(tmp_path / "weights", model, config)
    (tmp_path / "mine.py").write_text(
        "from benchmarks import libraries\n"
        "def make():\n    return libraries.timm_model(act_layer='relu')\n"
        "def other():\n    return libraries.timm_model(act_layer='silu')\n"
        "def broken():\n    raise ImportError('no such library')\n"
        "def blind():\n    return libraries.timm_model(in_chans=1)\n"
    )
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("mine", None)


@pytest.mark.parametrize("make", [libraries.timm_model, libraries.huggingface_model, libraries.torchvision_model])
def test_an_embedding_of_a_classifier_is_compared_with_what_its_last_layer_takes(make, tmp_path):
    recipe = Recipe(backend="onnxruntime", precision="fp32", export=Export(imgsz=64), model=Model(task="embed"))
    built = export(make(), tmp_path, recipe)
    assert built.report.passed
    assert built.artifact.sidecar.outputs[0].shape == ("batch", 64)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"cat": 2, "dog": 0, "cow": 1}, ("dog", "cow", "cat")),
        ({0: "a", 2: "c", 1: "b"}, ("a", "b", "c")),
        (["x", "y", "z"], ("x", "y", "z")),
    ],
)
def test_labels_are_a_list_or_a_dictionary_either_way(labels, expected, tmp_path):
    built = export(libraries.timm_model(num_classes=3), tmp_path, SMALL, labels=labels)
    assert built.artifact.sidecar.labels == expected


@pytest.mark.parametrize(
    ("labels", "message"),
    [("abc", "expected a list"), ([1, 2, 3], "expected a list"), (["a"], "1 names, but the head has 3 classes"),
     ({"a": "b"}, "labels: expected")],
)  # fmt: skip
def test_labels_that_do_not_fit_are_refused_and_nothing_is_written(labels, message, tmp_path):
    with pytest.raises(BadRequest, match=message):
        export(libraries.timm_model(num_classes=3), tmp_path, SMALL, labels=labels)
    assert not list(tmp_path.iterdir())


def quantized():
    return torch.ao.quantization.quantize_dynamic(libraries.timm_model(), {torch.nn.Linear})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: libraries.timm_model().state_dict(), "expected a torch.nn.Module, got OrderedDict"),
        (lambda: None, "expected a torch.nn.Module, got NoneType"),
        (lambda: libraries.timm_model().to("meta"), "parameters without values"),
        (lambda: torch.nn.Sequential(libraries.timm_model(), torch.nn.LazyLinear(3)), "parameters without values"),
        (lambda: torch.jit.trace(libraries.timm_model(), libraries.images()), "a traced program"),
        (quantized, "keys|layer"),
        (lambda: torch.nn.Linear(3, 3), "no ConvNeXt weights"),
    ],
    ids=["state dict", "None", "meta", "lazy", "traced", "quantized", "linear"],
)
def test_what_is_no_live_convnext_is_refused(make, message, tmp_path):
    with pytest.raises(BadRequest, match=message):
        export(make(), tmp_path, SMALL)


@pytest.mark.parametrize(
    "fields", [{"labels": "a.txt"}, {"variant": "base"}, {"reference": "timm"}, {"norm": "rms"}], ids=str
)
def test_fields_of_a_recipe_that_are_for_files_are_refused(fields, tmp_path):
    with pytest.raises(BadRequest, match=f"recipe.model.{next(iter(fields))} is for files"):
        export(libraries.timm_model(), tmp_path, replace(SMALL, model=Model(**fields)))


def test_an_activation_that_is_a_function_is_said_in_the_recipe(tmp_path):
    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = torch.nn.Linear(64, 32), torch.nn.Linear(32, 5)

        def forward(self, features):
            return self.fc2(torch.relu(self.fc1(features)))

    model = torch.nn.Sequential(OrderedDict(backbone=libraries.timm_model(num_classes=0), head=Head()))
    with pytest.raises(CheckFailed, match="the first difference: head"):
        export(model, tmp_path, SMALL)
    assert export(model, tmp_path, replace(SMALL, model=Model(head_act="relu"))).report.passed


def test_each_activation_of_a_live_head_stands_where_it_is(tmp_path):
    layers = [torch.nn.Linear(64, 64), torch.nn.Dropout(), torch.nn.BatchNorm1d(64), torch.nn.ReLU()]
    head = torch.nn.Sequential(*layers, torch.nn.Linear(64, 32), torch.nn.GELU(), torch.nn.Linear(32, 5))
    model = torch.nn.Sequential(OrderedDict(backbone=libraries.timm_model(num_classes=0), head=head))
    assert export(libraries.randomize(model), tmp_path, SMALL).report.passed


def test_transformers_loads_the_file_that_is_named_and_not_the_folder(tmp_path, run):
    config_of = libraries.huggingface_model("ConvNextForImageClassification")
    folder = libraries.save(tmp_path / "weights", config_of, json.loads(config_of.config.to_json_string()))
    other = libraries.huggingface_model("ConvNextForImageClassification")
    for parameter in other.parameters():
        parameter.data *= 1.01
    libraries.save(tmp_path / "other", other)
    (tmp_path / "other" / "model.safetensors").rename(folder / "last.safetensors")
    words = ("--imgsz", 64, "--reference", "transformers", "-o", tmp_path / "build", "--json")
    result = run("onnx", "--weights", folder / "last.safetensors", *words)
    assert result.code == 0, result.err
    assert "ConvNextForImageClassification (transformers" in result.json["artifact"]["reference"]


@pytest.mark.parametrize("spec", ["mine:make", "timm"])
def test_a_reference_is_compared_and_named_in_the_sidecar(spec, factory, run):
    words = ("--weights", "weights", "--imgsz", 64, "--reference", spec)
    result = run("onnx", *words, "-o", factory / "build", "--json")
    assert result.code == 0, result.err
    artifact = result.json["artifact"]
    assert artifact["reference"].startswith("timm.models.convnext.ConvNeXt (timm")
    verified = run("verify", artifact["path"], "--samples", 4, "--reference", spec, "--json")
    assert verified.code == 0, verified.err


def test_a_reference_that_differs_fails_with_code_5(factory, refused):
    words = ("--weights", "weights", "--imgsz", 64, "--reference", "mine:other", "-o", factory / "build")
    line = refused(5, "onnx", *words, folder=None)
    assert "stages.0.0.pwconv1" in line or "stages.0.0.pwconv2" in line
    assert not list((factory / "build").glob("*.onnx*"))


@pytest.mark.parametrize(
    ("spec", "code", "words"),
    [
        ("mine:nothing", 2, "mine has no nothing"),
        ("nowhere:make", 2, "no module nowhere"),
        ("mine:broken", 2, "it raised ImportError: no such library"),
        ("mine:blind", 2, "raised RuntimeError for images (3, 3, 64, 64)"),
        ("tim", 2, "module:callable"),
    ],
)
def test_a_reference_that_is_none_is_refused(spec, code, words, factory, refused):
    line = refused(code, "onnx", "--weights", "weights", "--imgsz", 64, "--reference", spec, "-o", factory / "build")
    assert words in line


def test_a_library_that_is_not_installed_is_named_with_the_line_that_installs_it(factory, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    line = refused(3, "onnx", "--weights", "weights", "--reference", "torchvision", "-o", factory / "build")
    assert "pip install torchvision" in line


def test_without_a_reference_the_sidecar_says_so(tiny, tmp_path, run):
    result = run("onnx", "--weights", tiny, "--imgsz", 64, "-o", tmp_path, "--json")
    assert result.json["artifact"]["reference"] == reference.OURS


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm", "torchvision", "transformers", "lightning"])
def test_the_examples_run_and_are_short(name, tmp_path, monkeypatch):
    libraries.library(name)
    path = ROOT / "examples" / f"after_training_{name}.py"
    assert len(path.read_text().splitlines()) <= 25
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    assert list((tmp_path / "build").glob("*.onnx"))


def test_the_preprocessing_that_is_given_is_that_of_the_artifact(tmp_path):
    wanted = Preprocessing(size=64, resize=80, interpolation="bilinear", mean=(0.1, 0.2, 0.3))
    built = export(libraries.torchvision_model(), tmp_path, SMALL, preprocessing=wanted)
    assert built.artifact.sidecar.preprocessing == wanted
    assert built.artifact.sidecar.origins["resize"] == "preprocessing argument of export"


def test_a_head_of_a_name_of_its_own_is_chosen_in_the_recipe(tmp_path):
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.out = libraries.timm_model(num_classes=0), torch.nn.Linear(64, 3)

        def forward(self, images):
            return self.out(self.backbone(images))

    recipe = Recipe(backend="onnxruntime", precision="fp32", export=Export(imgsz=64), model=Model(head="out"))
    built = export(Module(), tmp_path, recipe)
    assert built.report.passed
    assert built.artifact.sidecar.outputs[0].shape == ("batch", 3)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_graph_of_an_engine_is_compared_with_the_live_model(precision, tmp_path):
    """ONNX Runtime cannot run a graph in bf16, so without a GPU there is only the list of kernels."""
    pytest.importorskip("tensorrt_rtx")
    recipe = replace(SMALL, backend="tensorrt", precision=precision, target={"compute_capability": ["8.9"]})
    built = export(libraries.timm_model(), tmp_path, recipe)
    assert built.report.passed
    assert built.report.find("pointwise")
    if precision == "fp16":
        assert built.report.find("cosine").value > 0.999
