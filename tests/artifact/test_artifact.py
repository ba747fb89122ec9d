"""An artifact is what its sidecar says, or it is refused; what is written is whole."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest

from exporter import artifact
from exporter.artifact import disk, sidecar_path
from exporter.artifact.sidecar import MAX_SIDECAR_BYTES
from exporter.build import resolve
from exporter.build.export import export
from exporter.errors import BadRequest, Unavailable
from tests.conftest import ROOT, build, recipe_of, snapshot


def test_a_sidecar_of_an_older_schema_is_refused_with_the_command_that_rebuilds(onnx_copy, refused):
    path = sidecar_path(onnx_copy.path)
    older = {**json.loads(path.read_text()), "schema": 4, "recipe": {"form": "conv"}}
    path.write_text(json.dumps(older))
    message = refused(2, "inspect", onnx_copy.path, folder=onnx_copy.path.parent)
    assert "sidecar schema 4, this version reads schema 7; build the artifact again: convnext-export onnx" in message
    assert f"--weights {older['weights']['source']} --precision fp32 -o {onnx_copy.path.parent}" in message


def test_a_sidecar_of_a_later_schema_asks_for_an_upgrade(onnx_copy, refused):
    path = sidecar_path(onnx_copy.path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 8}))
    assert "pip install --upgrade" in refused(2, "inspect", onnx_copy.path)


def test_an_artifact_opens_as_it_was_sealed(onnx_copy):
    again = artifact.load(onnx_copy.path)
    assert again == onnx_copy
    assert again.sidecar.sha256 == artifact.sha256_file(onnx_copy.path)
    assert again.sidecar.bytes == onnx_copy.path.stat().st_size


def test_a_changed_file_is_refused_before_loading(onnx_copy):
    content = bytearray(onnx_copy.path.read_bytes())
    content[len(content) // 2] ^= 1
    onnx_copy.path.write_bytes(content)
    with pytest.raises(BadRequest, match=r"changed since it was built \(sha256 .*, expected "):
        artifact.load(onnx_copy.path)


def test_a_truncated_file_is_refused(onnx_copy):
    onnx_copy.path.write_bytes(onnx_copy.path.read_bytes()[:-1])
    with pytest.raises(BadRequest, match="bytes, expected"):
        artifact.load(onnx_copy.path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(precision="fp16"), "changed after it was written"),
        (lambda s: s["preprocessing"].update(mean=[0, 0, 0]), "changed after it was written"),
        (lambda s: s.update(colour="red"), "unknown field `colour`"),
        (lambda s: s.update(schema=99), "sidecar schema 99, this version reads schema 7"),
        (lambda s: s.update(bytes="many"), "Expected `int`, got `str`"),
        (lambda s: s.pop("variant"), "missing required field `variant`"),
    ],
    ids=["fact", "preprocessing", "unknown", "schema", "type", "missing"],
)
def test_a_changed_sidecar_is_refused(change, message, onnx_copy):
    path = sidecar_path(onnx_copy.path)
    sidecar = json.loads(path.read_text())
    change(sidecar)
    path.write_text(json.dumps(sidecar))
    with pytest.raises(BadRequest, match=message):
        artifact.load(onnx_copy.path)


def test_a_truncated_sidecar_is_refused(onnx_copy):
    path = sidecar_path(onnx_copy.path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BadRequest, match="sidecar cannot be read"):
        artifact.load(onnx_copy.path)


def test_a_sidecar_of_absurd_size_is_not_read(onnx_copy):
    with sidecar_path(onnx_copy.path).open("r+b") as file:
        file.truncate(MAX_SIDECAR_BYTES + 1)
    with pytest.raises(BadRequest, match="more than a sidecar of this tool has"):
        artifact.load(onnx_copy.path)


def test_a_file_without_a_sidecar_is_refused(onnx_copy):
    sidecar_path(onnx_copy.path).unlink()
    with pytest.raises(BadRequest, match="is not beside it; copy it too"):
        artifact.load(onnx_copy.path)


def test_a_missing_companion_is_named(artifacts, tmp_path):
    from tests.conftest import copy_artifact

    copied = copy_artifact(artifacts["openvino", "fp16"], tmp_path)
    copied.path.with_suffix(".bin").unlink()
    with pytest.raises(BadRequest, match=r"\.bin: missing"):
        artifact.load(copied.path)


def test_quality_is_kept_and_sealed(onnx_copy):
    artifact.update_quality(onnx_copy, {"cosine": 0.5})
    assert artifact.load(onnx_copy.path).sidecar.quality == {"cosine": 0.5}
    path = sidecar_path(onnx_copy.path)
    path.write_text(path.read_text().replace('"cosine": 0.5', '"cosine": 1.0'))
    with pytest.raises(BadRequest, match="changed after it was written"):
        artifact.load(onnx_copy.path)


def test_the_quality_of_an_artifact_that_was_built_again_meanwhile_is_not_written(onnx_copy):
    rewrite(onnx_copy, b"new content")
    artifact.update_quality(onnx_copy, {"cosine": 0.5})
    again = artifact.load(onnx_copy.path)
    assert (again.path.read_bytes(), again.sidecar.quality) == (b"new content", onnx_copy.sidecar.quality)
    assert again.sidecar.quality.get("cosine") != 0.5


def test_a_file_that_is_not_ours_is_not_overwritten(tiny, tmp_path):
    (tmp_path / "custom_fp32.onnx").write_bytes(b"precious")
    with pytest.raises(BadRequest, match="not written by this tool"):
        build(tiny, tmp_path)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("custom_fp32.onnx", b"precious")]


def test_what_a_killed_writer_left_is_swept_and_what_a_living_one_holds_is_not(onnx_copy):
    folder, name = onnx_copy.path.parent, onnx_copy.path.name
    (folder / f".{name}.dead.new").mkdir()
    (folder / f".{name}.dead.new" / "half").write_bytes(b"x")
    (folder / f".{name}.alive.new").mkdir()
    release = disk.lock(folder / f".{name}.alive.new")
    rewrite(onnx_copy, b"new")
    release()
    assert sorted(path.name for path in folder.iterdir() if path.suffix == ".new") == [f".{name}.alive.new"]


@pytest.mark.slow
def test_two_writers_and_a_reader_at_once(onnx_copy):
    """Each writes its own letter; a reader must always find one of them whole."""
    script = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        from exporter import artifact
        from exporter.artifact import disk
        path = Path({str(onnx_copy.path)!r})
        old = artifact.load(path)
        for _ in range(40):
            with artifact.staging(path) as folder:
                (folder / path.name).write_bytes(sys.argv[1].encode() * 100_000)
                artifact.seal(folder, path.name, old.sidecar)
    """)
    rewrite(onnx_copy, b"a" * 100_000)
    writers = [subprocess.Popen([sys.executable, "-c", script, letter], cwd=ROOT) for letter in "ab"]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        seen.add(artifact.load(onnx_copy.path).path.read_bytes()[:1])  # load raises if it is torn
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen <= {b"a", b"b"}
    assert sorted(p.name for p in onnx_copy.path.parent.iterdir()) == [
        onnx_copy.path.name,
        f"{onnx_copy.path.name}.json",
    ]


