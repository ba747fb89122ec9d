"""Heads without classes: what is compared instead of top-1 and cosine, and where it is not fooled."""

import importlib

import ml_dtypes
import numpy as np
import pytest
from msgspec.structs import replace
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr

from exporter.errors import CheckFailed
from exporter.model import convnext
from exporter.recipe import Checks
from exporter.verify import VerifyOptions, verify
from exporter.verify.checks import Subject
from tests.conftest import PX, build, tiny_state, write_tiny
from tests.verify.test_checks import measure

export = importlib.import_module("exporter.build.export")  # the package has a function of this name


def head(artifact, width=1):
    """An artifact's facts with a head of so many outputs."""
    sidecar = artifact.sidecar
    output = replace(sidecar.outputs[0], shape=("batch", width))
    weights = replace(sidecar.weights, num_classes=width)
    return Subject(type(artifact)(artifact.path, replace(sidecar, outputs=(output,), weights=weights)), [])


def column(seed=0, count=500, offset=0.0, spread=1.0):
    drawn = np.random.default_rng(seed).normal(offset, spread, (count, 1))
    return drawn.astype(np.float32)


def in_bf16(array):
    return array.astype(ml_dtypes.bfloat16).astype(np.float32)


@pytest.mark.parametrize("width", [1, 2])
def test_equal_neighbours_of_a_rounded_head_are_not_constant_outputs(artifacts, width):
    """Rounding to bf16 makes two neighbours of 500 equal in most runs."""
    subject = head(artifacts["openvino", "bf16"], width)
    ties = 0
    for seed in range(30):
        eager = np.random.default_rng(seed).normal(size=(500, width)).astype(np.float32)
        got = in_bf16(eager)
        ties += (got[1:] == got[:-1]).all(1).any() or (width > 1 and (np.ptp(got, axis=1) == 0).any())
        assert measure(subject, eager, got, batch=64)["constant_outputs"].passed
    assert ties >= 5, "there were some"


def test_one_value_for_images_that_vary_by_a_tenth_is_found(artifacts):
    """An int8 head of an age or a price: its values lie around 6, with a standard deviation of a tenth."""
    subject, eager = head(artifacts["onnxruntime", "int8"]), column(offset=6, spread=0.6)
    stuck = measure(subject, eager, np.full_like(eager, 5.7), batch=64)
    assert not stuck["spearman"].passed
    assert not stuck["r2"].passed
    healthy = measure(subject, eager, eager + column(1, spread=0.25), batch=64)
    assert all(finding.passed for finding in healthy.values()), healthy


def test_one_value_for_every_image_is_a_constant_output(artifacts):
    eager = column()
    found = measure(head(artifacts["openvino", "bf16"]), eager, np.full_like(eager, 0.25), batch=64)
    assert not found["constant_outputs"].passed
    assert not found["spearman"].passed
    assert found["spearman"].value == 0


def test_values_are_what_the_formulas_give(artifacts):
    eager = column(count=100, offset=0.5)
    got = eager + 0.1 * column(1, 100)
    found = measure(head(artifacts["onnxruntime", "int8"]), eager, got)
    a, b = eager[:, 0].astype(float), got[:, 0].astype(float)
    assert found["relative_error"].value == pytest.approx(100 * np.abs(a - b).mean() / np.abs(a).mean())
    assert found["r2"].value == pytest.approx(1 - ((a - b) ** 2).sum() / ((a - a.mean()) ** 2).sum())
    assert found["spearman"].value == pytest.approx(spearmanr(a, b)[0])
    assert not {"cosine", "top1_agreement"} & found.keys()


def test_ranks_of_equal_values_are_shared(artifacts):
    eager = np.repeat(column(count=20), 3, axis=0)
    got = np.round(eager, 1)
    assert measure(head(artifacts["onnxruntime", "int8"]), eager, got)["spearman"].value == pytest.approx(
        spearmanr(eager[:, 0], got[:, 0])[0]
    )


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_head_that_lost_its_values_fails_and_a_good_one_passes(artifacts, precision):
    """Both have the same sign for every image, so that their cosines are 1."""
    subject = head(artifacts["onnxruntime", precision])
    eager = np.abs(column()) + 0.5
    bad = np.abs(column(1)) + 0.5
    found = measure(subject, eager, bad)
    assert [found[metric].passed for metric in ("relative_error", "r2", "spearman")] == [False, False, False]
    good = measure(subject, eager, eager * (1 + 1e-3 * column(2)))
    assert all(finding.passed for finding in good.values())


def test_a_head_that_keeps_the_order_but_not_the_scale_fails(artifacts):
    found = measure(head(artifacts["onnxruntime", "int8"]), column(), 1.3 * column())
    assert (found["spearman"].passed, found["r2"].passed, found["relative_error"].passed) == (True, False, False)


def test_nan_passes_no_limit_of_values(artifacts):
    got = column()
    got[3] = np.nan
    found = measure(head(artifacts["onnxruntime", "int8"]), column(), got)
    for metric in ("relative_error", "r2", "spearman"):
        assert (found[metric].value, found[metric].passed) == (None, False)


def test_values_that_are_nearly_equal_for_all_images_say_nothing_of_order(artifacts):
    """Rounding to bf16 leaves 1000 ± 0.5 in a row of equal numbers."""
    eager = column(offset=1000, spread=0.5)
    found = measure(head(artifacts["openvino", "bf16"]), eager, in_bf16(eager))
    assert all(finding.passed for finding in found.values())
    assert found["r2"].value is None
    assert "nearly equal" in found["r2"].detail
    assert not measure(head(artifacts["openvino", "bf16"]), eager, 0.8 * eager)["relative_error"].passed


