"""Runs killed and disks filled: a few here, many in the results."""

import sys

import pytest

from benchmarks import fuzz, kill
from exporter.errors import ExporterError
from tests import once
from tests.conftest import build, write_tiny


@pytest.fixture
def one_recipe(monkeypatch):
    monkeypatch.setattr(kill, "CONTEXT", once.forking())
    monkeypatch.setattr(kill, "RECIPES", {"custom_fp16.onnx": "backend: onnxruntime\nprecision: fp16\nbench: null\n"})
    monkeypatch.setattr(kill.shutil, "which", lambda name: None)  # nothing is mounted in a test


@pytest.mark.slow
def test_nothing_is_torn_or_stale(one_recipe, tmp_path, monkeypatch):
    ends = []
    real = kill.faults
    monkeypatch.setattr(kill, "faults", lambda out: ends.append((tmp_path / "desk" / "log").read_text()) or real(out))
    monkeypatch.setattr(kill.random.Random, "randrange", lambda self, low, high: 4 * 100_000)
    kept = []
    result = kill.measure(tmp_path / "desk", 2, 0, 1, kept.append)
    assert [trial.what for trial in result.trials] == ["SIGKILL"] * 2 + ["disk full"]
    assert [len(one.trials) for one in kept] == [1, 2, 3]
    assert not [trial.wrong for trial in result.trials if trial.wrong]
    assert "no space left to write in" in ends[-1], "the disk was full indeed"
    assert "| SIGKILL | 2 | 0 |" in result.table()


def test_a_rebuild_replaces_the_graph_with_that_of_the_other_weights(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    for seed in (0, 1):
        built = build(write_tiny(tmp_path / f"weights{seed}", seed=seed), tmp_path / f"clean{seed}", "openvino")
    monkeypatch.setattr(kill, "RECIPES", {built.path.name: ""})
    contents = [kill.content(tmp_path / f"clean{seed}" / built.path.name) for seed in (0, 1)]
    assert contents[0] != contents[1]
    for number in range(3):
        assert not kill.rebuild(tmp_path, number).wrong
        assert kill.content(tmp_path / "out" / built.path.name) == contents[number % 2]


def test_what_is_torn_is_seen(onnx_copy):
    folder = onnx_copy.path.parent
    assert kill.faults(folder) == (1, "")
    whole = onnx_copy.path.read_bytes()
    onnx_copy.path.write_bytes(whole[:-1])
    assert "expected" in kill.faults(folder)[1]
    onnx_copy.path.write_bytes(whole)
    (folder / "x.report.json").write_text("{")
    assert "not a report of this tool" in kill.faults(folder)[1]


@pytest.mark.parametrize(
    ("reads", "what"),
    [(lambda path: 1 / 0, "ZeroDivisionError"), (lambda path: sys.exit(0), "SystemExit")],
)
def test_the_fuzzer_sees_what_is_no_error_of_ours(reads, what, tmp_path):
    assert fuzz._fault(reads, tmp_path / "a").startswith(what)


def test_the_fuzzer_takes_a_refusal_for_what_it_is(tmp_path):
    def refuse(path):
        raise ExporterError("no")

    assert fuzz._fault(refuse, tmp_path / "a") == "refused"
    assert fuzz._fault(lambda path: None, tmp_path / "a") == ""
