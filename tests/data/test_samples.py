"""What users call data: folders, manifests, arrays; and what they get wrong."""

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from exporter.artifact import sha256_file
from exporter.artifact.sidecar import Preprocessing
from exporter.data import synthetic
from exporter.data.arrays import open_npz
from exporter.data.classes import match_classes
from exporter.data.fingerprint import fingerprint
from exporter.data.samples import open_samples
from exporter.errors import BadRequest
from exporter.progress import REPORTER, Silent

RECIPE = Preprocessing(size=32, resize=32)


@pytest.fixture
def folder(tmp_path):
    """Three classes of two images."""
    for index, name in enumerate(["cat", "dog", "owl"]):
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.fromarray(synthetic.dead_leaves(40, 10 * index + number)).save(tmp_path / name / f"{number}.png")
    return tmp_path


@pytest.fixture
def notes():
    """The notes of the test."""
    said = []

    class Notes(Silent):
        def note(self, text):
            said.append(text)

    token = REPORTER.set(Notes())
    yield said
    REPORTER.reset(token)


def gather(source, labels=(), classes=3, size=4, most=None):
    samples = open_samples(str(source), RECIPE, labels, classes, most)
    batches = list(samples.batches(size))
    return samples, [int(label) for batch in batches for label in batch.labels], batches


def test_a_folder_per_class_in_sorted_order(folder):
    samples, labels, batches = gather(folder)
    assert samples.total == 6
    assert labels == [0, 0, 1, 1, 2, 2]
    assert [len(batch.names) for batch in batches] == [4, 2]
    assert batches[0].images.shape == (4, 3, 32, 32)


def test_folders_are_matched_to_the_models_labels(folder):
    _, labels, _ = gather(folder, labels=("owl", "cow", "cat", "dog"), classes=4)
    assert labels == [2, 2, 3, 3, 0, 0]


def test_folders_that_are_numbers_are_class_numbers():
    assert match_classes(["0", "1", "10", "2"], (), 11, "x") == {"0": 0, "1": 1, "10": 10, "2": 2}


def test_numbers_as_pandas_writes_them_are_class_numbers():
    names = [f"{number}.0" for number in range(12)]
    assert match_classes(sorted(names), (), 12, "x") == {name: index for index, name in enumerate(names)}


def test_words_among_numbers_and_numbers_below_zero_are_refused():
    with pytest.raises(BadRequest, match="class 0 is a number, and 'cat' is none; name all alike"):
        match_classes(["0", "1", "cat"], (), 3, "x")
    with pytest.raises(BadRequest, match="class -1, but the model's classes are 0 to 2"):
        match_classes(["-1", "0", "1"], (), 3, "x")


def test_a_class_the_model_does_not_have_is_refused(folder):
    with pytest.raises(BadRequest, match="class 'owl' is none of the model's 3 labels"):
        gather(folder, labels=("cat", "dog", "cow"))
    with pytest.raises(BadRequest, match="class 7, but the model's classes are 0 to 2"):
        match_classes(["0", "7"], (), 3, "x")


def test_folders_that_cannot_be_told_apart_are_refused(folder):
    with pytest.raises(BadRequest, match=r"3 classes \(cat, dog, owl\), but the model has 1000 classes and no labels"):
        gather(folder, classes=1000)


