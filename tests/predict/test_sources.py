"""What `predict` takes and writes at the edges: lists, pipes, addresses, names, links, damaged arrays."""

import io
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from exporter import predict
from exporter.artifact.sidecar import Preprocessing
from exporter.errors import BadRequest
from exporter.predict import PredictOptions, sources
from tests.artifact.test_sealed import notes
from tests.conftest import build
from tests.predict.test_predict import names_of

FULL = Path("/dev/full")


@pytest.fixture
def photo(tmp_path):
    """An image in a folder of its own."""
    path = tmp_path / "in" / "one.png"
    path.parent.mkdir()
    Image.new("RGB", (70, 60), "red").save(path)
    return path


def test_a_list_of_names_alone_is_a_source(photo, artifacts):
    (photo.parent / "two words.png").write_bytes(photo.read_bytes())
    listed = photo.parent / "images.txt"
    listed.write_text("one.png\r\n\ntwo words.png\n")
    assert names_of([listed]) == ["one.png", "two words.png"]
    records = list(predict.answer(artifacts["onnxruntime", "fp32"], [str(listed)], PredictOptions()))
    assert ["predictions" in record for record in records] == [True, True]


@pytest.mark.parametrize("start", [0, 1, 2, 4, 5, 9])
def test_images_from_any_number_on_are_read_without_those_before_them(start, photo, tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 40, 40, 3), np.uint8))
    (tmp_path / "list.txt").write_text("in/one.png\nin/one.png\n")
    words = [str(photo), str(photo.parent), str(tmp_path / "a.npz"), str(tmp_path / "list.txt")]
    every, recipe = names_of(words), Preprocessing(size=32, resize=32)
    opened, calls = sources.open_images(words, recipe), []
    real = sources.partial
    monkeypatch.setattr(sources, "partial", lambda *words: calls.append(words) or real(*words))
    assert len(every) == 7
    for part in (opened.samples.after(start), opened.samples.between(start, 7)):
        calls.clear()
        assert [name for name, _, _ in part.items()] == every[start:]
        assert len(calls) <= max(0, 7 - start)
        assert [name for name, _, _ in part.items(1)] == [name for name, _, _ in part.items()][1:]
    nested = opened.samples.between(1, 7).between(2, 4)
    assert [name for name, _, _ in nested.items()] == every[3:5]


def test_a_named_pipe_is_refused_in_place_of_waiting(photo, tmp_path):
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    for word in (pipe, tmp_path / "pipe.txt", tmp_path / "pipe.npz"):
        if word != pipe:
            os.mkfifo(word)
        with pytest.raises(BadRequest, match=r"a pipe or device; .* standard input and give -"):
            names_of([word])


def test_a_name_that_no_file_can_have_is_no_answer_and_the_others_are(photo, artifacts):
    names = f"{'a' * 300}.png\n{photo}\n".encode()
    records = list(predict.answer(artifacts["onnxruntime", "fp32"], ["-"], PredictOptions(), io.BytesIO(names)))
    assert ["error" in record for record in records] == [True, False]


def test_a_split_of_a_source_without_splits_is_refused(photo, tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((1, 60, 70, 3), np.uint8))
    for word, message in ((f"{photo}#train", "is one image; leave #train out"),
                          (f"{tmp_path / 'a.npz'}#val", "has no splits; leave #val out")):  # fmt: skip
        with pytest.raises(BadRequest, match=message):
            names_of([word])


def test_the_images_of_a_folder_with_masks_alone_are_read_with_a_note(photo, tmp_path):
    for folder in ("images", "masks", "more"):
        (tmp_path / "data" / folder).mkdir(parents=True)
        shutil.copyfile(photo, tmp_path / "data" / folder / "one.png")
    with notes() as noted:
        assert names_of([str(tmp_path / "data")]) == [f"{tmp_path}/data/images/one.png"]
    assert noted == [f"{tmp_path}/data has images and masks: only those in images/ are read"]


def test_a_folder_below_that_cannot_be_listed_is_refused(photo, monkeypatch):
    real = os.scandir

    def scandir(path):
        if Path(path).name == "private":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    (photo.parent / "private").mkdir()
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(BadRequest, match=r"private: cannot be listed \(Permission denied\)"):
        names_of([str(photo.parent)])


