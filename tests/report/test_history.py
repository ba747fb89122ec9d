"""A history is appended to, and its steps are found at the commit that made them."""

import json
import re
import subprocess

import numpy as np
import pytest
from msgspec.structs import replace

from exporter import machine, report
from exporter.errors import BadRequest
from exporter.report import Finding, history
from exporter.report.formats import html
from exporter.report.history import Entry, Series
from tests.report.test_formats import made


def entries(levels, noise=0.01, metric="speedup, batch 1", machine="A", seed=0):
    rng = np.random.default_rng(seed)
    return [
        Entry(
            commit=f"c{index:03}", time=f"2026-11-{1 + index // 24:02}T{index % 24:02}:00", artifact="a.onnx",
            machine=machine, values={metric: float(level * np.exp(rng.normal(0, noise)))},
        )
        for index, level in enumerate(levels)
    ]  # fmt: skip


def found(*told, **more):
    (one,) = history.series(entries(*told, **more))
    return history.steps(one)


def test_a_step_is_found_where_it_was_made():
    (step,) = found([2.0] * 25 + [1.84] * 15)
    assert step.commit == "c025"
    assert step.change_pct == pytest.approx(-8, abs=1)


def test_two_steps_and_none():
    assert [step.commit for step in found([1.0] * 12 + [1.2] * 12 + [1.1] * 12)] == ["c012", "c024"]
    alarms = sum(len(found([1.0] * 40, seed=seed)) for seed in range(100))
    assert alarms <= 3, "of a hundred histories in which nothing happened"


def test_one_bad_commit_is_no_step_nor_are_too_few():
    assert found([1.0] * 10 + [1.5] + [1.0] * 10) == []
    assert found([1.0, 1.0, 2.0, 2.0]) == []
    assert found([1.0] * 10 + [1.005] * 10, noise=1e-5) == [], "half a per cent"
    assert history.steps(Series("a", "m", "x", tuple(entries([0.0] * 8, metric="x")))) == []


@pytest.mark.parametrize("levels", [[1e308] * 4 + [5e-324] * 4, [5e-324] * 4 + [1e308] * 4, [1e308, -1e308] * 4])
def test_any_finite_number_is_drawn(levels):
    assert "c007" in html.render_trend(entries(levels, noise=0.0))


def test_machines_are_never_mixed():
    both = entries([1.0] * 10, machine="A") + entries([2.0] * 10, machine="B")
    assert [len(one.entries) for one in history.series(both)] == [10, 10]
    assert history.step_table(both).rows == []


def test_reports_are_appended_and_drawn(tmp_path, run):
    report.save(made("m.onnx"), tmp_path / "a.report.json")
    history = tmp_path / "h" / "history.jsonl"
    for index in range(3):
        result = run("report", tmp_path / "a.report.json", "--history", history, "--commit", f"{index:040}")
        assert result.code == 0, result.err
    lines = [json.loads(line) for line in history.read_text().splitlines()]
    assert [line["commit"][-1] for line in lines] == ["0", "1", "2"]
    assert lines[0]["values"]["top1"] == 82.1
    assert "p50_ms, batch 1" in lines[0]["values"]
    assert 5 < lines[0]["values"]["p50_ms, batch 1"] < 15, "what was measured, not what compare said of it"
    assert "No step" in run("report", history).out
    assert run("report", history, "--format", "html", "-o", tmp_path / "t.html").code == 0
    assert (tmp_path / "t.html").read_text().count("<svg") >= 4


def test_the_commit_is_gits_or_the_cis(tmp_path, run, monkeypatch):
    report.save(made("m.onnx"), tmp_path / "a.report.json")
    monkeypatch.chdir(tmp_path)
    for name in _history_variables():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert "--commit" in run("report", "a.report.json", "--history", "h.jsonl").err
    assert not (tmp_path / "h.jsonl").exists()
    monkeypatch.setenv("GITHUB_SHA", "f" * 40)
    assert run("report", "a.report.json", "--history", "h.jsonl").code == 0
    monkeypatch.delenv("GITHUB_SHA")
    subprocess.run(
        "git init -q . && git -c user.name=a -c user.email=b commit -q --allow-empty -m x", shell=True, check=True
    )
    assert run("report", "a.report.json", "--history", "h.jsonl").code == 0
    commits = [json.loads(line)["commit"] for line in (tmp_path / "h.jsonl").read_text().splitlines()]
    assert commits[0] == "f" * 40
    assert len(commits[1]) == 40
    assert commits[1] != commits[0]


def _history_variables():
    return machine.COMMIT_VARIABLES


