"""An int8 build whose parts other processes compute has the bytes of one that computes them all."""

import hashlib
from contextlib import suppress
from dataclasses import replace

import msgspec
import pytest
from PIL import Image

from exporter.artifact import sha256_file
from exporter.build import build
from exporter.build.int8 import speed
from exporter.build.int8.workers import decode, encode
from exporter.data import calibration, synthetic
from exporter.errors import BadRequest
from exporter.quantize import statistics
from exporter.run import tasks
from exporter.run.cluster import calibration_job
from exporter.verify import verify
from tests.build.networks import FRAGILE, write_fragile, write_labelled
from tests.conftest import PX, recipe_of, write_tiny


class Workers:
    """Computes as the workers of a cluster do, with each argument and result as bytes; stops after `most` batches."""

    def __init__(self, most=1000):
        self.most, self.passes, self.numbers, self.verified, self.closed = most, [], [], 0, False

    def statistics(self, calibration_pass, ranges, done):
        job, content = calibration_job(calibration_pass, encode(ranges)), encode(ranges)
        assert not tasks.check(job, []).error
        self.passes.append(job)
        for number in calibration_pass.remaining(done):
            if len(self.numbers) == self.most:
                raise KeyboardInterrupt
            self.numbers.append(number)
            result = tasks.do(job, [lambda: content], number)
            if result.error:
                raise BadRequest(result.error)
            yield decode(result.content)

    def verify(self, artifact, options):
        self.verified += 1
        return verify(artifact, options)

    def close(self):
        self.closed = True


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
    several = build(recipe, tmp_path / "several", workers=workers)
    assert set(one.artifact.sidecar.quantization.kept) == set(FRAGILE)
    assert sha256_file(several.artifact.path) == sha256_file(one.artifact.path)
    assert judged(several.report) == judged(one.report)
    assert workers.numbers == [0, 1, 2] * 2, "20 images in batches of 8, for extremes and histograms"
    assert workers.verified > 1
    assert workers.closed


def test_an_interrupted_calibration_runs_only_the_missing_batches(recipe, tmp_path, monkeypatch):
    fresh(monkeypatch, tmp_path / "cache")
    monkeypatch.setattr(statistics, "SAVE_S", 0)
    first, second = Workers(most=4), Workers()
    with suppress(KeyboardInterrupt):
        build(recipe, tmp_path / "out", workers=first)
    assert first.numbers == [0, 1, 2, 0]
    build(recipe, tmp_path / "out", workers=second)
    assert second.numbers == [1, 2]


def test_an_image_that_cannot_be_read_or_changed_is_named(recipe, tmp_path, monkeypatch):
    """A manifest has the digest of a file that is no image, and an image changes after the build has begun."""
    fresh(monkeypatch, tmp_path / "cache")
    (tmp_path / "images").mkdir()
    for number in range(12):
        Image.fromarray(synthetic.dead_leaves(PX, number)).save(tmp_path / "images" / f"{number:02d}.png")
    calibration.write(calibration.freeze("images", 12, 0), tmp_path / "set.tsv")
    recipe = msgspec.structs.replace(
        recipe, quantization=msgspec.structs.replace(recipe.quantization, calib=str(tmp_path / "set.tsv"), data=None)
    )
    last, workers = tmp_path / "images" / "11.png", Workers(most=1)
    with suppress(KeyboardInterrupt):
        build(recipe, tmp_path / "out", workers=workers)
    good, content = last.read_bytes(), encode(statistics.Statistics())
    last.write_bytes(good + b" ")
    (job,) = workers.passes
    error = tasks.do(replace(job, key="changed"), [lambda: content], 1).error
    assert f"--calib {tmp_path / 'set.tsv'}: not as when the command began: 11.png; restore" in error

    last.write_bytes(b"no image")
    text = (tmp_path / "set.tsv").read_text().replace(hashlib.sha256(good).hexdigest(), sha256_file(last))
    (tmp_path / "set.tsv").write_text(text)
    for helpers in (None, Workers()):
        with pytest.raises(BadRequest, match=r"cannot calibrate with 11\.png"):
            build(recipe, tmp_path / "out", workers=helpers)


def test_a_worker_with_other_weights_or_images_says_so(recipe, tmp_path, monkeypatch):
    fresh(monkeypatch, tmp_path / "cache")
    workers = Workers(most=0)
    with suppress(KeyboardInterrupt):
        build(recipe, tmp_path / "out", workers=workers)
    (job,) = workers.passes
    ranges = encode(statistics.Statistics())
    assert not tasks.do(job, [lambda: ranges], 0).error
    other = replace(job.schedule, versions={**job.schedule.versions, "torch": "1.0"})
    assert "torch 2" in tasks.check(replace(job, schedule=other), []).error
    write_tiny(tmp_path / "fragile")
    error = tasks.do(replace(job, key="weights"), [lambda: ranges], 0).error
    remedy = "with which the command began; restore them, or copy them to this machine"
    assert error == f"{tmp_path / 'fragile'}: not the weights {remedy}"
    images = tmp_path / "images.npz"
    images.write_bytes(images.read_bytes() + b" ")
    result = tasks.check(job, [])
    assert result.error == f"--calib {images}: not the images {remedy}"
    assert result.exit_code == 2