def test_a_named_pipe_in_a_list_has_no_answer(photo, artifacts):
    os.mkfifo(photo.parent / "pipe.png")
    names = f"{photo}\n{photo.parent / 'pipe.png'}\n".encode()
    records = list(predict.answer(artifacts["onnxruntime", "fp32"], ["-"], PredictOptions(), io.BytesIO(names)))
    assert [record.get("error") for record in records] == [None, "no regular file"]


@pytest.mark.parametrize("name", [b"caf\xe9.png", b"a#b.png", b"a?b.png", "Ärger 1%.png".encode()])
def test_the_address_of_any_name_is_read(name, photo):
    path = photo.parent / os.fsdecode(name)
    path.write_bytes(photo.read_bytes())
    assert names_of([path.as_uri()]) == [str(path)]
    if b"%" not in name:
        assert names_of([f"file://{path}"]) == [str(path)]
        assert names_of([f"file://localhost{path}"]) == [str(path)]


def test_an_address_may_name_a_split(photo):
    (photo.parent / "list.csv").write_text("path,split\none.png,train\none.png,val\none.png,val\n")
    assert len(names_of([f"{(photo.parent / 'list.csv').as_uri()}#val"])) == 2


def test_names_that_differ_look_different(photo, artifacts, tmp_path, run):
    folder = photo.parent
    names = ["a b.png", "a\tb.png", "a\nb.png", "a\\tb.png", "a\x1bb.png"]
    for name in names:
        (folder / name).write_bytes(photo.read_bytes())
    photo.unlink()
    result = run("predict", artifacts["onnxruntime", "fp32"].path, folder)
    lines = [line.partition("  ")[0].rpartition("/")[2] for line in result.out.splitlines()]
    assert sorted(lines) == sorted(["a b.png", r"a\tb.png", r"a\nb.png", r"a\\tb.png", r"a\x1bb.png"])


def test_a_link_to_nothing_is_not_replaced(photo, artifacts, tmp_path, refused):
    out, target = tmp_path / "a.csv", tmp_path / "elsewhere" / "b.csv"
    out.symlink_to(target)
    said = refused(2, "predict", artifacts["onnxruntime", "fp32"].path, photo, "-o", out, folder=tmp_path)
    assert "a link to a file that does not exist" in said
    assert out.is_symlink()


