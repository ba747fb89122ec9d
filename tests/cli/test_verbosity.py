"""`--quiet` and `--verbose`: how much a command prints on stderr."""

import re

import pytest


@pytest.mark.parametrize("words", [("onnx", "-q"), ("-q", "onnx"), ("onnx", "--quiet")])
def test_a_quiet_command_prints_its_result_only(words, run, tiny, tmp_path):
    result = run(*words, "--weights", tiny, "-o", tmp_path)
    assert (result.code, result.err) == (0, "")
    (line,) = result.out.splitlines()
    assert "custom_fp32.onnx" in line


def test_a_quiet_command_prints_errors(refused, tiny, tmp_path):
    assert "no such" in refused(2, "onnx", "-q", "--weights", tmp_path / "none.pth", "-o", tmp_path, folder=tmp_path)


def test_a_verbose_command_prints_when_steps_began_and_messages_of_libraries(run, tiny, tmp_path, traced_anew):
    result = run("onnx", "-v", "--weights", tiny, "-o", tmp_path)
    assert result.code == 0
    seconds = [float(found) for found in re.findall(r"^ *(\d+\.\d) s · ", result.err, flags=re.M)]
    assert len(seconds) >= 3
    assert seconds == sorted(seconds)
    assert "onnx_ir" in result.err


def test_the_next_command_is_as_it_was(run, tiny, tmp_path):
    run("onnx", "-v", "--weights", tiny, "-o", tmp_path / "a")
    result = run("onnx", "--weights", tiny, "-o", tmp_path / "b")
    assert "\n· " in f"\n{result.err}"
    assert "onnx_ir" not in result.err


def test_quiet_and_verbose_contradict_each_other(run, tiny, tmp_path):
    for words in (("onnx", "-q", "-v"), ("-q", "onnx", "-v")):
        result = run(*words, "--weights", tiny, "-o", tmp_path)
        assert result.code == 2
        assert "leave one out" in result.err
    assert not list(tmp_path.iterdir())


def test_where_no_bar_can_be_drawn_a_line_says_how_many_are_done(capsys, monkeypatch):
    from exporter.cli import console

    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    for batch in console.Drawn().track([10, 10, 10, 10], 40, "images", lambda count: count):
        now += batch
    lines = [line.strip() for line in capsys.readouterr().err.splitlines()]
    assert lines == ["images: 20 of 40, about 20 s left"], "one in 15 seconds, and none at the end"