def test_images_without_classes_are_unlabelled(folder):
    _, labels, _ = gather(folder / "cat")
    assert labels == [-1, -1]


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(BadRequest, match="no images in it"):
        gather(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(BadRequest, match="no images in it"):
        gather(tmp_path, classes=1)


def test_unreadable_images_are_counted_and_named(folder):
    (folder / "cat" / "0.png").write_bytes(b"no image")
    samples, labels, _ = gather(folder)
    assert labels == [0, 1, 1, 2, 2]
    assert len(samples.skipped) == 1
    assert samples.skipped[0].startswith("cat/0.png: no image of a known format")


def test_photographs_of_a_phone_that_pillow_cannot_read_are_named(folder, notes):
    (folder / "cat" / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    assert gather(folder)[0].total == 6
    assert any(
        "IMG_1.HEIC left out, in formats that Pillow does not read; convert them to JPEG" in note for note in notes
    )


def test_at_most_so_many_are_spread_over_the_classes(folder):
    samples, labels, _ = gather(folder, most=3)
    assert (samples.total, labels) == (3, [0, 1, 2])


@pytest.mark.parametrize(("name", "sign"), [("m.tsv", "\t"), ("m.csv", ",")])
def test_a_manifest(name, sign, folder):
    lines = ["# source: test", sign.join(["sha256", "path", "label"])]
    kinds = ("owl", "cat", "dog")
    lines += [sign.join([sha256_file(folder / kind / "1.png"), f"{kind}/1.png", kind]) for kind in kinds]
    (folder / name).write_text("\n".join(lines))
    _, labels, batches = gather(folder / name)
    assert labels == [2, 0, 1]
    assert batches[0].names == ("owl/1.png", "cat/1.png", "dog/1.png")


def test_files_with_another_digest_than_in_the_manifest_are_skipped_by_name(folder):
    digest = sha256_file(folder / "cat" / "0.png")
    (folder / "m.csv").write_text(
        f"path,label,sha256\ncat/0.png,0,{digest.upper()}\ndog/0.png,1,{digest}\nowl/0.png,2,\n"
    )
    samples, labels, _ = gather(folder / "m.csv")
    assert labels == [0, 2]
    assert samples.skipped == [f"dog/0.png: its SHA-256 is not the {digest[:12]}… of the manifest; restore the file"]


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", "cat/../../x.png", ""])
def test_a_manifest_does_not_leave_its_folder(path, folder):
    (folder / "m.tsv").write_text(f"path\tlabel\n{path}\tcat\n")
    with pytest.raises(BadRequest, match="lies outside the folder of this list"):
        gather(folder / "m.tsv")


def test_a_manifest_without_columns_is_refused(folder):
    (folder / "m.csv").write_text("cat/0.png,cat\n")
    with pytest.raises(BadRequest, match=r"expected a line of column names \(path, label, mask, split, sha256"):
        gather(folder / "m.csv")


def test_arrays_of_pixels_and_of_inputs(tmp_path):
    pixels = np.stack([synthetic.dead_leaves(32, i) for i in range(5)])
    np.savez(tmp_path / "pixels.npz", images=pixels, labels=np.arange(5) % 3)
    _, labels, batches = gather(tmp_path / "pixels.npz")
    assert labels == [0, 1, 2, 0, 1]
    np.savez(tmp_path / "column.npz", images=pixels, labels=np.arange(5)[:, None] % 3)  # as Keras has them
    assert gather(tmp_path / "column.npz")[1] == [0, 1, 2, 0, 1]
    inputs = np.concatenate([batch.images for batch in batches])
    np.savez_compressed(tmp_path / "inputs.npz", images=inputs)
    _, labels, batches = gather(tmp_path / "inputs.npz")
    assert labels == [-1] * 5
    assert np.array_equal(np.concatenate([batch.images for batch in batches]), inputs)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": np.zeros(3)}, "holds pictures.npy; expected 'images'"),
        ({"images": np.zeros((2, 3, 64, 64), np.float32)}, r"images are float32 \(2, 3, 64, 64\); expected"),
        ({"images": np.zeros((0, 3, 32, 32), np.float32)}, "expected 'images'"),
        ({"images": np.zeros((2, 3, 32, 32))}, "images are float64"),
        ({"images": np.zeros((2, 3, 32, 32), "f4"), "labels": np.zeros(3, int)}, "2 images but labels of shape"),
        ({"images": np.zeros((2, 3, 32, 32), "f4"), "labels": np.array([0, 9])}, "labels from 0 to 9, the model has 3"),
        ({"images": np.zeros((2, 3, 32, 32), "f4"), "labels": np.array([0.5, 1])}, r"npz: labels are float64 \(2,\)"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arrays, message, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(BadRequest, match=message):
        gather(tmp_path / "a.npz")


def test_numbers_already_normalised_are_no_input_for_bytes(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 3, 32, 32), np.float32))
    for word in ("uint8", "float01"):
        with pytest.raises(BadRequest, match=f"images are float32, and the artifact takes {word}"):
            open_npz(tmp_path / "a.npz", Preprocessing(size=32, resize=32, input=word))


def test_a_truncated_npz_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 3, 32, 32), np.float32))
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:2000])
    with pytest.raises(BadRequest, match="truncated or no"):
        gather(tmp_path / "a.npz")


def test_pickled_arrays_are_never_loaded(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((1, 3, 32, 32), "f4"), labels=np.array([{}], dtype=object))
    with pytest.raises(BadRequest, match="Object arrays cannot be loaded"):
        gather(tmp_path / "a.npz")


