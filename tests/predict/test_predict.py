"""`predict`: the answers are those of the runtime for the images, in every format, after an interruption too."""

import csv
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
from msgspec.structs import replace
from PIL import Image

from exporter import artifact as artifacts_
from exporter import predict
from exporter.errors import BadRequest, Unavailable
from exporter.predict import PredictOptions, predictor, sources, store, writers
from exporter.predict import answers as answers_
from exporter.recipe import Checks
from tests.conftest import PX, build, tiny_config

COUNT = 40


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with images of several sizes and modes, and two files that are none."""
    folder = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    (folder / "below").mkdir()
    for number in range(COUNT - 2):
        pixels = draw.integers(0, 256, (draw.integers(40, 90), draw.integers(40, 90), 3), dtype=np.uint8)
        Image.fromarray(pixels).convert("L" if number == 5 else "RGB").save(folder / "below" / f"{number:02d}.png")
    (folder / "empty.png").write_bytes(b"")
    (folder / "page.jpg").write_text("<html>not found</html>")
    return folder


def expected(artifact, path):
    """The logits of an image: PIL and ONNX Runtime alone, with the preprocessing of `tiny_config`."""
    config = tiny_config()["pretrained_cfg"]
    with Image.open(path) as image:
        image = image.convert("RGB")
        size = [PX * side // min(image.size) for side in image.size]  # as torchvision's Resize
        image = image.resize(size, Image.Resampling.BILINEAR)
        left, top = (round((side - PX) / 2) for side in size)
        pixels = np.asarray(image.crop((left, top, left + PX, top + PX)), np.float32) / 255
    normalised = (pixels - np.float32(config["mean"])) / np.float32(config["std"])
    session = onnxruntime.InferenceSession(str(artifact.path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: normalised.transpose(2, 0, 1)[None].copy()})
    return logits[0]


def softmax(logits):
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def test_the_answers_are_those_of_onnx_runtime_for_the_images(artifacts, photos):
    artifact = artifacts["onnxruntime", "fp32"]
    records = list(predict.answer(artifact, [str(photos)], PredictOptions(top=3)))
    assert len(records) == COUNT
    for record in records[: COUNT - 2]:
        probabilities = softmax(expected(artifact, record["image"]))
        answers = record["predictions"]
        classes = [one["class"] for one in answers]
        assert [one["label"] for one in answers] == [f"class {number}" for number in classes]
        assert [one["probability"] for one in answers] == pytest.approx(probabilities[classes], abs=2e-5)
        assert probabilities[classes] == pytest.approx(np.sort(probabilities)[::-1][:3], abs=2e-5), "the largest first"
        assert len(set(classes)) == 3
    assert [record["image"] for record in records] == sorted(map(str, photos.rglob("*.*")))
    assert [bool(record.get("error")) for record in records] == [False] * (COUNT - 2) + [True] * 2


def wrote(artifact, photos, out, **words):
    has_top = out.suffix != ".npz" and artifact.sidecar.task == "classify"
    options = words.pop("options", PredictOptions(top=2 if has_top else None))
    predict.predict(artifact, [str(photos)], options, out, **words)
    return out


def test_every_format_has_the_same_answers(artifacts, photos, tmp_path):
    artifact = artifacts["onnxruntime", "fp32"]
    parquet = pytest.importorskip("pyarrow.parquet")
    lines = wrote(artifact, photos, tmp_path / "a.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    rows = list(csv.DictReader(io.StringIO(wrote(artifact, photos, tmp_path / "a.csv").read_text())))
    table = parquet.read_table(wrote(artifact, photos, tmp_path / "a.parquet")).to_pylist()
    assert len(records) == len(rows) == len(table) == COUNT
    for record, row, cells in zip(records, rows, table, strict=True):
        assert record["image"] == row["image"] == cells["image"]
        assert record.get("error", "") == row["error"] == (cells["error"] or "")
        for rank, one in enumerate(record.get("predictions", ()), 1):
            assert one["label"] == row[f"label_{rank}"] == cells[f"label_{rank}"]
            assert one["class"] == int(row[f"class_{rank}"]) == cells[f"class_{rank}"]
            assert one["probability"] == float(row[f"probability_{rank}"])
            assert one["probability"] == pytest.approx(cells[f"probability_{rank}"], abs=1e-7)
    with np.load(wrote(artifact, photos, tmp_path / "a.npz")) as arrays:
        assert arrays["images"].tolist() == [r["image"] for r in records if "error" not in r]
        assert arrays["unreadable"].tolist() == [r["image"] for r in records if "error" in r]
        assert arrays["logits"].argmax(1).tolist() == [r["predictions"][0]["class"] for r in records[: COUNT - 2]]
        assert arrays["logits.labels"].tolist() == [f"class {number}" for number in range(10)]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet", ".npz"])
def test_an_interrupted_run_continues_to_the_same_bytes(suffix, artifacts, photos, tmp_path, monkeypatch):
    artifact = artifacts["onnxruntime", "fp32"]
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    whole = wrote(artifact, photos, tmp_path / f"whole{suffix}").read_bytes()
    out = tmp_path / f"cut{suffix}"
    real = predictor._answered
    starts = []

    def answered(answers, group, run, start):
        if start == 16:
            raise KeyboardInterrupt
        return real(answers, group, run, start)

    monkeypatch.setattr(predictor, "_answered", answered)
    with pytest.raises(KeyboardInterrupt, match=f"{out.name} has 16 of 40 images; the same command with --resume"):
        wrote(artifact, photos, out)
    assert not out.exists()
    with pytest.raises(BadRequest, match=r"unfinished output is there, 16 of 40 .* --resume continues it"):
        wrote(artifact, photos, out)
    monkeypatch.setattr(predictor, "_answered", lambda *words: starts.append(words[-1]) or real(*words))
    wrote(artifact, photos, out, resume=True)
    assert sorted(starts) == [16, 20, 24, 28, 32, 36], "no batch is computed twice"
    assert out.read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name, f"whole{suffix}"]


def cut(artifact, photos, out):
    """Leave an unfinished output."""
    job = store.Job(artifact=artifact.sidecar.sha256, images="", total=40, options={})
    with store.opened(out, job, False, False) as kept:
        kept.add(store.chunk_of(0, ["a"], ["unreadable"], {}))
        kept.flush()


def test_what_was_begun_with_other_inputs_is_not_continued(artifacts, photos, tmp_path):
    artifact, out = artifacts["onnxruntime", "fp32"], tmp_path / "a.csv"
    cut(artifact, photos, out)
    with pytest.raises(BadRequest, match="give the same, or --overwrite"):
        wrote(artifact, photos, out, resume=True)
    cut(artifacts["onnxruntime", "fp16"], photos, tmp_path / "b.csv")
    with pytest.raises(BadRequest, match="of another artifact"):
        wrote(artifact, photos, tmp_path / "b.csv", resume=True)
    assert len(wrote(artifact, photos, out, overwrite=True).read_text().splitlines()) == COUNT + 1


def test_a_damaged_chunk_is_computed_again(artifacts, photos, tmp_path, monkeypatch):
    artifact, out = artifacts["onnxruntime", "fp32"], tmp_path / "a.csv"
    whole = wrote(artifact, photos, tmp_path / "whole.csv").read_bytes()
    monkeypatch.setattr(store, "FLUSH_S", 0.0)
    monkeypatch.setattr(store.Store, "finish", lambda *words: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        wrote(artifact, photos, out)
    monkeypatch.undo()
    chunks = sorted(store.folder_of(out).glob("0*"))
    assert len(chunks) == 10
    chunks[1].write_bytes(chunks[1].read_bytes()[:-1])
    assert wrote(artifact, photos, out, resume=True).read_bytes() == whole


def test_an_output_is_not_replaced_and_not_written_twice_at_once(artifacts, photos, tmp_path):
    artifact, out = artifacts["onnxruntime", "fp32"], tmp_path / "a.csv"
    out.write_text("mine")
    with pytest.raises(BadRequest, match="is there already"):
        wrote(artifact, photos, out)
    assert out.read_text() == "mine"
    other = tmp_path / "b.csv"
    job = store.Job(artifact="", images="", total=1, options={})
    with store.opened(other, job, False, False), pytest.raises(BadRequest, match="another process is writing it"):
        wrote(artifact, photos, other)


def test_none_that_can_be_read_is_an_error_and_some_are_counted(artifacts, photos, tmp_path, run):
    path = artifacts["onnxruntime", "fp32"].path
    bad = run("predict", path, photos / "empty.png", photos / "page.jpg", "-o", tmp_path / "a.csv")
    assert (bad.code, "none of 2 images can be read" in bad.err) == (2, True)
    assert not list(tmp_path.iterdir()), "the next run is not asked to continue this one"
    some = run("predict", path, photos, "-o", tmp_path / "b.csv")
    assert some.code == 0
    assert "2 of 40 images have no answer" in some.err
    assert "empty.png" in some.err
    assert "page.jpg" in some.err


@pytest.mark.parametrize(
    ("name", "mode", "size"),
    [
        ("one.png", "RGB", (1, 1)),
        ("cmyk.jpg", "CMYK", (50, 60)),
        ("deep.png", "I;16", (50, 60)),
        ("p.gif", "P", (9, 70)),
    ],
)
def test_odd_images_are_answered(name, mode, size, artifacts, tmp_path):
    Image.new(mode, size, 7 if mode in ("I;16", "P") else None).save(tmp_path / name)
    (record,) = predict.answer(artifacts["onnxruntime", "fp32"], [str(tmp_path / name)], PredictOptions())
    assert len(record["predictions"]) == 5


def test_a_huge_or_cut_image_is_named(artifacts, photos, tmp_path):
    Image.new("1", (30_000, 30_000)).save(tmp_path / "huge.png")
    whole = next(photos.glob("below/*")).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    good = next(photos.glob("below/*"))
    words = [str(good), str(tmp_path)]
    records = list(predict.answer(artifacts["onnxruntime", "fp32"], words, PredictOptions()))
    assert [record["image"].rpartition("/")[2] for record in records] == [good.name, "cut.png", "huge.png"]
    assert "truncated" in records[1]["error"]
    assert "100,000,000" in records[2]["error"]


def names_of(words, stdin=b""):
    from exporter.artifact.sidecar import Preprocessing

    images = sources.open_images([str(word) for word in words], Preprocessing(size=32, resize=32), io.BytesIO(stdin))
    return [name for name, _, _ in images.samples.items()]


def test_every_kind_of_source(photos, tmp_path):
    first = photos / "below" / "00.png"
    assert names_of([first]) == [str(first)]
    assert names_of([f"{photos}/below/0?.png"]) == [str(photos / "below" / f"0{number}.png") for number in range(10)]
    assert names_of([first.as_uri()]) == [str(first)]
    assert names_of(["-"], f"{first}\n{photos}/page.jpg\n".encode()) == [str(first), f"{photos}/page.jpg"]
    assert names_of(["-"], f"{first}\0".encode()) == [str(first)]
    assert names_of(["-"], f"{first}\0{photos}/page.jpg".encode()) == [str(first), f"{photos}/page.jpg"]
    assert names_of(["-"], first.read_bytes()) == ["-"]
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 40, 40, 3), np.uint8))
    assert names_of([tmp_path / "a.npz", first]) == ["a.npz[0]", "a.npz[1]", "a.npz[2]", str(first)]
    assert names_of(["synthetic"])[:2] == ["dead leaves 0", "dead leaves 1"]
    assert len(names_of([photos])) == COUNT


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("https://example.org/a.jpg", "or one in object storage"),
        ("{photos}/belov", "did you mean 'below'"),
        ("{photos}/*.bmp", "no images in it"),
        ("{photos}/nobody/*.png", "no images in it"),
        ("-", "nothing on standard input"),
    ],
)
def test_a_source_without_images_is_refused(word, message, photos):
    with pytest.raises(BadRequest, match=message):
        names_of([word.format(photos=photos)])


def test_feature_vectors_go_to_arrays_and_tables(tiny, photos, tmp_path):
    artifact = build(tiny, tmp_path, task="embed")
    with pytest.raises(BadRequest, match=r"write \.npz, \.parquet or \.jsonl"):
        wrote(artifact, photos, tmp_path / "a.csv")
    with np.load(wrote(artifact, photos, tmp_path / "a.npz")) as arrays:
        vectors = arrays["embedding"]
    assert vectors.shape == (COUNT - 2, 48)
    first = json.loads(wrote(artifact, photos, tmp_path / "a.jsonl").read_text().splitlines()[0])
    assert first["embedding"] == pytest.approx(vectors[0], rel=1e-6)
    pyarrow = pytest.importorskip("pyarrow.parquet")
    column = pyarrow.read_table(wrote(artifact, photos, tmp_path / "a.parquet")).column("embedding").to_pylist()
    assert np.array_equal(np.asarray(column[: COUNT - 2], np.float32), vectors)
    assert column[COUNT - 2 :] == [None, None]


def test_feature_maps_go_to_arrays_only(tiny, photos, tmp_path):
    artifact = build(tiny, tmp_path, task="features")
    with pytest.raises(BadRequest, match=r"maps or tokens; write them to \.npz"):
        wrote(artifact, photos, tmp_path / "a.jsonl")
    with np.load(wrote(artifact, photos, tmp_path / "a.npz")) as arrays:
        assert [arrays[tensor.name].shape[1] for tensor in artifact.sidecar.outputs] == [16, 24, 32, 48]


def test_a_multilabel_head_gives_the_labels_above_the_threshold(artifacts, photos, tmp_path):
    artifact, image = artifacts["onnxruntime", "fp32"], photos / "below" / "03.png"
    logits = expected(artifact, image).astype(np.float64)
    probabilities = 1 / (1 + np.exp(-logits))
    ordered = np.sort(probabilities)[::-1]
    count = 1 + int(np.argmax(ordered[:5] - ordered[1:6]))
    threshold = float(ordered[count - 1 : count + 1].mean())
    options = PredictOptions(outputs="multilabel", threshold=threshold, top=4)
    (record,) = predict.answer(artifact, [str(image)], options)
    assert record["labels"] == [f"class {number}" for number in np.flatnonzero(probabilities >= threshold)]
    assert len(record["labels"]) == count
    assert [one["probability"] for one in record["predictions"]] == pytest.approx(
        np.sort(probabilities)[::-1][:4], abs=1e-5
    )
    out = wrote(artifact, image, tmp_path / "a.csv", options=options)
    assert next(csv.DictReader(io.StringIO(out.read_text())))["labels"] == ";".join(record["labels"])


def test_cells_that_a_spreadsheet_would_compute_are_text(artifacts, photos, tmp_path):
    name = tmp_path / "in" / '=HYPERLINK("x")\n.png'
    name.parent.mkdir()
    name.write_bytes((photos / "below" / "00.png").read_bytes())
    records = [{"image": "=1+1", "error": "@x"}, {"image": "a", "error": ""}]
    answers = predictor.answers_for(artifacts["onnxruntime", "fp32"], PredictOptions(top=1), whole=False)
    chunk = store.chunk_of(0, [r["image"] for r in records], ["@x", "-1"], {})
    writers.write_csv(tmp_path / "a.csv", answers, lambda: iter([chunk]))
    assert [row["image"] for row in csv.DictReader((tmp_path / "a.csv").open())] == ["'=1+1", "a"]
    assert [row["error"] for row in csv.DictReader((tmp_path / "a.csv").open())] == ["'@x", "'-1"]
    wrote(artifacts["onnxruntime", "fp32"], name.parent, tmp_path / "b.csv")
    assert len((tmp_path / "b.csv").read_text().splitlines()) == 2, "a line break in a name breaks no row"


def test_outputs_that_are_not_finite_are_no_answer(artifacts, photos):
    answers = predictor.answers_for(artifacts["onnxruntime", "fp32"], PredictOptions(top=1), whole=False)
    group = [predictor.Read(str(number), -1, np.zeros((3, 8, 8), np.float32)) for number in range(3)]
    logits = np.zeros((3, 10), np.float32)
    logits[1, 4] = np.nan
    chunk = predictor._answered(answers, group, lambda images: (logits,), 0)
    assert chunk.errors == ("", "the outputs are not finite", "")
    assert [record.get("error", "") for record in writers.records(answers, iter([chunk]))] == list(chunk.errors)


def test_a_full_disk_is_one_line_and_the_run_continues(artifacts, photos, tmp_path, monkeypatch):
    artifact, out = artifacts["onnxruntime", "fp32"], tmp_path / "a.csv"
    whole = wrote(artifact, photos, tmp_path / "whole.csv").read_bytes()

    def full(file, *words):
        file.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(writers.WRITERS, ".csv", full)
    with pytest.raises(Unavailable, match="no space left"):
        wrote(artifact, photos, out)
    assert not out.exists()
    monkeypatch.undo()
    assert wrote(artifact, photos, out, resume=True).read_bytes() == whole


WITHOUT = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnxscript"):
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
from exporter.cli import main
main()
"""


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_it_works_where_pytorch_cannot_be_imported(backend, artifacts, photos, tmp_path):
    words = ["predict", str(artifacts[backend, "fp32"].path), str(photos), "-o", str(tmp_path / "a.csv")]
    answer = subprocess.run([sys.executable, "-c", WITHOUT, *words], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert len((tmp_path / "a.csv").read_text().splitlines()) == COUNT + 1


def test_the_command_prints_lines_and_json(artifacts, photos, run, refused):
    path, image = artifacts["onnxruntime", "fp32"].path, photos / "below" / "00.png"
    line = run("predict", path, image, "--top", "2").out.splitlines()
    assert len(line) == 1
    assert line[0].startswith(f"{image}  class ")
    assert line[0].count(" %") == 2
    record = json.loads(run("predict", path, image, "--json").out)
    assert record["image"] == str(image)
    both = refused(2, "predict", path, image, "-o", "a.csv", "--resume", "--overwrite")
    assert "give one of them" in both
    assert "add -o FILE" in refused(2, "predict", path, image, "--resume")
    assert "ends in .csv, .jsonl, .parquet, .npz" in refused(2, "predict", path, image, "-o", "a.xlsx")
    assert "--outputs multilabel" in refused(2, "predict", path, image, "--threshold", "0.2")


def test_an_artifact_is_never_the_output(onnx_copy, photos, refused):
    folder = onnx_copy.path.parent
    refused(2, "predict", onnx_copy.path, photos, "-o", onnx_copy.path, folder=folder)
    assert artifacts_.load(onnx_copy.path)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_fixed_batch_and_several_threads_give_the_same_answers(backend, artifacts, tiny, photos, tmp_path):
    """The last batch of three is filled up; runs of several threads stay apart."""
    dynamic = predict.answer(artifacts[backend, "fp32"], [str(photos)], PredictOptions(threads=4))
    fixed = predict.answer(build(tiny, tmp_path, backend, batch=3), [str(photos)], PredictOptions(threads=1))
    for one, other in zip(dynamic, fixed, strict=True):
        assert one["image"] == other["image"]
        for answer, same in zip(one.get("predictions", ()), other.get("predictions", ()), strict=True):
            assert answer["probability"] == pytest.approx(same["probability"], abs=1e-5)


def test_names_of_any_bytes_are_answered(artifacts, photos, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    content = (photos / "below" / "00.png").read_bytes()
    for name in (b"caf\xe9.png", "Ärger.png".encode(), b"-o.png", b"two words.png"):
        (folder / os.fsdecode(name)).write_bytes(content)
    for suffix in (".csv", ".jsonl", ".npz"):
        wrote(artifacts["onnxruntime", "fp32"], folder, tmp_path / f"a{suffix}")
    names = [json.loads(line)["image"].rpartition("/")[2] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert names == ["-o.png", "caf\\udce9.png", "two words.png", "Ärger.png"]


def test_images_that_changed_are_not_continued(artifacts, photos, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "a.csv"
    shutil.copytree(photos, folder)
    images = sources.open_images([str(folder)], artifacts["onnxruntime", "fp32"].sidecar.preprocessing)
    (folder / "below" / "00.png").write_bytes((folder / "below" / "01.png").read_bytes())
    changed = sources.open_images([str(folder)], artifacts["onnxruntime", "fp32"].sidecar.preprocessing)
    assert images.key != changed.key
    job = store.Job(artifact="a", images=images.key, total=40, options={})
    with store.opened(out, job, False, False) as unfinished:
        unfinished.add(store.chunk_of(0, ["a"], ["unreadable"], {}))
        unfinished.flush()
    with (
        pytest.raises(BadRequest, match="of 40 other images"),
        store.opened(out, replace(job, images=changed.key), True, False),
    ):
        pass


def test_a_folder_of_another_origin_is_left_alone(artifacts, photos, tmp_path):
    out = tmp_path / "a.csv"
    folder = store.folder_of(out)
    folder.mkdir()
    (folder / ".job.json.1.new").write_text("of a process that was killed")
    wrote(artifacts["onnxruntime", "fp32"], photos, out)
    assert not folder.exists()
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(BadRequest, match="not an unfinished output of this tool"):
        wrote(artifacts["onnxruntime", "fp32"], photos, out, overwrite=True)
    assert (folder / "mine.txt").read_text() == "mine"


def test_answers_are_stored_before_they_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "FLUSH_S", 1e9)
    monkeypatch.setattr(store, "FLUSH_BYTES", 10 * store.CHUNK_BYTES)
    kept = store.Store(tmp_path / "a.csv", store.Job(artifact="", images="", total=100, options={}))
    kept.folder.mkdir()
    most = 0
    for start in range(100):
        kept.add(store.chunk_of(start, ["a.png"], [""], {}))
        most = max(most, len(kept.waiting))
    assert most == 10
    kept.flush()
    assert [chunk.start for chunk in kept.chunks()] == list(range(100))


def test_a_part_of_a_batch_has_the_answers_of_its_images():
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    chunk = store.chunk_of(8, list("abcd"), ["", "no image", "", ""], {"values": values})
    assert chunk.after(8) is chunk
    part = chunk.after(10)
    assert (part.start, part.names, part.errors) == (10, ("c", "d"), ("", ""))
    assert part.arrays()["values"].tolist() == values[1:].tolist()
    bad = store.chunk_of(0, ["a", "b"], ["", "no image"], {"values": values[:1]}).after(1)
    assert (bad.names, bad.tensors) == (("b",), {})


def test_another_device_or_version_is_not_resumed(artifacts, photos, tmp_path, monkeypatch):
    artifact, out = artifacts["onnxruntime", "fp32"], tmp_path / "a.csv"

    def interrupted(*_):
        raise KeyboardInterrupt

    real = store.Store.add
    monkeypatch.setattr(store.Store, "add", lambda kept, chunk: interrupted() if chunk.start else real(kept, chunk))
    with pytest.raises(KeyboardInterrupt):
        wrote(artifact, photos, out)
    with pytest.raises(BadRequest, match="was begun with device None, now cuda; give the same, or --overwrite"):
        predict.predict(artifact, [str(photos)], PredictOptions(top=2, device="cuda"), out, resume=True)
    monkeypatch.setattr("exporter.backends.computing_versions", lambda runtime: {"pillow": "1"})
    with pytest.raises(BadRequest, match=r"was begun with versions convnext-export .*, now pillow 1; give the same"):
        wrote(artifact, photos, out, resume=True)


OUTPUTS = {
    "classes": answers_.Output("logits", 0, "logits", "classes", 7, tuple("abcdefg")),
    "multilabel": answers_.Output("tags", 1, "logits", "multilabel", 7, ()),
    "values": answers_.Output("age", 2, "logits", "values", 2, ()),
    "embedding": answers_.Output("vector", 3, "embedding", "embedding", 0, ()),
}


@pytest.mark.parametrize("kinds", [(kind,) for kind in OUTPUTS] + [tuple(OUTPUTS)], ids="-".join)
@pytest.mark.parametrize("size", [1, 3, 8, 40])
def test_the_columns_of_a_parquet_file_are_the_records(kinds, size, tmp_path, monkeypatch):
    """The table that is made of the records, a row at a time, is the expected one."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    outputs = tuple(replace_place(OUTPUTS[kind], place) for place, kind in enumerate(kinds))
    answers, draw = answers_.Answers(outputs, 3, Checks()), np.random.default_rng(0)
    widths = {"classes": 7, "multilabel": 7, "values": 2, "embedding": 5}
    chunks = []
    for start in range(0, 40, size):
        count = min(size, 40 - start)
        errors = ["no image" if start + row in (0, 5, 16, 17, 39) else "" for row in range(count)]
        good = errors.count("")
        values = tuple(draw.normal(size=(good, widths[kind])).astype(np.float32) for kind in kinds)
        names = [f"{start + row}.png" for row in range(count)]
        chunks.append(store.chunk_of(start, names, errors, answers.of(values) if good else {}))
    monkeypatch.setattr(writers, "ROW_GROUP", 16)
    writers.write_parquet(tmp_path / "a.parquet", answers, lambda: iter(chunks))
    table = parquet.read_table(tmp_path / "a.parquet")
    columns = writers.columns(answers)
    rows = [writers.flat(columns, record) for record in writers.records(answers, iter(chunks))]
    assert table.equals(pa.Table.from_pylist(rows, table.schema))
    metadata = parquet.read_metadata(tmp_path / "a.parquet")
    assert [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)] == [16, 16, 8]


def replace_place(output, place):
    return dataclasses.replace(output, place=place)


def test_images_that_were_unreadable_before_an_interruption_are_counted_after_it(
    artifacts, photos, tmp_path, monkeypatch
):
    artifact, out = artifacts["onnxruntime", "fp32"], tmp_path / "a.csv"
    words, real = [str(photos / "page.jpg"), str(photos), str(photos / "empty.png")], store.Store.add

    def add(kept, chunk):
        if chunk.start >= 8:
            raise KeyboardInterrupt
        real(kept, chunk)

    monkeypatch.setattr(store.Store, "add", add)
    with pytest.raises(KeyboardInterrupt):
        predict.predict(artifact, words, PredictOptions(), out)
    monkeypatch.setattr(store.Store, "add", real)
    summary = predict.predict(artifact, words, PredictOptions(), out, resume=True)
    assert summary.now == COUNT + 2 - 8
    names = [reason.partition(":")[0].rpartition("/")[2] for reason in summary.unreadable]
    assert names == ["page.jpg", "empty.png", "page.jpg", "empty.png"]
