"""A verification in shards: a report with the same bytes, whoever measured the shards and in whatever order."""

import os
import random
from pathlib import Path

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace
from PIL import Image

from exporter import machine, verify
from exporter import report as reports
from exporter.data import synthetic
from exporter.errors import BadRequest
from exporter.run import spread
from exporter.verify import VerifyOptions, shards
from exporter.verify.checks import structure
from tests.conftest import build, copy_artifact, snapshot, tiny_state, write_tiny

COUNT, SIZE = 84, 32


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Photographs in folders of classes; one cannot be read, and one lies beside the folders."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(COUNT):
        folder = root / f"class {number % 10}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(synthetic.dead_leaves(48, number)).save(folder / f"{number}.png")
    (root / "class 3" / "43.png").write_bytes(b"no image")
    Image.fromarray(synthetic.dead_leaves(48, 0)).save(root / "stray.png")
    return root


def measured(artifact, options, size=SIZE):
    """The schedule and all shards, each of a worker of its own, in another order, as bytes."""
    schedule = shards.schedule(artifact, options, size)
    numbers = random.Random(0).sample(range(schedule.count), schedule.count)
    done = {}
    for number in numbers:
        with shards.open_worker(schedule, artifact) as worker:
            done[number] = shards.encode(worker.measure(number))
    return schedule, done


def merged(artifact, options, size=SIZE):
    schedule, done = measured(artifact, options, size)
    assert schedule.count > 1
    return shards.merged(schedule, artifact, lambda number: shards.decode(done[number]))


def same(artifact, options, size=SIZE):
    expected = verify.verify(artifact, options)
    got = merged(artifact, options, size)
    assert reports.encode(got) == reports.encode(expected)
    return expected


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_classes_are_counted_as_in_one_process(precision, artifacts, photos):
    report = same(artifacts["onnxruntime", precision], VerifyOptions(data=str(photos)))
    assert report.value("images") == COUNT - 1
    assert report.find("unreadable").detail == "1: class 3/43.png: no image of a known format"
    assert report.value("top1") is not None
    if precision == "int8":
        assert len(report.differences) == 12
        assert all(one.thumbnail for one in report.differences)


@pytest.mark.parametrize("backend", ["openvino", "tensorrt"])
def test_each_runtime_and_one_that_is_simulated(backend, artifacts, photos):
    same(artifacts[backend, "fp16"], VerifyOptions(data=str(photos), samples=40), 16)


def test_feature_vectors_are_compared_over_all_shards(tiny, tmp_path, photos):
    artifact = build(tiny, tmp_path, task="embed")
    report = same(artifact, VerifyOptions(data=str(photos)))
    assert report.value("neighbour_agreement") is not None


def test_values_are_ranked_over_all_shards(tmp_path, photos):
    from safetensors.torch import save_file

    folder = write_tiny(tmp_path / "regression")
    save_file(tiny_state(classes=1), folder / "model.safetensors")
    (folder / "config.json").unlink()
    report = same(build(folder, tmp_path / "out"), VerifyOptions(data=str(photos)))
    assert report.value("spearman") is not None


def test_several_labels_are_ranked_over_all_shards(artifacts, tmp_path):
    for number in range(40):
        Image.fromarray(synthetic.dead_leaves(48, number)).save(tmp_path / f"{number}.png")
    rows = [[f"{number}.png", *(str(int((number + label) % 3 == 0)) for label in range(10))] for number in range(40)]
    header = ["path", *(f"class {label}" for label in range(10))]
    (tmp_path / "labels.csv").write_text("\n".join(map(",".join, [header, *rows])) + "\n")
    options = VerifyOptions(data=str(tmp_path / "labels.csv"), outputs="multilabel")
    report = same(artifacts["onnxruntime", "fp16"], options, 16)
    assert report.value("map_drop") is not None