def test_synthetic_needs_no_data():
    samples, labels, batches = gather("synthetic")
    assert (samples.total, set(labels)) == (16, {-1})
    assert batches[0].images.std() > 0.5


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    def peak(count):
        np.savez(tmp_path / "a.npz", images=np.zeros((count, 3, 32, 32), np.float32))
        tracemalloc.start()
        samples = open_samples(str(tmp_path / "a.npz"), RECIPE, (), 3)
        seen = sum(len(batch.names) for batch in samples.batches(8))
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert seen == count
        return held

    assert peak(2000) < 1.2 * peak(200) + 2e5


def test_no_such_data_says_what_there_could_be(tmp_path):
    with pytest.raises(BadRequest, match="no such data; give a folder"):
        gather(tmp_path / "nothing")
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(BadRequest, match="expected a folder"):
        gather(tmp_path / "x.txt")


def test_foreign_folders_are_no_classes_of_a_model_with_labels():
    with pytest.raises(BadRequest, match="2 labels, none of them among these"):
        match_classes(["birds", "cats"], ("owl", "cow"), 2, "x")


def test_imagenets_folders_are_its_classes_whatever_the_labels_say():
    assert match_classes(["n01440764", "n02102040"], ("tench", "springer"), 2, "x")["n02102040"] == 1


def test_names_that_cannot_be_told_apart_are_refused():
    with pytest.raises(BadRequest, match="2 of the model's labels are 'crane'"):
        match_classes(["crane"], ("crane", "cow", "crane"), 3, "x")
    with pytest.raises(BadRequest, match="0, 00 have the same number"):
        match_classes(["0", "00"], (), 3, "x")


def test_at_most_so_many_of_an_npz_are_spread_too(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((9, 3, 32, 32), np.float32), labels=np.arange(9) // 3)
    assert gather(tmp_path / "a.npz", most=3)[1] == [0, 1, 2]


def test_images_beside_the_class_folders_are_named_and_are_not_unreadable(folder, notes):
    (folder / "cat" / "0.png").rename(folder / "stray.png")
    samples, labels, _ = gather(folder)
    assert labels == [0, 1, 1, 2, 2]
    assert notes == [f"{folder}: files beside the class folders are left out (1): stray.png"]
    assert samples.skipped == []


def test_a_class_folder_that_is_a_link_is_in_the_fingerprint(folder):
    (folder / "cat").rename(folder / ".elsewhere")
    (folder / "cat").symlink_to(folder / ".elsewhere")
    (folder / "cat" / "up").symlink_to(folder)
    (folder / "dog" / "self").symlink_to("self")
    assert gather(folder)[0].total == 6
    before = fingerprint(str(folder))
    (folder / ".elsewhere" / "0.png").write_bytes(b"other")
    assert fingerprint(str(folder)) != before


def test_a_folder_that_cannot_be_listed_is_named(folder, monkeypatch):
    real = os.scandir

    def scandir(path):
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(BadRequest, match=r"dog: cannot be listed \(Permission denied\)"):
        gather(folder)


@pytest.mark.parametrize("head", ["\ufeffpath,label", "path, label", "# made by hand\npath,label"])
def test_manifests_as_people_and_spreadsheets_write_them(head, folder):
    (folder / "m.csv").write_text(f"{head}\ncat/0.png,cat\nowl/0.png,owl\ndog/0.png,dog\n", "utf-8")
    assert gather(folder / "m.csv")[1] == [0, 2, 1]


def test_columns_and_arrays_nobody_would_read_are_refused(folder, tmp_path):
    (folder / "m.csv").write_text("path,score\ncat/0.png,cat\n")
    with pytest.raises(BadRequest, match="unknown columns score; remove them"):
        gather(folder / "m.csv")
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 3, 32, 32), np.float32), y=np.zeros(2, int))
    with pytest.raises(BadRequest, match=r"holds images\.npy, y\.npy; expected"):
        gather(tmp_path / "a.npz")


def test_hidden_files_and_folders_are_passed_over(folder):
    (folder / "cat" / ".ipynb_checkpoints").mkdir()
    (folder / "cat" / "0.png").rename(folder / "cat" / ".ipynb_checkpoints" / "0.png")
    (folder / "cat" / "._1.png").write_bytes(b"")
    samples, labels, _ = gather(folder)
    assert (labels, samples.skipped) == ([0, 1, 1, 2, 2], [])


def of_channels(count):
    return Preprocessing(size=(32, 48), resize=(32, 48), mean=(0.5,) * count, std=(0.25,) * count)


