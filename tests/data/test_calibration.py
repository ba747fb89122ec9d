"""Calibration sets: chosen fairly, frozen by content, refused by name."""

import contextlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from exporter.artifact.sidecar import Preprocessing
from exporter.data import calibration, manifests, samples
from exporter.data.calibration import open_calibration
from exporter.errors import BadRequest
from tests.conftest import snapshot

RECIPE = Preprocessing(size=32, resize=32)
COUNTS = {"cat": 8, "dog": 3, "emu": 20}


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for label, count in COUNTS.items():
        (tmp_path / "images" / label).mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{index}.png")
    return tmp_path / "images"


def frozen(folder, size=12, seed=0):
    manifest = calibration.freeze(str(folder), size, seed)
    path = folder.parent / "sets" / "mine.tsv"
    calibration.write(manifest, path)
    return path


def test_classes_have_equal_shares_and_what_one_lacks_falls_to_the_others(folder):
    assert calibration.freeze(str(folder), 12, 0).classes() == {"cat": 4, "dog": 3, "emu": 5}
    assert calibration.freeze(str(folder), 31, 0).classes() == COUNTS
    assert len({entry.path for entry in calibration.freeze(str(folder), 12, 0).entries}) == 12


def test_the_seed_decides_which(folder):
    draws = [{entry.path for entry in calibration.freeze(str(folder), 12, seed).entries} for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_a_manifest_says_where_it_came_from_and_is_read_back_as_it_was(folder):
    path = frozen(folder)
    head = path.read_text().splitlines()[:5]
    assert head[1:4] == ["# source: ../images", "# seed: 0", "# rule: 12 of 31 images, equally from 3 classes"]
    assert head[4] == "sha256\tpath\tlabel"
    written, read = calibration.freeze(str(folder), 12, 0), calibration.read(path)
    assert read.entries == written.entries
    assert read.digest == written.digest


def test_a_seed_that_is_no_number_is_read_as_0(folder):
    path = frozen(folder, seed=3)
    path.write_text(path.read_text().replace("# seed: 3", "# seed: --5"))
    assert calibration.read(path).seed == 0


def test_the_digest_is_of_the_contents_wherever_they_lie(folder, tmp_path):
    digest = calibration.read(frozen(folder)).digest
    shutil.copytree(folder.parent, tmp_path / "elsewhere", dirs_exist_ok=True)
    assert calibration.read(tmp_path / "elsewhere" / "sets" / "mine.tsv").digest == digest
    assert calibration.freeze(str(folder), 11, 0).digest != digest


def test_it_can_be_measured_on_too(folder):
    opened = samples.open_samples(str(frozen(folder)), RECIPE, ("cat", "dog", "emu"), 3)
    (batch,) = opened.batches(64)
    assert sorted(batch.labels.tolist()) == [0] * 4 + [1] * 3 + [2] * 5


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.write_bytes(b"other"), "changed since it was frozen: {name}"),
        (lambda path: path.unlink(), "missing in .*: {name}"),
    ],
)
def test_a_file_that_changed_or_went_is_named(folder, spoil, said):
    path = frozen(folder)
    name = calibration.read(path).entries[5].path
    spoil(folder / name)
    with pytest.raises(BadRequest, match=said.format(name=name)):
        open_calibration(str(path), RECIPE, 3)


def test_duplicates_and_unreadable_files_are_named_and_nothing_is_written(folder, refused):
    shutil.copy(folder / "dog" / "0.png", folder / "dog" / "9.png")
    before = snapshot(folder.parent)
    assert "dog/9.png is dog/0.png" in refused(
        2, "calibrate", folder, "--calib-size", 32, "-o", folder.parent / "m.tsv"
    )
    (folder / "dog" / "9.png").write_bytes(b"not an image")
    assert "dog/9.png: cannot be read" in refused(2, "calibrate", folder, "-o", folder.parent / "m.tsv")
    (folder / "dog" / "9.png").unlink()
    before.pop(str(folder / "dog" / "9.png"))
    assert snapshot(folder.parent) == before


@pytest.mark.parametrize(
    ("source", "size", "said"),
    [
        ("{folder}", 32, "31 images, 32 were asked for"),
        ("{folder}/nothing", None, "no such data"),
        ("{folder}/../sets/mine.tsv", 13, "12 images, 13 were asked for"),
    ],
)
def test_what_cannot_be_had_is_refused(folder, source, size, said):
    frozen(folder)
    with pytest.raises(BadRequest, match=said):
        open_calibration(source.format(folder=folder), RECIPE, 3, size)


def test_a_manifest_whose_images_are_elsewhere_now_says_where_they_were(folder):
    path = frozen(folder)
    folder.rename(folder.parent / "moved")
    with pytest.raises(BadRequest, match=r"images lie in .*images, and there is no such folder"):
        calibration.read(path)


