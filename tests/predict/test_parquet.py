"""Images in Parquet files and in object storage: the answers are those of the files in a folder, row by row."""

import io
import json
import os
import random
import re
import shutil
from importlib import util

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from PIL import Image

from exporter import predict
from exporter.artifact.sidecar import Preprocessing
from exporter.data.images import Unreadable
from exporter.data.synthetic import dead_leaves
from exporter.errors import BadRequest, Unavailable
from exporter.predict import PredictOptions, parquet, remote, sources, store
from tests.predict.test_predict import names_of

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

COUNT, BAD = 24, 5
PATHED = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of images, one of which is none."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(COUNT):
        Image.fromarray(dead_leaves(48, number)).save(folder / f"{number:02d}.png")
    (folder / f"{BAD:02d}.png").write_bytes(b"no image")
    return folder


def contents(photos):
    return [file.read_bytes() for file in sorted(photos.iterdir())]


def write(path, columns, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


def answers_of(artifact, *words):
    """Each answer without the name of its image."""
    records = predict.answer(artifact, list(map(str, words)), PredictOptions())
    return [{key: value for key, value in record.items() if key != "image"} for record in records]


@pytest.fixture(scope="module")
def expected(artifacts, photos):
    answers = answers_of(artifacts["onnxruntime", "fp32"], photos)
    assert ["error" in answer for answer in answers] == [number == BAD for number in range(COUNT)]
    return answers


def columns_of(kind, photos):
    names, bytes_ = [f"{number:02d}.png" for number in range(COUNT)], contents(photos)
    if kind == "struct":
        return {"image": pa.array([{"bytes": b, "path": n} for b, n in zip(bytes_, names, strict=True)], PATHED)}
    if kind == "struct of paths":
        return {"image": pa.array([{"bytes": None, "path": str(photos / name)} for name in names], PATHED)}
    if kind == "path":
        return {"label": list(range(COUNT)), "file_name": [str(photos / name) for name in names]}
    if kind == "struct without paths":
        return {"image": [{"bytes": content, "path": None} for content in bytes_]}
    if kind == "category":
        return {"path": pa.array([str(photos / name) for name in names]).dictionary_encode()}
    if kind == "file address":
        return {"path": [f"file://{photos}/{name}" for name in names]}
    if kind.endswith("view"):
        views = {
            "binary view": (bytes_, pa.binary_view()),
            "string view": ([f"{photos}/{n}" for n in names], pa.string_view()),
        }
        return {"image": pa.array(*views[kind])}
    return {"content": pa.array(bytes_, pa.binary() if kind == "binary" else pa.large_binary())}


KINDS = (
    "struct",
    "struct of paths",
    "struct without paths",
    "path",
    "file address",
    "category",
    "string view",
    "binary",
    "large binary",
    "binary view",
)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_have_the_answers_of_files(kind, artifacts, photos, expected, tmp_path):
    file = write(tmp_path / "rows.parquet", columns_of(kind, photos), row_group_size=7)
    assert answers_of(artifacts["onnxruntime", "fp32"], file) == expected


def test_rows_are_named_by_their_number_and_paths_by_themselves(photos, tmp_path):
    file = write(tmp_path / "a" / "rows.parquet", columns_of("struct", photos))
    assert names_of([file])[:2] == [f"{file}[0]", f"{file}[1]"]
    paths = write(tmp_path / "a" / "list.parquet", {"path": ["x/1.png", "/y/2.png", "s3://bucket/3.png"]})
    assert names_of([paths]) == [f"{tmp_path}/a/x/1.png", "/y/2.png", "s3://bucket/3.png"]


def test_rows_without_an_image_have_a_reason(photos, artifacts, tmp_path):
    good = contents(photos)[0]
    struct = pa.array([{"bytes": good, "path": None}, None, {"bytes": None, "path": "gone.png"}], PATHED)
    file = write(tmp_path / "rows.parquet", {"image": struct})
    reasons = [answer.get("error") for answer in answers_of(artifacts["onnxruntime", "fp32"], file)]
    assert reasons == [None, "no image in this row", f"{tmp_path}/gone.png: No such file or directory"]
    (tmp_path / "a.png").write_bytes(good)
    paths = write(tmp_path / "paths.parquet", {"path": ["a.png", None, "gone.png"]})
    reasons = [answer.get("error") for answer in answers_of(artifacts["onnxruntime", "fp32"], paths)]
    assert reasons[:2] == [None, "no path in this row"]
    assert "No such file" in reasons[2]
    assert names_of([paths])[1] == f"{paths}[1]"
    nothing = write(tmp_path / "nothing.parquet", {"image": pa.nulls(2)})
    with pytest.raises(BadRequest, match=r"none of 2 images can be read .* no path in this row"):
        answers_of(artifacts["onnxruntime", "fp32"], nothing)


def test_a_folder_and_a_pattern_of_parquet_files_are_read_in_order(photos, artifacts, expected, tmp_path):
    column = columns_of("binary", photos)["content"]
    for number in range(3):
        rows = {"image": column[8 * number : 8 * number + 8], "other": column[:8]}
        write(tmp_path / "data" / f"part-{number}.parquet", rows)
        write(tmp_path / "data" / f"part-{number}-none.parquet", {"image": column[:0], "other": column[:0]})
    write(tmp_path / "data" / "part-null.parquet", {"image": pa.nulls(0), "other": pa.nulls(0)})
    (tmp_path / "data" / ".hidden.parquet").write_bytes(b"none")
    artifact = artifacts["onnxruntime", "fp32"]
    for word in (f"{tmp_path}/data#image", f"{tmp_path}/data/*.parquet#image", f"file://{tmp_path}/data#image"):
        assert answers_of(artifact, word) == expected
    (tmp_path / "data" / "a.png").write_bytes(contents(photos)[0])
    assert names_of([tmp_path / "data"]) == [f"{tmp_path}/data/a.png"], "images come before Parquet files"


@pytest.mark.parametrize(
    ("columns", "word", "message"),
    [
        ({"image": [b"a"]}, "#picture", r"no column 'picture' in it; it has image \(binary\)"),
        ({"image": [b"a"], "label": [1]}, "#label", "column label is int64; expected image bytes"),
        ({"label": [1]}, "", r"no column of images in it; expected .* and it has label \(int64\)"),
        ({"caption": ["a.png"]}, "", "add #COLUMN for paths"),
        ({"a": [b"a"], "b": [b"b"]}, "", "several columns may have images: a, b; add one, as in #a"),
        ({"image": pa.array([], pa.binary())}, "", "no rows in it"),
        (None, "", "truncated or no Parquet file"),
    ],
)
def test_a_file_without_a_column_of_images_is_refused(columns, word, message, artifacts, refused, tmp_path):
    file = tmp_path / "rows.parquet"
    file.write_bytes(b"PAR1 none") if columns is None else write(file, columns)
    words = ("predict", artifacts["onnxruntime", "fp32"].path, f"{file}{word}", "-o", tmp_path / "a.csv")
    said = refused(2, *words, folder=tmp_path)
    assert re.search(message, said)
    assert str(file) in said


def test_a_column_of_text_of_any_name_is_taken_if_it_is_named(photos, tmp_path):
    file = write(tmp_path / "rows.parquet", {"where": [str(photos / "00.png")]})
    assert names_of([f"{file}#where"]) == [str(photos / "00.png")]


def rows_of(file):
    return parquet.Rows(str(file), file.open("rb"))


def test_rows_can_be_read_in_any_order(tmp_path):
    file = write(tmp_path / "rows.parquet", {"image": [b"%d" % number for number in range(1000)]}, row_group_size=300)
    rows, numbers = rows_of(file), list(range(1000))
    random.Random(0).shuffle(numbers)
    assert [rows.value(number) for number in numbers] == [b"%d" % number for number in numbers]


def test_of_a_row_group_a_few_rows_are_in_memory(tmp_path):
    class Watched(io.FileIO):
        largest = 0

        def read(self, size=-1):
            content = super().read(size)
            Watched.largest = max(Watched.largest, len(content))
            return content

    peaks, draw = [], np.random.default_rng(0)
    for count in (400, 1600):
        values = [draw.bytes(20_000) for _ in range(count)]
        options = {"row_group_size": count, "write_batch_size": 16, "data_page_size": 100_000, "use_dictionary": False}
        file = write(tmp_path / f"{count}.parquet", {"image": values}, **options)
        del values
        rows, before, peak = parquet.Rows("", Watched(file)), pa.total_allocated_bytes(), 0
        for number in range(count):
            rows.value(number)
            peak = max(peak, pa.total_allocated_bytes() - before)
        peaks.append(peak)
        del rows
    assert Watched.largest < 2_000_000, "of files of 8 and 32 MB"
    assert peaks[1] < 1.2 * peaks[0] < 12_000_000


def damaged(folder):
    """Two row groups, the first of which is damaged from about its middle on."""
    values = [bytes([number]) * 500 for number in range(200)]
    file = folder / "rows.parquet"
    options = {"row_group_size": 100, "compression": "gzip", "write_batch_size": 10, "data_page_size": 1000}
    write(file, {"image": values}, use_dictionary=False, **options)
    column = pq.ParquetFile(file).metadata.row_group(0).column(0)
    content = bytearray(file.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    content[middle : middle + 40] = b"\xff" * 40
    file.write_bytes(content)
    return file, values


def test_rows_behind_damage_have_a_reason_in_any_order(tmp_path):
    file, values = damaged(tmp_path)

    def read(rows, number):
        try:
            return rows.value(number)
        except Unreadable as error:
            return str(error)

    rows = rows_of(file)
    read_in_order = [read(rows, number) for number in range(200)]
    assert read_in_order[100:] == values[100:]
    good = sum(one == value for one, value in zip(read_in_order, values, strict=True)) - 100
    assert 16 <= good < 100
    assert read_in_order[:good] == values[:good]
    assert all(one.startswith("row group 0 is damaged (") for one in read_in_order[good:100])
    again = rows_of(file)
    assert [read(again, number) for number in reversed(range(200))][::-1] == read_in_order


def test_an_interrupted_prediction_of_rows_continues(photos, artifacts, tmp_path, monkeypatch):
    file = write(tmp_path / "rows.parquet", columns_of("struct", photos), row_group_size=10)
    artifact, words, out = artifacts["onnxruntime", "fp32"], [str(file)], tmp_path / "a.jsonl"
    predict.predict(artifact, words, PredictOptions(), tmp_path / "whole.jsonl")
    real = sources.images.read
    late = contents(photos)[20:]

    def interrupted(stream, recipe):
        content = stream.read()
        if content in late:
            raise Unavailable("the storage does not answer")
        return real(io.BytesIO(content), recipe)

    monkeypatch.setattr(store, "FLUSH_S", 0)
    monkeypatch.setattr(sources.images, "read", interrupted)
    with pytest.raises(Unavailable):
        predict.predict(artifact, words, PredictOptions(), out)
    monkeypatch.setattr(sources.images, "read", real)
    summary = predict.predict(artifact, words, PredictOptions(), out, resume=True)
    assert 0 < summary.now < COUNT
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    ranges = predict.ranges_of(artifact, words, PredictOptions(), out, 8)
    with predict.open_ranges(ranges, artifact) as chunks:
        parts = {number: list(chunks(number)) for number in (2, 0, 1)}
    names = [name for number in range(3) for chunk in parts[number] for name in chunk.names]
    assert names == [json.loads(line)["image"] for line in out.read_text().splitlines()]


def test_a_changed_file_is_another_source(photos, tmp_path):
    keys = set()
    for values in (contents(photos)[:2], contents(photos)[:3]):
        file = write(tmp_path / "rows.parquet", {"image": values, "second": values})
        for column in ("image", "second"):
            keys.add(sources.open_images([f"{file}#{column}"], Preprocessing(size=32, resize=32)).key)
    assert len(keys) == 4


def test_the_bytes_of_a_row_are_opened_for_its_overlay(photos, tmp_path):
    file = write(tmp_path / "rows.parquet", columns_of("struct", photos))
    opened = sources.open_images([str(photos / "00.png"), str(file)], Preprocessing(size=32, resize=32))
    assert opened.file(f"{file}[3]", file).read() == contents(photos)[3]
    assert opened.file(str(photos / "00.png"), photos / "00.png") == photos / "00.png"


# Object storage: the storage of fsspec in the memory of this process, under the scheme s3.


class Bucket(MemoryFileSystem):
    """A storage that can fail."""

    protocol = ("s3",)
    store, pseudo_dirs = {}, [""]
    failing = ()

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(str(path).replace("s3://", "memory://"))

    def cat_file(self, path, **words):
        if path.endswith(Bucket.failing):
            raise RuntimeError("SlowDown: reduce your request rate")
        return super().cat_file(path, **words)


@pytest.fixture
def bucket(photos, monkeypatch):
    """A bucket with the photographs, and with a Parquet file of them."""
    monkeypatch.setattr(Bucket, "failing", ())
    monkeypatch.setitem(_registry, "s3", Bucket)
    Bucket.clear_instance_cache()
    Bucket.store.clear()
    system = Bucket()
    for file in photos.iterdir():
        system.pipe(f"/bucket/photos/{file.name}", file.read_bytes())
    table = io.BytesIO()
    pq.write_table(pa.table(columns_of("struct", photos)), table, row_group_size=7)
    system.pipe("/bucket/rows/part.parquet", table.getvalue())
    yield system
    Bucket.clear_instance_cache()


@pytest.mark.parametrize(
    "word",
    [
        "s3://bucket/photos",
        "s3://bucket/photos/*.png",
        "S3://bucket/photos/",
        "s3://bucket/rows",
        "s3://bucket/rows/part.parquet",
        "s3://bucket/rows/part.parquet#image",
        "s3://bucket/rows/*.parquet",
    ],
)
def test_object_storage_has_the_answers_of_files(word, bucket, artifacts, expected):
    assert answers_of(artifacts["onnxruntime", "fp32"], word) == expected


def test_the_memory_of_this_process_is_a_storage(photos, artifacts, expected):
    system = fsspec.filesystem("memory")
    system.pipe("/of-tests/a.png", contents(photos)[0])
    try:
        assert answers_of(artifacts["onnxruntime", "fp32"], "memory://of-tests/a.png") == expected[:1]
    finally:
        system.rm("/of-tests", recursive=True)


def test_paths_in_rows_may_be_addresses(bucket, artifacts, expected, tmp_path):
    names = [f"s3://bucket/photos/{number:02d}.png" for number in range(COUNT)]
    file = write(tmp_path / "rows.parquet", {"path": names})
    artifact = artifacts["onnxruntime", "fp32"]
    assert answers_of(artifact, file) == expected
    table = io.BytesIO()
    pq.write_table(pa.table({"path": ["photos/00.png", "photos/gone.png"]}), table)
    bucket.pipe("/bucket/list.parquet", table.getvalue())
    first, gone = answers_of(artifact, "s3://bucket/list.parquet")
    assert (first, gone) == (expected[0], {"error": "no such file"})


def test_the_bytes_of_an_address_are_opened_for_its_overlay(bucket, photos):
    opened = sources.open_images(["s3://bucket/photos"], Preprocessing(size=32, resize=32))
    assert opened.file("s3://bucket/photos/03.png", photos).read() == contents(photos)[3]


def test_a_storage_that_does_not_answer_is_no_damaged_image(bucket, photos, artifacts, tmp_path, monkeypatch):
    artifact, out = artifacts["onnxruntime", "fp32"], tmp_path / "a.csv"
    predict.predict(artifact, ["s3://bucket/photos"], PredictOptions(), tmp_path / "whole.csv")
    monkeypatch.setattr(store, "FLUSH_S", 0)
    Bucket.failing = tuple(f"/{number}.png" for number in range(20, COUNT))
    with pytest.raises(Unavailable, match=r"s3://bucket/photos/20.png: the storage does not answer \(SlowDown"):
        predict.predict(artifact, ["s3://bucket/photos"], PredictOptions(), out)
    Bucket.failing = ()
    assert predict.predict(artifact, ["s3://bucket/photos"], PredictOptions(), out, resume=True).now < COUNT
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_a_storage_that_fails_while_rows_are_read_is_no_damaged_file(bucket, monkeypatch):
    stream = remote.files_at("s3://bucket/rows/part.parquet")[0].open()
    rows = parquet.Rows("part.parquet", stream)
    monkeypatch.setattr(stream.stream, "read", lambda size: (_ for _ in ()).throw(ConnectionError("reset")))
    with pytest.raises(Unavailable, match="reset"):
        rows.value(0)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("s3://bucket/nothing", "no such file or folder in the storage"),
        ("s3://bucket/*.jpg", "no such file or folder in the storage"),
        ("s3://", "no such file or folder in the storage"),
        ("s3://bucket/text", "no images in it"),
        ("s3://bucket/rows/part.parquet#label", "no column 'label'"),
    ],
)
def test_an_address_without_images_is_refused(word, message, bucket):
    bucket.pipe("/bucket/text/a.txt", b"text")
    with pytest.raises(BadRequest, match=message):
        names_of([word])