@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
def test_a_full_disk_behind_stdout_is_what_a_full_disk_is_elsewhere(photo, artifacts, installed):
    import subprocess

    words = [installed, "predict", artifacts["onnxruntime", "fp32"].path, photo]
    with FULL.open("w") as full:
        done = subprocess.run(list(map(str, words)), stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 3
    assert [line for line in done.stderr.splitlines() if line.startswith("error")] == [
        "error: output: No space left on device"
    ]


def damaged(tmp_path):
    """An archive of six images whose bytes are damaged from the fourth on."""
    path, draw = tmp_path / "a.npz", np.random.default_rng(0)
    np.savez(path, images=draw.integers(0, 256, (6, 64, 64, 3), dtype=np.uint8))
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("images.npy").header_offset
    content = bytearray(path.read_bytes())
    content[start + 3 * 64 * 64 * 3 + 5000] ^= 255
    path.write_bytes(content)
    return path


def test_a_damaged_array_is_counted_and_the_others_are_answered(photo, artifacts, tmp_path):
    words = [str(damaged(tmp_path)), str(photo)]
    records = list(predict.answer(artifacts["onnxruntime", "fp32"], words, PredictOptions()))
    assert [record["image"] for record in records] == [*(f"a.npz[{number}]" for number in range(6)), str(photo)]
    errors = [record.get("error", "") for record in records]
    assert (errors[0], errors[-1]) == ("", "")
    assert "damaged" in errors[5]


@pytest.mark.parametrize(
    ("task", "outputs", "suffix", "option"),
    [
        ("embed", None, ".jsonl", "--top 3: it is for scores of classes"),
        ("classify", "values", ".csv", "--top 3: it is for scores of classes"),
        ("classify", None, ".npz", "--top 3: .npz files hold the outputs as they are"),
    ],
)
def test_top_is_refused_where_it_does_nothing(task, outputs, suffix, option, tiny, photo, tmp_path, refused):
    artifact = build(tiny, tmp_path / "out", task=task)
    words = ("--outputs", outputs) if outputs else ()
    said = refused(2, "predict", artifact.path, photo, "--top", 3, *words, "-o", tmp_path / f"a{suffix}")
    assert option in said


def test_more_classes_than_there_are_are_refused(artifacts, photo, refused):
    artifact = artifacts["onnxruntime", "fp32"]
    assert "--top 11: the artifact has 10 classes; give at most 10" in refused(
        2, "predict", artifact.path, photo, "--top", 11
    )


def test_a_threshold_is_refused_where_no_label_is_decided(artifacts, photo, tmp_path, refused):
    words = ("--outputs", "multilabel", "--threshold", 0.2, "-o", tmp_path / "a.npz")
    said = refused(2, "predict", artifacts["onnxruntime", "fp32"].path, photo, *words)
    assert "--threshold 0.2: .npz files hold the outputs as they are" in said


def test_every_session_says_how_many_batches_run_at_once(artifacts):
    from exporter import backends

    for name in ("onnxruntime", "openvino"):
        artifact, runtime = artifacts[name, "fp32"], backends.runtime(name)
        with runtime.open(artifact, runtime.options(threads=2, hint="throughput")) as session:
            assert session.streams >= 1
    with backends.runtime("null").open(artifacts["onnxruntime", "fp32"], backends.Options()) as session:
        assert session.streams == 1


def test_several_outputs_have_the_same_columns_in_every_table(tmp_path, photo):
    import csv

    from safetensors.torch import save_file

    from tests.conftest import tiny_state

    parquet = pytest.importorskip("pyarrow.parquet")
    state = tiny_state()
    for name, size in (("kind", 4), ("age", 1)):
        state |= {f"{name}.{end}": state[f"head.{end}"][:size].clone() for end in ("weight", "bias")}
    for end in ("weight", "bias"):
        del state[f"head.{end}"]
    save_file(state, tmp_path / "two.safetensors")
    artifact = build(tmp_path / "two.safetensors", tmp_path / "out", head="kind,age")
    for suffix in (".csv", ".parquet", ".jsonl"):
        predict.predict(artifact, [str(photo)], PredictOptions(), tmp_path / f"a{suffix}")
    (row,) = csv.DictReader((tmp_path / "a.csv").open())
    (cells,) = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    record = json.loads((tmp_path / "a.jsonl").read_text())
    assert list(row) == list(cells)
    assert cells["kind.class_1"] == int(row["kind.class_1"]) == record["kind"]["predictions"][0]["class"]
    assert cells["age.value_1"] == pytest.approx(float(row["age.value_1"]))
    assert isinstance(cells["kind.probability_2"], float)


def test_an_image_of_a_list_or_of_a_table_that_changed_is_noticed(photo):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    listed, table = photo.parent / "list.txt", photo.parent / "rows.parquet"
    listed.write_text("one.png\n")
    parquet.write_table(pyarrow.table({"path": ["one.png"]}), table)
    before = [sources.open_images([str(path)], Preprocessing()).key for path in (listed, table)]
    Image.new("RGB", (80, 60), "blue").save(photo)
    after = [sources.open_images([str(path)], Preprocessing()).key for path in (listed, table)]
    assert all(one != other for one, other in zip(before, after, strict=True))


def test_the_home_folder_is_a_source(photo, monkeypatch):
    monkeypatch.setenv("HOME", str(photo.parent.parent))
    assert names_of(["~/in"]) == [str(photo)]


@pytest.mark.slow
def test_the_labels_are_those_of_the_first_head(tmp_path, photo):
    from safetensors.torch import save_file

    from tests.conftest import tiny_state

    state = tiny_state()
    for head in ("kind", "color"):
        state |= {f"{head}.{end}": state[f"head.{end}"].clone() for end in ("weight", "bias")}
    for end in ("weight", "bias"):
        del state[f"head.{end}"]
    save_file(state, tmp_path / "two.safetensors")
    (tmp_path / "kinds.txt").write_text("".join(f"kind {number}\n" for number in range(10)))
    artifact = build(
        tmp_path / "two.safetensors", tmp_path / "out", head="kind,color", labels=str(tmp_path / "kinds.txt")
    )
    (record,) = predict.answer(artifact, [str(photo)], PredictOptions())
    assert record["kind"]["predictions"][0]["label"].startswith("kind ")
    assert "label" not in record["color"]["predictions"][0]
