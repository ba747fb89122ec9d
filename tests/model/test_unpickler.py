"""Whatever a checkpoint names, nothing of it is imported or run."""

import argparse
import collections
import datetime
import enum
import pathlib
import re
import zipfile

import numpy as np
import pytest
import torch

from exporter.errors import BadRequest
from exporter.model import checkpoint, pytorch
from exporter.model.unpickler import Stub
from tests.model import attacks

STATE = {f"layer{i}.weight": torch.arange(6.0).reshape(2, 3) + i for i in range(4)}


@pytest.fixture(autouse=True, scope="module")
def everything_is_imported(tmp_path_factory):
    """What reading itself imports is there before the watch begins."""
    path = tmp_path_factory.mktemp("warm") / "w.pth"
    for zipped in (True, False):
        torch.save({"model": STATE, "a": np.ones(2)}, path, _use_new_zipfile_serialization=zipped)
        checkpoint.read(path)
    attacks.archive(path, b"\x80\x04N.")
    with pytest.raises(BadRequest):
        checkpoint.read(path)


def refusal(path):
    with attacks.nothing_runs(path), pytest.raises(BadRequest) as caught:
        checkpoint.read(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


def test_the_watch_sees_what_a_real_unpickler_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    attacks.archive(tmp_path / "a.pth", b"\x80\x04" + attacks.HARMFUL["reduce"][0] + b".")
    with pytest.raises(AssertionError, match=r"os\.system"), attacks.nothing_runs(tmp_path / "a.pth"):
        torch.load(tmp_path / "a.pth", weights_only=False)
    assert (tmp_path / "exploded").exists()


@pytest.mark.parametrize("write", [attacks.archive, attacks.stream])
@pytest.mark.parametrize("kind", attacks.HARMFUL)
def test_a_file_that_names_what_does_harm_is_refused_by_that_name(kind, write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, name = attacks.HARMFUL[kind]
    write(tmp_path / "a.pth", b"\x80\x04" + content + b".")
    assert re.search(
        rf"refused, it carries code \(.*{re.escape(name)}.*\) and nothing of it was run", refusal(tmp_path / "a.pth")
    )
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("kind", ["reduce", "newobj", "setstate", "name builtins.eval"])
def test_harm_beside_a_sound_state_dict_refuses_the_whole_file(kind, tmp_path):
    (tmp_path / "a.pth").write_bytes(attacks.beside(STATE, attacks.HARMFUL[kind][0]))
    assert "carries code" in refusal(tmp_path / "a.pth")


@pytest.mark.parametrize("write", [attacks.archive, attacks.stream])
@pytest.mark.parametrize("kind", [*attacks.BROKEN, *attacks.ODD])
def test_pickles_that_mean_nothing_are_refused_in_one_line(kind, write, tmp_path):
    content = {**attacks.BROKEN, **attacks.ODD}[kind]
    write(tmp_path / "a.pth", b"\x80\x04" + content + b".")
    expected = "truncated or no PyTorch file" if kind in attacks.BROKEN else "state dict"
    assert expected in refusal(tmp_path / "a.pth")


@pytest.mark.parametrize("kind", attacks.ODD)
def test_tensors_beside_inert_objects_load(kind, tmp_path):
    path = tmp_path / "a.pth"
    path.write_bytes(attacks.beside(STATE, attacks.ODD[kind]))
    with attacks.nothing_runs(path):
        content = checkpoint.read(path)
    assert content.tensors.keys() == STATE.keys()
    assert all(torch.equal(content.tensors[key], STATE[key]) for key in STATE)


@pytest.mark.parametrize("kind", attacks.UNSTORED)
def test_tensors_without_their_numbers_are_refused(kind, tmp_path):
    entries = b"".join(attacks.text(f"w{i}") + attacks.UNSTORED[kind] + b"s" for i in range(4))
    attacks.archive(tmp_path / "a.pth", b"\x80\x04}" + entries + b".")
    assert re.search("truncated|refused", refusal(tmp_path / "a.pth"))


def test_many_names_of_one_storage_cannot_outgrow_their_file(tmp_path):
    entries = b"".join(attacks.text(f"w{i}") + attacks.tensor([4000], [1], elements=4000) + b"s" for i in range(100))
    attacks.archive(tmp_path / "a.pth", b"\x80\x04}" + entries + b".", [("0", bytes(16_000))])
    assert "its tensors claim 400000 elements" in refusal(tmp_path / "a.pth")


class Colour(enum.Enum):
    RED = 1


class Unknown:
    def __init__(self):
        self.tensors = [torch.ones(3)]
        self.inner = argparse.Namespace(a=1)


def test_harmless_pickles_load_and_say_what_was_skipped(tmp_path):
    path = tmp_path / "w.pth"
    args = argparse.Namespace(
        output_dir=pathlib.PurePosixPath("/x/y"), size=torch.Size([1, 2]), dtype=torch.float16, colour=Colour.RED
    )
    extras = {
        "args": args,
        "best": np.float64(70.5),
        "classes": np.array(["cat", "dog"]),
        "counts": np.arange(3, dtype=">i4"),
        "flags": {True, False},
        "frozen": frozenset({"a"}),
        "z": 1 + 2j,
        "raw": bytearray(b"ab"),
        "sizes": collections.defaultdict(list, a=[1]),
        "recent": collections.deque([1, 2], maxlen=3),
        "device": torch.device("cuda", 1),
        "when": datetime.datetime(2026, 1, 1),
        "unknown": Unknown(),
    }
    torch.save({"model": STATE, **extras}, path)
    with attacks.nothing_runs(path):
        content = checkpoint.read(path)
    assert content.tensors.keys() == STATE.keys()
    assert content.beside == {
        "args": {"output_dir": "/x/y", "size": [1, 2], "dtype": "torch.float16"},
        "best": 70.5,
        "classes": ["cat", "dog"],
        "counts": [0, 1, 2],
        "flags": content.beside["flags"],
        "frozen": ["a"],
        "z": 1 + 2j,
        "raw": b"ab",
        "sizes": {"a": [1]},
        "recent": [1, 2],
        "device": "cuda:1",
    }
    assert sorted(content.beside["flags"]) == [False, True]
    (note,) = content.notes
    assert note.startswith("skipped 3 objects of other programs: ")
    assert all(name in note for name in ("test_unpickler.Colour", "test_unpickler.Unknown", "datetime.datetime"))


def test_configurations_of_omegaconf_and_mmengine_become_plain(tmp_path):
    """Their pickles, written by opcodes: the libraries themselves are not installed."""
    text, name = attacks.text, attacks.name
    leaf = name("omegaconf.nodes", "AnyNode") + b")\x81}" + text("_val") + b"K\x07sb"
    tree = name("omegaconf.dictconfig", "DictConfig") + b")\x81}" + text("_content") + b"}" + text("lr") + leaf + b"ssb"
    config = name("mmengine.config.config", "ConfigDict") + b"}" + text("type") + text("ConvNeXt") + b"s\x85R"
    history = name("mmengine.logging.history_buffer", "HistoryBuffer") + b")\x81}b"
    extras = b"}" + text("a") + tree + b"s" + text("b") + config + b"s" + text("c") + history + b"s"
    (tmp_path / "a.pth").write_bytes(attacks.beside(STATE, extras))
    content = checkpoint.read(tmp_path / "a.pth")
    assert content.beside == {"x": {"a": {"lr": 7}, "b": {"type": "ConvNeXt"}}}
    assert content.notes == ("skipped 1 objects of other programs: mmengine.logging.history_buffer.HistoryBuffer",)


class HistoryBuffer:
    """As mmengine's: its state holds functions of the class, which protocol 2 pickles by getattr."""

    def mean(self):
        """Not called."""

    def __getstate__(self):
        return {"statistics": {"mean": HistoryBuffer.mean}, "log": np.ones(3)}


@pytest.mark.parametrize("zipped", [True, False])
def test_functions_of_a_class_are_named_and_not_looked_up(zipped, tmp_path):
    beside = {"message_hub": {"loss": HistoryBuffer(), "lr": HistoryBuffer()}, "state_dict": STATE}
    torch.save(beside, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    content = checkpoint.read(tmp_path / "a.pth")
    assert content.tensors.keys() == STATE.keys()
    assert any("test_unpickler.HistoryBuffer" in note for note in content.notes)


class Schedule:
    """As OneCycleLR of older PyTorch: its state holds a method of itself."""

    def anneal(self):
        """Not called."""


@pytest.mark.parametrize("zipped", [True, False])
def test_a_method_of_an_object_is_left_out_with_it(zipped, tmp_path):
    beside = {"lr_schedulers": [{"anneal_func": Schedule().anneal}], "state_dict": STATE}
    torch.save(beside, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    assert checkpoint.read(tmp_path / "a.ckpt").tensors.keys() == STATE.keys()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_every_floating_type_and_view_reads_as_it_was_written(dtype, zipped, tmp_path):
    whole = torch.randn(6, 8).to(getattr(torch, dtype))
    state = {"a": whole, "b": whole.t(), "c": whole[1:4, ::2], "d": torch.nn.Parameter(whole[2])}
    torch.save(state, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    tensors = checkpoint.read(tmp_path / "w.pt").tensors
    for key, value in state.items():
        assert tensors[key].dtype == value.dtype
        assert torch.equal(tensors[key].float(), value.detach().float())


def test_numbers_of_the_other_byte_order_are_swapped(tmp_path):
    entry = attacks.text("w") + attacks.tensor([4], [1]) + b"s"
    values = np.arange(4, dtype=">f4").tobytes()
    attacks.archive(tmp_path / "a.pth", b"\x80\x04}" + entry + b".", [("0", values)])
    with zipfile.ZipFile(tmp_path / "a.pth", "a") as file:
        file.writestr("archive/byteorder", b"big")
    assert checkpoint.read(tmp_path / "a.pth").tensors["w"].tolist() == [0, 1, 2, 3]


def test_only_the_part_that_is_taken_is_read(tmp_path, monkeypatch):
    torch.save({"model": STATE, "model_ema": STATE, "optimizer": {"state": {0: torch.ones(9)}}}, tmp_path / "w.pth")
    read = []
    real = pytorch.PyTorchFile.tensor
    monkeypatch.setattr(
        pytorch.PyTorchFile, "tensor", lambda file, pointer: read.append(pointer) or real(file, pointer)
    )
    checkpoint.read(tmp_path / "w.pth")
    assert len(read) == len(STATE)


def test_an_interrupt_is_not_swallowed(tmp_path, monkeypatch):
    torch.save(STATE, tmp_path / "w.pth")

    def interrupt(*_):
        raise KeyboardInterrupt

    for target, name in ((pytorch.Unpickler, "load"), (pytorch.PyTorchFile, "tensor")):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                checkpoint.read(tmp_path / "w.pth")


def test_a_stub_keeps_its_name_and_nothing_else():
    assert Stub.__slots__ == ("is_module", "kind", "name")
    assert not any(callable(getattr(Stub("os.system"), name)) for name in Stub.__slots__)


def test_a_plain_pickle_is_no_pytorch_file(tmp_path):
    import pickle

    (tmp_path / "w.pth").write_bytes(pickle.dumps({"a": 1}))
    assert "a pickle that torch.save did not write" in refusal(tmp_path / "w.pth")