def test_an_object_that_is_too_large_for_an_image_is_not_read(bucket, artifacts, monkeypatch):
    monkeypatch.setattr(remote, "MAX_BYTES", 100)
    monkeypatch.setattr(Bucket, "cat_file", None)
    (answer,) = answers_of_all_unreadable("s3://bucket/photos/00.png")
    assert "bytes, more than 100" in answer


def answers_of_all_unreadable(word):
    opened = sources.open_images([word], Preprocessing(size=32, resize=32))
    return [read.reason for group in opened.samples.groups(4) for read in group]


@pytest.mark.parametrize(("scheme", "package"), [("s3", "s3fs"), ("gs", "gcsfs"), ("abfs", "adlfs")])
def test_without_its_package_the_line_that_installs_it_is_printed(scheme, package, artifacts, refused, tmp_path):
    if util.find_spec(package):
        pytest.skip(f"{package} is installed")
    words = ("predict", artifacts["onnxruntime", "fp32"].path, f"{scheme}://bucket/a", "-o", tmp_path / "a.csv")
    assert f"{package} is not installed; pip install {package}" in refused(3, *words, folder=tmp_path)


@pytest.mark.parametrize(
    "word", ["{0}/a.parquet", "{0}/a.parquet#image", "file://{0}/a.parquet", "{0}", "{0}/*.parquet"]
)
def test_an_output_never_replaces_a_source(word, photos, artifacts, refused, tmp_path):
    write(tmp_path / "a.parquet", {"image": contents(photos)})
    words = ("predict", artifacts["onnxruntime", "fp32"].path, word.format(tmp_path), "-o", tmp_path / "a.parquet")
    assert "the images are read from there" in refused(2, *words, "--overwrite", folder=tmp_path)


