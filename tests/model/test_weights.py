"""Every wrapper, format and mishap that a file of weights comes with."""

import argparse
import json
import os

import pytest
import torch
from safetensors.torch import save_file

from exporter.errors import BadRequest, Unavailable
from exporter.model import weights
from exporter.model.layouts import Choices
from tests.conftest import tiny_config, tiny_state


@pytest.fixture
def state():
    return tiny_state()


def same(found, state):
    return all(torch.equal(found.state[key], state[key]) for key in state) and found.state.keys() == state.keys()


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"model": s},
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model_ema": s},
        lambda s: {"state_dict": {f"module.{key}": value for key, value in s.items()}},
        lambda s: {"model": s, "args": argparse.Namespace(lr=1e-3), "optimizer": {"state": {}}},
    ],
    ids=["bare", "model", "state_dict", "model_ema", "module.", "training"],
)
def test_wrappers_are_seen_through(wrap, suffix, state, tmp_path):
    path = tmp_path / f"weights{suffix}"
    torch.save(wrap(state), path)
    assert same(weights.load(str(path)), state)


def test_of_two_parts_either_can_be_taken(state, tmp_path):
    path, other = tmp_path / "weights.pth", tiny_state(seed=1)
    torch.save({"model": state, "model_ema": other}, path)
    assert same(weights.load(str(path)), state)
    assert same(weights.load(f"{path}#model_ema"), other)


def test_a_part_that_is_not_there_is_refused_with_those_that_are(state, tmp_path):
    torch.save({"model": state}, tmp_path / "weights.pth")
    with pytest.raises(BadRequest, match="no part 'model_ema'; it has model"):
        weights.load(f"{tmp_path / 'weights.pth'}#model_ema")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_become_fp32(dtype, state, tmp_path):
    half = {key: value.to(dtype) for key, value in state.items()}
    save_file(half, tmp_path / "half.safetensors")
    found = weights.load(str(tmp_path / "half.safetensors"))
    assert all(value.dtype == torch.float32 for value in found.state.values())
    assert same(found, {key: value.float() for key, value in half.items()})


def test_the_digest_is_of_the_weights_not_of_the_file(state, tmp_path):
    save_file(state, tmp_path / "a.safetensors")
    torch.save({"model": state}, tmp_path / "b.pth")
    save_file(tiny_state(seed=1), tmp_path / "c.safetensors")
    a, b, c = (weights.load(str(tmp_path / name)).weights for name in ("a.safetensors", "b.pth", "c.safetensors"))
    assert a.digest == b.digest != c.digest
    assert a.file_sha256 != b.file_sha256


def test_random_weights_are_those_of_their_seed():
    first, again, other = (weights.load(f"random:{seed}", "atto").weights.digest for seed in (0, 0, 1))
    assert first == again != other


def test_labels_and_preprocessing_come_from_config_json(tiny):
    found = weights.load(str(tiny))
    assert found.labels[:2] == ("class 0", "class 1")
    assert (found.preprocessing.size, found.preprocessing.interpolation) == (64, "bilinear")
    assert found.preprocessing.std == (0.2, 0.3, 0.4)


def test_hugging_face_preprocessing_is_understood(state, tmp_path):
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"id2label": tiny_config()["id2label"]}))
    recipe = {"size": {"shortest_edge": 224}, "crop_pct": 0.875, "resample": 3}
    recipe |= {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(recipe))
    found = weights.load(str(tmp_path)).preprocessing
    assert (found.size, found.resize, found.crop, found.interpolation) == (224, 256, "center", "bicubic")
    recipe["size"] = {"shortest_edge": 384}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(recipe))
    found = weights.load(str(tmp_path)).preprocessing
    assert (found.size, found.crop) == (384, "squash")


