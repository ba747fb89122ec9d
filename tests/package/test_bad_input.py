"""`package`: what cannot be packaged is refused in one line, and nothing half written is left."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace
from PIL import Image

from exporter import artifact as artifacts_
from exporter import package
from exporter.artifact import update_quality
from exporter.errors import BadRequest, Unavailable
from exporter.package import PackageOptions, destinations, folder
from exporter.recipe.fields import fields_of
from tests.conftest import ROOT, build, copy_artifact
from tests.predict.test_predict import WITHOUT


def test_the_command_writes_a_package_and_names_it(artifacts, tmp_path, run):
    path = artifacts["onnxruntime", "fp32"].path
    result = run("package", path, "--for", "python", "-o", tmp_path / "a" / "b")
    assert result.code == 0, result.err
    assert result.out.startswith(f"{tmp_path / 'a' / 'b'}  9 files")
    result = run("package", path, "--for", "triton", "--ensemble", "-o", tmp_path / "c", "--json")
    assert set(result.json["files"]) == {
        file.relative_to(tmp_path / "c").as_posix() for file in (tmp_path / "c").rglob("*") if file.is_file()
    }
    assert artifacts_.load(tmp_path / "a" / "b" / path.name).sidecar == artifacts["onnxruntime", "fp32"].sidecar


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--for", "tritn"], "tritn"),
        (["--for", "python", "--labels", "labels.txt"], "3 labels, and the artifact has 10 classes"),
        (["--for", "python", "--labels", "missing.txt"], "no such file"),
        (["--for", "python", "--sample", "missing.png"], "--sample missing.png: No such file"),
        (["--for", "python", "--sample", "labels.txt"], "--sample labels.txt: no image of a known format"),
        (["--for", "python", "--threshold", "0.3"], "add --outputs multilabel"),
        (["--for", "python", "--instances", "2"], "--instances is for --for triton; leave it out with --for python"),
        (["--for", "triton", "--instances", "0"], "1"),
        (["--for", "triton", "-o", "full"], "full: not empty (mine is in it)"),
        (["--for", "triton", "-o", "labels.txt"], "labels.txt: not a folder"),
        (["--for", "triton", "-o", "labels.txt/below"], "labels.txt is a file, not a folder"),
        (["--for", "python", "--top", "11"], "--top 11: the artifact has 10 classes; give at most 10"),
    ],
)
def test_bad_input_is_one_line(words, message, artifacts, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "labels.txt").write_text("cat\ndog\nowl\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    words = [*words, *([] if "-o" in words else ["-o", "out"])]
    assert message in refused(2, "package", artifacts["onnxruntime", "fp32"].path, *words, folder=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "labels.txt"]


def test_an_artifact_that_failed_its_verification_is_packaged_with_a_note(artifacts, tmp_path, run):
    (tmp_path / "a").mkdir()
    artifact = copy_artifact(artifacts["onnxruntime", "fp32"], tmp_path / "a")
    words = ("package", artifact.path, "--for", "python", "-o")
    assert run(*words, tmp_path / "first").code == 0
    assert "| verified | not yet |" in (tmp_path / "first" / "README.md").read_text()
    update_quality(artifact, {"data": "val", "passed": "no", "reference": "mine:model", "top1": 58.4})
    second = run(*words, tmp_path / "second")
    says = "failed on val, compared with mine:model, top-1 58.40 %"
    assert (second.code, f"its last verification {says}" in " ".join(second.err.split())) == (0, True)
    assert f"| verified | {says} |" in (tmp_path / "second" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["working folder", "link", "mount point"])
def test_a_folder_that_cannot_be_replaced_is_refused_before_the_work(kind, artifacts, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    out = tmp_path / "out"
    if kind == "working folder":
        monkeypatch.chdir(out)
        out = Path()
    elif kind == "link":
        out = tmp_path / "link"
        out.symlink_to(tmp_path / "out")
    else:
        monkeypatch.setattr(os.path, "ismount", lambda path: path == out)
    with pytest.raises(BadRequest, match=rf"{kind}, which cannot be replaced by the package; give -o a new folder"):
        package.package(artifacts["onnxruntime", "fp32"], "python", out)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_empty_folder_is_taken(artifacts, tmp_path):
    (tmp_path / "out").mkdir()
    package.package(artifacts["onnxruntime", "fp32"], "python", tmp_path / "out")
    assert (tmp_path / "out" / "README.md").is_file()
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


def test_several_heads_are_refused(artifacts, tmp_path):
    artifact = artifacts["onnxruntime", "fp32"]
    architecture = {**artifact.sidecar.architecture, "heads": ("one:3", "other:4")}
    other = type(artifact)(artifact.path, replace(artifact.sidecar, architecture=architecture))
    with pytest.raises(BadRequest, match="2 heads; packages are written for one"):
        package.package(other, "python", tmp_path / "out")


def test_a_runtime_without_packages_is_refused(artifacts, tmp_path):
    artifact = artifacts["onnxruntime", "fp32"]
    other = type(artifact)(artifact.path, replace(artifact.sidecar, backend="null"))
    with pytest.raises(BadRequest, match="built for null, and packages are written for onnxruntime, openvino"):
        package.package(other, "python", tmp_path / "out")


def test_labels_of_features_are_refused(tiny, tmp_path):
    (tmp_path / "labels.txt").write_text("\n".join(f"label {number}" for number in range(48)))
    artifact = build(tiny, tmp_path, task="embed")
    with pytest.raises(BadRequest, match="48 labels, and the artifact has no classes"):
        package.package(artifact, "python", tmp_path / "out", PackageOptions(labels=str(tmp_path / "labels.txt")))


@pytest.mark.parametrize("place", ["write", "copy"])
def test_a_full_disk_leaves_nothing(place, artifacts, tmp_path, monkeypatch):
    real, calls = getattr(folder, place), []

    def full(*words):
        calls.append(words)
        if len(calls) < 2:
            return real(*words)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, place, full)
    with pytest.raises(Unavailable, match="no space left"):
        package.package(artifacts["onnxruntime", "fp32"], "python", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: os.terminal_size((0, 0)) and type("Disk", (), {"free": 1000})
    )
    with pytest.raises(Unavailable, match="MB are needed and 0 MB are free"):
        package.package(artifacts["onnxruntime", "fp32"], "python", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_one_leaves_nothing_and_a_killed_one_is_swept(artifacts, tmp_path, monkeypatch):
    def interrupt(*words):
        raise KeyboardInterrupt

    monkeypatch.setattr(package, "expected_of", interrupt)
    with pytest.raises(KeyboardInterrupt):
        package.package(artifacts["onnxruntime", "fp32"], "python", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    killed = tmp_path / ".out.abc.new"
    killed.mkdir()
    (killed / "half").write_text("half")
    package.package(artifacts["onnxruntime", "fp32"], "python", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


PAIRS = {"python": "onnxruntime", "triton": "openvino", "ovms": "openvino"}  # others with ONNX


@pytest.mark.parametrize("destination", destinations.names())
def test_it_works_where_pytorch_cannot_be_imported(destination, artifacts, tmp_path, request):
    if destination == "web":
        request.getfixturevalue("runtime")
    backend = PAIRS.get(destination, "onnxruntime")
    words = ["package", str(artifacts[backend, "fp32"].path), "--for", destination, "-o", str(tmp_path / "out")]
    answer = subprocess.run([sys.executable, "-c", WITHOUT, *words], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert (tmp_path / "out" / "expected.npz").is_file()


def test_an_artifact_that_is_rebuilt_meanwhile_gives_no_package(artifacts, tmp_path, monkeypatch):
    copy = copy_artifact(artifacts["onnxruntime", "fp32"], tmp_path)

    def rebuild(*_):
        with artifacts_.staging(copy.path) as folder:
            (folder / copy.path.name).write_bytes(b"another graph")
            artifacts_.seal(folder, copy.path.name, copy.sidecar)
        return None, "it was not run"

    monkeypatch.setattr(package, "expected_of", rebuild)
    with pytest.raises(BadRequest, match="another process has rebuilt it meanwhile; run the same command again"):
        package.package(copy, "python", tmp_path / "package")
    assert not (tmp_path / "package").exists()


def test_the_same_artifact_gives_the_same_bytes(artifacts, tmp_path):
    for name in ("one", "two"):
        package.package(artifacts["onnxruntime", "fp32"], "triton", tmp_path / name)
    one, two = ({path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")
                 if path.is_file()} for name in ("one", "two"))  # fmt: skip
    assert len(one) > 8
    assert one == two


def test_a_damaged_picture_is_refused_before_anything_is_written(artifacts, tmp_path):
    Image.new("F", (8, 8)).save(tmp_path / "float.tiff")
    options = PackageOptions(sample=str(tmp_path / "float.tiff"))
    with pytest.raises(BadRequest, match="no known range"):
        package.package(artifacts["onnxruntime", "fp32"], "python", tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_every_destination_is_described():
    page = (ROOT / "docs" / "package.md").read_text()
    aims = [destinations.destination(name) for name in destinations.names()]
    assert len(aims) >= 3
    assert all(aim.name == name for aim, name in zip(aims, destinations.names(), strict=True))
    assert [aim.name for aim in aims if f"\n## {aim.name}\n" not in page] == []
    options = [name for aim in aims for name in fields_of(aim.options)]
    assert len(options) == len(set(options)), "each is an option of the command"


def test_the_wheel_has_the_templates():
    templates = list((ROOT / "exporter" / "package" / "templates").rglob("*.*"))
    assert len(templates) >= 10
    ignored = subprocess.run(["git", "check-ignore", *map(str, templates)], cwd=ROOT, capture_output=True, check=False)
    assert ignored.stdout == b"", "hatchling leaves out what git ignores"


def test_a_file_that_another_process_removed_is_no_fault_of_the_output(tmp_path):
    with pytest.raises(BadRequest, match=r"gone\.bin: it cannot be read, or another process has removed it"):
        folder.copy(tmp_path / "gone.bin", tmp_path / "out" / "gone.bin")
