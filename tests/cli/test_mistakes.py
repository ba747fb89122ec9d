"""Mistakes of a newcomer: each is refused with one line that says what to type instead."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from exporter import report
from exporter.artifact import sidecar_path
from exporter.data.synthetic import dead_leaves
from tests.conftest import ROOT, copy_artifact

SCALE = "pixels are from 0 to 1 here: divide by 255"
REFERENCES = "expected one of module:callable, timm, transformers, torchvision"
SEVEN_CLASSES = """
from exporter.model.fit import empty
from tests.conftest import tiny_architecture

def load():
    return empty(tiny_architecture(), 7).to_empty(device="cpu")
"""


@pytest.fixture
def here(artifacts, tmp_path, monkeypatch):
    """A working folder with the fp32 ONNX artifact, `custom_fp32.onnx`."""
    copy_artifact(artifacts["onnxruntime", "fp32"], tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_reference_with_other_classes_is_refused_with_both_shapes(here, refused):
    (here / "seven_classes.py").write_text(SEVEN_CLASSES)
    words = ("verify", "custom_fp32.onnx", "--reference", "seven_classes:load", "--samples", 4)
    message = refused(2, *words)
    assert "the reference seven_classes:load returns [(4, 7)], the artifact [(4, 10)]" in message
    assert not (here / "custom_fp32.onnx.report.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weights", "nosuch.pth"], "nosuch.pth: no such file or folder"),
        (["--weights", "empty"], "empty: no weights in it"),
        (["--variant", "v2_small"], "v2_small has no published weights on the Hub"),
        (["--labels", "nosuch.txt"], "nosuch.txt: no such file"),
        (["--reference", "torchvison"], REFERENCES),
        (["--int8", "--calib", "nosuch"], "--calib nosuch: no such data"),
        (["--int8", "--data", "nosuch"], "nosuch: no such data"),
        (["--input", "image", "--interpolation", "box"], "--input image: box picks pixels"),
        (["--head", "none", "--task", "classify,embed"], "--head none leaves out the classifier that --task classify"),
        (["--head", "none", "--output", "top5"], "--head none leaves out the classifier that --output top5"),
    ],
)
def test_a_dry_run_refuses_paths_and_names_that_do_not_exist(words, message, refused, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    weights = [] if {"--weights", "--variant"} & {*words} else ["--weights", tiny]
    assert message in refused(2, "onnx", *weights, *words, "--dry-run", folder=tmp_path)


@pytest.mark.parametrize(
    "words", [[], ["--labels", "labels.txt"], ["--int8", "--calib", "digits-256", "--data", "photos"]]
)
def test_a_dry_run_accepts_paths_and_names_that_exist(words, run, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    (tmp_path / "photos").mkdir()
    result = run("onnx", "--weights", tiny, *words, "--dry-run")
    assert result.code == 0, result.err
    assert "None" not in result.out
    assert f"the model of {tiny}, in {'int8' if words[:1] == ['--int8'] else 'fp32'} for onnxruntime" in result.out


@pytest.mark.parametrize("command", ["onnx", "verify", "bench"])
def test_a_misspelt_reference_is_refused_before_weights_are_read(command, here, refused, tiny, monkeypatch):
    from exporter.model import weights

    monkeypatch.setattr(weights, "_load", lambda *anything: pytest.fail("the weights were read"))
    words = ["--weights", tiny] if command == "onnx" else ["custom_fp32.onnx"]
    assert REFERENCES in refused(2, command, *words, "--reference", "torchvison", folder=here)


def test_a_recipe_with_a_misspelt_reference_is_refused_with_its_line(refused, tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("backend: onnxruntime\nprecision: fp32\nmodel:\n  reference: torchvison\n")
    assert f"my.yaml:4:14: model.reference: {REFERENCES}" in refused(2, "run", path)


def test_no_custom_variant_is_advised_because_there_is_no_such_name(refused, tiny):
    message = refused(2, "onnx", "--weights", tiny, "--variant", "tiny")
    assert "weights of custom, asked for tiny; leave --variant out" in message


@pytest.mark.parametrize("words", [["verify"], ["inspect"], ["bench"], ["compare", "other.onnx"]])
def test_of_a_missing_file_only_artifacts_beside_it_are_named(words, here, refused):
    (here / "other.onnx").write_bytes(b"")
    (here / "package.json").write_text("{}")
    (here / "data.json").write_text("{}")
    (here / "data").write_text("no artifact, but a file with a .json beside it")
    words = [words[0], "zzz", "zzz"] if words[0] == "compare" else [*words, "zzz"]
    assert refused(2, *words, folder=here).endswith("zzz: no such file; known: custom_fp32.onnx")
    sidecar_path(here / "custom_fp32.onnx").unlink()
    assert refused(2, *words).endswith("zzz: no such file")


@pytest.mark.parametrize("command", ["verify", "inspect", "bench", "compare"])
def test_a_folder_or_a_sidecar_as_artifact_is_refused_with_the_file_to_give(command, here, refused):
    def message(path):
        return refused(2, command, *[path] * (2 if command == "compare" else 1), folder=here)

    assert message(here).endswith(f"{here}: is a folder; give the file, such as {here / 'custom_fp32.onnx'}")
    assert "is a folder; give the file" in message(".")
    assert message("custom_fp32.onnx.json").endswith("this is the sidecar; give custom_fp32.onnx")


def test_a_sidecar_as_report_is_refused_with_the_artifact(here, refused):
    assert "this is the sidecar" in refused(2, "report", "custom_fp32.onnx.json")


def test_an_unknown_device_is_refused_with_the_choices(here, refused):
    message = refused(2, "verify", "custom_fp32.onnx", "--device", "gpu")
    assert "is for onnxruntime, which takes cpu, cuda, tensorrt" in message


@pytest.mark.parametrize("value", ["87.5", "2", "0"])
def test_both_bounds_of_the_crop_are_in_the_message(value, refused, run):
    message = refused(2, "onnx", "--weights", "random:0", "--crop-pct", value)
    assert "expected a number above 0, at most 1" in message
    assert "[above 0, at most 1]" in " ".join(run("onnx", "--help").out.split())


@pytest.mark.parametrize(
    ("option", "value"),
    [("--mean", "123.675,116.28,103.53"), ("--std", "58.395,57.12,57.375"), ("--mean", "nan"), ("--mean", "inf")],
)
def test_mean_and_deviation_of_pixels_to_255_are_refused(option, value, refused, tmp_path):
    assert SCALE in refused(2, "onnx", "--weights", "random:0", option, value, "--dry-run")
    values = value.replace("nan", ".nan").replace("inf", ".inf")
    path = tmp_path / "my.yaml"
    path.write_text(f"backend: onnxruntime\nprecision: fp32\npreprocessing:\n  {option[2:]}: [{values}]\n")
    assert SCALE in refused(2, "run", path)


def test_a_picture_that_is_no_svg_is_refused(here, refused, run):
    message = refused(2, "inspect", "custom_fp32.onnx", "--picture", "network.png", folder=here)
    assert "give a name that ends in .svg" in message
    assert run("inspect", "custom_fp32.onnx", "--picture", "network.svg").code == 0
    assert (here / "network.svg").read_text().startswith("<svg")


@pytest.mark.parametrize("name", ["nosuch.yaml", "nosuch.yml"])
def test_a_missing_recipe_file_is_refused_without_the_bundled_recipes(name, refused):
    assert refused(2, "run", name) == f"error: {name}: no such file"
    assert "did you mean 'onnxruntime/tiny_int8'?" in refused(2, "run", "onnxruntime/tiny_int")


def test_inspect_prints_quality_with_as_many_digits_as_verify(here, run):
    verified = run("verify", "custom_fp32.onnx", "--samples", 4)
    assert verified.code == 0, verified.err
    quality = json.loads(sidecar_path(here / "custom_fp32.onnx").read_text())["quality"]
    shown = run("inspect", "custom_fp32.onnx").out
    assert f"images 4, cosine {quality['cosine']:.7f}, max_abs {quality['max_abs']:.6g}" in " ".join(shown.split())


def test_a_limit_that_is_missed_by_less_than_the_digits_shown_is_explained():
    from exporter.cli.console import limit, value
    from exporter.report import Finding

    close = Finding(check="parity", metric="cosine", value=0.9999999999996473, limit=1.0, passed=False)
    assert (value(close), limit(close)) == ("0.9999999999996473", "1")
    far = Finding(check="parity", metric="cosine", value=0.98, limit=0.9999999, passed=False)
    assert (value(far), limit(far)) == ("0.9800000", "0.9999999")
    slow = Finding(check="latency", metric="p50_ms", value=3.00000001, unit="ms", limit=3.0, passed=False)
    assert value(slow) == "3.00000001 ms"


def test_the_speed_of_a_ratio_has_two_decimals():
    from exporter.cli.console import value
    from exporter.report import Finding

    assert value(Finding(check="int8", metric="gain", value=26.04123, unit="×")) == "26.04 ×"


@pytest.mark.parametrize("word", ["export", "build", "convert", "exprot", "buidl"])
def test_a_command_that_says_export_is_answered_with_those_that_do(word, refused):
    assert refused(2, word).endswith(f"no command {word!r}; these export: onnx, openvino, trt")


def test_an_option_is_suggested_only_where_its_name_is_close(here, refused):
    assert "'--imgsz'." in refused(2, "verify", "custom_fp32.onnx", "--imgsz", 96)
    assert "mean" not in refused(2, "verify", "custom_fp32.onnx", "--imgsz", 96)
    assert "'--samples'" in refused(2, "verify", "custom_fp32.onnx", "--sample", 4)


def test_agreement_says_how_many_images_decide_it(here, run):
    report = run("verify", "custom_fp32.onnx", "--samples", 2, "--json").json
    agreement = next(finding for finding in report["findings"] if finding["metric"] == "top1_agreement")
    detail = "2 of 2 images; 2 images are too few to judge by, about 3,700 are needed"
    assert agreement["detail"] == detail


def test_the_image_size_is_set_from_python_as_the_quick_start_shows():
    from exporter.recipe import Recipe

    page = (ROOT / "docs" / "quickstart.md").read_text()
    snippets = [part for part in page.split("```python\n") if "Export(imgsz" in part]
    names: dict[str, object] = {}
    exec(snippets[0].partition("```")[0], names)
    recipe = names["recipe"]
    assert isinstance(recipe, Recipe)
    assert recipe.export.imgsz == 96


def test_a_file_as_output_folder_is_refused(tiny, tmp_path, refused):
    line = refused(2, "onnx", "--weights", tiny, "-o", tmp_path / "model.onnx", folder=tmp_path)
    assert "expected a folder" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("onnx", "--bf16"), "onnxruntime cannot run bf16; openvino and tensorrt can"),
        (("onnx", "--fp8"), "onnxruntime cannot run fp8; tensorrt can"),
        (("openvino", "--fp8"), "openvino cannot run fp8; tensorrt can"),
    ],
)
def test_a_precision_of_another_target_is_refused_with_the_targets_that_take_it(words, message, refused, tmp_path):
    line = refused(2, *words, "--weights", "random:0", "-o", tmp_path, folder=tmp_path)
    assert message in line
    assert "fp16" not in line


def test_the_default_precision_can_be_named(run, tmp_path):
    done = run("onnx", "--fp32", "--weights", "random:0", "-o", tmp_path, "--dry-run")
    assert (done.code, "in fp32 for onnxruntime" in done.out) == (0, True)


def test_an_fp32_graph_in_another_form_is_replaced_with_a_note(tiny, run, tmp_path):
    """fp16 is made from it, and its name has no form."""
    words = ("onnx", "--weights", tiny, "--batch", 1, "-o", tmp_path)
    assert run(*words).code == 0
    done = run(*words, "--fp16", "--form", "linear")
    assert (done.code, "custom_fp32.onnx is replaced: form conv → linear" in done.err) == (0, True)


def test_an_artifact_of_another_size_is_replaced_with_a_note(tiny, run, tmp_path):
    words = ("onnx", "--weights", tiny, "-o", tmp_path)
    assert "is replaced" not in run(*words).err + run(*words).err
    assert "custom_fp32.onnx is replaced: imgsz 64 → 32" in run(*words, "--imgsz", 32).err
    assert "custom_fp32.onnx is replaced: batch dynamic → 2" in run(*words, "--imgsz", 32, "--batch", 2).err


EVIL = "a\x1b[31m\u202e\nerror: b"
"""A name that colours the terminal, reverses its direction and begins a line of its own."""


@pytest.mark.parametrize(
    "words",
    [
        ("verify", f"{EVIL}.onnx"),
        ("verify", "custom_fp32.onnx", "--data", EVIL),
        ("compare", f"{EVIL}.json", f"{EVIL}.json"),
        ("onnx", "--weights", f"{EVIL}.pth"),
        ("onnx", "--weights", f"evil{EVIL}.safetensors"),
        ("onnx", "--weights", "random:0", "--dry-run", "-o", EVIL),
        ("onnx", "--weights", "random:0", "--dry-run", "--save-config", f"{EVIL}.yaml"),
        ("inspect", "custom_fp32.onnx", "--picture", f"{EVIL}.svg"),
        ("report", "report.json", "-o", f"{EVIL}.md"),
        ("run", f"{EVIL}.yaml"),
        ("run", f"two{EVIL}.yaml"),
        ("run", f"{EVIL}.yaml", f"two{EVIL}.yaml"),
        ("doctor", EVIL),
        ("doctor", f"--{EVIL}"),
        (EVIL,),
    ],
)
def test_no_name_of_a_file_sends_commands_to_the_terminal(words, here, run):
    """Nor does a key of a checkpoint; and no name begins a line."""
    save_file({f"{EVIL}.weight": torch.zeros(2, 2)}, here / f"evil{EVIL}.safetensors")
    (here / f"{EVIL}.yaml").write_text(
        f"backend: onnxruntime\nprecision: fp32\nmodel: {{weights: {json.dumps(EVIL)}}}\n"
    )
    (here / f"two{EVIL}.yaml").write_text(f"backend: onnxruntime\n{json.dumps(EVIL)}: 1\nprecision: fp23\n")
    report.save(report.Report(passed=True, recipe={}, artifact={}, environment={}, findings=()), here / "report.json")
    result = run(*words)
    printed = result.out + result.err
    assert "\\x1b[31m" in printed or "a?[31m" in printed, printed
    assert not set(printed) & {"\x1b", "\u202e", "\0"}
    assert not [line for line in printed.splitlines() if line.startswith("error: b")]
    assert "Traceback" not in printed


def test_a_build_says_so_where_nothing_states_the_preprocessing(run, tiny, tmp_path):
    says = "the weights do not state the preprocessing of training, so images are"
    bare = tmp_path / "bare.safetensors"
    bare.write_bytes((tiny / "model.safetensors").read_bytes())
    built = run("onnx", "--weights", bare, "-o", tmp_path / "a")
    assert f"{says} resized to 256, cut to 224 (default)" in " ".join(built.err.split())
    for words in (
        ["--weights", tiny],
        ["--weights", bare, "--crop-mode", "center"],
        ["--weights", "random:0", "--variant", "atto", "--imgsz", 96],
    ):
        assert says not in " ".join(run("onnx", *words, "-o", tmp_path / "b", "--force").err.split())


def test_an_assumed_preprocessing_is_repeated_where_it_matters(run, tiny, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for seed in range(3):
        Image.fromarray(dead_leaves((97, 150), seed)).save(photos / f"{seed}.png")
    bare = tmp_path / "bare.safetensors"
    bare.write_bytes((tiny / "model.safetensors").read_bytes())
    built = {}
    for name, words in (("assumed", [bare]), ("stated", [bare, "--resize", 256])):
        run("onnx", "--weights", *words, "-o", tmp_path / name)
        (built[name],) = (tmp_path / name).glob("*.onnx")
    rows = {name: run("verify", path, "--data", photos, "--json").out for name, path in built.items()}
    assert "assumed_preprocessing" in rows["assumed"]
    assert "the weights do not state the preprocessing" in rows["assumed"]
    assert '"assumed_preprocessing"' not in rows["stated"]
    assert '"assumed_preprocessing"' not in run("verify", built["assumed"], "--json").out, (
        "synthetic images have no other"
    )
    for name, path in built.items():
        packaged = run("package", path, "--for", "python", "-o", tmp_path / f"{name}-package")
        page = (tmp_path / f"{name}-package" / "README.md").read_text()
        assert ("resized to 256, cut to 224 (default)" in " ".join(packaged.err.split())) == (name == "assumed")
        assert ("**Assumed:**" in page) == (name == "assumed")