def test_labels_that_do_not_fit_the_head_are_refused(state, tmp_path):
    save_file(state, tmp_path / "model.safetensors")
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(f"label {i}" for i in range(1000)))
    with pytest.raises(BadRequest, match="1000 labels, but the head has 10 classes"):
        weights.load(str(tmp_path / "model.safetensors"), labels=labels)
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"0": "only"}}))
    with pytest.raises(BadRequest, match=r"config.json: 1 labels, but the head has 10 classes"):
        weights.load(str(tmp_path))


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_a_pickle_that_carries_code_is_refused_and_not_run(state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": state, "extra": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(BadRequest, match=r"carries code \((posix|os)\.system\) and nothing of it was run"):
        weights.load("bomb.pth")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(share, suffix, state, tmp_path):
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(BadRequest, match="truncated or no"):
        weights.load(str(path))


def test_noise_is_refused(tmp_path):
    for suffix in (".safetensors", ".pth", ".bin"):
        path = tmp_path / f"noise{suffix}"
        path.write_bytes(bytes(range(256)) * 40)
        with pytest.raises(BadRequest, match="truncated or no"):
            weights.load(str(path))


def test_missing_keys_are_counted_and_named(state, tmp_path):
    del state["stages.1.0.pwconv1.bias"], state["stages.2.1.norm.weight"]
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(BadRequest, match=r"2 missing keys \(stages.1.0.pwconv1.bias, stages.2.1.norm.weight\)"):
        weights.load(str(tmp_path / "w.safetensors"))


def test_unexpected_keys_are_counted_and_named(state, tmp_path):
    state["stages.0.0.attention.weight"] = torch.zeros(3)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(BadRequest, match=r"1 unexpected keys \(stages.0.0.attention.weight\)"):
        weights.load(str(tmp_path / "w.safetensors"))


def test_a_wrong_shape_is_named_with_what_was_expected(state, tmp_path):
    state["stages.1.0.pwconv1.bias"] = torch.zeros(5)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(BadRequest, match=r"stages.1.0.pwconv1.bias is \(5,\), expected \(96,\)"):
        weights.load(str(tmp_path / "w.safetensors"))


def test_weights_of_another_variant_name_the_one_that_fits(tmp_path):
    save_file(weights.load("random:0", "v2_atto").state, tmp_path / "w.safetensors")
    with pytest.raises(BadRequest, match="weights of v2_atto, asked for tiny; use --variant v2_atto"):
        weights.load(str(tmp_path / "w.safetensors"), "tiny")


def test_another_network_is_told_from_a_convnext(tmp_path):
    save_file({"conv1.weight": torch.zeros(3), "fc.weight": torch.zeros(3)}, tmp_path / "resnet.safetensors")
    with pytest.raises(BadRequest, match=r"no ConvNeXt weights: 2 keys \(conv1.weight, fc.weight\)"):
        weights.load(str(tmp_path / "resnet.safetensors"))


def test_a_backbone_without_a_head_serves_features_and_nothing_else(state, tmp_path, run):
    whole = tiny_state()
    headless = {key: value for key, value in state.items() if not key.startswith(("head", "norm"))}
    save_file(headless, tmp_path / "w.safetensors")
    words = [
        "onnx",
        "--weights",
        tmp_path / "w.safetensors",
        "--imgsz",
        64,
        "-o",
        tmp_path / "out",
        "--task",
        "classify",
    ]
    refused = run(*words)
    assert refused.code == 2
    assert "no classifier in these weights; --task features takes them" in refused.err
    assert run(*[word for word in words if word not in ("--task", "classify")]).code == 0
    assert run("verify", tmp_path / "out" / "custom_features_fp32.onnx", "--samples", 2).code == 0
    assert torch.equal(
        weights.load(str(tmp_path / "w.safetensors")).state["stages.0.0.gamma"], whole["stages.0.0.gamma"]
    )


def test_parameters_and_numpy_numbers_in_a_checkpoint_are_harmless(state, tmp_path):
    import numpy as np

    parameters = {key: torch.nn.Parameter(value) for key, value in state.items()}
    torch.save({"state_dict": parameters, "best_acc1": np.float64(70.6)}, tmp_path / "w.ckpt")
    assert same(weights.load(str(tmp_path / "w.ckpt")), state)


def test_sparse_tensors_are_refused(state, tmp_path):
    torch.save({**state, "head.weight": state["head.weight"].to_sparse()}, tmp_path / "w.pth")
    with pytest.raises(BadRequest, match=r"1 tensors are sparse, .* \(head.weight\); save them as"):
        weights.load(str(tmp_path / "w.pth"))


@pytest.mark.parametrize(
    "change",
    [{"crop_pct": -1}, {"size": 0}, {"image_std": [0, 0, 0]}],
)
def test_preprocessing_that_makes_no_sense_is_refused(change, state, tmp_path):
    save_file(state, tmp_path / "model.safetensors")
    recipe = {"size": 224, "image_mean": [0.5] * 3, "image_std": [0.5] * 3} | change
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(recipe))
    with pytest.raises(BadRequest, match=r"preprocessor_config.json: cannot be understood"):
        weights.load(str(tmp_path))


def test_any_number_of_classes_is_accepted(tmp_path):
    save_file(tiny_state(classes=7), tmp_path / "w.safetensors")
    assert weights.load(str(tmp_path / "w.safetensors")).weights.num_classes == 7


def test_a_variant_without_published_weights_says_what_to_give():
    with pytest.raises(BadRequest, match=r"isotropic_small has no published weights on the Hub; give --weights FILE"):
        weights.load("hub", "isotropic_small")


def test_without_network_and_cache_the_hub_ends_in_one_clear_error(monkeypatch, tmp_path):
    import huggingface_hub

    def no_network(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    with pytest.raises(Unavailable, match=r"--weights FILE, --weights hf-hub:owner/name .* or --weights random:0"):
        weights.load("hub", "tiny")


def test_a_hub_repository_is_read_like_a_folder(monkeypatch, tiny):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(tiny))
    found = weights.load("hf-hub:someone/convnext")
    assert asked == ["someone/convnext"]
    assert (found.weights.source, found.labels[0]) == ("hf-hub:someone/convnext", "class 0")