@pytest.mark.parametrize("line", ["", "{}", "[]", '{"schema": 2}', '{"commit": "a"', "\x00"])
def test_a_line_that_is_none_is_named(line, tmp_path):
    path = tmp_path / "history.jsonl"
    good = json.dumps({"commit": "a", "time": "t", "artifact": "a", "machine": "m", "values": {}})
    path.write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(BadRequest, match="line 2"):
        history.load(path)


def test_what_is_no_history_is_left_as_it_was(tmp_path, refused):
    report.save(made("m.onnx"), tmp_path / "a.report.json")
    (tmp_path / "h.jsonl").write_text("not ours\n")
    told = ("report", tmp_path / "a.report.json", "--history", tmp_path / "h.jsonl", "--commit", "c")
    assert "line 1" in refused(2, *told, folder=tmp_path)
    assert "written as html or markdown" in refused(2, "report", tmp_path / "h.jsonl", "--format", "csv")
    assert "no entries" in refused(2, "report", tmp_path / "none.jsonl")


def test_the_page_begins_with_the_latest_step_and_its_commit_and_charts_mark_every_step():
    both = entries([1.0] * 12 + [1.2] * 12 + [1.1] * 12) + entries([5.0] * 36, metric="bytes")
    page = html.render_trend(both)
    assert "2 steps in 36 commits, the latest at commit c024 (2026-11-02 00:00): a.onnx, speedup, batch 1" in page
    first, second = re.findall(r"<svg.*?</svg>", page, flags=re.S)
    texts = [text.strip() for text in re.findall(r"<text[^>]*>(.*?)</text>", first, flags=re.S)]
    assert [text.split()[0] for text in texts if text.endswith("%")] == ["c012", "c024"]
    assert {"c000", "c035", "2026-11-01", "2026-11-02"} <= set(texts)
    assert "c012" not in second
    assert page.count(">A</") == 0
    assert page.count("machine: A") == 1
    assert "No step in 36 commits." in html.render_trend(entries([5.0] * 36))


def test_reports_of_a_ci_have_its_commit(monkeypatch):
    for name in _history_variables():
        monkeypatch.delenv(name, raising=False)
    assert "commit" not in machine.environment()
    monkeypatch.setenv("CI_COMMIT_SHA", "f" * 40)
    assert machine.environment()["commit"] == "f" * 40


def test_a_last_line_without_its_break_is_kept(tmp_path):
    path = tmp_path / "history.jsonl"
    history.append(path, [made("m.onnx")], "a")
    path.write_bytes(path.read_bytes().rstrip())
    history.append(path, [made("m.onnx")], "b")
    assert [entry.commit for entry in history.load(path)] == ["a", "b"]


def test_artifacts_of_one_file_name_are_apart(tmp_path, run):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        one = made("m.onnx")
        report.save(replace(one, artifact={**one.artifact, "path": f"{folder}/m.onnx"}), tmp_path / f"{folder}.json")
    words = (tmp_path / "a.json", tmp_path / "b.json", "--history", tmp_path / "h.jsonl", "--commit", "c")
    assert run("report", *words).code == 0
    assert [entry.artifact for entry in history.load(tmp_path / "h.jsonl")] == ["a/m.onnx", "b/m.onnx"]


def test_lines_of_earlier_versions_have_the_setting_of_the_others(tmp_path):
    path = tmp_path / "h.jsonl"
    timed = Finding(check="latency", metric="p50_ms", case="batch 1", value=10, setting="cpu, latency")
    for commit, setting in (("a", ""), ("b", "cpu, latency")):
        history.append(path, [replace(made("m.onnx"), findings=(replace(timed, setting=setting),))], commit)
    (one,) = history.series(history.load(path))
    assert (one.title, one.values) == ("p50_ms, batch 1", [10, 10])


def test_values_of_other_settings_or_images_are_another_series(tmp_path):
    path = tmp_path / "h.jsonl"
    for commit, threads, images in (("a", 1, "x" * 64), ("b", 4, "y" * 64), ("c", 1, "x" * 64)):
        timed = Finding(check="latency", metric="p50_ms", case="batch 1", value=10 / threads, setting=f"cpu, {threads}")
        top1 = Finding(check="accuracy", metric="top1", value=90.0 / threads)
        one = replace(made("m.onnx"), findings=(timed, top1), recipe={"verify": {"images": images}})
        history.append(path, [one], commit)
    assert {one.title: one.values for one in history.series(history.load(path))} == {
        "p50_ms, batch 1 (cpu, 1)": [10, 10],
        "p50_ms, batch 1 (cpu, 4)": [2.5],
        "top1 (images xxxxxxxxxxxx)": [90, 90],
        "top1 (images yyyyyyyyyyyy)": [22.5],
    }