def test_the_worst_of_several_values_is_judged_and_named(artifacts):
    subject = head(artifacts["onnxruntime", "int8"], 3)
    eager = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    got = eager.copy()
    got[:, 2] += 0.5 * column(1, 200)[:, 0]
    found = measure(subject, eager, got, options=Checks(outputs="values"))
    assert not found["r2"].passed
    assert found["r2"].detail.startswith("logits[2]")
    assert "r2" not in measure(subject, eager, got), "several outputs are classes where nothing is said"


def test_limits_of_ones_own_replace_those_of_the_precision(artifacts):
    subject, eager = head(artifacts["onnxruntime", "int8"]), column()
    got = eager + 0.02 * column(1)
    assert all(finding.passed for finding in measure(subject, eager, got).values())
    for limit in ({"min_r2": 0.9999}, {"min_spearman": 0.9999}, {"max_relative_error": 0.1}):
        found = measure(subject, eager, got, options=Checks(**limit))
        failed = [finding.metric for finding in found.values() if not finding.passed]
        assert failed == [next(iter(limit)).removeprefix("min_").removeprefix("max_")]
    flat = np.full_like(eager, 2.0)
    assert not measure(subject, flat, flat, options=Checks(min_r2=0.5))["r2"].passed, "nothing shows that it is kept"


@pytest.fixture(scope="module")
def regression(tmp_path_factory):
    """A tiny network with one output."""
    return write_with_head(tmp_path_factory.mktemp("regression"), classes=1)


def write_with_head(folder, classes=1, bias=None, scale=1.0):
    folder = write_tiny(folder)
    state = tiny_state(classes=classes)
    state["head.weight"] *= scale
    if bias is not None:
        state["head.bias"][:] = bias
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").unlink()
    return folder


@pytest.mark.parametrize(("backend", "precision"), [("onnxruntime", "fp32"), ("onnxruntime", "int8")])
def test_a_head_with_one_output_is_verified_on_any_images(regression, tmp_path, backend, precision, refused, run):
    made = build(regression, tmp_path, backend, precision, imgsz=PX)
    for name in ("first", "second"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(8):
            pixels = np.random.default_rng(index).integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((PX, PX)).save(tmp_path / "images" / name / f"{index}{name}.png")
    for data in ("synthetic", str(tmp_path / "images")):
        report = verify(made, VerifyOptions(data=data))
        assert report.passed, [f for f in report.findings if not f.passed]
        assert report.value("images") == 16
        assert report.value("relative_error") < 10
        assert report.find("top1") is None
    assert "without a top-1" in refused(2, "verify", made.path, "--max-drop", 1, "--data", tmp_path / "images")
    assert "has one output" in refused(2, "verify", made.path, "--outputs", "classes")
    assert run("verify", made.path, "--outputs", "values", "--min-r2", 0.9).code == 0


@pytest.mark.parametrize("task", ["features", "embed"])
def test_artifacts_without_classes_are_verified_on_class_folders(task, tiny, tmp_path):
    made = build(tiny, tmp_path, task=task)
    for name in ("first", "second", "third"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.effect_noise((PX, PX), 80).convert("RGB").save(tmp_path / "images" / name / "a.png")
    report = verify(made, VerifyOptions(data=str(tmp_path / "images")))
    assert report.passed
    assert (report.value("images"), report.find("top1")) == (3, None)


def test_int8_of_a_head_with_one_output_has_no_budget_of_top1(regression, run, refused, tmp_path, monkeypatch):
    from exporter.build.int8 import speed

    monkeypatch.setattr(speed, "SECONDS_EACH", 0.3)
    words = ("onnx", "--int8", "--weights", regression, "--imgsz", PX, "--calib-size", 16, "-o", tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (16, PX, PX, 3), dtype=np.uint8)
    np.savez(tmp_path / "ages.npz", images=pixels, labels=np.arange(16) * 5)
    assert "the outputs are values" in refused(2, *words, "--calib", tmp_path / "ages.npz", "--max-drop", 1)
    words += ("--calib", tmp_path / "ages.npz")
    done = run(*words, "--json")
    assert done.code == 0, done.err
    assert {"relative_error", "max_abs"} <= {finding["metric"] for finding in done.json["report"]["findings"]}


def test_a_head_whose_output_hardly_varies_can_be_traced(tmp_path):
    """Rounding 1000 in fp32 is more than 10⁻⁴ of this head's standard deviation."""
    folder = write_with_head(tmp_path / "weights", bias=1000.0, scale=1e-3)
    assert build(folder, tmp_path, imgsz=PX).path.exists()


def test_a_head_whose_products_cancel_can_be_traced(tmp_path):
    """The features behind a LayerNorm have a sum of zero, and its rounding is all that this head gives."""
    folder = write_with_head(tmp_path / "weights", bias=0.0)
    state = load_file(folder / "model.safetensors")
    state["norm.bias"][:] = 0
    state["head.weight"][0] = 1 / state["norm.weight"]
    save_file(state, folder / "model.safetensors")
    assert build(folder, tmp_path, imgsz=PX).path.exists()


def test_another_activation_is_still_a_difference_of_a_head_with_one_output(regression, tmp_path, monkeypatch):
    real = export._expected

    def with_tanh(model, probe):
        blocks = [module for module in model.modules() if isinstance(module, convnext.Block)]
        before = [block.act for block in blocks]
        for block in blocks:
            block.act = convnext.ACTIVATIONS["gelu_tanh"]
        outputs = real(model, probe)
        for block, act in zip(blocks, before, strict=True):
            block.act = act
        return outputs

    monkeypatch.setattr(export, "_expected", with_tanh)
    with pytest.raises(CheckFailed, match="logits differs by"):
        build(regression, tmp_path, imgsz=PX)