def test_a_project_can_be_moved_whole(state, tmp_path, monkeypatch):
    from exporter.backends import eager
    from tests.conftest import build

    project = tmp_path / "project"
    (project / "weights").mkdir(parents=True)
    save_file(state, project / "weights" / "w.safetensors")
    monkeypatch.chdir(project)
    made = build("weights/w.safetensors", project / "build")
    assert made.sidecar.weights.source == "../weights/w.safetensors"
    monkeypatch.chdir(tmp_path)
    project.rename(tmp_path / "moved")
    from exporter import artifact

    assert same(weights.reload(artifact.load(tmp_path / "moved" / "build" / made.path.name)), state)
    opened = artifact.load(tmp_path / "moved" / "build" / made.path.name)
    assert len(eager.RUNTIME.layers(opened, eager.EagerOptions())) > 20


def test_nan_in_a_checkpoint_is_refused_by_name(state, tmp_path):
    state["stages.2.0.pwconv1.weight"][3, 3] = float("nan")
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(BadRequest, match=r"NaN or infinity in 1 tensors \(stages.2.0.pwconv1.weight\)"):
        weights.load(str(tmp_path / "w.safetensors"))


def test_of_two_whole_networks_none_is_taken_unasked(state, tmp_path):
    other = tiny_state(seed=1)
    torch.save({**state, **{f"extra.{key}": value for key, value in other.items()}}, tmp_path / "w.pth")
    with pytest.raises(BadRequest, match="2 networks lie in these weights; choose one: --prefix"):
        weights.load(str(tmp_path / "w.pth"))
    assert same(weights.load(str(tmp_path / "w.pth"), choices=Choices(prefix="extra")), other)


def test_a_copy_of_a_network_is_left_out_by_name(state, tmp_path, capsys):
    copy = {f"teacher.{key}": value for key, value in tiny_state(seed=1).items()}
    torch.save({**{f"student.{key}": value for key, value in state.items()}, **copy}, tmp_path / "w.pth")
    assert same(weights.load(str(tmp_path / "w.pth")), state)


def test_tensors_of_something_else_are_left_out(state, tmp_path):
    torch.save({**state, "criterion.centers": torch.zeros(10, 48)}, tmp_path / "w.pth")
    assert same(weights.load(str(tmp_path / "w.pth")), state)


def test_prefixes_of_compile_and_ddp_come_off_together(state, tmp_path):
    torch.save({f"_orig_mod.module.{key}": value for key, value in state.items()}, tmp_path / "w.pth")
    assert same(weights.load(str(tmp_path / "w.pth")), state)


def test_another_activation_is_refused(tiny, tmp_path):
    import shutil

    shutil.copytree(tiny, tmp_path / "w")
    (tmp_path / "w" / "config.json").write_text(json.dumps({"hidden_act": "relu6"}))
    with pytest.raises(BadRequest, match="hidden_act is 'relu6'; not supported"):
        weights.load(str(tmp_path / "w"))


def test_a_part_of_a_folder_is_remembered(state, tmp_path):
    torch.save({"model": state, "model_ema": tiny_state(seed=1)}, tmp_path / "model.pth")
    found = weights.load(f"{tmp_path}#model_ema")
    assert found.weights.source.endswith("#model_ema")
    assert weights.load(found.weights.source).weights.digest == found.weights.digest


def test_labels_of_ones_own_are_enough_to_verify_by(tiny, tmp_path, run):
    """The sidecar keeps them, so a config.json that does not fit the head is in nobody's way."""
    import shutil

    shutil.copytree(tiny, tmp_path / "w")
    (tmp_path / "w" / "config.json").write_text(json.dumps({"id2label": {"0": "only"}}))
    (tmp_path / "labels.txt").write_text("\n".join(f"label {i}" for i in range(10)))
    words = ["--weights", tmp_path / "w", "--labels", tmp_path / "labels.txt", "--imgsz", 64]
    assert run("onnx", *words, "-o", tmp_path).code == 0
    assert run("verify", tmp_path / "custom_fp32.onnx", "--samples", 2).code == 0


@pytest.mark.parametrize("batch", [1, 2])
def test_one_class_is_a_number_of_classes_too(batch, tmp_path, run):
    save_file(tiny_state(classes=1), tmp_path / "w.safetensors")
    assert (
        run("onnx", "--weights", tmp_path / "w.safetensors", "--imgsz", 64, "--batch", batch, "-o", tmp_path).code == 0
    )
    result = run("verify", tmp_path / "custom_fp32.onnx", "--samples", 4)
    assert result.code == 0, result.out


def test_a_download_that_breaks_off_is_one_clear_error(monkeypatch):
    import huggingface_hub

    class Dropped(Exception):
        """As the HTTP client raises it."""

    def drop(*args, **kwargs):
        raise Dropped("peer closed connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", drop)
    with pytest.raises(Unavailable, match=r"the Hub cannot be reached \(Dropped\)"):
        weights.load("hub", "tiny")
