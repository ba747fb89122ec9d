"""The simulation of a cluster does all tasks, loses those of failed machines, and needs no less than the ideal time."""

import pytest

from benchmarks import scale


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(scale, "IMAGES", 200_000)


def simulated(failures=0.0, in_order=True, size=512, machines=10):
    return scale.simulate((machines, size, failures, in_order), {"slow": 80.0, "fast": 20.0}, 3e-6)


def test_without_failures_the_time_is_near_the_ideal_one(few):
    run = simulated()
    assert (run.lost, run.ideal_s) == (0, pytest.approx(200_000 / (5 * 4 / 0.08 + 5 * 4 / 0.02)))
    assert 1.0 < run.seconds / run.ideal_s < 1.5, "ten seconds to open the models, and the last tasks"


def test_failed_machines_cost_time_and_no_result(few):
    run = simulated(failures=30.0)
    assert run.lost > 0
    assert run.seconds > simulated().seconds


def test_in_order_results_wait_and_in_any_order_none_does(few):
    assert simulated().waiting > 0
    assert simulated(in_order=False).waiting == 0


def test_large_ranges_end_late(few):
    assert simulated(size=8192).seconds > 1.5 * simulated(size=512).seconds


def test_the_driver_is_measured_with_real_answers():
    driver = scale.driven(2000)
    assert driver.images == 2000
    assert driver.sent_bytes > 2000 * scale.TOP * 8
    assert min(driver.receive_s, driver.write_s) > 0