@pytest.mark.parametrize("channels", [1, 2, 4, 12])
def test_arrays_of_other_channels_and_of_two_sides(channels, tmp_path):
    recipe = of_channels(channels)
    pixels = np.stack([synthetic.dead_leaves((32, 48), seed, channels) for seed in range(3)])
    np.savez(tmp_path / "pixels.npz", images=pixels)
    (batch,) = open_samples(str(tmp_path / "pixels.npz"), recipe, (), 3).batches(4)
    assert batch.images == pytest.approx(np.moveaxis(pixels, -1, 1) / 255 * 4 - 2, abs=1e-5)
    np.savez(tmp_path / "inputs.npz", images=batch.images)
    (again,) = open_samples(str(tmp_path / "inputs.npz"), recipe, (), 3).batches(4)
    assert np.array_equal(again.images, batch.images)
    (made,) = open_samples("synthetic", recipe, (), 3, 3).batches(4)
    assert np.array_equal(made.images, batch.images)


@pytest.mark.parametrize("shape", [(2, 32, 48, 3), (2, 48, 32, 5)])
def test_arrays_of_the_wrong_channels_are_refused(shape, tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros(shape, np.uint8))
    if shape[-1] == 3:
        with pytest.raises(BadRequest, match=r"as uint8 \(N, H, W, 5\), or float32 \(N, 5, 32, 48\) already"):
            open_npz(tmp_path / "a.npz", of_channels(5))
    else:
        assert open_npz(tmp_path / "a.npz", of_channels(5)).count == 2


@pytest.mark.parametrize("channels", [2, 12])
def test_image_files_are_refused_for_other_channels(channels, folder, tmp_path):
    told = (
        rf"cat/0.png does not have the {channels} channels of the network; give an .npz file .* \(N, {channels}, H, W\)"
    )
    with pytest.raises(BadRequest, match=told):
        open_samples(str(folder), of_channels(channels), (), 3)
    (tmp_path / "digits.tsv").write_text("# generator: sklearn.datasets.load_digits\npath\n1\n")
    with pytest.raises(BadRequest, match=f"does not have the {channels} channels"):
        open_samples(str(tmp_path / "digits.tsv"), of_channels(channels), (), 3)


def test_grey_and_alpha_are_read_from_image_files(folder):
    for channels in (1, 4):
        batches = list(open_samples(str(folder), of_channels(channels), (), 3).batches(8))
        assert batches[0].images.shape == (6, channels, 32, 48)


def test_tiff_files_of_many_pages_are_data(tmp_path):
    bands = [Image.fromarray(plane) for plane in np.moveaxis(synthetic.dead_leaves(48, 0, 12), -1, 0)]
    bands[0].save(tmp_path / "a.tiff", save_all=True, append_images=bands[1:])
    (batch,) = open_samples(str(tmp_path), of_channels(12), (), 3).batches(8)
    assert batch.images.shape == (1, 12, 32, 48)


@pytest.mark.parametrize(
    ("names", "one"),
    [(("train", "val"), "val"), (("images", "labels"), "images"), (("Test", "Train"), "Test"), (("train",), "train")],
)
def test_folders_of_splits_or_masks_are_no_classes(names, one, tmp_path):
    for name in names:
        (tmp_path / name).mkdir()
        Image.fromarray(synthetic.dead_leaves(40, 1)).save(tmp_path / name / "a.png")
    with pytest.raises(BadRequest, match=rf"are no classes; give one of them, as .*/{one}"):
        gather(tmp_path, classes=len(names))
    with pytest.raises(BadRequest, match="are no classes"):
        gather(tmp_path, ("cat", "dog", "owl"), classes=3)
    assert gather(tmp_path, tuple(names), classes=len(names))[0].total == len(names), "a model may have such labels"


def test_numbers_that_image_folder_would_count_in_another_order_are_noted(tmp_path, notes):
    for number in range(11):
        (tmp_path / str(number)).mkdir()
        Image.fromarray(synthetic.dead_leaves(40, number)).save(tmp_path / str(number) / "a.png")
    _, labels, _ = gather(tmp_path, classes=11)
    assert labels == [0, 1, 10, *range(2, 10)]
    (note,) = notes
    assert "torchvision's ImageFolder counts them as text" in note
    gather(tmp_path, tuple("abcdefghijk"), classes=11)
    assert len(notes) == 2, "no folder has the name of a label"
    _, labels, _ = gather(tmp_path, tuple(sorted(map(str, range(11)))), classes=11)
    assert labels == list(range(11))
    (tmp_path / "10" / "a.png").unlink()
    (tmp_path / "10").rmdir()
    gather(tmp_path, classes=11)
    assert len(notes) == 2
