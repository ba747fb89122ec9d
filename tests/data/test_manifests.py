"""Manifests as people have them: tables with other names of columns and splits, and ImageNet's lists."""

import pytest
from PIL import Image

from exporter.artifact.sidecar import Preprocessing
from exporter.data import synthetic
from exporter.data.fingerprint import fingerprint
from exporter.data.samples import match_classes, open_samples
from exporter.errors import BadRequest

RECIPE = Preprocessing(size=32, resize=32)
IMAGENET = ("n01440764 tench, Tinca tinca", "n01443537 goldfish", "n02012849 crane", "n03126707 crane")


@pytest.fixture
def folder(tmp_path):
    """Six images, as `0.png` to `4.png` and one as `5.JPEG`."""
    for number in range(6):
        name = f"{number}.png" if number < 5 else "5.JPEG"
        Image.fromarray(synthetic.dead_leaves(40, number)).save(tmp_path / name)
    return tmp_path


def gather(source, labels=(), classes=3):
    """Names and classes of the samples of a source."""
    samples = open_samples(str(source), RECIPE, labels, classes)
    batches = list(samples.batches(4))
    assert samples.skipped == []
    return [(name, int(label)) for batch in batches for name, label in zip(batch.names, batch.labels, strict=True)]


@pytest.mark.parametrize("header", ["filename,label", "ImageId,Class", "image_path,category", "File, Target"])
def test_columns_with_the_names_that_people_use(header, folder):
    (folder / "m.csv").write_text(f"{header}\n0.png,owl\n1.png,cat\n2.png,dog\n")
    assert gather(folder / "m.csv") == [("0.png", 2), ("1.png", 0), ("2.png", 1)]


def test_image_ids_get_the_suffix_of_their_file(folder):
    (folder / "m.csv").write_text("ImageId,Class\n0,1\n5,2\n")
    assert gather(folder / "m.csv") == [("0.png", 1), ("5.JPEG", 2)]


@pytest.mark.parametrize("word", ["val", "validation", "test", "Valid"])
def test_of_splits_the_one_for_validation_is_taken(word, folder):
    (folder / "m.csv").write_text(f"filename,label,split\n0.png,0,train\n1.png,1,{word}\n2.png,2,{word}\n")
    assert gather(folder / "m.csv") == [("1.png", 1), ("2.png", 2)]
    assert gather(f"{folder / 'm.csv'}#train") == [("0.png", 0)]


def test_splits_that_leave_a_choice_are_refused_with_those_that_are_there(folder):
    path = folder / "m.csv"
    path.write_text("filename,label,split\n0.png,0,train\n1.png,1,val\n2.png,2,test\n")
    with pytest.raises(BadRequest, match=r"splits train, val, test; take one of them as in m.csv#val or m.csv#test"):
        gather(path)
    assert gather(f"{path}#test") == [("2.png", 2)]
    assert fingerprint(f"{path}#test") != fingerprint(f"{path}#val")
    with pytest.raises(BadRequest, match="no split 'dev'; it has train, val, test"):
        gather(f"{path}#dev")
    path.write_text("filename,label,split\n0.png,0,a\n1.png,1,b\n")
    with pytest.raises(BadRequest, match=r"take one of them as in m.csv#a or m.csv#b"):
        gather(path)


def test_a_single_split_is_all_there_is(folder):
    (folder / "m.csv").write_text("filename,label,split\n0.png,0,train\n1.png,1,train\n")
    assert len(gather(folder / "m.csv")) == 2


def test_two_columns_of_labels_are_refused_with_both_readings(folder):
    (folder / "m.csv").write_text("filename,label,class\n0.png,owl,2\n")
    with pytest.raises(BadRequest, match=r"the label is in label \('owl' first\) or class \('2' first\); keep one"):
        gather(folder / "m.csv")


@pytest.mark.parametrize("beside", ["val", "images", "."])
def test_imagenets_list_with_a_folder_beside_it(beside, folder):
    (folder / beside).mkdir(exist_ok=True)
    for number in (0, 1):
        (folder / f"{number}.png").rename(folder / beside / f"ILSVRC2012_val_0000000{number}.png")
    (folder / "val.txt").write_text("ILSVRC2012_val_00000000.png 2\nILSVRC2012_val_00000001.png 0\n")
    assert [label for _, label in gather(folder / "val.txt")] == [2, 0]
    assert fingerprint(str(folder / "val.txt"))


def test_an_image_in_two_folders_is_refused_with_both(folder):
    (folder / "val").mkdir()
    (folder / "val" / "0.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "val.txt").write_text("0.png 2\n")
    with pytest.raises(BadRequest, match=r"0.png is in .* and in .*val; keep one of them"):
        gather(folder / "val.txt")


def test_a_folder_beside_a_list_is_no_way_out(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (folder / "0.png").rename(outside / "0.png")
    (folder / "val").symlink_to(outside)
    (folder / "val.txt").write_text("0.png 2\n")
    with pytest.raises(BadRequest, match="is a link out of"):
        gather(folder / "val.txt")


def test_a_text_that_lists_no_images_is_refused(folder):
    (folder / "m.txt").write_text("cat\ndog\n")
    with pytest.raises(BadRequest, match="expected a folder"):
        gather(folder / "m.txt")


def test_folders_have_the_wordnet_id_or_the_words_of_a_label():
    assert match_classes(["n01443537", "n02012849"], IMAGENET, 4, "x") == {"n01443537": 1, "n02012849": 2}
    assert match_classes(["goldfish", "tench, Tinca tinca"], IMAGENET, 4, "x")["tench, Tinca tinca"] == 0
    assert match_classes([IMAGENET[3]], IMAGENET, 4, "x") == {IMAGENET[3]: 3}
    with pytest.raises(BadRequest, match="2 of the model's labels are 'crane'"):
        match_classes(["crane"], IMAGENET, 4, "x")