def test_an_error_while_writing_leaves_what_was_there(onnx_copy):
    before = snapshot(onnx_copy.path.parent)

    def write():
        with artifact.staging(onnx_copy.path) as folder:
            (folder / onnx_copy.path.name).write_bytes(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write()
    assert snapshot(onnx_copy.path.parent) == before


def rewrite(onnx_copy, content):
    with artifact.staging(onnx_copy.path) as folder:
        (folder / onnx_copy.path.name).write_bytes(content)
        artifact.seal(folder, onnx_copy.path.name, onnx_copy.sidecar)


def test_a_move_that_was_cut_short_is_finished_by_whoever_comes_next(onnx_copy, monkeypatch):
    """Killed after the decision and after each of the moves, the new artifact is what the next reader finds."""
    monkeypatch.setattr(artifact, "_recover", lambda target: None)
    rewrite(onnx_copy, b"new content")
    monkeypatch.undo()
    commit = artifact._commit_folder(onnx_copy.path)
    assert commit.is_dir()
    (commit / onnx_copy.path.name).replace(onnx_copy.path)  # the first move was made, then came the end
    again = artifact.load(onnx_copy.path)
    assert again.path.read_bytes() == b"new content"
    assert not commit.exists()


def test_an_output_that_is_read_or_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.json").touch()
    (tmp_path / "b.json").symlink_to("a.json")
    artifact.check_output(tmp_path / "a.json", [tmp_path / "c.json"])
    with pytest.raises(BadRequest, match=r"b\.json: is read, and would be replaced; write to another file"):
        artifact.check_output(tmp_path / "b.json", [tmp_path / "a.json"])
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(BadRequest, match="its folder cannot be written; choose another folder"):
        artifact.check_output(tmp_path / "new" / "a.json")


def test_files_the_new_artifact_has_not_are_removed(onnx_copy):
    name = onnx_copy.path.name
    with artifact.staging(onnx_copy.path) as folder:
        (folder / name).write_bytes(b"graph")
        (folder / f"{name}.data").write_bytes(b"weights")
        artifact.seal(folder, name, onnx_copy.sidecar)
    assert len(artifact.load(onnx_copy.path).files) == 2
    rewrite(onnx_copy, b"small")
    assert artifact.load(onnx_copy.path).path.read_bytes() == b"small"
    assert sorted(path.name for path in onnx_copy.path.parent.iterdir()) == [name, f"{name}.json"]


@pytest.mark.slow
def test_killed_at_any_moment_there_is_the_old_artifact_or_the_new(onnx_copy, tmp_path):
    script = textwrap.dedent(f"""
        from pathlib import Path
        from exporter import artifact
        from exporter.artifact import disk
        path = Path({str(onnx_copy.path)!r})
        old = artifact.load(path)
        print("ready", flush=True)
        while True:
            for content in (b"a" * 300_000, b"b" * 300_000):
                with artifact.staging(path) as folder:
                    (folder / path.name).write_bytes(content)
                    artifact.seal(folder, path.name, old.sidecar)
    """)
    for moment in range(8):
        process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE)
        process.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.02 + moment * 0.007)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        artifact.load(onnx_copy.path)  # raises if it is torn
    rewrite(onnx_copy, b"the last")
    assert len(list(onnx_copy.path.parent.iterdir())) == 2, "something was left behind"