def test_masks_are_counted_over_all_shards(tiny_upernet, tmp_path):
    artifact = build(tiny_upernet, tmp_path / "built")
    classes = artifact.sidecar.weights.num_classes
    for name in ("images", "masks"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for number in range(5):
        Image.fromarray(synthetic.dead_leaves(64, number)).save(tmp_path / f"data/images/{number}.png")
        mask = np.random.default_rng(number).integers(0, classes, (8, 8), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(mask).save(tmp_path / f"data/masks/{number}.png")
    report = same(artifact, VerifyOptions(data=str(tmp_path / "data")), 2)
    assert len(report.pictures) == 5
    assert report.value("miou") is not None


def test_synthetic_images_and_a_part_of_a_folder(artifacts, photos):
    artifact = artifacts["onnxruntime", "fp32"]
    same(artifact, VerifyOptions(samples=40), 16)
    same(artifact, VerifyOptions(data=str(photos), samples=50))


def test_an_image_that_is_constant_across_the_border_of_two_shards_counts(artifacts, photos):
    """The last image of a shard and the first of the next are compared, as those of two batches are."""
    artifact = artifacts["onnxruntime", "fp32"]
    options = VerifyOptions(data=str(photos), samples=32)

    def stuck(images):
        return (np.repeat(np.arange(10, dtype=np.float32)[None], len(images), 0),)

    schedule = shards.schedule(artifact, options, 16)
    done = {}
    for number in range(2):
        with shards.open_worker(schedule, artifact) as worker:
            stuck.facts = worker.pair.candidate.facts
            pair = type(worker.pair)(artifact, worker.pair.original, stuck, worker.pair.meters)
            done[number] = type(worker)(schedule, pair, worker.samples, worker.layers, worker.findings).measure(number)
    report = shards.merged(schedule, artifact, done.__getitem__)
    assert report.value("constant_outputs") == report.value("images") - 1  # the first is compared with none


def test_int8_of_unlike_processors_is_reported_apart(artifacts, photos):
    artifact = artifacts["onnxruntime", "int8"]
    options = VerifyOptions(data=str(photos))
    schedule, done = measured(artifact, options)
    here = machine.arithmetic()
    other = "avx2" if here == "amx" else "amx"

    def read(number):
        shard = shards.decode(done[number])
        return replace(shard, arithmetic=other) if number == 1 else shard

    report = shards.merged(schedule, artifact, read)
    assert {finding.case for finding in report.findings if finding.metric == "cosine"} == {here, other}
    assert report.find("images", here).value + report.find("images", other).value == COUNT - 1
    assert report.find("machines").value == 2
    assert f"{other}: shards 1" in report.find("machines").detail
    assert report.find("unlike_classes").detail == "the intervals of all metrics overlap"
    fp32 = artifacts["onnxruntime", "fp32"]
    schedule, done = measured(fp32, options)
    report = shards.merged(schedule, fp32, read)
    assert [finding.case for finding in report.findings if finding.metric == "cosine"] == [""]
    assert report.find("machines").value == 2


def test_another_class_of_processors_is_that_of_the_machines_that_measured(artifacts, photos, monkeypatch):
    """Not of the machine that writes the report."""
    artifact = artifacts["onnxruntime", "int8"]
    monkeypatch.setattr(structure, "unlike", lambda built_for: "this CPU has no VNNI")
    schedule, done = measured(artifact, VerifyOptions(data=str(photos)))
    monkeypatch.undo()
    report = shards.merged(schedule, artifact, lambda number: shards.decode(done[number]))
    assert report.find("other_cpu").detail == "this CPU has no VNNI"


def test_a_schedule_is_of_one_artifact_and_of_these_images(artifacts, photos, tmp_path):
    artifact = artifacts["onnxruntime", "fp32"]
    for number in range(4):
        Image.fromarray(synthetic.dead_leaves(48, number)).save(tmp_path / f"{number}.png")
    options = VerifyOptions(data=str(tmp_path))
    schedule = shards.schedule(artifact, options)
    with (
        pytest.raises(BadRequest, match="another artifact than the schedule's"),
        shards.open_worker(schedule, artifacts["onnxruntime", "fp16"]),
    ):
        pass
    other = replace(schedule, versions={**schedule.versions, "numpy": "1.0"})
    with (
        pytest.raises(BadRequest, match=r"numpy \S+, but the work was begun with 1.0"),
        shards.open_worker(other, artifact),
    ):
        pass
    (tmp_path / "5.png").write_bytes((tmp_path / "0.png").read_bytes())
    with pytest.raises(BadRequest, match="other images than those of the"), shards.open_worker(schedule, artifact):
        pass
    with pytest.raises(BadRequest, match="--blocks"):
        shards.schedule(artifact, VerifyOptions(blocks=True))


@pytest.mark.parametrize("content", [b"", b"x", shards.zlib.compress(b"x"), shards.zlib.compress(bytes(9))[:-4]])
def test_what_is_no_shard_is_refused(content):
    with pytest.raises(BadRequest, match="measure it again"):
        shards.decode(content)


@pytest.fixture
def copied(artifacts, tmp_path):
    (tmp_path / "built").mkdir()
    return copy_artifact(artifacts["onnxruntime", "fp32"], tmp_path / "built")


def test_the_commands_of_a_folder_give_the_report(copied, photos, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("verify", copied.path, "--data", photos).code == 0
    path = copied.path.with_name(f"{copied.path.name}.report.json")
    expected = path.read_bytes()
    path.unlink()
    result = run("verify", copied.path, "--data", photos, "--on", "files:work", "--shard-size", 20)
    assert result.code == 0, result.err
    assert "3 commands, one for each shard" in result.out
    for line in (tmp_path / "work/commands.txt").read_text().splitlines()[::-1]:
        assert run(*line.split()[1:]).code == 0
    result = run("merge", "work")
    assert result.code == 0, result.err
    assert path.read_bytes() == expected
    assert run("merge", "work", "--json").json["passed"]


def test_shards_that_are_there_are_not_measured_again(copied, photos, tmp_path, run):
    folder = tmp_path / "work"
    options = ("verify", copied.path, "--data", photos, "--on", f"files:{folder}", "--shard-size", 32)
    assert run(*options).code == 0
    assert run("shard", folder, "0-1").out.startswith("2 shards measured")
    result = run("merge", folder)
    assert result.code == 2
    assert "1 of 3 shards are missing: 2;" in result.err
    before = snapshot(folder / "shards")
    damaged = folder / "shards/000001.shard"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    result = run("shard", folder, "0-2")
    assert result.out.startswith("2 shards measured")
    noted = " ".join(result.err.split())
    assert "000001.shard is damaged or has another key; measure the shard again" in noted
    assert {name: content for name, content in snapshot(folder / "shards").items() if name in before} == before
    assert "3 of 3 shards are in" in run(*options).err
    assert "every one of these shards was measured already" in run("shard", folder, 0).err
    other = run(*options, "--min-cosine", 0.5)
    assert other.code == 2
    assert "it has 3 shards of another one, so give another folder" in other.err
    assert len(list((folder / "shards").glob("*.shard"))) == 3


def test_data_and_weights_may_lie_elsewhere(tiny, photos, tmp_path, run):
    import shutil

    weights, data = tmp_path / "weights", tmp_path / "data"
    shutil.copytree(tiny, weights)
    shutil.copytree(photos, data)
    artifact = build(weights, tmp_path / "built")
    folder = tmp_path / "work"
    assert run("verify", artifact.path, "--data", data, "--on", f"files:{folder}").code == 0
    weights.rename(tmp_path / "moved weights")
    data.rename(tmp_path / "moved data")
    assert run("shard", folder, 0).code != 0
    result = run("shard", folder, 0, "--data", tmp_path / "moved data", "--weights", tmp_path / "moved weights")
    assert result.code == 0, result.err
    assert run("merge", folder).code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--on", "files:"], "expected the name of a folder"),
        (["--on", "files:work", "-o", "a.json"], "`merge` does"),
        (["--on", "slurm"], "expected ray, ray://HOST:PORT, or for verify files:DIR"),
        (["--on", "ray://host"], "expected ray, ray://HOST:PORT"),
        (["--shard-size", "16"], "only applies to shards"),
        (["--on", "files:work", "--blocks"], "--blocks"),
        (["--on", "files:work", "--shard-size", "32769"], "--shard-size 32769: expected 1 to 32,768 images"),
        (["--on", "files:."], "expected a folder without the artifact"),
    ],
)
def test_bad_words_are_refused(words, message, copied, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(2, "verify", copied.path, *words, folder=tmp_path)


def test_bad_folders_and_numbers_are_refused(copied, refused, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("a")
    assert "expected a new or empty folder" in refused(2, "verify", copied.path, "--on", "files:mine", folder=tmp_path)
    assert "no schedule of shards of this version in it" in refused(2, "shard", "mine", 0, folder=tmp_path)
    assert "no schedule of shards of this version in it" in refused(2, "merge", "gone", folder=tmp_path)
    assert run("verify", copied.path, "--on", "files:work").code == 0
    assert "work has the shards 0 to 0" in refused(2, "shard", "work", 1, folder=tmp_path)
    for word in ("one", "3-1", "1-", "-"):
        assert "expected the number of a shard" in refused(2, "shard", "work", word, folder=tmp_path)


def test_a_copy_that_is_there_is_left_as_it_is_and_others_are_replaced_whole(tmp_path, monkeypatch):
    (tmp_path / "new").write_bytes(b"same")
    (tmp_path / "copy").write_bytes(b"same")
    before = (tmp_path / "copy").stat()
    spread._copy(tmp_path / "new", tmp_path / "copy")
    assert (tmp_path / "copy").stat() == before
    (tmp_path / "new").write_bytes(b"other")

    def interrupted(source, target):
        Path(target).write_bytes(b"oth")
        raise KeyboardInterrupt

    monkeypatch.setattr(spread.shutil, "copyfile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        spread._copy(tmp_path / "new", tmp_path / "copy")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"copy": b"same", "new": b"other"}
    monkeypatch.undo()
    spread._copy(tmp_path / "new", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"other"


def test_missing_shards_are_named_as_ranges():
    assert spread._ranges([3, 17, 40, 41, 42]) == ["3", "17", "40-42"]
    assert spread._ranges([]) == []


def test_numbers_of_shards():
    assert spread.numbers_of(["3", "0-2"], 4, "work") == [3, 0, 1, 2]
    with pytest.raises(BadRequest, match="work has the shards 0 to 3"):
        spread.numbers_of(["0-99999999999"], 4, "work")
    with pytest.raises(BadRequest, match="expected the number of a shard"):
        spread.numbers_of(["1" * 5000], 4, "work")


def test_a_folder_of_the_user_is_left_as_it_is(copied, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine/shards").mkdir(parents=True)
    (tmp_path / "mine/schedule.json").write_text('{"my": "plan"}')
    (tmp_path / "mine/shards/thesis.txt").write_text("years")
    message = refused(2, "verify", copied.path, "--on", "files:mine", folder=tmp_path)
    assert "no schedule of shards of this version in it" in message
    message = refused(2, "verify", copied.path, "--on", "files:built", folder=tmp_path)
    assert "expected a folder without the artifact" in message


def test_a_report_does_not_replace_a_file_of_its_shards(copied, refused, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("verify", copied.path, "--on", "files:work").code == 0
    assert run("shard", "work", 0).code == 0
    for name in ("schedule.json", "commands.txt", "shards/000000.shard", "artifact/a.json"):
        assert "a file of the shards" in refused(2, "merge", "work", "-o", f"work/{name}", folder=tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("total", 20, "the schedule has 20 images in shards of 512, and synthetic has 16 in batches of 16"),
        ("size", 7, "in shards of 7"),
        ("total", 0, "no schedule of shards of this version in it"),
        ("artifact", "a\0b", "no schedule of shards of this version in it"),
    ],
)
def test_a_schedule_that_was_edited_is_refused(field, value, message, copied, refused, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("verify", copied.path, "--on", "files:work").code == 0
    path = tmp_path / "work/schedule.json"
    path.write_bytes(msgspec.json.encode(msgspec.json.decode(path.read_bytes()) | {field: value}))
    assert message in refused(2, "shard", "work", 0, folder=tmp_path)


def test_a_module_is_imported_only_if_it_is_named(copied, refused, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("open('imported', 'w')")
    assert run("verify", copied.path, "--on", "files:work").code == 0
    path = tmp_path / "work/schedule.json"
    content = msgspec.json.decode(path.read_bytes())
    content["options"]["reference"] = "evil:model"
    path.write_bytes(msgspec.json.encode(content))
    message = refused(2, "shard", "work", 0, folder=tmp_path)
    assert "add --reference evil:model to import that module" in message
    assert not (tmp_path / "imported").exists()


def test_a_shard_of_other_arrays_is_refused(artifacts, photos):
    artifact = artifacts["onnxruntime", "fp32"]
    schedule, done = measured(artifact, VerifyOptions(data=str(photos)))

    def read(number):
        shard = shards.decode(done[number])
        rows = {
            "parity": {
                **shard.batches[0].rows["parity"],
                "cosines": shards.Tensor(dtype="O", shape=(1,), content=b"12345678"),
            }
        }
        return replace(shard, batches=(replace(shard.batches[0], rows=rows),)) if number == 1 else shard

    with pytest.raises(BadRequest, match="shard 1 is not one of this schedule"):
        shards.merged(schedule, artifact, read)


def test_names_that_are_no_text_are_written(artifacts, tmp_path, run):
    for number in range(3):
        path = os.fsencode(tmp_path) + b"/bad\xff%d.png" % number
        Image.fromarray(synthetic.dead_leaves(48, number)).save(tmp_path / "a.png")
        (tmp_path / "a.png").rename(os.fsdecode(path))
    report = verify.verify(artifacts["onnxruntime", "fp32"], VerifyOptions(data=str(tmp_path)))
    assert "bad�" in report.find("cosine").detail
    assert reports.encode(report)


def test_a_schedule_survives_its_file(artifacts):
    schedule = shards.schedule(artifacts["onnxruntime", "fp32"], VerifyOptions(samples=3, min_cosine=0.5))
    assert msgspec.json.decode(msgspec.json.encode(schedule), type=shards.Schedule).key == schedule.key
