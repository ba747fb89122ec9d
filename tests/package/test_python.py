"""`package --for python`: a folder that answers as `predict` does, without PyTorch and without this tool."""

import json
import os
import re
import shlex

import numpy as np
import pytest
from msgspec.structs import replace
from PIL import Image

from exporter import package, predict
from exporter.artifact.sidecar import Preprocessing
from exporter.backends import as_taken
from exporter.data import images
from exporter.data.synthetic import dead_leaves
from exporter.package import PackageOptions
from exporter.predict import PredictOptions
from exporter.recipe import Checks
from tests.conftest import build
from tests.package.conftest import execute


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Photographs of every mode, and of odd sizes."""
    folder = tmp_path_factory.mktemp("photographs")
    draw = Image.fromarray(dead_leaves((97, 150), 3))
    draw.save(folder / "rgb.png")
    draw.save(folder / "photo.jpg", quality=90)
    draw.convert("CMYK").save(folder / "cmyk.jpg")
    draw.convert("L").save(folder / "grey.png")
    draw.convert("LA").save(folder / "grey_alpha.png")
    Image.fromarray(np.dstack([np.asarray(draw), np.asarray(draw)[..., :1]])).save(folder / "alpha.png")
    deep = np.random.default_rng(0).integers(0, 1 << 16, (90, 70), dtype=np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    draw.quantize(32).save(folder / "palette.gif", transparency=3)
    draw.convert("1").save(folder / "bits.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    draw.save(folder / "turned.jpg", exif=exif)
    draw.resize((1, 1)).save(folder / "one.png")
    draw.resize((3, 61)).save(folder / "thin.png")
    draw.resize((400, 301)).save(folder / "large.webp")
    assert len(list(folder.iterdir())) == 13
    return folder


def typed(folder, bare):
    """Type the commands of the README of a package; the lines of the prediction and of the self-test."""
    (block,) = re.findall(r"```console\n(.*?)```", (folder / "README.md").read_text(), flags=re.S)
    commands = block.splitlines()
    assert commands[:2] == ["python3 -m venv .venv", ".venv/bin/pip install -r requirements.txt"]
    assert {re.split("[>=]", line)[0] for line in (folder / "requirements.txt").read_text().splitlines()} <= {
        "numpy", "Pillow", "onnxruntime", "openvino",
    }  # fmt: skip
    outputs = []
    for line in commands[2:]:
        first, *words = shlex.split(line)
        assert first == ".venv/bin/python"
        result = execute(bare, *words, folder=folder)
        assert result.returncode == 0, f"{line}\n{result.stdout}{result.stderr}"
        outputs.append(result.stdout)
    assert len(outputs) == 2
    return outputs


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_commands_of_its_readme_give_the_answers_of_predict(backend, artifacts, bare, photographs, tmp_path):
    artifact, out = artifacts[backend, "fp32"], tmp_path / "package"
    written = package.package(artifact, "python", out)
    assert set(written.files) == {path.name for path in out.iterdir()}
    line, test = typed(out, bare)
    assert test.splitlines()[-1] == "passed"
    (expected,) = predict.answer(artifact, [str(out / "sample.png")], PredictOptions())
    assert_same(json.loads(line), expected | {"image": "sample.png"})
    paths = sorted(photographs.iterdir())
    result = execute(bare, "predict.py", *paths, folder=out)
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(records) == len(paths)
    for record, same in zip(records, predict.answer(artifact, list(map(str, paths)), PredictOptions()), strict=True):
        assert_same(record, same)
    forbidden = execute(bare, "-c", "import torch", folder=out)
    assert "No module named 'torch'" in forbidden.stderr


def assert_same(record, expected):
    assert record.keys() == expected.keys()
    assert record["image"] == expected["image"]
    if "embedding" in expected:
        assert record["embedding"] == pytest.approx(expected["embedding"], rel=1e-4, abs=1e-5)
        return
    for one, other in zip(record["predictions"], expected["predictions"], strict=True):
        assert one["label"] == other["label"]
        assert one["class"] == other["class"]
        assert one["probability"] == pytest.approx(other["probability"], abs=2e-5)


VARIANTS = {
    "as published": Preprocessing(size=64, resize=75),
    "at 384": Preprocessing(size=64, resize=64, crop="squash"),
    "squash and crop": Preprocessing(size=64, resize=(80, 70), crop="squash", interpolation="lanczos"),
    "border": Preprocessing(size=64, resize=64, crop="border", interpolation="bilinear"),
    "filled up": Preprocessing(size=64, resize=50, interpolation="nearest"),
    "two sides": Preprocessing(size=(48, 64), resize=(50, 70), offset="floor", interpolation="box"),
    "pixels": Preprocessing(size=33, resize=40, input="uint8", color="BGR", layout="NHWC"),
    "shares": Preprocessing(size=64, resize=65, input="float01", layout="NHWC", interpolation="hamming"),
    "grey": Preprocessing(size=64, resize=60, mean=(0.4,), std=(0.2,)),
    "alpha": Preprocessing(size=64, resize=70, mean=(0.4, 0.5, 0.6, 0.5), std=(0.2,) * 4),
    "bands": Preprocessing(size=64, resize=60, mean=(0.1, 0.9), std=(0.2, 0.3)),
}


def written_module(artifact, preprocessing, folder, **options):
    """The `predict.py` that is written for an artifact with another preprocessing, as a dictionary of its names."""
    from exporter.package import contents as record
    from exporter.package.rendering import render

    dtype = "uint8" if preprocessing.input == "uint8" else "float32"
    tensor = replace(artifact.sidecar.inputs[0], dtype=dtype)
    sidecar = replace(artifact.sidecar, preprocessing=preprocessing, inputs=(tensor,))
    outputs = package._outputs(artifact, sidecar, Checks(), 5)
    sample = record.sample_of(None, preprocessing)
    other, serving = type(artifact)(artifact.path, sidecar), record.serving_of(artifact)
    contents = record.Contents(other, serving, outputs, sidecar.labels, 5, Checks(), sample, None)
    text = render("predict.py", contents, program="predict", imports="", code="")
    (folder / "labels.txt").write_text("\n".join(sidecar.labels))
    names = {"__file__": str(folder / "predict.py"), "__name__": "predict"}
    exec(compile(text, "predict.py", "exec"), names)
    return names, text, sample


@pytest.mark.parametrize("name", VARIANTS)
def test_every_preprocessing_is_that_of_the_exporter(name, artifacts, photographs, tmp_path):
    recipe = VARIANTS[name]
    names, text, sample = written_module(artifacts["onnxruntime", "fp32"], recipe, tmp_path)
    (tmp_path / sample.name).write_bytes(sample.content)
    paths = [tmp_path / sample.name] if name == "bands" else [tmp_path / sample.name, *sorted(photographs.iterdir())]
    for path in paths:
        array = names["preprocess"](path)
        expected = as_taken(images.read(path, recipe)[None], recipe)
        assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
        assert array.astype(np.float64) == pytest.approx(expected.astype(np.float64), abs=2e-6), path.name
    assert len(text.splitlines()) <= 80
    assert max(map(len, text.splitlines())) <= 120


def test_a_file_that_is_no_image_has_a_reason_in_place_of_an_answer(artifacts, bare, tmp_path):
    out = tmp_path / "package"
    package.package(artifacts["onnxruntime", "fp32"], "python", out)
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    Image.new("F", (8, 8)).save(tmp_path / "float.tiff")
    Image.new("RGB", (1, 30_000)).save(tmp_path / "thin.png")  # its short side as the crop needs it takes gigabytes
    Image.fromarray(np.full((8, 8), 100_000, np.int32)).save(tmp_path / "deep.tiff")
    odd = [tmp_path / name for name in ("page.jpg", "float.tiff", "deep.tiff", "thin.png", os.fsdecode(b"caf\xe9.png"))]
    words = [*odd, "sample.png"]
    result = execute(bare, "predict.py", *words, folder=out)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert ["error" in line for line in lines] == [True, True, True, True, True, False]
    assert all("no known range" in line["error"] for line in lines[1:3])
    assert "too long and thin to resize" in lines[3]["error"]
    assert result.returncode == 1
    assert execute(bare, "predict.py", "sample.png", folder=out).returncode == 0
    assert "python predict.py IMAGE" in execute(bare, "predict.py", folder=out).stderr
    help_ = execute(bare, "predict.py", "--help", folder=out)
    assert (help_.returncode, "python predict.py IMAGE" in help_.stdout) == (0, True)
    (out / artifacts["onnxruntime", "fp32"].path.name).unlink()
    for words in (["predict.py", "sample.png"], ["selftest.py"]):
        result = execute(bare, *words, folder=out)
        assert (result.returncode, "Traceback" in result.stderr) == (1, False), result.stderr


def test_outputs_that_are_not_finite_are_no_answer(artifacts, bare, tmp_path):
    out = tmp_path / "package"
    package.package(artifacts["onnxruntime", "fp32"], "python", out)
    program = out / "predict.py"
    text = program.read_text()
    assert text.count("return model.run(") == 1
    program.write_text(text.replace("return model.run(", "return np.nan * np.array(model.run(") + "")
    program.write_text(program.read_text().replace(".name: batch})", ".name: batch}))"))
    result = execute(bare, "predict.py", "sample.png", folder=out)
    assert (result.returncode, json.loads(result.stdout)["error"]) == (1, "array must not contain infs or NaNs"), (
        result.stderr
    )


def test_the_self_test_fails_for_other_preprocessing(artifacts, bare, tmp_path):
    out = tmp_path / "package"
    package.package(artifacts["onnxruntime", "fp32"], "python", out)
    program = out / "predict.py"
    program.write_text(program.read_text().replace('convert("RGB")', 'convert("L").convert("RGB")'))
    result = execute(bare, "selftest.py", folder=out)
    assert (result.returncode, result.stdout.splitlines()[-1]) == (1, "FAILED")


@pytest.mark.parametrize("task", ["embed", "features"])
def test_features_are_packaged(task, tiny, bare, tmp_path):
    artifact, out = build(tiny, tmp_path, task=task), tmp_path / "package"
    package.package(artifact, "python", out)
    line, test = typed(out, bare)
    assert test.count("limit") == len(artifact.sidecar.outputs)
    record = json.loads(line)
    if task == "embed":
        assert len(record["embedding"]) == 48
    else:
        assert [record[tensor.name]["shape"][0] for tensor in artifact.sidecar.outputs] == [16, 24, 32, 48]
    assert "LABELS" not in (out / "predict.py").read_text(), "features have no classes"


def test_multilabel_heads_and_values_are_packaged(artifacts, bare, tmp_path):
    artifact = artifacts["onnxruntime", "fp32"]
    options = PredictOptions(outputs="multilabel", threshold=0.4, top=3)
    package.package(artifact, "python", tmp_path / "labels", answers=options)
    record = json.loads(typed(tmp_path / "labels", bare)[0])
    (expected,) = predict.answer(artifact, [str(tmp_path / "labels" / "sample.png")], options)
    assert_same(record, expected | {"image": "sample.png"})
    assert record["labels"] == expected["labels"]
    assert 0 < len(record["labels"]) < 10
    package.package(artifact, "python", tmp_path / "values", answers=PredictOptions(outputs="values"))
    values = json.loads(typed(tmp_path / "values", bare)[0])["values"]
    with np.load(tmp_path / "values" / "expected.npz") as arrays:
        assert values == pytest.approx(arrays["logits"][0].tolist(), abs=1e-5)


def test_a_fixed_batch_of_pixels_is_packaged(tiny, bare, tmp_path):
    artifact, out = build(tiny, tmp_path, batch=3, input="uint8"), tmp_path / "package"
    package.package(artifact, "python", out)
    assert typed(out, bare)[1].splitlines()[-1] == "passed"


def test_a_picture_and_labels_of_ones_own(artifacts, bare, photographs, tmp_path):
    artifact, labels = artifacts["onnxruntime", "fp32"], tmp_path / "labels.csv"
    labels.write_text("\n".join(f'{number},"{number} ✓, ""x"""' for number in range(10)))
    options = PackageOptions(labels=str(labels), sample=str(photographs / "turned.jpg"))
    out = tmp_path / "package"
    package.package(artifact, "python", out, options)
    assert (out / "sample.jpg").read_bytes() == (photographs / "turned.jpg").read_bytes()
    record = json.loads(typed(out, bare)[0])
    first = record["predictions"][0]
    assert first["label"] == f'{first["class"]} ✓, "x"'


@pytest.mark.parametrize(
    "fields",
    [
        {"output": "softmax"},
        {"output": "sigmoid"},
        {"output": "top5"},
        {"io": "fp16", "output": "top5"},
        {"task": "embed", "l2": True},
        {"task": "classify,embed"},
    ],
    ids=lambda fields: " ".join(map(str, fields.values())),
)
def test_other_outputs_are_packaged(fields, tiny, bare, tmp_path):
    artifact, out = build(tiny, tmp_path, **fields), tmp_path / "package"
    package.package(artifact, "python", out)
    line, test = typed(out, bare)
    assert test.splitlines()[-1] == "passed"
    (expected,) = predict.answer(artifact, [str(out / "sample.png")], PredictOptions())
    expected = expected.get("logits", expected)  # of several tasks the classes
    assert_same(json.loads(line), expected | {"image": "sample.png"})
