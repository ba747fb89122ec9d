"""The calibration sets that ship: made anew they are the same, and one changed pixel is seen."""

import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import calibration as sets
from benchmarks import digits
from exporter.artifact.sidecar import Preprocessing
from exporter.data import calibration, generators, samples
from exporter.data.calibration import open_calibration
from exporter.data.fingerprint import fingerprint
from exporter.errors import BadRequest, Unavailable
from exporter.recipe import bundled
from tests.conftest import ROOT

RECIPE = Preprocessing(size=32, resize=32)


def pixels_of(images):
    return np.concatenate([batch.images for batch in images.batches(64)])


def test_the_sets_that_ship_are_found_and_described():
    assert sorted(bundled.sets()) == ["digits-256", "synthetic-256"]
    readme = (ROOT / "calibration" / "README.md").read_text("utf-8")
    for name, path in bundled.sets().items():
        manifest = calibration.read(path)
        assert len(manifest.entries) == 256
        assert all((manifest.source, manifest.license, manifest.rule))
        assert f"`{name}`" in readme


def test_the_digits_made_anew_are_those_of_the_file(tmp_path):
    calibration.write(sets.digits_256(), tmp_path / "digits-256.tsv")
    assert (tmp_path / "digits-256.tsv").read_bytes() == bundled.sets()["digits-256"].read_bytes()


def test_the_first_synthetic_images_made_anew_are_those_of_the_file():
    assert sets.synthetic_256(8).entries == calibration.read(bundled.sets()["synthetic-256"]).entries[:8]


@pytest.mark.slow
def test_all_synthetic_images_made_anew_are_those_of_the_file(tmp_path):
    calibration.write(sets.synthetic_256(), tmp_path / "synthetic-256.tsv")
    assert (tmp_path / "synthetic-256.tsv").read_bytes() == bundled.sets()["synthetic-256"].read_bytes()


def test_the_digits_are_those_that_were_drawn_from_the_folder_of_the_demo(tmp_path):
    digits.write_images(tmp_path / "train", held_out=False)
    folder = open_calibration(str(tmp_path / "train"), digits.RECIPE, 10, 256)
    shipped = open_calibration("digits-256", digits.RECIPE, 10)
    assert shipped.total == folder.total == 256
    assert np.array_equal(pixels_of(shipped), pixels_of(folder))
    assert not shipped.synthetic


def test_synthetic_256_are_the_images_of_synthetic(monkeypatch):
    monkeypatch.setattr(calibration, "check", lambda manifest, where: None)  # ten seconds, and tested below
    shipped = open_calibration("synthetic-256", RECIPE, 10)
    assert shipped.synthetic
    first = next(iter(shipped.batches(6))).images
    assert np.array_equal(first, next(iter(open_calibration("synthetic", RECIPE, 10).batches(6))).images)
    assert shipped.digest != open_calibration("synthetic", RECIPE, 10).digest


@pytest.mark.parametrize(("name", "size"), [("digits-256", 256), ("synthetic-256", 4)])
def test_a_changed_pixel_is_refused(name, size, monkeypatch):
    maker = generators.GENERATORS[calibration.read(bundled.sets()[name]).generator]
    image = maker.image

    def changed(number, size, channels):
        pixels = image(number, size, channels).copy()
        if number == damaged:
            pixels[3, 4, 1] ^= 1
        return pixels

    manifest = calibration.read(bundled.sets()[name])
    damaged = int(manifest.entries[-1].path)
    open_calibration(name, RECIPE, 10, size)
    monkeypatch.setitem(generators.GENERATORS, manifest.generator, replace(maker, image=changed))
    with pytest.raises(BadRequest, match=rf"{name}: 1 of {size} images of .* that were frozen \({damaged}\)"):
        open_calibration(name, RECIPE, 10, size)


def test_without_scikit_learn_the_line_that_installs_it_is_said(monkeypatch):
    generators.digits.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(Unavailable, match="pip install scikit-learn"):
        open_calibration("digits-256", RECIPE, 10)
    generators.digits.cache_clear()


def test_a_file_of_the_users_own_is_taken_before_a_set_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_calibration("digits-256", RECIPE, 10).total == 256
    digits.write_images(tmp_path / "all", held_out=True)
    shutil.move(tmp_path / "all" / "3", tmp_path / "digits-256")
    mine = open_calibration("digits-256", RECIPE, 10)
    assert mine.total == len(list((tmp_path / "digits-256").iterdir()))
    assert mine.digest != calibration.read(bundled.sets()["digits-256"]).digest


def test_the_cache_key_of_a_set_does_not_depend_on_where_the_package_lies(tmp_path, monkeypatch):
    before = fingerprint("digits-256")
    shutil.copytree(bundled.folder("calibration"), tmp_path / "elsewhere")
    monkeypatch.setattr(bundled, "folder", lambda name: tmp_path / "elsewhere")
    assert fingerprint("digits-256") == before
    path = tmp_path / "elsewhere" / "digits-256.tsv"
    path.write_text(path.read_text("utf-8").replace("# seed: 0", "# seed: 1"), "utf-8")
    assert fingerprint("digits-256") != before


