"""An artifact of other weights is replaced only where that was asked for."""

import pytest

from exporter import artifact
from exporter.artifact import sidecar_path
from exporter.build import build
from exporter.errors import BadRequest
from tests.conftest import recipe_of, write_tiny


@pytest.fixture
def two(tmp_path, monkeypatch):
    """Two checkpoints of one network with different weights."""
    monkeypatch.chdir(tmp_path)
    return write_tiny(tmp_path / "a"), write_tiny(tmp_path / "b", seed=1)


def digest_of(folder, name="custom_fp32.onnx"):
    return artifact.load(folder / name).sidecar.weights.digest


def test_a_build_of_other_weights_is_refused_and_names_both_ways_out(two, run, refused, tmp_path):
    assert run("onnx", "--weights", two[0]).code == 0
    message = refused(2, "onnx", "--weights", two[1], folder=tmp_path / "build")
    assert "custom_fp32.onnx: built from other weights (" in message
    assert "--force" in message
    assert "-o" in message
    assert run("onnx", "--weights", two[1], "-o", tmp_path / "other").code == 0
    assert digest_of(tmp_path / "other") != digest_of(tmp_path / "build")


def test_force_replaces_them(two, run, tmp_path):
    assert run("onnx", "--weights", two[0]).code == 0
    before = digest_of(tmp_path / "build")
    assert run("onnx", "--weights", two[1], "--force").code == 0
    assert digest_of(tmp_path / "build") != before


def test_the_same_weights_are_built_again_from_another_path(two, run, tmp_path):
    assert run("onnx", "--weights", two[0]).code == 0
    assert run("onnx", "--weights", write_tiny(tmp_path / "copy"), "--opset", "19").code == 0


def test_a_checkpoint_that_was_trained_on_is_built_again_with_a_note(two, run, tmp_path):
    assert run("onnx", "--weights", two[0]).code == 0
    write_tiny(two[0], seed=2)
    result = run("onnx", "--weights", two[0])
    assert result.code == 0, result.err
    assert "custom_fp32.onnx is replaced" in result.err


def test_an_intermediate_file_of_other_weights_is_kept_too(two, run, refused, tmp_path):
    assert run("openvino", "--weights", two[0]).code == 0
    refused(2, "openvino", "--weights", two[1], "--fp16", folder=tmp_path / "build")


def test_a_build_that_another_process_overtakes_replaces_nothing(two, tmp_path):
    ours = build(recipe_of(weights=str(two[0])), tmp_path / "ours").artifact
    theirs = build(recipe_of(weights=str(two[1])), tmp_path / "theirs").artifact
    target = tmp_path / "custom_fp32.onnx"

    def overtaken(file):
        file.write_bytes(b"ours")
        with artifact.staging(target) as folder:
            (folder / target.name).write_bytes(theirs.path.read_bytes())
            artifact.seal(folder, target.name, theirs.sidecar)

    with pytest.raises(BadRequest, match="built from other weights"):
        artifact.publish(target, ours.sidecar, overtaken)
    assert artifact.load(target).sidecar.sha256 == theirs.sidecar.sha256
    assert sidecar_path(target).is_file()


def test_two_recipes_of_a_run_do_not_write_one_file_with_different_weights(two, run, refused, tmp_path):
    names = []
    for weights in two:
        names.append(tmp_path / f"{weights.name}.yaml")
        names[-1].write_text(
            f"backend: onnxruntime\nprecision: fp32\nmodel: {{weights: {weights}}}\nbench: null\n"
            "checks: {samples: 4}\n"
        )
    for jobs in (1, 2):
        assert "would all write" in refused(2, "run", *names, "--jobs", jobs, folder=tmp_path)
    (first,) = run("run", names[0], "--json").json
    result = run("run", names[1], "--json")
    assert result.code == 2
    assert "built from other weights" in result.json[0]["error"]
    assert first["artifact"]["sha256"] == artifact.load(tmp_path / "build" / "custom_fp32.onnx").sidecar.sha256
    assert run("run", names[1], "--force", "--json").code == 0
