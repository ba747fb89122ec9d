"""Manifests as people have them: tables with other names of columns and splits, and ImageNet's lists."""

import re

import pytest
from PIL import Image

from exporter.artifact.sidecar import Preprocessing
from exporter.data import synthetic
from exporter.data.classes import match_classes
from exporter.data.fingerprint import fingerprint
from exporter.data.manifests import CALIBRATION, read_manifest
from exporter.data.samples import open_samples
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
    (folder / "m.csv").write_text("filename,label,split\n0.png,0,fold1\n1.png,1,fold1\n")
    assert len(gather(folder / "m.csv")) == 2
    (folder / "m.csv").write_text("filename,label,split\n0.png,0,\n1.png,1,\n")
    assert len(gather(folder / "m.csv")) == 2


def test_images_for_training_are_measured_on_only_when_asked_for(folder):
    (folder / "m.csv").write_text("filename,label,split\n0.png,0,train\n1.png,1,train\n")
    with pytest.raises(BadRequest, match=r"its only split is train; .* say m\.csv#train"):
        gather(folder / "m.csv")
    assert len(gather(f"{folder / 'm.csv'}#train")) == 2


def test_rows_in_no_split_beside_others_are_refused(folder):
    (folder / "m.csv").write_text("filename,label,split\n0.png,0,val\n1.png,1,\n")
    with pytest.raises(BadRequest, match=r"line 3 is in no split, and others are in val; .* as in m\.csv#val"):
        gather(folder / "m.csv")
    assert gather(f"{folder / 'm.csv'}#val") == [("0.png", 0)]


def test_classes_as_pandas_writes_them_are_numbers(folder):
    names = [f"{number}.png" for number in range(5)]
    classes = [10, 2, 11, 0, 1]
    rows = "".join(f"{name},{number}.0\n" for name, number in zip(names, classes, strict=True))
    (folder / "m.csv").write_text(f"filename,label\n{rows}")
    assert gather(folder / "m.csv", classes=12) == list(zip(names, classes, strict=True))


@pytest.mark.parametrize(
    ("cell", "message"), [("", "no class"), ("  ", "no class"), ("-1", "class -1"), ("-1.0", r"class -1\.0")]
)
@pytest.mark.parametrize("classes", [("0", "1"), ("cat", "dog")])
def test_a_row_without_a_class_among_others_is_refused_by_its_line(cell, message, classes, folder):
    rows = f"0.png,{classes[0]}\n\n1.png,{cell}\n2.png,{classes[1]}\n"
    (folder / "m.csv").write_text(f"# by hand\nfilename,label\n{rows}")
    with pytest.raises(BadRequest, match=f"line 5 has {message}; give a class to every row, or to none"):
        gather(folder / "m.csv")


def test_spaces_around_cells_do_not_count(folder):
    (folder / "m.csv").write_text('filename,label,split\n0.png , dog ,val \n 1.png,"cat ", val\n2.png, "owl",val\n')
    assert gather(folder / "m.csv", ("owl", "cat", "dog")) == [("0.png", 2), ("1.png", 1), ("2.png", 0)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("1.png,1,cat", "line 3 has 3 cells: another number of columns than the 2 of the header"),
        ("1.png", "line 3 has 1 cells: another number of columns than the 2 of the header"),
        ('1.png,"1\n2.png,2', "line 3: unexpected end of data; close every quote in its line"),
        ('1.png,"1\n2.png,2"', "line 3: a quote does not close; close every quote in its line"),
        ('1.png,"1"0', "line 3: ',' expected after '\"'; close every quote in its line"),
    ],
)
def test_rows_with_cells_that_nobody_would_read_are_refused_by_their_line(row, message, folder):
    (folder / "m.csv").write_text(f"filename,label\n0.png,0\n{row}\n3.png,1\n")
    with pytest.raises(BadRequest, match=re.escape(f"cannot be read as a manifest ({message})")):
        gather(folder / "m.csv")


@pytest.mark.parametrize("name", ["m.csv", "m.txt"])
def test_only_newlines_end_a_row(name, folder):
    labels = ("cat\u2028tabby", "dog\u0085hound")
    head, sign = ("filename,label\n", ",") if name == "m.csv" else ("", " ")
    (folder / name).write_text(f"{head}0.png{sign}{labels[1]}\n1.png{sign}{labels[0]}\n", "utf-8")
    assert gather(folder / name, labels, 2) == [("0.png", 1), ("1.png", 0)]


def test_quotes_in_the_names_of_a_frozen_set_are_as_they_are(folder):
    (folder / '"0".png').write_bytes((folder / "0.png").read_bytes())
    manifest = folder / "m.tsv"
    manifest.write_text(f'{CALIBRATION}\n# source: .\nsha256\tpath\tlabel\n{"0" * 64}\t"0".png\t"a" cat \n')
    listed = read_manifest(manifest)
    assert [row["path"] for row in listed.rows] == ['"0".png']
    assert [row["label"] for row in listed.rows] == ['"a" cat ']


def test_a_line_of_a_text_that_lists_no_image_is_named(folder):
    (folder / "m.txt").write_text("0.png 1\n\n1.png\n")
    with pytest.raises(BadRequest, match=r"line 3 is '1\.png'; expected a folder"):
        gather(folder / "m.txt")


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


@pytest.mark.parametrize(
    ("name", "text", "lines"),
    [
        ("m.csv", "path,label\n0.png,0\n1.png,1\n./0.png,1\n", "2 and 4"),
        ("m.tsv", "path\n1.png\n\n0.png\n0.png\n", "4 and 5"),
        ("m.txt", "0.png 0\n1.png 1\n1.png 1\n", "2 and 3"),
        ("m.csv", "path\n0\n0.png\n", "2 and 3"),
    ],
)
def test_an_image_in_two_lines_is_refused_with_both(name, text, lines, folder):
    (folder / name).write_text(text)
    with pytest.raises(BadRequest, match=rf"lines {lines} are both '[01].png'; list each image once"):
        read_manifest(folder / name)


def test_an_image_may_be_in_two_splits(folder):
    (folder / "m.csv").write_text("path,label,split\n0.png,0,train\n1.png,1,train\n0.png,0,val\n")
    assert len(read_manifest(folder / "m.csv", "train").rows) == 2
    assert len(read_manifest(folder / "m.csv", "val").rows) == 1


def test_a_text_that_lists_no_images_is_refused(folder):
    (folder / "m.txt").write_text("cat\ndog\n")
    with pytest.raises(BadRequest, match="expected a folder"):
        gather(folder / "m.txt")


def test_folders_have_the_wordnet_id_or_the_words_of_a_label():
    assert match_classes(["n01443537", "n02012849"], IMAGENET, 4, "x") == {"n01443537": 1, "n02012849": 2}
    assert match_classes(["goldfish", "tench, Tinca tinca"], IMAGENET, 4, "x")["tench, Tinca tinca"] == 0
    assert match_classes([IMAGENET[3]], IMAGENET, 4, "x") == {IMAGENET[3]: 3}
    for names in (["1", "3"], ["1.0", "3.0"], ["001", "003"]):  # numbers are those of the labels, not of their places
        assert match_classes(names, ("1", "2", "3"), 3, "x") == dict(zip(names, (0, 2), strict=True))
    with pytest.raises(BadRequest, match=r"class '4\.0' is none of the model's 3 labels"):
        match_classes(["1.0", "4.0"], ("1", "2", "3"), 3, "x")
    with pytest.raises(BadRequest, match="2 of the model's labels are 'crane'"):
        match_classes(["crane"], IMAGENET, 4, "x")