def test_a_split_of_generated_images_is_another_source(tmp_path):
    header, *rows = (ROOT / "calibration" / "digits-256.tsv").read_text().split("sha256\tpath\tlabel\n")
    lines = [f"{row}\t{'a' if number % 2 else 'b'}\n" for number, row in enumerate(rows[0].splitlines())]
    (tmp_path / "digits.tsv").write_text(f"{header}sha256\tpath\tlabel\tsplit\n{''.join(lines)}")
    assert fingerprint(f"{tmp_path}/digits.tsv#a") != fingerprint(f"{tmp_path}/digits.tsv#b")


@pytest.mark.parametrize("ask", [lambda word: open_calibration(word, RECIPE, 10), fingerprint])
def test_a_misspelled_name_gets_the_nearest(ask):
    with pytest.raises(BadRequest, match="did you mean 'digits-256'"):
        ask("digits-265")
    with pytest.raises(BadRequest, match="did you mean 'synthetic'"):
        ask("synthetc")
    with pytest.raises(BadRequest, match=r"an \.npz file, 'synthetic' or a bundled set"):
        ask("zebra")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("load_digits", "load_digit", "did you mean 'sklearn.datasets.load_digits'"),
        ("# pixels: 8", "# pixels: 99999", "from 1 to 1024"),
        ("# pixels: 8", "# pixels: " + "9" * 5000, "from 1 to 1024"),
        ("\t1563\t", "\t99999\t", "digit 99999: there are 1797"),
        ("\t1563\t", "\t../x\t", "lies outside"),
        ("\t1563\t", "\tx\t", "'x' is no number of an image"),
    ],
)
def test_a_damaged_set_is_refused(old, new, said, tmp_path):
    text = bundled.sets()["digits-256"].read_text("utf-8")
    assert old in text
    (tmp_path / "set.tsv").write_text(text.replace(old, new), "utf-8")
    with pytest.raises(BadRequest, match=said):
        open_calibration(str(tmp_path / "set.tsv"), RECIPE, 10)


def test_a_set_with_classes_can_be_measured_on():
    opened = samples.open_samples("digits-256", digits.RECIPE, tuple("0123456789"), 10, 20)
    (batch,) = opened.batches(32)
    assert (opened.labelled, opened.synthetic, batch.images.shape) == (True, False, (20, 3, 64, 64))
    assert sorted(set(batch.labels.tolist())) == list(range(10))


@pytest.mark.parametrize(("source", "synthetic"), [("synthetic", 1), ("synthetic-256", 1), ("digits-256", 0), ("x", 0)])
def test_it_is_known_which_sources_show_nothing_real(source, synthetic):
    assert samples.is_synthetic(source) == bool(synthetic)


def test_the_command_lists_the_sets(run, refused):
    rows = run("calibrate", "--json").json
    assert [(row["name"], row["images"]) for row in rows] == [("digits-256", 256), ("synthetic-256", 256)]
    assert all(row["license"] and row["rule"] and row["source"] and len(row["digest"]) == 64 for row in rows)
    table = run("calibrate").out
    assert "digits-256" in table
    assert "CC BY 4.0" in table
    assert "give the folder of images" in refused(2, "calibrate", "--calib-size", 3)


def test_the_command_checks_a_set_by_name(run, refused):
    shown = run("calibrate", "digits-256")
    assert shown.code == 0, shown.err
    assert "made by sklearn.datasets.load_digits" in shown.out
    assert "is a manifest already" in refused(2, "calibrate", "digits-256", "-o", "x.tsv")
    assert "did you mean 'digits-256'" in refused(2, "calibrate", "digit-256")


def test_a_recipe_names_a_set_as_a_word(tmp_path, monkeypatch):
    from exporter import backends, build
    from exporter.recipe import file

    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    path = tmp_path / "recipes" / "r.yaml"
    path.write_text("backend: onnxruntime\nprecision: int8\nquantization: {calib: digits-256}\n")
    made = build.read(path)
    assert made.quantization.calib == "digits-256"
    assert b"calib: digits-256\n" in file.write(
        made, tmp_path / "recipes" / "s.yaml", backends.target(made.backend).options
    )
    (tmp_path / "recipes" / "digits-256").mkdir()
    assert build.read(path).quantization.calib == str(tmp_path / "recipes" / "digits-256")


def test_an_artifact_calibrated_with_a_set_says_so(tiny, tmp_path):
    from tests.conftest import build

    made = build(tiny, tmp_path, precision="int8", calib="digits-256", calib_size=16)
    record = made.sidecar.quantization
    assert (record.calib, record.images, record.synthetic) == ("digits-256", 16, False)
