"""The experiment on intervals: what it counts."""

from benchmarks import coverage
from benchmarks.coverage import Repetition


def repetition(low, high, loaded=False, noise=""):
    return Repetition(
        loaded=loaded, ratio=(low + high) / 2, low=low, high=high, processes=5, measured_again=0, noise=noise, seconds=1
    )


def test_intervals_that_hold_one_are_counted_apart_from_those_that_call_one_faster():
    repetitions = [
        repetition(0.9, 1.1),
        repetition(1.01, 1.1),
        repetition(0.8, 0.99, True, "noisy"),
        repetition(0.5, 2, True),
    ]
    assert [one.holds for one in repetitions] == [True, False, False, True]
    lines = coverage.summary(repetitions).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| free", "| loaded", "| both"]
    assert lines[2].startswith("| free | 2 | 1 |")
    assert "| 1 | 0 |" in lines[2]
    assert "| 0 | 1 |" in lines[3]
    assert lines[4].endswith("| 1 |")


def test_an_artifact_is_timed_against_itself(artifacts):
    artifact = artifacts["onnxruntime", "fp32"]
    one = coverage.repeat(artifact, artifact, threads=1, seconds=0.1, seed=0, loaded=False)
    assert one.low <= one.ratio <= one.high
    assert one.processes == coverage.supervisor.PROCESSES


def test_verdicts_are_counted_by_the_load_of_the_machine():
    repetitions = [
        repetition(1.1, 1.3),
        repetition(0.9, 1.1),
        repetition(0.7, 0.9, True, "noisy: interval wider than ±5 %"),
        repetition(0.7, 0.9, True, "noisy: interval wider than ±5 %, other processes used 45 % of the machine"),
    ]
    lines = coverage.verdicts(repetitions).splitlines()
    assert lines[2] == "| free | 2 | 1 | 1 | 0 | 0 | 1.00–1.20 × | 0 |"
    assert lines[3] == "| loaded | 2 | 0 | 0 | 1 | 1 | 0.80–0.80 × | 2 |"
