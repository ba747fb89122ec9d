"""`--form auto`: the fastest whose answers hold, remembered for this machine and model shape."""

import json
import shutil

import pytest
from msgspec.structs import replace

from exporter import artifact
from exporter.artifact import sidecar_path
from exporter.build import pipeline, tune
from exporter.errors import ExporterError
from exporter.model import FORMS
from exporter.recipe import Recipe
from tests.bench import fakes

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
        asked.append(recipe.form)
        out.mkdir(parents=True)
        for path in (made.path, sidecar_path(made.path)):
            shutil.copy(path, out)
        return artifact.load(out / made.path.name)

    build.asked = asked
    return build


@pytest.fixture
def recipe(tiny):
    return Recipe(weights=str(tiny), form="auto")


def remembered(tmp_path):
    (path,) = (tmp_path / "cache" / "convnext-export" / "forms").iterdir()
    return path


def test_the_fastest_is_taken_and_what_was_tried_is_kept(builder, recipe, tmp_path):
    assert tune.fastest(recipe, builder, fakes.nchw_is_faster) == "nchw"
    assert builder.asked == list(FORMS)
    choice = json.loads(remembered(tmp_path).read_text())
    gain, low, high = choice["gains"]["nchw"]
    assert 1.5 < low <= gain <= high < 3
    assert 0.8 < choice["gains"]["linear"][0] < 1.25
    assert choice["facts"]["architecture"]["dims"] == [16, 24, 32, 48]


def test_the_second_time_nothing_is_built_or_timed(builder, recipe):
    tune.fastest(recipe, builder, fakes.nchw_is_faster)
    builder.asked.clear()
    assert tune.fastest(recipe, builder, None) == "nchw"
    assert builder.asked == []


@pytest.mark.parametrize(
    "change", [{"batch": 8}, {"backend": "openvino"}, {"imgsz": 96}, {"input": "uint8"}, {"simplify": False}]
)
def test_another_shape_is_measured_anew(change, builder, recipe, tmp_path):
    tune.fastest(recipe, builder, fakes.nchw_is_faster)
    builder.asked.clear()
    tune.fastest(replace(recipe, **change), builder, fakes.nchw_is_faster)
    assert builder.asked == list(FORMS)
    assert len(list((tmp_path / "cache" / "convnext-export" / "forms").iterdir())) == 2


def test_another_machine_is_measured_anew(builder, recipe, monkeypatch):
    tune.fastest(recipe, builder, fakes.nchw_is_faster)
    builder.asked.clear()
    monkeypatch.setattr(tune.machine, "cpu", lambda: ("another", []))
    tune.fastest(recipe, builder, fakes.nchw_is_faster)
    assert builder.asked == list(FORMS)


@pytest.mark.parametrize("damage", [b"", b"{", b'{"form": "nchw"}', b"\xff\xfe", None])
def test_a_damaged_memory_is_made_again(damage, builder, recipe, tmp_path):
    tune.fastest(recipe, builder, fakes.nchw_is_faster)
    path = remembered(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"nchw"', b'"wrong"', 1) if damage is None else damage)
    assert tune.fastest(recipe, builder, fakes.nchw_is_faster) == "nchw"
    assert len(builder.asked) == 2 * len(FORMS)
    assert json.loads(remembered(tmp_path).read_text())["form"] == "nchw"


def test_a_form_that_is_no_faster_does_not_replace_the_backends_own(builder, recipe):
    assert tune.fastest(recipe, builder, fakes.same) == "conv"


@pytest.mark.parametrize("opener", [fakes.nchw_is_wrong, fakes.nchw_crashes])
def test_a_fast_form_that_fails_is_not_taken_and_the_choice_not_kept(opener, builder, recipe, tmp_path, monkeypatch):
    """It may stand another time: memory can run out."""
    notes = []
    monkeypatch.setattr(tune, "note", notes.append)
    assert tune.fastest(recipe, builder, opener) == "conv"
    assert "nchw fell out: cosine" in notes[-1] or "nchw fell out: brought its process down" in notes[-1]
    assert "nchw 2" not in notes[-1]
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_stops_nothing(builder, recipe, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert tune.fastest(recipe, builder, fakes.nchw_is_faster) == "nchw"
    assert (tmp_path / "file").read_text() == "no folder"


def test_nothing_to_compare_with_is_an_error(builder, recipe, tmp_path):
    with pytest.raises(ExporterError, match="nothing to hold the forms against: plain failed: no such device"):
        tune.fastest(recipe, builder, fakes.plain_is_closed)
    assert not (tmp_path / "cache").exists()


def test_auto_builds_what_it_chose(recipe, monkeypatch, tmp_path):
    """The whole way with real models: which wins is the machine's to say."""
    monkeypatch.setattr(tune, "SECONDS", 0.5)
    made = pipeline.build(recipe, tmp_path / "out")
    assert made.sidecar.recipe["form"] == json.loads(remembered(tmp_path).read_text())["form"]
    assert made.path.name == "custom_fp32.onnx"
    again = pipeline.build(recipe, tmp_path / "out")
    assert again.sidecar.sha256 == made.sidecar.sha256
