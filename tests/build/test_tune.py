"""`--form auto`: the fastest whose answers hold, remembered for this machine and model shape."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest

from exporter import artifact, backends, precision
from exporter.artifact import sidecar_path
from exporter.build import build, resolve, tune
from exporter.errors import ExporterError, Unavailable
from exporter.model import FORMS
from tests.bench import fakes
from tests.conftest import recipe_of

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def a_cache_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tune, "SECONDS", 1.0)


@pytest.fixture
def builder(artifacts):
    """Copies an artifact instead of building, and keeps what it was asked for."""
    made, asked = artifacts["onnxruntime", "fp32"], []

    def build(recipe, out):
        asked.append(recipe.export.form)
        out.mkdir(parents=True)
        for path in (made.path, sidecar_path(made.path)):
            shutil.copy(path, out)
        return artifact.load(out / made.path.name)

    build.asked = asked
    return build


@pytest.fixture
def job(tiny, tmp_path):
    return resolve(recipe_of(weights=str(tiny), form="auto"), tmp_path)


@pytest.fixture
def nchw_chosen(monkeypatch):
    """`nchw` is chosen without timing."""
    choose = lambda job, made, facts, opener: tune.Choice(form="nchw", gains={}, failures={}, facts=facts)  # noqa: E731
    monkeypatch.setattr(tune, "_choose", choose)


def remembered(tmp_path):
    (path,) = (tmp_path / "cache" / "convnext-export" / "forms").iterdir()
    return path


def test_the_fastest_is_taken_and_what_was_tried_is_kept(builder, job, tmp_path):
    assert tune.fastest(job, builder, fakes.nchw_is_faster) == "nchw"
    assert builder.asked == list(FORMS)
    choice = json.loads(remembered(tmp_path).read_text())
    gain, low, high = choice["gains"]["nchw"]
    assert 1.5 < low <= gain <= high < 3
    assert 0.8 < choice["gains"]["linear"][0] < 1.25
    assert choice["facts"]["architecture"]["dims"] == [16, 24, 32, 48]


def test_the_second_time_nothing_is_built_or_timed(builder, job, nchw_chosen):
    tune.fastest(job, builder, None)
    builder.asked.clear()
    assert tune.fastest(job, builder, None) == "nchw"
    assert builder.asked == []


@pytest.mark.parametrize(
    "change", [{"batch": 8}, {"backend": "openvino"}, {"imgsz": 96}, {"input": "uint8"}, {"simplify": False}]
)
def test_another_shape_is_measured_anew(change, builder, job, nchw_chosen, tiny, tmp_path):
    tune.fastest(job, builder, None)
    builder.asked.clear()
    other = resolve(recipe_of(weights=str(tiny), form="auto", **change), tmp_path)
    tune.fastest(other, builder, None)
    assert builder.asked == list(FORMS)
    assert len(list((tmp_path / "cache" / "convnext-export" / "forms").iterdir())) == 2


def test_another_machine_is_measured_anew(builder, job, nchw_chosen, monkeypatch):
    tune.fastest(job, builder, None)
    builder.asked.clear()
    monkeypatch.setattr(tune.machine, "cpu", lambda: ("another", []))
    tune.fastest(job, builder, None)
    assert builder.asked == list(FORMS)


@pytest.mark.parametrize("damage", [b"", b"{", b'{"form": "nchw"}', b"\xff\xfe", None])
def test_a_damaged_memory_is_made_again(damage, builder, job, nchw_chosen, tmp_path):
    tune.fastest(job, builder, None)
    path = remembered(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"nchw"', b'"wrong"', 1) if damage is None else damage)
    assert tune.fastest(job, builder, None) == "nchw"
    assert len(builder.asked) == 2 * len(FORMS)
    assert json.loads(remembered(tmp_path).read_text())["form"] == "nchw"


def test_a_form_that_is_no_faster_does_not_replace_the_backends_own(builder, job):
    assert tune.fastest(job, builder, fakes.same) == "conv"


@pytest.mark.parametrize("opener", [fakes.nchw_is_wrong, fakes.nchw_crashes])
def test_a_fast_form_that_fails_is_not_taken_and_the_choice_not_kept(opener, builder, job, tmp_path, monkeypatch):
    """It may stand another time: memory can run out."""
    notes = []
    monkeypatch.setattr(tune, "note", notes.append)
    assert tune.fastest(job, builder, opener) == "conv"
    assert "nchw failed: cosine" in notes[-1] or "nchw failed: crashed its process" in notes[-1]
    assert "nchw 2" not in notes[-1]
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_stops_nothing(builder, job, nchw_chosen, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert tune.fastest(job, builder, None) == "nchw"
    assert (tmp_path / "file").read_text() == "no folder"


def test_nothing_is_built_where_nothing_can_be_timed(builder, job, monkeypatch):
    unable = dataclasses.replace(job.runtime, unable=lambda: "no GPU")
    with pytest.raises(Unavailable, match=r"--form auto: the forms cannot be timed here \(no GPU\); give one of plain"):
        tune.fastest(dataclasses.replace(job, runtime=unable), builder)
    assert builder.asked == []


def test_nothing_to_compare_with_is_an_error(builder, job, tmp_path):
    with pytest.raises(ExporterError, match="the form plain, which others are compared with, failed: no such device"):
        tune.fastest(job, builder, fakes.plain_is_closed)
    assert not (tmp_path / "cache").exists()


def test_auto_builds_what_it_chose(tiny, monkeypatch, tmp_path):
    """The whole way with real models: which wins is the machine's to say."""
    monkeypatch.setattr(tune, "SECONDS", 0.5)
    recipe = recipe_of(weights=str(tiny), form="auto")
    made = build(recipe, tmp_path / "out").artifact
    assert made.sidecar.recipe["export"]["form"] == json.loads(remembered(tmp_path).read_text())["form"]
    assert made.path.name == "custom_fp32.onnx"
    again = build(recipe, tmp_path / "out").artifact
    assert again.sidecar.sha256 == made.sidecar.sha256


def test_another_version_of_the_runtime_is_measured_anew(builder, job, nchw_chosen, monkeypatch):
    tune.fastest(job, builder, None)
    versions = backends.versions()
    monkeypatch.setattr(backends, "versions", lambda: {**versions, "onnxruntime": "0.0"})
    tune.fastest(job, builder, None)
    assert len(builder.asked) == 2 * len(FORMS)


@pytest.mark.parametrize(
    ("answer", "share", "fails"), [("labels", 0.995, False), ("labels", 0.98, True), ("logits", 0.995, True)]
)
def test_labels_of_pixels_are_judged_by_the_share_of_equal_ones(answer, share, fails, job):
    spec = SimpleNamespace(answer=answer)
    other = SimpleNamespace(precision=precision.get("fp16"), trace=SimpleNamespace(spec=spec))
    timing = SimpleNamespace(failures={}, launches=[SimpleNamespace(cosine={"a": share})])
    assert bool(tune._failure(other, timing, "a")) == fails


def test_another_gpu_is_measured_anew(builder, job, nchw_chosen, monkeypatch):
    tune.fastest(job, builder, None)
    builder.asked.clear()
    monkeypatch.setattr("exporter.machine.gpu", lambda: {"name": "Another GPU"})
    tune.fastest(job, builder, None)
    assert builder.asked == list(FORMS)
