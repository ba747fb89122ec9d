"""Masks and overlays that `predict` writes for segmentation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from exporter import predict
from exporter.artifact.sidecar import Preprocessing
from exporter.data import images
from exporter.data.synthetic import dead_leaves
from exporter.predict import PredictOptions, masks
from exporter.recipe import PreprocessingOptions
from tests.conftest import build
from tests.model import segmenters
from tests.reference import library

library("transformers")
PROCESSOR = {
    "image_processor_type": "SegformerImageProcessor", "size": {"height": 64, "width": 64}, "resample": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return segmenters.transformers_model()


@pytest.fixture(scope="module")
def artifacts(model, tmp_path_factory):
    folder = segmenters.save(tmp_path_factory.mktemp("upernet"), model, PROCESSOR)
    return {
        output: build(folder, tmp_path_factory.mktemp(output), output=output)
        for output in ("logits", "labels", "logits4")
    }


@pytest.fixture
def photos(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    for name, size in (("a.png", (60, 90)), ("b.jpg", (64, 64))):
        Image.fromarray(dead_leaves(size, len(name), 3)).save(tmp_path / "photos" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos"


@pytest.mark.parametrize("output", ["logits", "labels"])
def test_a_mask_has_the_classes_of_its_image_at_its_size(output, artifacts, model, photos, tmp_path, run):
    result = run("predict", artifacts[output].path, "photos", "-o", "masks")
    assert result.code == 0, result.err
    written = {path.name for path in (tmp_path / "masks").rglob("*.png")}
    assert written == {"a.png", "a_overlay.png", "b.png", "b_overlay.png"}
    recipe = Preprocessing(size=64, resize=64, crop="squash", interpolation="bilinear")
    for name, size in (("a.png", (60, 90)), ("b.jpg", (64, 64))):
        (path,) = (tmp_path / "masks").rglob(name.replace("jpg", "png"))
        pixels = images.read(photos / name, recipe)
        expected = segmenters.logits(model, torch.from_numpy(pixels)[None]).argmax(1)[0].numpy().astype(np.uint8)
        with Image.open(path) as mask:
            assert mask.mode == "P"
            resized = Image.fromarray(expected).resize(size[::-1], Image.Resampling.NEAREST)
            np.testing.assert_array_equal(np.asarray(mask), np.asarray(resized))
            colors = masks.colors()[np.asarray(mask)]
            np.testing.assert_array_equal(np.asarray(mask.convert("RGB")), colors)
        with Image.open(path.with_name(f"{path.stem}_overlay.png")) as overlay, Image.open(photos / name) as photo:
            mixed = (np.asarray(photo, float) + colors) / 2
            assert np.abs(np.asarray(overlay) - mixed).max() <= 0.5


def test_a_mask_of_an_image_that_is_stretched_and_cut_has_the_size_of_the_input(model, photos, tmp_path, run):
    folder = segmenters.save(tmp_path / "weights", model, PROCESSOR)
    artifact = build(folder, tmp_path / "built", output="labels", preprocessing=PreprocessingOptions(resize=72))
    recipe = artifact.sidecar.preprocessing
    assert (recipe.crop, recipe.size, recipe.resize) == ("squash", 64, 72)
    assert run("predict", artifact.path, photos / "a.png", "-o", "masks").code == 0
    (path,) = (path for path in (tmp_path / "masks").rglob("a.png"))
    pixels = images.read(photos / "a.png", recipe)
    expected = segmenters.logits(model, torch.from_numpy(pixels)[None]).argmax(1)[0].numpy()
    with (
        Image.open(path) as mask,
        Image.open(path.with_name("a_overlay.png")) as overlay,
        Image.open(photos / "a.png") as photo,
    ):
        np.testing.assert_array_equal(np.asarray(mask), expected)
        cut = photo.resize((72, 72), Image.Resampling.BILINEAR).crop((4, 4, 68, 68))
        mixed = (np.asarray(cut, float) + masks.colors()[expected]) / 2
        assert np.abs(np.asarray(overlay) - mixed).max() <= 1


def test_the_overlay_of_a_16_bit_image_is_as_bright_as_the_image(artifacts, tmp_path, run):
    grey = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    assert run("predict", artifacts["labels"].path, tmp_path / "deep.png", "-o", tmp_path / "masks").code == 0
    (path,) = (tmp_path / "masks").rglob("deep.png")
    with Image.open(path) as mask, Image.open(path.with_name("deep_overlay.png")) as overlay:
        mixed = (grey[..., None] / 257 + masks.colors()[np.asarray(mask)]) / 2
        assert np.abs(np.asarray(overlay) - mixed).max() <= 1


@pytest.mark.parametrize(("count", "mode"), [(256, "P"), (300, "I;16")])
def test_the_format_of_masks_is_that_of_the_network_whatever_classes_an_image_has(count, mode, tmp_path):
    masks.write(tmp_path / "a.png", np.zeros((4, 4), np.int32), count, tmp_path / "no", Preprocessing())
    with Image.open(tmp_path / "a.png") as mask:
        assert mask.mode == mode


def test_scores_of_pixels_are_not_kept_for_their_masks(artifacts, photos):
    answers = predict.answers_for(artifacts["logits"], PredictOptions(), whole=False)
    (kept,) = masks.Classes(answers.outputs, answers.top, answers.checks).of((np.eye(3).reshape(1, 3, 1, 3),)).values()
    np.testing.assert_array_equal(kept, [[[0, 1, 2]]])


def test_an_image_on_standard_input_has_the_mask_of_its_file(artifacts, photos, tmp_path):
    for name, sources in (("piped", ["-"]), ("file", [str(photos / "a.png")])):
        with (photos / "a.png").open("rb") as stdin:
            predict.predict(artifacts["labels"], sources, PredictOptions(), tmp_path / name, stdin=stdin)
    (file,) = (tmp_path / "file").rglob("a.png")
    assert (tmp_path / "piped" / "stdin.png").read_bytes() == file.read_bytes()
    overlay = file.with_name("a_overlay.png")
    assert (tmp_path / "piped" / "stdin_overlay.png").read_bytes() == overlay.read_bytes()


def test_colours_are_those_of_pascal_voc():
    table = masks.colors()
    assert table[:4].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    assert table[20].tolist() == [0, 64, 128]
    assert len({tuple(color) for color in table.tolist()}) == 256


def test_where_images_are_cut_the_mask_has_the_size_of_the_input(photos, tmp_path):
    recipe = Preprocessing(size=48, resize=60, crop="center")
    classes = np.arange(48 * 48).reshape(48, 48) % 7
    masks.write(tmp_path / "m.png", classes, 7, photos / "a.png", recipe)
    with Image.open(tmp_path / "m.png") as mask, Image.open(tmp_path / "m_overlay.png") as overlay:
        np.testing.assert_array_equal(np.asarray(mask), classes)
        with Image.open(photos / "a.png") as photo:
            cut = np.asarray(photo)[6:54, 21:69]
        mixed = (cut.astype(float) + masks.colors()[classes]) / 2
        assert np.abs(np.asarray(overlay) - mixed).max() <= 1


def test_more_than_256_classes_take_16_bits_and_what_is_no_file_has_no_overlay(tmp_path):
    classes = np.full((8, 8), 300)
    masks.write(tmp_path / "m.png", classes, 301, tmp_path / "a.npz[0]", Preprocessing())
    with Image.open(tmp_path / "m.png") as mask:
        np.testing.assert_array_equal(np.asarray(mask), classes)
    assert [path.name for path in tmp_path.glob("*.png")] == ["m.png"]


def test_masks_stay_below_their_folder(tmp_path):
    assert masks.path_of(tmp_path, "/etc/a.jpg") == tmp_path / "etc/a.png"
    assert masks.path_of(tmp_path, "../../b.jpg") == tmp_path / "b.png"
    assert masks.path_of(tmp_path, "-") == tmp_path / "stdin.png"
    assert masks.path_of(tmp_path, "a.npz[3]") == tmp_path / "a.npz[3].png"


def test_what_cannot_be_written_is_refused(artifacts, photos, tmp_path, run):
    assert run("predict", artifacts["labels"].path, photos / "a.png", "-o", "masks").code == 0
    for words, message in (
        (("labels", "photos", "-o", "masks"), "expected a new or empty folder"),
        (("labels", "photos", "-o", "other", "--resume"), "--resume continues a file"),
        (("logits4", "photos", "-o", "other"), "logits4 has no classes of pixels"),
        (("labels", "photos"), "write them with -o FOLDER as masks, or with -o FILE.npz"),
        (("labels", "photos", "-o", "a.csv"), "write them to .npz"),
    ):
        result = run("predict", artifacts[words[0]].path, *words[1:])
        assert result.code == 2
        assert message in result.err
    assert run("predict", artifacts["labels"].path, "photos", "-o", "masks", "--overwrite").code == 0
    Image.fromarray(dead_leaves(64, 1, 3)).save(photos / "a.jpg")
    result = run("predict", artifacts["labels"].path, "photos", "-o", "twice")
    assert result.code == 2
    assert "would be written for both photos/a.jpg and photos/a.png" in " ".join(result.err.split())
    assert not (tmp_path / "twice").exists()
    (photos / "a.jpg").rename(photos / "a_overlay.jpg")
    assert run("predict", artifacts["labels"].path, "photos", "-o", "twice").code == 2
    (tmp_path / "file").write_text("mine")
    result = run("predict", artifacts["labels"].path, "photos", "-o", "file", "--overwrite")
    assert "-o file: is a file; give a folder" in result.err


@pytest.mark.slow
def test_a_mask_never_replaces_an_image(artifacts, photos, monkeypatch, refused):
    before = (photos / "a.png").read_bytes()
    monkeypatch.chdir(photos)
    message = refused(2, "predict", artifacts["labels"].path, "a.png", "b.jpg", "-o", ".", "--overwrite")
    assert "a.png: is a source, and a mask would replace it; give another folder" in " ".join(message.split())
    assert (photos / "a.png").read_bytes() == before


@pytest.mark.slow
def test_images_of_a_manifest_are_found_below_its_folder(artifacts, photos, tmp_path):
    """Not below the working folder, where there is another image of that name."""
    (tmp_path / "data").mkdir()
    (photos / "a.png").rename(tmp_path / "data" / "a.png")
    (tmp_path / "data" / "list.txt").write_text("a.png\n")
    Image.new("RGB", (10, 10)).save(tmp_path / "a.png")
    predict.predict(artifacts["labels"], ["data/list.txt"], PredictOptions(), tmp_path / "masks")
    for name in ("a.png", "a_overlay.png"):
        with Image.open(tmp_path / "masks" / name) as written:
            assert written.size == (90, 60)


@pytest.mark.slow
def test_an_image_with_an_odd_name_has_its_overlay(artifacts, photos, tmp_path):
    (photos / "a.png").rename(photos / "a\tb.png")
    predict.predict(artifacts["labels"], ["photos"], PredictOptions(), tmp_path / "masks")
    with Image.open(tmp_path / "masks" / "photos" / "a\tb_overlay.png") as overlay:
        assert overlay.size == (90, 60)


@pytest.mark.slow
def test_two_images_of_one_name_are_refused(artifacts, photos, tmp_path, refused):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        Image.fromarray(dead_leaves(64, 1, 3)).save(tmp_path / folder / "a.png")
        (tmp_path / folder / "list.txt").write_text("a.png\n")
    message = refused(2, "predict", artifacts["labels"].path, "x/list.txt", "y/list.txt", "-o", "out")
    assert "would be written for both x/a.png and y/a.png" in " ".join(message.split())


def test_masks_of_two_archives_of_one_name_are_refused(artifacts, photos, tmp_path, refused):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        np.savez(tmp_path / folder / "a.npz", images=np.zeros((2, 64, 64, 3), np.uint8))
    message = refused(2, "predict", artifacts["labels"].path, "x/a.npz", "y/a.npz", "-o", "out")
    assert "would be written for both x/a.npz[0] and y/a.npz[0]" in " ".join(message.split())


def test_a_folder_for_masks_may_have_a_dot_in_its_name(artifacts, photos, tmp_path, run):
    (tmp_path / "masks_v1.0").mkdir()
    assert run("predict", artifacts["labels"].path, "photos", "-o", "masks_v1.0").code == 0
    assert (tmp_path / "masks_v1.0" / "photos" / "a.png").is_file()


def test_an_interrupted_folder_of_masks_says_how_to_go_on(artifacts, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "_chunks", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt, match="masks: masks are missing; run the same command with --overwrite"):
        predict.predict_masks(artifacts["labels"], [str(photos)], PredictOptions(), tmp_path / "masks")


def test_a_mask_of_a_grey_network_has_the_size_of_its_image(tmp_path):
    Image.new("L", (90, 60)).save(tmp_path / "scan.png")
    recipe = Preprocessing(size=32, resize=32, crop="squash", mean=(0.5,), std=(0.5,))
    masks.write(tmp_path / "mask.png", np.ones((32, 32), np.int64), 7, tmp_path / "scan.png", recipe)
    assert Image.open(tmp_path / "mask.png").size == (90, 60)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mask.png", "scan.png"]
