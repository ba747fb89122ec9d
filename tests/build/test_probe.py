"""Before calibration: is int8 faster than the next higher precision on this machine?"""

import re
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from exporter import machine
from exporter.bench import supervisor
from exporter.build import resolve
from exporter.build.int8 import probe
from exporter.errors import CheckFailed
from exporter.model import structure, weights
from exporter.recipe import Quantization
from exporter.recipe.fields import fields_of
from tests.bench import fakes
from tests.conftest import recipe_of

BACKENDS = ("onnxruntime", "openvino")


@pytest.fixture
def probing(monkeypatch, int8_of_tiny_networks_may_be_slower):
    """The rest of the suite does not probe. Other tests run at the same time and would disturb the timing."""
    monkeypatch.setattr(probe, "refuse_slower", int8_of_tiny_networks_may_be_slower)
    monkeypatch.setattr(machine, "disturbances", lambda conditions: [])


@pytest.fixture
def launches(monkeypatch):
    """The timing processes that were started."""
    real, started = supervisor._launch, []
    monkeypatch.setattr(supervisor, "_launch", lambda *words, **options: started.append(1) or real(*words, **options))
    return started


@pytest.fixture
def notes(monkeypatch):
    said = []
    monkeypatch.setattr(probe, "note", said.append)
    return said


def refuse(source, tmp_path, opener, backend="onnxruntime", **fields):
    job = resolve(recipe_of(backend, "int8", weights=str(source), **fields), tmp_path)
    before = weights.digest(job.checkpoint.state)
    probe.refuse_slower(job, tmp_path / "probe", opener)
    assert weights.digest(job.checkpoint.state) == before, "the whole network is still there to be built"


@pytest.mark.parametrize("backend", BACKENDS)
def test_slower_int8_stops_the_build_with_both_latencies(backend, tiny, tmp_path, launches, probing):
    with pytest.raises(CheckFailed) as refused:
        refuse(tiny, tmp_path, fakes.int8_is_slower, backend)
    text = str(refused.value)
    value, low, high = map(float, re.search(r"([\d.]+) × \(95 % ([\d.]+)–([\d.]+);", text).groups())
    assert 0.6 < low <= value <= high < 0.72
    assert re.search(r"slower than (fp32|bf16) here: (2\.9|3\.)\d+ ms instead of (1\.9|2\.)\d+ ms", text)
    assert "1, 1, 2, 1 blocks instead of 1, 1, 2, 1" in text
    assert "--even-if-slower" in text
    assert len(launches) == supervisor.PROCESSES


def test_a_disturbed_timing_does_not_stop_the_build(tiny, tmp_path, launches, notes, probing, monkeypatch):
    monkeypatch.setattr(machine, "disturbances", lambda conditions: ["other processes used 45 % of the machine"])
    refuse(tiny, tmp_path, fakes.int8_is_slower)
    (text,) = notes
    assert text.startswith("cannot tell whether int8 is faster here: other processes used 45 % of the machine; ")


def test_clearly_faster_int8_needs_one_process(tiny, tmp_path, launches, probing):
    refuse(tiny, tmp_path, fakes.int8_is_faster)
    assert len(launches) == 1


def test_equal_speed_does_not_stop_the_build(tiny, tmp_path, launches, probing):
    refuse(tiny, tmp_path, fakes.int8_is_alike)
    assert len(launches) == supervisor.PROCESSES


def test_what_cannot_be_timed_does_not_stop_the_build(tiny, tmp_path, launches, notes, probing):
    refuse(tiny, tmp_path, fakes.int8_is_closed)
    assert "cannot be measured" in notes[-1]
    assert "no such kernel" in notes[-1]
    assert len(launches) == 1, "the other model is not timed alone"


@pytest.mark.parametrize("fields", [{"even_if_slower": True}, {"cpu": "arm"}])
def test_nothing_is_timed_where_speed_here_does_not_matter(fields, tiny, tmp_path, launches, probing, monkeypatch):
    monkeypatch.setattr(probe, "of_this_machine", lambda: "portable")
    refuse(tiny, tmp_path, fakes.int8_is_slower, **fields)
    assert launches == []


def test_nothing_is_timed_where_only_weights_are_quantized(tiny, tmp_path, launches, notes, probing):
    job = resolve(recipe_of("tensorrt", "int8", weights=str(tiny), int8_scope="weights"), tmp_path)
    with_gpu = replace(job, runtime=replace(job.runtime, unable=lambda: ""))
    probe.refuse_slower(with_gpu, tmp_path / "probe", fakes.int8_is_slower)
    assert (launches, notes) == ([], [])


def test_nothing_is_timed_without_the_device(tiny, tmp_path, launches, probing):
    job = resolve(recipe_of("tensorrt", "int8", weights=str(tiny)), tmp_path)
    without_gpu = replace(job, runtime=replace(job.runtime, unable=lambda: "no GPU"))
    probe.refuse_slower(without_gpu, tmp_path / "probe", fakes.int8_is_slower)
    assert launches == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_int8_is_compared_with_the_form_that_the_higher_precision_ships_in(backend, tiny, tmp_path):
    job = resolve(recipe_of(backend, "int8", weights=str(tiny)), tmp_path)
    quantized, above = probe._build(job, tmp_path / "probe")
    assert quantized.sidecar.recipe["export"]["form"] == job.form
    assert above.sidecar.recipe["export"]["form"] == job.target.form(job.target.above_int8(), None)


def test_the_command_ends_with_exit_code_5_and_leaves_nothing(tiny, run, tmp_path, monkeypatch, probing):
    real = probe.refuse_slower
    monkeypatch.setattr(probe, "refuse_slower", lambda job, folder: real(job, folder, fakes.int8_is_slower))
    done = run("onnx", "--int8", "--weights", tiny, "-o", tmp_path / "out")
    assert done.code == 5
    assert "int8 is slower than fp32 here" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("depths", "expected"),
    [
        ((3, 3, 9, 3), (1, 1, 3, 1)),
        ((3, 3, 27, 3), (1, 1, 9, 1)),
        ((2, 2, 8, 2), (1, 1, 4, 1)),
        ((2, 3, 7, 2), (1, 1, 3, 1)),
        ((18,), (1,)),
        ((1, 1, 2, 1), (1, 1, 2, 1)),
    ],
)
def test_stages_keep_their_proportions(depths, expected):
    assert probe.shortened(depths) == expected


def test_only_deeper_blocks_are_left_out(tiny):
    names = list(load_file(tiny / "model.safetensors"))
    left_out = [name for name in names if not structure.is_within(name, (1, 1, 1, 1))]
    assert left_out
    assert {structure.block(name) for name in left_out} == {"stages.2.1"}
    assert all(structure.is_within(name, (1, 1, 2, 1)) for name in names)


def test_the_option_does_not_change_the_artifact():
    assert "even_if_slower" in fields_of(Quantization)
    recipes = [recipe_of(precision="int8", even_if_slower=value).of_build() for value in (False, True)]
    assert recipes[0] == recipes[1]
