"""An int8 build whose parts other processes compute has the bytes of one that computes them all."""

from contextlib import suppress
from dataclasses import replace

import pytest

from exporter.artifact import sha256_file
from exporter.build import build
from exporter.build.int8 import speed
from exporter.build.int8.calibration import decode, encode
from exporter.quantize import statistics
from exporter.run import tasks
from exporter.run.cluster import calibration_job
from exporter.verify import verify
from tests.build.networks import FRAGILE, write_fragile, write_labelled
from tests.conftest import recipe_of, write_tiny


class Workers:
    """Computes as the workers of a cluster do, with each argument and result as bytes; stops after `most` batches."""

    def __init__(self, most=1000):
        self.most, self.passes, self.numbers, self.verified = most, [], [], 0

    def statistics(self, calibration, scaled, done):
        job, content = calibration_job(calibration, encode(scaled)), encode(scaled)
        assert not tasks.check(job, []).error
        self.passes.append(job)
        for number in calibration.numbers(done):
            if len(self.numbers) == self.most:
                raise KeyboardInterrupt
            self.numbers.append(number)
            result = tasks.do(job, [lambda: content], number)
            assert not result.error
            yield decode(result.content)

    def verify(self, artifact, options):
        self.verified += 1
        return verify(artifact, options)


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """An int8 build that must keep parts in higher precision; each call takes another folder of caches."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speed, "SECONDS_EACH", 0.3)
    photographs = write_labelled(tmp_path / "images.npz")
    weights = write_fragile(tmp_path / "fragile")
    yield recipe_of(
        "onnxruntime", "int8", weights=str(weights), calib=str(photographs), calib_size=None, calib_method="mse",
        data=str(photographs), max_drop=0.05, imgsz=None,
    )  # fmt: skip
    tasks._close()


def fresh(monkeypatch, folder):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))


def judged(report):
    """The findings without those of the timing."""
    return [finding for finding in report.findings if finding.check != "int8"]


def test_an_artifact_has_the_bytes_of_one_process(recipe, tmp_path, monkeypatch):
    fresh(monkeypatch, tmp_path / "cache of one")
    one = build(recipe, tmp_path / "one")
    fresh(monkeypatch, tmp_path / "cache of several")
    workers = Workers()
    several = build(recipe, tmp_path / "several", spread=workers)
    assert set(one.artifact.sidecar.quantization.kept) == set(FRAGILE)
    assert sha256_file(several.artifact.path) == sha256_file(one.artifact.path)
    assert judged(several.report) == judged(one.report)
    assert workers.numbers == [0, 1, 2] * 2, "20 images in batches of 8, for extremes and histograms"
    assert workers.verified > 1


def test_an_interrupted_calibration_runs_only_the_missing_batches(recipe, tmp_path, monkeypatch):
    fresh(monkeypatch, tmp_path / "cache")
    monkeypatch.setattr(statistics, "SAVE_S", 0)
    first, second = Workers(most=4), Workers()
    with suppress(KeyboardInterrupt):
        build(recipe, tmp_path / "out", spread=first)
    assert first.numbers == [0, 1, 2, 0]
    build(recipe, tmp_path / "out", spread=second)
    assert second.numbers == [1, 2]


def test_a_worker_with_other_weights_or_images_says_so(recipe, tmp_path, monkeypatch):
    fresh(monkeypatch, tmp_path / "cache")
    workers = Workers(most=0)
    with suppress(KeyboardInterrupt):
        build(recipe, tmp_path / "out", spread=workers)
    (job,) = workers.passes
    scaled = encode(statistics.Statistics())
    assert not tasks.do(job, [lambda: scaled], 0).error
    other = replace(job.schedule, versions={**job.schedule.versions, "torch": "1.0"})
    assert "torch 2" in tasks.check(replace(job, schedule=other), []).error
    write_tiny(tmp_path / "fragile")
    error = tasks.do(replace(job, key="weights"), [lambda: scaled], 0).error
    assert error == f"{tmp_path / 'fragile'}: other weights than where the command was typed; copy those"
    images = tmp_path / "images.npz"
    images.write_bytes(images.read_bytes() + b" ")
    result = tasks.check(job, [])
    assert result.error == f"--calib {images}: other images than where the command was typed; copy those"
    assert result.exit_code == 2