def test_a_full_disk_is_one_clear_line_and_nothing_is_lost(onnx_copy, monkeypatch):
    before = snapshot(onnx_copy.path.parent)

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifact, "flush", full)
    with pytest.raises(Unavailable, match="no space left to write in"):
        rewrite(onnx_copy, b"new")
    monkeypatch.undo()
    assert snapshot(onnx_copy.path.parent) == before


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounting a small disk needs root")
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_disk_that_fills_up_while_a_runtime_writes(backend, share, artifacts, tiny, tmp_path):
    """Whether it has room for nothing, for half of the file, or for nearly all of it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("no mount in this sandbox")
    try:
        if backend == "openvino":  # the graph fits, the IR does not
            export(resolve(recipe_of("openvino", weights=str(tiny)), disk))
        free = shutil.disk_usage(disk).free
        (disk / "ballast").write_bytes(b"0" * (free - int(share * artifacts[backend, "fp32"].sidecar.bytes)))
        before = snapshot(disk)
        with pytest.raises(Unavailable, match="no space left"):
            build(tiny, disk, backend)
        assert snapshot(disk) == before
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounting a disk needs root")
def test_an_artifact_on_a_read_only_disk_is_verified_and_its_report_kept(run, onnx_copy, tmp_path):
    place = tmp_path / "readonly"
    place.mkdir()
    words = ["mount", "--bind", onnx_copy.path.parent, place]
    if subprocess.run(words, capture_output=True).returncode:
        pytest.skip("no mount in this sandbox")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", place], check=True)
        result = run("verify", place / onnx_copy.path.name, "--samples", 2, "-o", tmp_path / "report.json")
        assert result.code == 0, result.err
        assert "the results are not recorded in the sidecar" in result.err
        assert json.loads((tmp_path / "report.json").read_text())["passed"]
    finally:
        subprocess.run(["umount", place], check=True)
