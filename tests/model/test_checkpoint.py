"""Which part of a checkpoint is taken, what is dropped and said, and what is refused with what to do."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from exporter.errors import BadRequest, Unavailable
from exporter.model import checkpoint, hub, parts, sources, weights
from tests.conftest import tiny_state

STATE = {f"layer{i}.weight": torch.full((2, 3), float(i)) for i in range(5)}
OTHER = {key: value + 100 for key, value in STATE.items()}


def saved(tmp_path, content, name="w.pth"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


def same(tensors, state=STATE):
    return tensors.keys() == state.keys() and all(torch.equal(tensors[key], state[key]) for key in state)


@pytest.mark.parametrize("wrapper", parts.WRAPPERS)
def test_every_usual_wrapper_is_seen_through(wrapper, tmp_path):
    content = checkpoint.read(saved(tmp_path, {wrapper: STATE, "epoch": 3}))
    assert same(content.tensors)
    assert content.beside == {"epoch": 3}
    assert content.notes == ()


@pytest.mark.parametrize("suffix", checkpoint.SUFFIXES[1:6])
def test_every_suffix_of_pytorch_is_read(suffix, tmp_path):
    assert same(checkpoint.read(saved(tmp_path, STATE, f"w.pth{suffix}")).tensors)


def test_wrappers_nest_and_what_lies_beside_each_is_kept(tmp_path):
    nested = {
        "model": {"state_dict": {"module": STATE}, "arch": "a", "epoch": 1},
        "epoch": 2,
        "class_to_idx": {"cat": 0},
    }
    content = checkpoint.read(saved(tmp_path, nested))
    assert same(content.tensors)
    assert content.beside == {"epoch": 2, "class_to_idx": {"cat": 0}, "arch": "a"}


def test_plain_weights_are_preferred_to_their_average_and_a_note_says_how_to_take_it(tmp_path):
    path = saved(tmp_path, {"model_ema": OTHER, "ema": OTHER, "model": STATE})
    content = checkpoint.read(path)
    assert same(content.tensors)
    assert content.notes == ("w.pth holds model and model_ema and ema; taking model (w.pth#model_ema takes another)",)
    assert same(checkpoint.read(path, "model_ema").tensors, OTHER)


@pytest.mark.parametrize("part", ["a.b/model_ema", "a.b.model_ema", "a.b"])
def test_a_part_is_any_path_of_keys(part, tmp_path):
    path = saved(tmp_path, {"model": STATE, "a.b": {"model_ema": OTHER}})
    assert same(checkpoint.read(path, part).tensors, OTHER)


@pytest.mark.parametrize("part", ["b", "model/x", "a/", "model.layer0.weight"])
def test_a_wrong_part_names_those_that_are_there(part, tmp_path):
    path = saved(tmp_path, {"model": STATE, "a": {"model_ema": OTHER}})
    if part == "a/":
        assert same(checkpoint.read(path, part).tensors, OTHER)
    else:
        with pytest.raises(BadRequest, match=re.escape(f"no part {part!r}; it has model, a, a/model_ema")):
            checkpoint.read(path, part)


def test_a_single_part_of_another_name_is_taken_with_a_note(tmp_path):
    content = checkpoint.read(saved(tmp_path, {"run": {"classifier": STATE}, "optimizer": {"state": OTHER}}))
    assert same(content.tensors)
    assert content.notes == (
        "w.pth: taking run/classifier, the only part with weights",
        "left out 5 tensors beside the weights: optimizer (5)",
    )


def test_several_parts_of_other_names_are_refused_by_name(tmp_path):
    path = saved(tmp_path, {"generator": STATE, "discriminator": OTHER})
    with pytest.raises(BadRequest, match=r"2 parts with weights \(generator, discriminator\); take one as w.pth#gen"):
        checkpoint.read(path)
    assert same(checkpoint.read(path, "discriminator").tensors, OTHER)


def test_an_averaged_model_of_pytorch_is_read(tmp_path):
    from torch.optim.swa_utils import AveragedModel

    model = torch.nn.Linear(3, 2)
    content = checkpoint.read(saved(tmp_path, {"model_ema": AveragedModel(model).state_dict()}))
    assert same(content.tensors, {f"module.{key}": value for key, value in model.state_dict().items()})
    assert content.notes == ("dropped 1 tensors that are no weights: n_averaged",)


def test_what_is_no_weight_is_dropped_counted_and_named(tmp_path):
    odd = {
        "bn.num_batches_tracked": torch.tensor(3),
        "half.num_batches_tracked": torch.tensor(3.0).half(),
        "index": torch.arange(3),
        "empty": torch.zeros(0, 3),
        "stem.total_ops": torch.zeros(1, dtype=torch.float64),  # of thop.profile
        "complex": torch.zeros(2, dtype=torch.complex64),
    }
    for path in (saved(tmp_path, STATE | odd), tmp_path / "w.safetensors"):
        if path.suffix == ".safetensors":
            del odd["complex"]
            save_file(STATE | odd, path)
        content = checkpoint.read(path)
        assert same(content.tensors)
        (note,) = content.notes
        assert note.startswith(f"dropped {len(odd)} tensors that are no weights: ")


@pytest.mark.parametrize("content", [{"loss": torch.tensor(0.5)}, {"a": torch.arange(4)}, {}, {"a": 1}, [STATE], 3])
def test_files_without_weights_are_refused(content, tmp_path):
    with pytest.raises(BadRequest, match=r"w\.pth: "):
        checkpoint.read(saved(tmp_path, content))


@pytest.mark.parametrize("name", ["head", "classifier", "fc"])
def test_a_classifier_that_was_saved_beside_its_backbone_is_read_with_it(name, tmp_path):
    head = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    content = checkpoint.read(saved(tmp_path, {"backbone": STATE, name: head, "epoch": 3}))
    whole = {f"backbone.{key}": value for key, value in STATE.items()} | {f"{name}.{k}": v for k, v in head.items()}
    assert same(content.tensors, whole)
    assert content.beside == {"epoch": 3}
    assert f"backbone and {name} are read as one network" in content.notes


def test_shards_of_several_processes_are_refused_with_what_to_do(tmp_path):
    from torch import distributed
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        path = saved(tmp_path, {"model": {k: distribute_tensor(v, mesh, [Replicate()]) for k, v in STATE.items()}})
    finally:
        distributed.destroy_process_group()
    with pytest.raises(BadRequest, match=r"w\.pth: .* \(DTensor, as of FSDP2\); gather them .*get_model_state_dict"):
        checkpoint.read(path)


def test_arrays_of_numpy_are_refused_with_what_to_do(tmp_path):
    path = saved(tmp_path, {"model": {key: value.numpy() for key, value in STATE.items()}})
    with pytest.raises(
        BadRequest, match=r"w\.pth: arrays of NumPy, expected tensors; save them as tensors: torch.save"
    ):
        checkpoint.read(path)


def test_empty_weights_of_deepspeed_are_refused_with_what_to_do(tmp_path):
    path = saved(tmp_path, {"module": dict.fromkeys(STATE, torch.zeros(0)), "ds_version": "0.14.0"})
    with pytest.raises(BadRequest, match=r"w\.pth: DeepSpeed keeps the weights in other files .*run zero_to_fp32\.py"):
        checkpoint.read(path)


def test_a_folder_of_checkpoints_names_them(tmp_path):
    for number in (10, 20):
        (tmp_path / f"checkpoint-{number}").mkdir()
        save_file(STATE, tmp_path / f"checkpoint-{number}" / "model.safetensors")
    with pytest.raises(
        BadRequest, match=r"no weights in it, but in its folders checkpoint-10, checkpoint-20; give one"
    ):
        sources.weights_in(tmp_path)


@pytest.mark.parametrize(
    "key",
    ["fc._packed_params._packed_params", "fc.weight.absmax", "fc.weight.quant_state.bitsandbytes__nf4", "fc.qweight",
     "fc.zero_point", "fc.activation_post_process.min_val", "fc.weight_scale"],
)  # fmt: skip
def test_quantized_weights_are_refused_with_what_to_do(key, tmp_path):
    with pytest.raises(
        BadRequest, match=r"quantized weights \(.*\); load the float weights .* torch.save\(model.state_"
    ):
        checkpoint.read(saved(tmp_path, STATE | {key: torch.ones(2)}))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_quantized_tensor_is_refused(tmp_path):
    quantized = torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)
    with pytest.raises(BadRequest, match=r"quantized weights \(fc.weight\)"):
        checkpoint.read(saved(tmp_path, STATE | {"fc.weight": quantized}))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_whole_pickled_module_is_refused_with_the_line_that_saves_its_weights(wrapped, tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    path = saved(tmp_path, {"model": module, "epoch": 1} if wrapped else module)
    with pytest.raises(
        BadRequest, match=r"a whole pickled module \(torch.nn.*Sequential\).*state_dict\(\), 'weights.pth'"
    ):
        checkpoint.read(path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_program_is_refused_with_the_line_that_saves_its_weights(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "w.pt")
    with pytest.raises(BadRequest, match=r"a TorchScript program.*torch.jit.load\('w.pt'\).state_dict\(\)"):
        checkpoint.read(tmp_path / "w.pt")


def test_a_program_of_torch_export_is_refused_with_the_line_that_saves_its_weights(tmp_path):
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),)), tmp_path / "w.pt")
    with pytest.raises(BadRequest, match=r"written by torch.export.save.*torch.export.load\('w.pt'\).state_dict"):
        checkpoint.read(tmp_path / "w.pt")
    torch.save(torch.export.load(tmp_path / "w.pt").state_dict, tmp_path / "weights.pth")
    assert set(checkpoint.read(tmp_path / "weights.pth").tensors) == {"weight", "bias"}


def test_lora_adapters_are_refused_as_file_folder_and_keys(tmp_path):
    adapter = {"base_model.model.fc.lora_A.weight": torch.ones(2, 2)}
    save_file(adapter, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    for source in (tmp_path, tmp_path / "adapter_model.safetensors", saved(tmp_path, STATE | adapter)):
        with pytest.raises(BadRequest, match=r"a LoRA adapter.*merge_and_unload\(\).save_pretrained"):
            weights.load(str(source))


def test_a_merged_network_in_the_folder_of_its_adapter_is_read(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file(STATE, tmp_path / "model.safetensors")
    assert sources.weights_in(tmp_path) == tmp_path / "model.safetensors"


def sharded(tmp_path, form="safetensors"):
    stem = "model" if form == "safetensors" else "pytorch_model"
    where = {}
    for number, keys in enumerate((sorted(STATE)[:2], sorted(STATE)[2:]), 1):
        name = f"{stem}-0000{number}-of-00002.{form}"
        shard = {key: STATE[key] for key in keys}
        save_file(shard, tmp_path / name) if form == "safetensors" else torch.save(shard, tmp_path / name)
        where |= dict.fromkeys(keys, name)
    index = tmp_path / f"{stem}.{form}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return index, where


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_several_files_with_an_index_are_one_checkpoint(form, tmp_path):
    index, where = sharded(tmp_path, form)
    assert sources.weights_in(tmp_path) == index
    assert same(checkpoint.read(index).tensors)
    assert checkpoint.files(index) == (index, *sorted({tmp_path / name for name in where.values()}))
    with pytest.raises(BadRequest, match="one of several files; give the folder"):
        checkpoint.read(tmp_path / next(iter(where.values())))
    index.unlink()
    with pytest.raises(BadRequest, match=r"one of several files, and their index \(\*.index.json\) is missing"):
        checkpoint.read(tmp_path / next(iter(where.values())))


def test_the_only_file_of_one_is_a_checkpoint_without_an_index(tmp_path):
    save_file(STATE, tmp_path / "model-00001-of-00001.safetensors")
    assert same(checkpoint.read(sources.weights_in(tmp_path)).tensors)


def test_an_index_is_a_cache_key_with_all_its_files(tmp_path):
    sharded(tmp_path)
    before = weights.fingerprint(str(tmp_path))
    save_file({key: OTHER[key] for key in sorted(STATE)[2:]}, tmp_path / "model-00002-of-00002.safetensors")
    assert weights.fingerprint(str(tmp_path)) != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda where: where | {"layer0.weight": "model-9.safetensors"},
            "names model-9.safetensors, which is not there",
        ),
        (lambda where: where | {"extra": next(iter(where.values()))}, r"lists 1 tensors that .* not have \(extra\)"),
        (lambda where: where | {"a": "../w.safetensors"}, r"names '\.\./w.safetensors', which leads out of its folder"),
        (lambda where: where | {"a": "/w.safetensors"}, "leads out of its folder"),
        (lambda where: where | {"a": "b/w.safetensors"}, "leads out of its folder"),
        (lambda where: where | {"a": "config.json"}, "which is no file of weights"),
        (lambda where: where | {"a": 3}, "no index of weights"),
        (lambda where: {}, "no index of weights"),
        (lambda where: None, "no index of weights"),
    ],
)
def test_an_index_that_does_not_fit_its_files_is_refused(change, message, tmp_path):
    index, where = sharded(tmp_path)
    index.write_text(json.dumps({"weight_map": change(where)}))
    with pytest.raises(BadRequest, match=message):
        checkpoint.read(index)


@pytest.mark.parametrize("content", ["", "[]", "[" * 100_000, '{"weight_map"', "\0"])
def test_an_index_that_is_none_is_refused(content, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(BadRequest, match="no index of weights"):
        checkpoint.read(tmp_path / "model.safetensors.index.json")


def test_tensors_that_an_index_does_not_list_are_left_out_with_a_note(tmp_path):
    index, where = sharded(tmp_path)
    del where["layer0.weight"]
    index.write_text(json.dumps({"weight_map": where}))
    content = checkpoint.read(index)
    assert "layer0.weight" not in content.tensors
    assert content.notes == (f"left out 1 tensors that {index.name} does not list: layer0.weight",)


def test_the_only_file_of_weights_in_a_folder_is_taken_whatever_its_name(tmp_path):
    best = saved(tmp_path, STATE, "best.pth")
    saved(tmp_path, {}, "optimizer.pt")
    assert sources.weights_in(tmp_path) == best
    saved(tmp_path, STATE, "last.ckpt")
    with pytest.raises(BadRequest, match=r"2 files of weights \(best.pth, last.ckpt\); give one FILE"):
        sources.weights_in(tmp_path)


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_names_of_openclip_are_known_in_folders_and_on_the_hub(name, tmp_path, monkeypatch):
    import huggingface_hub

    saved(tmp_path, STATE, name)
    saved(tmp_path, STATE, "other.bin")
    assert sources.weights_in(tmp_path) == tmp_path / name
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    assert hub.cached("someone/clip") == tmp_path


class TestKeras:
    """Files of keras.applications' ConvNeXt: depths (1, 1, 1, 1), written in Keras' structure."""

    DIMS = (4, 4, 8, 8)

    def layers(self):
        """(path in the file, name of the layer, arrays, module of ours)."""
        draw = torch.Generator().manual_seed(0)
        random = lambda *shape: torch.randn(shape, generator=draw).numpy()  # noqa: E731
        yield "sequential/layers/conv2d", "t_stem_conv", [random(4, 4, 3, 4), random(4)], "downsample_layers.0.0"
        yield (
            "sequential/layers/layer_normalization",
            "t_stem_layernorm",
            [random(4), random(4)],
            "downsample_layers.0.1",
        )
        for i, dim in enumerate(self.DIMS):
            if i:
                old, path = self.DIMS[i - 1], f"sequential_{i}/layers"
                yield (
                    f"{path}/layer_normalization",
                    f"t_downsampling_layernorm_{i - 1}",
                    [random(old)] * 2,
                    f"downsample_layers.{i}.0",
                )
                yield (
                    f"{path}/conv2d",
                    f"t_downsampling_conv_{i - 1}",
                    [random(2, 2, old, dim), random(dim)],
                    f"downsample_layers.{i}.1",
                )
            end, name = f"_{i}" if i else "", f"t_stage_{i}_block_0"
            yield f"conv2d{end}", f"{name}_depthwise_conv", [random(7, 7, 1, dim), random(dim)], f"stages.{i}.0.dwconv"
            yield f"layer_normalization{end}", f"{name}_layernorm", [random(dim), random(dim)], f"stages.{i}.0.norm"
            yield (
                f"dense_{2 * i + 1}",
                f"{name}_pointwise_conv_1",
                [random(dim, 4 * dim), random(4 * dim)],
                f"stages.{i}.0.pwconv1",
            )
            yield (
                f"dense_{2 * i + 2}",
                f"{name}_pointwise_conv_2",
                [random(4 * dim, dim), random(dim)],
                f"stages.{i}.0.pwconv2",
            )
            yield f"layer_scale{end}", f"{name}_layer_scale", [random(dim)], f"stages.{i}.0"
        yield "layer_normalization_9", "t_head_layernorm", [random(8), random(8)], "norm"
        yield "dense_99", "t_head_dense", [random(8, 5), random(5)], "head"

    def write(self, path):
        h5py = pytest.importorskip("h5py", reason="needs h5py")
        with h5py.File(path, "w") as file:
            for where, name, arrays, _ in self.layers():
                group = file.create_group(f"layers/{where}/vars")
                group.attrs["name"] = name
                for number, array in enumerate(arrays):
                    group[str(number)] = array
            file.create_group("layers/normalization/vars").attrs["name"] = "t_prestem_normalization"
        return path

    def test_weights_get_the_names_and_axes_of_the_paper(self, tmp_path):
        content = checkpoint.read(self.write(tmp_path / "m.weights.h5"))
        self.compare(content)
        assert content.beside["keras"]["mean"] == pytest.approx([123.675, 116.28, 103.53])
        assert content.beside["keras"]["variance"] == pytest.approx([58.395**2, 57.12**2, 57.375**2])
        assert content.notes == (
            "m.weights.h5: Keras puts a softmax behind the classifier; here the outputs are the logits before it",
        )

    def compare(self, content):
        expected = 0
        for _, name, arrays, module in self.layers():
            ends = ["gamma"] if name.endswith("layer_scale") else ["weight", "bias"]
            for end, array in zip(ends, arrays, strict=True):
                array = torch.from_numpy(array)
                if array.ndim == 4:
                    array = torch.einsum("hwio->oihw", array)
                assert torch.equal(content.tensors[f"{module}.{end}"], array.T if array.ndim == 2 else array)
                expected += 1
        assert len(content.tensors) == expected

    def test_an_archive_brings_mean_and_variance_in_its_configuration(self, tmp_path):
        import zipfile

        self.write(tmp_path / "m.weights.h5")
        layer = {"class_name": "Normalization", "config": {"mean": [[1.0, 2.0, 3.0]], "variance": [4.0, 5.0, 6.0]}}
        with zipfile.ZipFile(tmp_path / "m.keras", "w") as archive:
            archive.write(tmp_path / "m.weights.h5", "model.weights.h5")
            archive.writestr("config.json", json.dumps({"config": {"layers": [layer]}}))
        content = checkpoint.read(tmp_path / "m.keras")
        self.compare(content)
        assert content.beside == {"keras": {"mean": [1.0, 2.0, 3.0], "variance": [4.0, 5.0, 6.0]}}
        preprocessing = weights.load(str(tmp_path / "m.keras")).preprocessing
        assert preprocessing.mean == pytest.approx([1 / 255, 2 / 255, 3 / 255])
        assert preprocessing.std == pytest.approx([2 / 255, 5**0.5 / 255, 6**0.5 / 255])

    def test_a_link_to_another_file_is_refused(self, tmp_path):
        h5py = pytest.importorskip("h5py", reason="needs h5py")
        self.write(tmp_path / "m.weights.h5")
        with h5py.File(tmp_path / "m.weights.h5", "a") as file:
            file["layers/other"] = h5py.ExternalLink("/etc/passwd", "/")
        with pytest.raises(BadRequest, match="other is a link to elsewhere"):
            checkpoint.read(tmp_path / "m.weights.h5")

    def test_arrays_larger_than_their_file_are_refused(self, tmp_path):
        h5py = pytest.importorskip("h5py", reason="needs h5py")
        with h5py.File(tmp_path / "m.h5", "w") as file:
            file.create_dataset("a", (1 << 16, 1 << 16), "f4", chunks=(64, 64), compression="gzip")
        with pytest.raises(BadRequest, match="unpack to more"):
            checkpoint.read(tmp_path / "m.h5")

    def test_another_network_and_damage_are_refused(self, tmp_path):
        h5py = pytest.importorskip("h5py", reason="needs h5py")
        with h5py.File(tmp_path / "m.h5", "w") as file:
            file["conv1/kernel"] = torch.ones(3).numpy()
        with pytest.raises(
            BadRequest, match=r"not a ConvNeXt of keras.applications: 1 arrays of other layers \(conv1/ker"
        ):
            checkpoint.read(tmp_path / "m.h5")
        for name in ("n.h5", "n.keras"):
            (tmp_path / name).write_bytes((tmp_path / "m.h5").read_bytes()[:300])
            with pytest.raises(BadRequest, match="truncated or no Keras file"):
                checkpoint.read(tmp_path / name)

    def test_without_h5py_the_line_that_installs_it_is_given(self, tmp_path, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "h5py", None)
        (tmp_path / "m.h5").touch()
        with pytest.raises(Unavailable, match=r"needs h5py; pip install 'convnext-export\[keras\]'"):
            checkpoint.read(tmp_path / "m.h5")


def test_a_wrapper_is_taken_whatever_few_tensors_lie_beside_it(tmp_path):
    content = {"model": tiny_state(), **{name: torch.ones(3) for name in ("mean", "std", "class_weights", "losses")}}
    torch.save({**content, "keras": "2.1"}, tmp_path / "weights.pth")
    assert weights.load(str(tmp_path / "weights.pth")).task == "classify"
