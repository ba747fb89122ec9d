"""The session on a GPU machine, rehearsed on the CPU: every command runs, and a failure stops nothing."""

import sys

import msgspec
import pytest

from benchmarks import gpu
from exporter.backends.tensorrt import library


@pytest.mark.slow
def test_the_rehearsal_runs_everything_and_is_no_result(tiny, installed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "COMMAND", installed)
    monkeypatch.setattr(gpu, "PRECISIONS", ("int8",))  # which fp16 is built for too, to be held against
    gpu.main(["--rehearse", "--weights", str(tiny), "-o", str(tmp_path)])
    session = msgspec.json.decode((tmp_path / "session.json").read_bytes(), type=gpu.Session)
    assert session.rehearsal
    assert session.seconds < gpu.BUDGET_S
    failed = [step for step in session.steps if step.code not in (0, 5)]
    assert all(step.words[:3] == ("-q", "-m", "gpu") for step in failed), failed
    verbs = [step.words[0] for step in session.steps]
    assert {"doctor", "onnx", "verify", "bench", "report", "-q"} <= set(verbs)
    assert verbs.count("trt") == len(library.here())
    most = [step.words[step.words.index("--max-batch") + 1] for step in session.steps if step.words[0] == "trt"]
    assert set(most) <= {str(max(gpu.BATCHES))}, "engines take the largest batch that is timed"
    assert (tmp_path / "batch-1" / "custom_fp16.onnx.report.json").exists()
    assert "exit 0" in capsys.readouterr().out


def test_a_command_for_which_no_time_is_left_is_recorded():
    kept = []
    runner = gpu.Runner(budget=0.0, keep=lambda steps: kept.append(len(steps)))
    assert not runner.run([sys.executable], "-c", "1/0")
    assert kept == [1], "written after each step, for the session may be killed"
    assert runner.steps[0].code is None
    slow = gpu.Runner(budget=1.0)
    assert not slow.run([sys.executable], "-c", "import time; time.sleep(30)")
    assert slow.steps[0].last == "stopped: the time was up"


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "gpu", lambda: None)
    with pytest.raises(SystemExit, match="no NVIDIA GPU here"):
        gpu.main(["-o", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
