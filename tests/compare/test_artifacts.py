"""Two artifacts timed in turn; the sessions are fakes that take as long as they say."""

import msgspec
import numpy as np
import pytest

from exporter import machine
from exporter.bench import Launch, supervisor
from exporter.compare import artifacts as comparing
from exporter.compare import parse_limits, processes_needed
from exporter.compare.artifacts import CompareOptions, Pair
from exporter.errors import BadRequest, CheckFailed
from tests.bench import fakes
from tests.conftest import build

QUICK = CompareOptions(duration=0.8)


@pytest.fixture
def pair(artifacts):
    made = artifacts["onnxruntime", "fp32"]
    return Pair(made, made)


def test_a_slower_head_is_measured_again_and_fails(pair):
    limits = parse_limits(["p50_ms:5%", "throughput_ips:5%"])
    findings = comparing.compare_times(pair, limits, QUICK, fakes.slower_head)
    assert [finding.passed for finding in findings] == [False, False]
    assert 30 < findings[0].value < 50
    assert -35 < findings[1].value < -22
    assert len(findings[0].samples) == max(supervisor.PROCESSES * comparing.AGAIN, processes_needed(2))
    assert findings[0].detail.startswith("regressed")


def test_a_slower_head_fails_among_however_many_comparisons(pair):
    """Holm's correction for 44 comparisons takes 13 processes: p = 44 · 2⁻¹³ = 0.005."""
    limits = parse_limits(["p50_ms:5%", "p90_ms:5%", "p99_ms:5%", "throughput_ips:5%"]) * 11
    findings = comparing.compare_times(pair, limits, QUICK, fakes.slower_head)
    assert [finding.passed for finding in findings] == [False] * 44
    assert len(findings[0].samples) == 13


def test_a_finding_says_on_which_device_and_how_noisy_the_machine_was(pair, monkeypatch):
    monkeypatch.setattr(machine, "disturbances", lambda conditions: ["other processes used 45 % of the machine"])
    options = msgspec.structs.replace(QUICK, threads=1)
    (finding,) = comparing.compare_times(pair, parse_limits(["p50_ms:90%"]), options, fakes.same)
    assert finding.setting == "cpu, 1 thread, latency"
    assert finding.noise.startswith("noisy: ")
    assert finding.noise.endswith("other processes used 45 % of the machine")
    assert "noisy" not in finding.detail, "said once"


def test_a_disturbed_process_is_measured_again_and_left_out(pair, monkeypatch):
    first = []
    monkeypatch.setattr(
        supervisor, "is_disturbed", lambda launch: launch is (first or first.append(launch) or first)[0]
    )
    (finding,) = comparing.compare_times(pair, parse_limits(["p50_ms:90%"]), QUICK, fakes.same)
    assert len(finding.samples) == supervisor.PROCESSES
    assert first


def test_the_same_is_looked_at_once_and_passes(pair):
    (finding,) = comparing.compare_times(pair, parse_limits(["p50_ms:20%"]), QUICK, fakes.same)
    assert finding.passed
    assert abs(finding.value) < 15
    assert len(finding.samples) == supervisor.PROCESSES


def test_a_suspicion_that_does_not_come_back_passes(pair, monkeypatch):
    """Slow at the first look only."""
    looks = []
    original = comparing._changes

    def changes(pair, limits, batch, options, processes, opener):
        looks.append(processes)
        return original(pair, limits, batch, options, processes, fakes.same if looks[1:] else fakes.slower_head)

    monkeypatch.setattr(comparing, "_changes", changes)
    (finding,) = comparing.compare_times(pair, parse_limits(["p50_ms:20%"]), QUICK)
    assert looks == [supervisor.PROCESSES, processes_needed(1)]
    assert finding.passed


def test_every_batch_is_a_case_of_its_own(pair):
    options = msgspec.structs.replace(QUICK, batch=(1, 2))
    findings = comparing.compare_times(pair, parse_limits(["p50_ms:50%"]), options, fakes.same)
    assert sorted(finding.case for finding in findings) == ["batch 1", "batch 2"]


def test_a_head_that_crashes_is_named(pair):
    with pytest.raises(CheckFailed, match=r"custom_fp32.onnx: crashed its process \(SIGSEGV\)"):
        comparing.compare_times(pair, parse_limits([]), QUICK, fakes.crashing_head)


def test_a_head_that_gives_no_numbers_is_not_fast(pair):
    with pytest.raises(CheckFailed, match="differ in shape"):
        comparing.compare_times(pair, parse_limits([]), QUICK, fakes.nan_head)


def test_one_core_is_left_to_the_others_but_never_none_used(pair, monkeypatch):
    for cores, threads in ((1, 1), (2, 1), (8, 7)):
        monkeypatch.setattr(comparing.machine, "cores", lambda cores=cores: cores)
        assert {arm.threads for arm in comparing._plan(pair, 1, QUICK, 0).arms} == {threads}


def test_two_models_are_not_compared_unless_asked(pair, tmp_path, artifacts, tiny):
    other = build("random:0", tmp_path, variant="atto", imgsz=64)
    two = Pair(pair.base, other)
    with pytest.raises(BadRequest, match="two models"):
        comparing.check_pair(two, QUICK)
    comparing.check_pair(two, msgspec.structs.replace(QUICK, across=("model",)))
    fixed = Pair(pair.base, build(tiny, tmp_path / "fixed", batch=2))
    comparing.check_pair(fixed, QUICK)  # their own batch
    with pytest.raises(BadRequest, match="use --batch 2"):
        comparing.check_pair(fixed, msgspec.structs.replace(QUICK, batch=(1,)))
    small = Pair(pair.base, build(tiny, tmp_path / "small", imgsz=32))
    with pytest.raises(BadRequest, match="32 pixels"):
        comparing.check_pair(small, QUICK)


def test_the_batches_that_run_at_once_count_for_a_rate():
    launch = Launch({"head": [[10.0, 10.0]]}, {}, {"head": 2}, {}, {}, 0, None)
    assert np.exp(comparing._logs(launch, "head", "throughput_ips")) == pytest.approx([5.0])
    assert np.exp(comparing._logs(launch, "head", "p50_ms")) == pytest.approx([10.0])
