"""A report holds the figures of one machine, also where a build was done on another."""

import pytest

from exporter import machine
from exporter.recipe import Bench, Checks
from exporter.report import Finding, Report
from exporter.run.steps import Part, Steps, verify_options
from tests.conftest import copy_artifact, recipe_of

FINDINGS = (
    Finding(check="int8", metric="gain", value=1.4, low=1.3, high=1.5, case="fp32", detail="5 ms, 7 ms in fp32"),
    Finding(check="int8", metric="int8_speedup", value=2.0),
    Finding(check="int8", metric="tried_loss", value=0.1, case="0 kept"),
    Finding(check="int8", metric="tried_ms", value=5.0, case="0 kept"),
    Finding(check="int8", metric="kept_back", value=0.2, case="head", detail="+1.0 % latency"),
    Finding(check="int8", metric="calibration", value=16.0),
)


@pytest.fixture
def steps(tiny, artifacts, tmp_path):
    """The steps of a recipe whose build is stored, and its artifact."""
    made = copy_artifact(artifacts["onnxruntime", "fp32"], tmp_path)
    steps = Steps(recipe_of(weights=str(tiny)), tmp_path, tmp_path / "runs" / "one")
    (tmp_path / "runs" / "one").mkdir(parents=True)
    report = Report(
        passed=True, recipe={"seed": 0}, artifact={}, environment={"cpu": "that one", "power": 3}, findings=FINDINGS
    )
    steps.keep("build", Part(key=steps.key("build"), file=made.path.name, sha256=made.sidecar.sha256, report=report))
    return steps, made


def test_the_figures_of_this_machine_are_kept(steps):
    steps, artifact = steps
    assert steps.part("build", artifact).report.findings == FINDINGS


@pytest.mark.parametrize("other", ["cpu", "cores", "gpu"])
def test_the_figures_of_another_machine_are_left_out_with_the_reason(other, steps, monkeypatch):
    steps, artifact = steps
    here = {"cpu": ("Another CPU", ["avx9"]), "cores": 77, "gpu": {"name": "Another GPU"}}[other]
    cpu, _ = machine.cpu()
    monkeypatch.setattr(machine, other, lambda: here)
    report = steps.part("build", artifact).report
    gain, kept, calibration = report.findings
    assert (gain.metric, gain.value, gain.interval, gain.case) == ("gain", None, None, "fp32")
    assert gain.detail.startswith(f"timed on {cpu}, ")
    assert "not here; remove " in gain.detail
    assert (kept.metric, kept.value, kept.detail) == ("kept_back", 0.2, "not timed here")
    assert calibration.metric == "calibration"
    assert (report.environment, report.recipe) == ({}, {"seed": 0})


def test_a_stored_build_that_names_no_machine_is_of_another(steps):
    steps, artifact = steps
    path = steps.folder / "build.json"
    content = path.read_text()
    start = content.index('"machine":')
    path.write_text(content[: start - 1] + content[content.index('"', start + len('"machine":') + 1) + 1 :])
    assert steps.part("build", artifact).report.find("gain").value is None


@pytest.mark.parametrize(("step", "changes"), [("verify", True), ("bench", True), ("build", False)])
def test_results_against_a_module_of_the_user_end_with_its_code(step, changes, steps, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "users_network.py").write_text("from users_blocks import build")
    (tmp_path / "users_blocks.py").write_text("build = None")
    artifact = steps[1] if step != "build" else None
    recipe = recipe_of(weights=steps[0].recipe.model.weights, reference="users_network:build", bench=Bench())
    own = Steps(recipe, tmp_path, tmp_path)
    before = own.key(step, artifact)
    assert own.key(step, artifact) == before
    (tmp_path / "users_blocks.py").write_text("build = print")
    assert (own.key(step, artifact) != before) == changes


def test_an_int8_build_depends_on_how_its_masks_are_read(steps, tmp_path):
    weights = steps[0].recipe.model.weights
    keys = [
        Steps(recipe_of(precision="int8", weights=weights, checks=Checks(reduce_zero_label=flag)), tmp_path, tmp_path)
        for flag in (False, True)
    ]
    assert keys[0].key("build") != keys[1].key("build")


@pytest.mark.parametrize(("backend", "changes"), [("tensorrt", True), ("onnxruntime", False)])
def test_an_engine_depends_on_the_gpu(backend, changes, steps, tmp_path, monkeypatch):
    own = Steps(recipe_of(backend, "fp16", weights=steps[0].recipe.model.weights), tmp_path, tmp_path)
    before = own.key("build")
    monkeypatch.setattr(machine, "gpu", lambda: {"name": "Another GPU"})
    assert (own.key("build") != before) == changes


def test_a_recipe_is_verified_on_the_images_that_its_build_measured_accuracy_on():
    assert verify_options(recipe_of(precision="int8", data="photos")).data == "photos"
    assert verify_options(recipe_of(precision="int8", data="photos", checks=Checks(data="others"))).data == "others"
    assert verify_options(recipe_of(precision="int8")).data == "synthetic"