def test_batches_can_begin_and_end_in_the_middle(folder):
    images = open_calibration(str(folder), RECIPE, 3)
    everything = [name for batch in images.batches(4) for name in batch.names]
    rest = [name for batch in images.batches(4, 10) for name in batch.names]
    some = [name for batch in images.batches(4, 8, 14) for name in batch.names]
    assert images.total == len(everything) == 31
    assert rest == everything[10:]
    assert some == everything[8:14]


def test_an_image_that_broke_after_it_was_opened_is_no_silent_gap(folder):
    images = open_calibration(str(folder), RECIPE, 3)
    (folder / "emu" / "3.png").write_bytes(b"broken")
    with pytest.raises(BadRequest, match=r"cannot calibrate with emu/3.png"):
        list(images.batches(8))


def test_arrays_and_synthetic_images_have_digests_too(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels)
    np.savez(tmp_path / "b.npz", images=pixels[::-1])
    digests = {open_calibration(str(tmp_path / name), RECIPE, 3).digest for name in ("a.npz", "b.npz")}
    digests |= {open_calibration("synthetic", RECIPE, 3, size).digest for size in (None, 8)}
    assert len(digests) == 4
    assert open_calibration("synthetic", RECIPE, 3).synthetic
    assert not open_calibration(str(tmp_path / "a.npz"), RECIPE, 3).synthetic


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(head=st.lists(st.text(max_size=20), max_size=3), rows=st.lists(st.lists(st.text(max_size=70), max_size=4)))
def test_whatever_a_manifest_holds_it_is_read_or_refused(head, rows, tmp_path):
    lines = [manifests.CALIBRATION, *(f"# source: {line}" for line in head), "sha256\tpath\tlabel"]
    text = "\n".join([*lines, *("\t".join(row) for row in rows)])
    (tmp_path / "hostile.tsv").write_bytes(text.encode("utf-8", "surrogatepass"))
    with contextlib.suppress(BadRequest):
        calibration.read(tmp_path / "hostile.tsv")


def test_the_verb_freezes_and_shows(folder, run):
    path = folder.parent / "set.tsv"
    made = run("calibrate", folder, "-o", path, "--calib-size", 9, "--seed", 3, "--json")
    assert made.code == 0, made.err
    assert f"{folder}: 9 images to calibrate on; 256 or more are better" in made.err
    shown = run("calibrate", path, "--json")
    assert shown.json["digest"] == made.json["digest"] == calibration.read(path).digest
    table = run("calibrate", path).out
    assert "9 of 31 images" in table
    assert "emu" in table


def test_a_set_of_another_folder_is_not_replaced(folder, run, refused, monkeypatch):
    monkeypatch.chdir(folder.parent)
    for parent in ("food", "cars"):
        shutil.copytree(folder, folder.parent / parent / "train")
    assert run("calibrate", "food/train", "--calib-size", 9).code == 0
    first = Path("calibration/train.tsv").read_bytes()
    line = refused(2, "calibrate", "cars/train", "--calib-size", 9)
    assert "train.tsv: exists, and is not a set of cars/train; remove it, or give another file with -o" in line
    assert Path("calibration/train.tsv").read_bytes() == first
    assert run("calibrate", "food/train", "--calib-size", 9, "--seed", 1).code == 0, "the same folder again"
    Path("mine.tsv").write_text("my notes")
    assert "mine.tsv: exists" in refused(2, "calibrate", "food/train", "-o", "mine.tsv")


def test_digests_may_be_in_capitals(folder):
    path = frozen(folder)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:5], *(line[:64].upper() + line[64:] for line in lines[5:])]))
    assert calibration.read(path).digest == calibration.freeze(str(folder), 12, 0).digest


def test_a_name_that_is_no_utf8_is_refused_before_it_is_listed(folder, tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    try:
        (folder / "cat" / "0.png").rename(folder / "cat" / name)
    except OSError:
        pytest.skip("this file system has UTF-8 names alone")
    with pytest.raises(BadRequest, match="that is no UTF-8, cannot be listed; rename it"):
        calibration.write(calibration.freeze(str(folder), 31, 0), tmp_path / "a.tsv")
    assert not (tmp_path / "a.tsv").exists()


@pytest.mark.parametrize("words", [("--calib-size", 3), ("-o", "other.tsv"), ("--seed", 0)])
def test_a_frozen_set_is_not_frozen_again(folder, refused, words):
    assert "is a manifest already" in refused(2, "calibrate", frozen(folder), *words)


def test_synthetic_images_need_no_manifest(refused):
    assert "need no manifest" in refused(2, "calibrate", "synthetic")


def test_the_default_is_16_images_for_segmentation_and_pyramids(folder):
    assert open_calibration("synthetic", RECIPE, None, dense=True).total == 16
    assert open_calibration("synthetic", RECIPE, None).total == 128
    assert open_calibration(str(folder), RECIPE, None, dense=True).total == 16
    assert open_calibration(str(folder), RECIPE, None, 3, dense=True).total == 3