def test_an_output_among_pictures_is_no_source(photos, artifacts, run, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    words = ("predict", artifacts["onnxruntime", "fp32"].path, tmp_path / "photos", "-o", tmp_path / "photos/a.parquet")
    assert run(*words).code == 0
    assert run(*words, "--overwrite").code == 0


def test_paths_that_are_no_regular_file_or_no_name_have_a_reason(photos, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(1 << 30)
    reasons = {
        str(tmp_path / "pipe"): "no regular file",
        "/dev/zero": "no regular file",
        "a\0b": "no name of a file",
        "large.png": "1,073,741,824 bytes, more than 268,435,456",
        "https://example.org/a.png": "expected a file:// address of this machine, or one in object storage",
    }
    rows = [{"bytes": None, "path": path} for path in reasons]
    write(tmp_path / "a.parquet", {"image": [{"bytes": contents(photos)[0], "path": "good.png"}, *rows]})
    write(tmp_path / "b.parquet", {"path": ["good.png", *reasons]})
    for table in ("a.parquet", "b.parquet"):
        read = sources.open_images([f"{tmp_path}/{table}"], Preprocessing(size=32))
        _, *loads = [load for *_, load in read.samples.items()]
        for load, reason in zip(loads, reasons.values(), strict=True):
            with pytest.raises(Unreadable, match=reason):
                load()


def test_two_columns_of_one_name_are_refused(photos, artifacts, refused, tmp_path):
    twice = pa.table([pa.array(contents(photos)[:1]), pa.array([1])], names=["image", "image"])
    pq.write_table(twice, tmp_path / "a.parquet")
    for word in (f"{tmp_path}/a.parquet", f"{tmp_path}/a.parquet#image"):
        words = ("predict", artifacts["onnxruntime", "fp32"].path, word, "-o", tmp_path / "a.csv")
        assert "several columns are named image; rename the others" in refused(2, *words, folder=tmp_path)
