"""PyTorch's answers are cached by content: with the same bits, never those of another network or of other images."""

import dataclasses
import os
import sys

import msgspec
import numpy as np
import pytest
import torch
from msgspec.structs import replace
from PIL import Image

from exporter import backends
from exporter.artifact import Artifact
from exporter.backends import eager
from exporter.build import resolve
from exporter.build.int8.search import open_reference
from exporter.data import synthetic
from exporter.errors import BadRequest, Unavailable
from exporter.model import weights
from exporter.verify import VerifyOptions, answers, open_data, verify
from tests.artifact.test_sealed import notes
from tests.conftest import build, copy_artifact, recipe_of, type_command, write_tiny
from tests.reference import library

IMAGES, BATCHES = 20, [16, 4]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """The folder of the cached answers, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "convnext-export" / "answers"


@pytest.fixture(autouse=True)
def computed(monkeypatch):
    """The number of images of each batch that PyTorch computes."""
    sizes, real = [], eager.EagerSession.__call__

    def counted(session, images):
        sizes.append(len(images))
        return real(session, images)

    monkeypatch.setattr(eager.EagerSession, "__call__", counted)
    return sizes


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(IMAGES):
        Image.fromarray(synthetic.dead_leaves(70, index)).save(folder / f"{index:02}.png")
    return folder


def content(report):
    return msgspec.json.encode(report)


def test_a_second_verify_computes_nothing_and_its_report_is_the_same(artifacts, photos, cache, computed, monkeypatch):
    artifact, options = artifacts["onnxruntime", "fp16"], VerifyOptions(data=str(photos))
    with notes() as lines:
        first = verify(artifact, options)
    assert computed == BATCHES
    assert not any("cached" in line for line in lines)
    with notes() as lines:
        second = verify(artifact, options)
    assert computed == BATCHES
    assert f"PyTorch's outputs for 20 of 20 images were read from the cache ({cache})" in lines
    monkeypatch.setattr(answers, "SMALL", set())
    uncached = verify(artifact, options)
    assert computed == 2 * BATCHES
    assert content(first) == content(second) == content(uncached)


def test_all_artifacts_of_a_network_share_the_answers(artifacts, photos, computed):
    for key in (("onnxruntime", "fp32"), ("onnxruntime", "fp16"), ("openvino", "fp32")):
        verify(artifacts[key], VerifyOptions(data=str(photos)))
    assert computed == BATCHES


def test_the_search_for_int8_shares_them_too(artifacts, tiny, photos, computed, tmp_path):
    options = VerifyOptions(data=str(photos))
    verify(artifacts["onnxruntime", "fp32"], options)
    job = resolve(recipe_of(precision="int8", weights=str(tiny)), tmp_path)
    with open_reference(job, options, tmp_path) as session:
        for batch in open_data(job.sidecar, options).batches(16):
            session(batch.images)
    assert computed == BATCHES


def test_a_changed_image_is_computed_with_its_batch(artifacts, photos, computed):
    artifact, options = artifacts["onnxruntime", "fp32"], VerifyOptions(data=str(photos))
    verify(artifact, options)
    pixels = np.array(Image.open(photos / "19.png"))
    pixels[35, 35] ^= 128
    before = (photos / "19.png").stat()
    Image.fromarray(pixels).save(photos / "19.png")
    os.utime(photos / "19.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    verify(artifact, options)
    assert computed == [*BATCHES, 4]


def test_another_order_of_images_is_another_batch(artifacts, photos, computed):
    verify(artifacts["onnxruntime", "fp32"], VerifyOptions(data=str(photos)))
    (photos / "00.png").rename(photos / "99.png")
    verify(artifacts["onnxruntime", "fp32"], VerifyOptions(data=str(photos)))
    assert computed == 2 * BATCHES


def test_other_preprocessing_is_computed(artifacts, photos, computed):
    artifact, options = artifacts["onnxruntime", "fp32"], VerifyOptions(data=str(photos))
    verify(artifact, options)
    other = replace(artifact.sidecar.preprocessing, interpolation="bicubic")
    verify(Artifact(artifact.path, replace(artifact.sidecar, preprocessing=other)), options)
    assert computed == 2 * BATCHES


def test_other_weights_are_computed(artifacts, photos, computed, tmp_path):
    options = VerifyOptions(data=str(photos))
    verify(artifacts["onnxruntime", "fp32"], options)
    verify(build("random:1", tmp_path / "a", variant="atto", imgsz=64), options)
    verify(build("random:2", tmp_path / "b", variant="atto", imgsz=64), options)
    assert computed == 3 * BATCHES
    verify(build("random:1", tmp_path / "a", precision="fp16", variant="atto", imgsz=64), options)
    assert computed == 3 * BATCHES


def test_features_are_not_stored(tiny, photos, cache, computed, tmp_path):
    artifact, options = build(tiny, tmp_path / "a", task="embed,features"), VerifyOptions(data=str(photos))
    verify(artifact, options)
    verify(artifact, options)
    assert computed == 2 * BATCHES
    assert not cache.exists()


def test_the_users_own_module_is_not_stored(artifacts, tiny, photos, cache, computed, tmp_path, monkeypatch):
    (tmp_path / "users_model.py").write_text(
        f"from exporter.model import weights\n\ndef model():\n    return weights.load({str(tiny)!r}).model()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "users_model", raising=False)
    options = VerifyOptions(data=str(photos), reference="users_model:model")
    for _ in range(2):
        assert verify(artifacts["onnxruntime", "fp32"], options).passed
    assert computed == 2 * BATCHES
    assert not cache.exists()
    (tmp_path / "copied").mkdir()
    copied = copy_artifact(artifacts["onnxruntime", "fp32"], tmp_path / "copied")
    said = type_command("verify", copied.path, "--data", photos, "--reference", "users_model:model").out
    assert "passed, compared with users_model:model" in said
    assert "reference users_model:model" in " ".join(type_command("inspect", copied.path).out.split())
    type_command("verify", copied.path, "--data", photos)
    assert "users_model" not in type_command("inspect", copied.path).out


@pytest.mark.slow
def test_a_librarys_model_has_answers_of_its_own_until_its_configuration_changes(photos, computed, tmp_path):
    timm = library("timm")
    folder = tmp_path / "model"
    timm.models.save_for_hf(timm.create_model("convnext_atto", num_classes=10), folder, safe_serialization=True)
    artifact = build(folder, tmp_path, imgsz=64)
    ours, theirs = (VerifyOptions(data=str(photos), reference=name) for name in (None, "timm"))
    for options in (ours, theirs, ours, theirs):
        verify(artifact, options)
    assert computed == 2 * BATCHES
    config = folder / "config.json"
    config.write_text(config.read_text() + "\n")
    verify(artifact, theirs)
    assert computed == 3 * BATCHES


def test_missing_and_other_weights_are_refused_as_without_a_cache(photos, tmp_path):
    folder = write_tiny(tmp_path / "model")
    artifact, options = build(folder, tmp_path), VerifyOptions(data=str(photos))
    verify(artifact, options)
    other = write_tiny(tmp_path / "other", grn=True, layer_scale=False)
    with pytest.raises(BadRequest, match="other weights"):
        verify(artifact, replace(options, weights=str(other)))
    with pytest.raises(BadRequest, match="--reference nothing"):
        verify(artifact, replace(options, reference="nothing"))
    folder.rename(tmp_path / "moved")
    with pytest.raises(Unavailable, match="no longer there"):
        verify(artifact, options)


def test_a_damaged_file_is_computed_and_written_again(artifacts, photos, cache, computed):
    artifact, options = artifacts["onnxruntime", "fp32"], VerifyOptions(data=str(photos))
    expected = verify(artifact, options)
    small, large = sorted(cache.iterdir(), key=lambda path: path.stat().st_size)
    good = small.read_bytes()
    for bad in (good[:-5], large.read_bytes()):
        small.write_bytes(bad)
        computed.clear()
        with notes() as lines:
            assert content(verify(artifact, options)) == content(expected)
        assert computed == [4]
        assert lines[0] == f"{small} is damaged or has another key; PyTorch computes these images again"
        assert small.read_bytes() == good


def test_an_interrupted_verify_keeps_what_it_computed(artifacts, photos, computed, monkeypatch):
    artifact, options = artifacts["onnxruntime", "fp32"], VerifyOptions(data=str(photos))
    with monkeypatch.context() as patch:
        counted = eager.EagerSession.__call__

        def interrupted(session, images):
            if computed:
                raise KeyboardInterrupt
            return counted(session, images)

        patch.setattr(eager.EagerSession, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            verify(artifact, options)
    assert computed == [16]
    verify(artifact, options)
    assert computed == [16, 4]


def test_what_was_not_used_for_longest_is_removed(artifacts, photos, cache, computed, monkeypatch):
    artifact, options = artifacts["onnxruntime", "fp32"], VerifyOptions(data=str(photos))
    verify(artifact, options)
    small, large = sorted(cache.iterdir(), key=lambda path: path.stat().st_size)
    left = cache / ".of-a-process-that-was-killed.new"
    left.write_bytes(b"?" * 5000)
    for age, path in enumerate((large, small, left)):
        os.utime(path, (9 - age, 9 - age))
    monkeypatch.setattr(answers, "LIMIT_BYTES", 2 * large.stat().st_size + 10)
    verify(artifact, replace(options, samples=16))  # a batch of other images
    (new,) = set(cache.iterdir()) - {large}
    assert large.exists()
    assert new.stat().st_size == large.stat().st_size
    computed.clear()
    verify(artifact, options)
    assert computed == [4]
    assert large.exists(), "it was used after the other"
    assert not new.exists()


def test_the_cache_is_pruned_at_the_end_too(artifacts, photos, cache, monkeypatch):
    cache.mkdir(parents=True)
    (cache / "old.npz").write_bytes(b"?" * 100_000)
    os.utime(cache / "old.npz", (1, 1))
    monkeypatch.setattr(answers, "LIMIT_BYTES", 100_000)  # so much that no single batch causes it
    verify(artifacts["onnxruntime", "fp32"], VerifyOptions(data=str(photos)))
    assert not (cache / "old.npz").exists()
    assert len(list(cache.iterdir())) == len(BATCHES)


def test_a_cache_that_cannot_be_written_stops_nothing(artifacts, photos, computed, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        assert verify(artifacts["onnxruntime", "fp32"], VerifyOptions(data=str(photos))).passed
    assert computed == 2 * BATCHES


def test_timing_computes_each_time(artifacts, cache, computed):
    images = np.zeros((1, 3, 64, 64), np.float32)
    with backends.runtime("eager").open(artifacts["onnxruntime", "fp32"], eager.EagerOptions()) as session:
        session(images)
        session(images)
    with answers.open_reference(artifacts["onnxruntime", "fp32"], eager.EagerOptions()) as session:
        runs, forward = [], session.session._forward
        session.session._forward = lambda given: (runs.append(1), forward(given))[1]
        bound = session.bind([images])
        bound.run()
        bound.run()
    assert computed == [1, 1]
    assert len(runs) == 2
    assert not cache.exists()


def identity(artifact, options=None, **of_checkpoint):
    checkpoint = dataclasses.replace(weights.reload(artifact), **of_checkpoint)
    return eager._identity(artifact, checkpoint, options or eager.EagerOptions())


def test_the_identity_has_whatever_changes_the_last_bits(artifacts, monkeypatch):
    artifact = artifacts["onnxruntime", "fp32"]
    first = identity(artifact)
    assert identity(artifact) == first
    variant = weights.reload(artifact).variant
    steeper = replace(variant, architecture=replace(variant.architecture, norm_eps=1e-3))
    assert identity(artifact, variant=steeper) != first
    timm = eager.EagerOptions(reference="timm")
    assert identity(artifact, timm) not in (first, identity(artifact, timm, variant=replace(variant, name="atto")))
    export = {**artifact.sidecar.recipe.get("export", {}), "output": "softmax"}
    softmax = Artifact(artifact.path, replace(artifact.sidecar, recipe={**artifact.sidecar.recipe, "export": export}))
    assert identity(softmax) != first
    assert identity(artifact, eager.EagerOptions(device="cuda")) is None
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert identity(artifact) != first
    torch.set_num_threads(threads)
    monkeypatch.setattr(eager.machine, "cpu", lambda: ("another", []))
    assert identity(artifact) != first
    monkeypatch.undo()
    assert identity(artifact) == first
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    assert identity(artifact) != first
