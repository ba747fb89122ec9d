"""Folders and manifests of images with masks: their pairs, their values and their way to the size of the input."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageOps

from exporter.artifact.sidecar import Preprocessing
from exporter.data import calibration, images, masks
from exporter.data.fingerprint import fingerprint
from exporter.data.manifests import read_manifest
from exporter.data.samples import open_samples
from exporter.errors import BadRequest
from exporter.predict import sources

RECIPE = Preprocessing(size=32, resize=32, crop="squash", interpolation="bilinear")


def write(folder, image, mask, classes, size=None):
    """An image and its mask (H, W) below a folder."""
    height, width = size or classes.shape
    for path in (folder / image, folder / mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), 99, np.uint8)).save(folder / image)
    Image.fromarray(classes).save(folder / mask)


def quarters(side=64, values=(0, 1, 2, 255)):
    grid = np.array(values).reshape(2, 2)
    return np.kron(grid, np.ones((side // 2, side // 2), int)).astype(np.uint8)


def read(folder, split="", recipe=RECIPE, most=None, **values):
    source = f"{folder}#{split}" if split else str(folder)
    pairs = masks.pairs_of(source)
    assert pairs is not None
    samples = masks.open_masks(source, pairs, lambda _: recipe, masks.Values(**{"classes": 3, **values}), most)
    (batch,) = samples.batches(8)
    return batch


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_of_an_image_is_that_of_pillow_upright(orientation, name, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (30, 20)).save(tmp_path / name, exif=exif)
    with Image.open(tmp_path / name) as image:
        assert images.size_of(tmp_path / name) == ImageOps.exif_transpose(image).size


@pytest.mark.parametrize(
    ("name", "lines"), [("list.csv", "path,mask\na.jpg,m/a.png\n"), ("list.txt", "a.jpg m/a.png\n")]
)
def test_a_changed_mask_of_a_manifest_changes_what_is_measured(name, lines, tmp_path):
    write(tmp_path, "a.jpg", "m/a.png", quarters())
    (tmp_path / name).write_text(lines)
    before = fingerprint(str(tmp_path / name))
    assert fingerprint(str(tmp_path / name)) == before
    Image.new("L", (32, 32), 1).save(tmp_path / "m/a.png")
    assert fingerprint(str(tmp_path / name)) != before


def test_images_in_a_folder_that_is_a_link_are_read(tmp_path):
    write(tmp_path, "mnt/images/training/0.jpg", "ade/annotations/training/0.png", quarters())
    (tmp_path / "ade/images").symlink_to(tmp_path / "mnt/images")
    assert [entry.path for entry in calibration.freeze(f"{tmp_path}/ade#training", None, 0).entries] == [
        "images/training/0.jpg"
    ]
    assert sources.open_images([f"{tmp_path}/ade#training"], RECIPE).samples.total == 1


def test_a_changed_image_of_a_split_that_is_a_link_is_noticed(tmp_path):
    write(tmp_path, "mnt/0.jpg", "ade/annotations/training/0.png", quarters())
    (tmp_path / "ade/images").mkdir()
    (tmp_path / "ade/images/training").symlink_to(tmp_path / "mnt")
    assert sources.open_images([f"{tmp_path}/ade#training"], RECIPE).samples.total == 1
    before = fingerprint(f"{tmp_path}/ade#training")
    Image.new("RGB", (70, 64)).save(tmp_path / "mnt/0.jpg")
    assert fingerprint(f"{tmp_path}/ade#training") != before


@pytest.mark.parametrize(
    ("images", "masks"), [("JPEGImages", "SegmentationClass"), ("images", "labels"), ("images", "masks")]
)
def test_other_usual_folders_are_pairs_by_name(images, masks, tmp_path):
    write(tmp_path, f"{images}/a.jpg", f"{masks}/a.png", quarters())
    assert read(tmp_path).names == ("a.jpg",)


@pytest.mark.parametrize(("folder", "file"), [("annotations", "instances_val2017.json"), ("labels", "a.txt")])
def test_annotations_of_detectors_are_no_masks(folder, file, tmp_path):
    write(tmp_path, "images/a.jpg", f"{folder}/a.png", quarters())
    (tmp_path / folder / "a.png").replace(tmp_path / folder / file)
    assert masks.pairs_of(str(tmp_path)) is None


def test_the_folders_of_ade20k_are_pairs_by_name(tmp_path):
    for split in ("training", "validation"):
        write(tmp_path, f"images/{split}/a.jpg", f"annotations/{split}/a.png", quarters())
    with pytest.raises(BadRequest, match=r"has the splits training, validation; take one .*#validation"):
        read(tmp_path)
    batch = read(tmp_path, "validation")
    assert batch.names == ("a.jpg",)
    assert batch.images.shape == (1, 3, 32, 32)
    np.testing.assert_array_equal(batch.labels[0], quarters(32, (0, 1, 2, -1 % 256)).astype(np.int8))


def test_the_folders_of_cityscapes_are_pairs_by_their_endings(tmp_path):
    image, mask = "leftImg8bit/val/ulm/u_1_leftImg8bit.png", "gtFine/val/ulm/u_1_gtFine_labelTrainIds.png"
    write(tmp_path, image, mask, quarters())
    assert read(tmp_path, "val").names == ("ulm/u_1_leftImg8bit.png",)


def test_masks_are_no_images_to_calibrate_with_or_to_predict(tmp_path):
    for number, split in enumerate(("training", "validation")):
        write(tmp_path, f"images/{split}/{number}.jpg", f"annotations/{split}/{number}.png", quarters())
        Image.new("RGB", (64, 64), (99 * number, 0, 0)).save(tmp_path / f"images/{split}/{number}.jpg")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "images/training/2.jpg")  # a mask is needed to measure only
    training = ["images/training/0.jpg", "images/training/2.jpg"]
    frozen = calibration.freeze(f"{tmp_path}#training", None, 0)
    assert [entry.path for entry in frozen.entries] == training
    assert len(calibration.freeze(str(tmp_path), None, 0).entries) == 3
    assert calibration.open_calibration(str(tmp_path), RECIPE, None, None, 0).total == 3
    assert open_samples(f"{tmp_path}#training", RECIPE, (), None).total == len(training)
    assert sources.open_images([f"{tmp_path}#training"], RECIPE).samples.total == len(training)
    before = fingerprint(str(tmp_path))
    Image.new("L", (40, 30), 1).save(tmp_path / "annotations/training/0.png")
    assert fingerprint(str(tmp_path)) != before, "a changed mask changes what is measured"


def test_a_split_of_a_folder_without_masks_is_refused(tmp_path):
    (tmp_path / "val").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "val/a.jpg")
    with pytest.raises(BadRequest, match="#val needs a folder with images and masks"):
        open_samples(f"{tmp_path}#val", RECIPE, (), None)


def manifest(folder, text, name="list.csv"):
    (folder / name).write_text(text)
    return folder / name


def test_a_manifest_names_the_mask_of_each_image(tmp_path):
    write(tmp_path, "photos/a.jpg", "drawn/one.png", quarters())
    write(tmp_path, "photos/b.jpg", "drawn/two.png", quarters(values=(2, 2, 2, 2)))
    path = manifest(tmp_path, "filename,split,mask\nphotos/a.jpg,train,drawn/one.png\nphotos/b.jpg,val,drawn/two.png\n")
    assert read(path, "train").names == ("photos/a.jpg",)
    batch = read(path)
    assert batch.names == ("photos/b.jpg",)
    assert (batch.labels[0] == 2).all()


@pytest.mark.parametrize(
    ("name", "lines"),
    [("list.txt", "photos/a.jpg drawn/one.PNG\n"), ("list.csv", "image,label\nphotos/a.jpg,drawn/one.PNG\n")],
)
def test_labels_that_are_png_files_are_masks(name, lines, tmp_path):
    write(tmp_path, "photos/a.jpg", "drawn/one.PNG", quarters())
    path = manifest(tmp_path, lines, name)
    assert (read(path).labels[0] == read(manifest(tmp_path, "path,mask\nphotos/a.jpg,drawn/one.PNG\n")).labels[0]).all()
    assert masks.pairs_of(str(manifest(tmp_path, "image,label\nphotos/a.jpg,cat\n", "classes.csv"))) is None


def test_an_image_that_is_not_that_of_the_manifest_is_skipped(tmp_path):
    write(tmp_path, "a.jpg", "a.png", quarters())
    path = manifest(tmp_path, f"path\tmask\tsha256\na.jpg\ta.png\t{'0' * 64}\n", "list.tsv")
    samples = masks.open_masks(str(path), masks.pairs_of(str(path)), lambda _: RECIPE, masks.Values(3))
    assert list(samples.batches(1)) == []
    assert "its SHA-256 is not the 000000000000" in samples.skipped[0]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("a.jpg,\n", "line 2 has no mask; add one, or remove the line"),
        ("a.jpg,../a.png\n", "'../a.png' lies outside the folder of this list"),
        ("a.jpg,b.png\n", "b.png: no such mask, for the image a.jpg"),
        ("a.jpg,b.JPG\n", "the mask b.JPG is a JPEG, which changes classes near borders; save masks as PNG"),
    ],
)
def test_a_manifest_with_a_mask_that_is_none_is_refused(lines, message, tmp_path):
    write(tmp_path, "a.jpg", "a.png", quarters())
    with pytest.raises(BadRequest, match=message):
        read(manifest(tmp_path, f"path,mask\n{lines}"))


def test_masks_are_of_no_interest_where_classes_are_read(tmp_path):
    path = manifest(tmp_path, "path,label,mask\na.jpg,cat,\nb.jpg,dog,../b.png\n")
    assert [row["label"] for row in read_manifest(path).rows] == ["cat", "dog"]


def test_a_label_may_be_called_mask(tmp_path):
    """Of people who wear one."""
    path = manifest(tmp_path, "path,hat,mask\na.jpg,0,1\n")
    assert read_manifest(path).columns == ("hat", "mask")
    assert masks.pairs_of(str(path)) is None
    assert read_manifest(manifest(tmp_path, "path,mask\na.jpg,1\n")).columns == ("mask",)


def test_zero_is_no_class_where_masks_count_from_one(tmp_path):
    write(tmp_path, "images/a.png", "masks/a.png", quarters(values=(0, 1, 2, 3)))
    labels = read(tmp_path, reduce_zero_label=True).labels[0]
    assert [labels[0, 0], labels[0, -1], labels[-1, 0], labels[-1, -1]] == [-1, 0, 1, 2]


@pytest.mark.parametrize("crop", ["center", "border"])
def test_masks_are_cut_and_filled_up_as_their_images(crop, tmp_path):
    classes = np.repeat(np.array([[0, 1, 2, 0]], np.uint8), 20, 0).repeat(10, 1)  # (20, 40)
    write(tmp_path, "img_dir/a.png", "ann_dir/a.png", classes)
    labels = read(tmp_path, recipe=Preprocessing(size=20, resize=20, crop=crop)).labels[0]
    if crop == "center":
        np.testing.assert_array_equal(labels, classes[:, 10:30])
    else:
        assert (labels[:5] == -1).all()
        assert (labels[15:] == -1).all()
        np.testing.assert_array_equal(labels[5:15], classes[:10, ::2])


@pytest.mark.parametrize(
    ("classes", "size", "message"),
    [
        (quarters(), (64, 60), "64×64 pixels, but its image has 60×64; give masks of the size of their images"),
        (
            quarters(values=(0, 1, 2, 3)),
            None,
            "value 3, but the 3 classes are 0 to 2, and 255 is ignored; --reduce",
        ),
        (
            np.stack([quarters()] * 2 + [quarters() + 1], 2).astype(np.uint8),
            (64, 64),
            "RGB has several numbers a pixel",
        ),
        (quarters()[:48], (64, 48), "64×48 pixels, but its image has 48×64; .* turned upright, as its EXIF data says"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused_by_name(classes, size, message, tmp_path):
    write(tmp_path, "images/a.png", "masks/a.png", classes, size)
    with pytest.raises(BadRequest, match=f"masks/a.png: .*{message}"):
        read(tmp_path)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_a_grey_mask_with_several_equal_colours_is_read(mode, tmp_path):
    Image.fromarray(quarters().astype(np.uint8)).convert(mode).save(tmp_path / "a.png")
    np.testing.assert_array_equal(images.read_mask(tmp_path / "a.png"), quarters())


def test_an_image_without_a_mask_is_named(tmp_path):
    write(tmp_path, "images/a.png", "masks/b.png", quarters())
    with pytest.raises(BadRequest, match=r"masks/a\.png: no such mask, for the image a\.png"):
        read(tmp_path)


def test_a_mask_may_end_in_capitals_and_belongs_to_one_image(tmp_path):
    write(tmp_path, "images/a.JPG", "masks/a.PNG", quarters())
    assert read(tmp_path).names == ("a.JPG",)
    write(tmp_path, "images/a.png", "masks/a.PNG", quarters())
    with pytest.raises(BadRequest, match=r"a\.PNG: the mask of both a\.JPG and a\.png; keep one of these images"):
        read(tmp_path)


@pytest.mark.parametrize(("training", "validation"), [("train2017", "val2017"), ("training", "test_a")])
def test_training_images_are_not_measured_with_others(training, validation, tmp_path):
    for split in (training, validation):
        write(tmp_path, f"images/{split}/a.jpg", f"masks/{split}/a.png", quarters())
    with pytest.raises(BadRequest, match=f"take one of them as in .*#{validation}"):
        read(tmp_path)
    assert read(tmp_path, validation).names == ("a.jpg",)
    for split, scene in ((training, "train_station"), (validation, "village")):
        for folder in ("images", "masks"):
            (tmp_path / folder / split).rename(tmp_path / folder / scene)
    assert len(read(tmp_path).names) == 2


def test_a_folder_without_masks_is_none(tmp_path):
    (tmp_path / "images").mkdir()
    assert masks.pairs_of(str(tmp_path)) is None
    (tmp_path / "masks").mkdir()
    with pytest.raises(BadRequest, match="images: no images in"):
        read(tmp_path)


def test_the_first_images_are_evenly_spread(tmp_path):
    for name in "abcde":
        write(tmp_path, f"images/{name}.png", f"masks/{name}.png", quarters())
    assert read(tmp_path, most=3).names == ("a.png", "c.png", "e.png")
