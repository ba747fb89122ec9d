"""Files from anywhere: whatever is in them, the answer is one clear error of ours, never a traceback."""

import io
import json
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from exporter import artifact, discover, report
from exporter.artifact import sidecar_path
from exporter.artifact.sidecar import Preprocessing
from exporter.compare import parse_limits
from exporter.compare.reports import compare_reports
from exporter.data import images
from exporter.data.samples import open_samples
from exporter.errors import ExporterError
from exporter.model import weights
from exporter.model.config import read_config
from tests import once
from tests.conftest import tiny_state

MANY = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_subnormal=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
SPOTS = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True, allow_subnormal=False), st.integers(0, 255)), min_size=1, max_size=8
)


def spoil(content, spots, cut):
    """The bytes with some replaced and the end cut off."""
    spoilt = bytearray(content)
    for where, value in spots:
        spoilt[int(where * len(spoilt))] = value
    return bytes(spoilt[: max(1, int(len(spoilt) * cut))])


def ours(action, *arguments):
    """Run something that may fail only in our own words."""
    try:
        return action(*arguments)
    except ExporterError as error:
        assert str(error)
        return None


def pickled(content, zipped=True):
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


SMALL = {"stages.0.0.dwconv.weight": torch.ones(4, 1, 7, 7), "head.weight": torch.ones(2, 4)}


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
@MANY
@given(spots=SPOTS, cut=st.floats(0.2, 1))
def test_spoilt_checkpoints(kind, spots, cut, tmp_path):
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    path.write_bytes(spoil(save(SMALL) if kind == "safetensors" else pickled(SMALL, kind == "zip"), spots, cut))
    ours(weights.load, str(path))


def test_a_checkpoint_that_holds_itself(tmp_path):
    snake = {}
    snake["model"] = snake
    (tmp_path / "w.pth").write_bytes(pickled(snake))
    assert ours(weights.load, str(tmp_path / "w.pth")) is None


def test_json_nested_deeper_than_the_stack(onnx_copy, tmp_path):
    deep = "[" * 50_000 + "]" * 50_000
    for path, read in [
        (tmp_path / "config.json", lambda: read_config(tmp_path)),
        (tmp_path / "report.json", lambda: report.load(tmp_path / "report.json")),
        (sidecar_path(onnx_copy.path), lambda: artifact.load(onnx_copy.path)),
    ]:
        path.write_text('{"schema": 1, "recipe": ' + deep + "}")
        assert ours(read) is None


@pytest.mark.parametrize("word", ["~nobody_of_this_name/x", "x" * 5000, "a\0b"])
def test_paths_that_no_file_can_have(word):
    assert ours(weights.load, word) is None
    assert ours(open_samples, word, Preprocessing(), (), 10) is None


@MANY
@given(content=st.dictionaries(st.text(max_size=20), st.integers() | st.text() | st.lists(st.integers())))
def test_checkpoints_of_anything_but_tensors(content, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(pickled(content))
    assert ours(weights.load, str(path)) is None


@MANY
@given(data=st.data())
def test_checkpoints_with_keys_and_shapes_of_their_own(data, tmp_path):
    state = tiny_state()
    for key in data.draw(st.lists(st.sampled_from(sorted(state)), min_size=1, max_size=4, unique=True)):
        shape = data.draw(st.lists(st.integers(0, 5), max_size=5))
        change = data.draw(st.sampled_from(["drop", "reshape", "rename"]))
        old = state.pop(key)
        if change == "reshape":
            state[key] = torch.zeros(shape)
        elif change == "rename":
            state[key + data.draw(st.text("abc.0123", max_size=6))] = old
    path = tmp_path / "weights.safetensors"
    path.write_bytes(save({key: value.contiguous() for key, value in state.items()}))
    ours(weights.load, str(path))


@MANY
@given(config=JSON, recipe=JSON)
def test_configurations_of_any_content(config, recipe, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(recipe))
    ours(read_config, tmp_path)


@MANY
@given(
    labels=JSON, cfg=st.dictionaries(st.sampled_from(["input_size", "crop_pct", "interpolation", "mean", "std"]), JSON)
)
def test_configurations_with_the_right_keys(labels, cfg, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"id2label": labels, "pretrained_cfg": cfg}))
    ours(read_config, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"id2label": labels}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 224, "image_mean": labels, "image_std": 1}))
    ours(read_config, tmp_path)


@MANY
@given(spots=SPOTS, cut=st.floats(0.2, 1))
def test_spoilt_sidecars(spots, cut, onnx_copy):
    path = sidecar_path(onnx_copy.path)
    whole = path.read_bytes()
    spoilt = spoil(whole, spots, cut)
    path.write_bytes(spoilt)
    try:
        assert spoilt == whole or ours(artifact.load, onnx_copy.path) in (None, onnx_copy)
    finally:
        path.write_bytes(whole)


@MANY
@given(content=JSON)
def test_sidecars_and_reports_of_any_content(content, onnx_copy):
    path = sidecar_path(onnx_copy.path)
    whole = path.read_bytes()
    path.write_text(json.dumps(content))
    try:
        assert ours(artifact.load, onnx_copy.path) is None
        assert ours(report.load, path) is None
    finally:
        path.write_bytes(whole)


METRIC = st.sampled_from(
    ["p50_ms", "eager_p50_ms", "speedup", "p99_ms", "top1", "top1_eager", "cosine", "bytes", "block_error", "other"]
)
NUMBER = st.none() | st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False)
FINDING = st.fixed_dictionaries(
    {"check": st.sampled_from(["latency", "regression", "parity", "blocks", "?"]), "metric": METRIC, "value": NUMBER},
    optional={
        "case": st.sampled_from(["", "batch 1", "x"]),
        "limit": NUMBER,
        "low": NUMBER,
        "high": NUMBER,
        "passed": st.booleans(),
        "detail": st.text(max_size=20),
        "samples": st.lists(st.floats(-1e9, 1e9, allow_subnormal=False), max_size=6),
        "launches": st.lists(st.integers(-2, 9), max_size=4),
    },
)
REPORT = st.fixed_dictionaries(
    {
        "schema": st.just(1),
        "passed": st.booleans(),
        "recipe": st.dictionaries(st.text(max_size=5), JSON, max_size=2),
        "artifact": st.dictionaries(st.sampled_from(["path", "backend", "precision", "sha256", "variant"]), JSON),
        "environment": st.dictionaries(st.sampled_from(["cpu", "isa", "cores", "versions", "session", "timing"]), JSON),
        "findings": st.lists(FINDING, max_size=5),
    }
)


@settings(MANY, max_examples=30)
@given(content=REPORT)
def test_reports_that_are_well_formed_and_mean_nothing(content, tmp_path):
    """Every format writes them, and a comparison judges them or says why not."""
    (tmp_path / "r.json").write_text(json.dumps(content))
    loaded = ours(report.load, tmp_path / "r.json")
    if loaded is None:
        return
    for form in discover.names("exporter.report.formats"):
        ours(discover.load("exporter.report.formats", form, "RENDER"), [loaded])
    for limit in ("p50_ms:5%", "bytes:1%", "top1_drop:1"):
        ours(compare_reports, [(loaded, loaded)], parse_limits([limit]), ())


@MANY
@given(text=st.text(max_size=200))
def test_manifests_of_any_content(text, tmp_path):
    (tmp_path / "m.csv").write_text(text, "utf-8", errors="surrogatepass")
    ours(open_samples, str(tmp_path / "m.csv"), Preprocessing(), (), 10)


@MANY
@given(spots=SPOTS, cut=st.floats(0.2, 1))
def test_spoilt_arrays(spots, cut, tmp_path):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=np.zeros((2, 3, 8, 8), np.float32), labels=np.arange(2))
    (tmp_path / "a.npz").write_bytes(spoil(buffer.getvalue(), spots, cut))
    samples = ours(open_samples, str(tmp_path / "a.npz"), Preprocessing(size=8, resize=8), (), 10)
    if samples:
        ours(list, samples.batches(2))


def test_an_npz_that_claims_more_than_it_holds_is_refused(tmp_path):
    """A header of 2⁴⁰ images in front of nothing."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (2**40, 3, 8, 8)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue())
    samples = open_samples(str(tmp_path / "a.npz"), Preprocessing(size=8, resize=8), (), 10)
    with pytest.raises(ExporterError, match="ends after 0 of"):
        list(samples.batches(4))


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp", "tiff", "bmp"])
@MANY
@given(spots=SPOTS, cut=st.floats(0.2, 1))
def test_spoilt_images(kind, spots, cut, tmp_path):
    from PIL import Image

    from exporter.data.synthetic import dead_leaves

    buffer = io.BytesIO()
    Image.fromarray(dead_leaves(24, 0)).save(buffer, kind)
    path = tmp_path / f"a.{kind}"
    path.write_bytes(spoil(buffer.getvalue(), spots, cut))
    try:
        images.read(path, Preprocessing(size=8, resize=8))
    except images.Unreadable as error:
        assert str(error)


def test_a_checkpoint_that_unpacks_to_more_than_it_is_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**24))
    with pytest.raises(ExporterError, match=r"that unpack to 16777216; a checkpoint is not compressed"):
        weights.load(str(tmp_path / "a.pth"))


@pytest.mark.parametrize("swapped", [False, True])
def test_weights_of_a_graph_that_lie_elsewhere_are_not_read(swapped, onnx_copy):
    """The sidecar is sealed again: its digests are right, and still the graph points out of its folder."""
    import onnx

    graph = onnx.load(onnx_copy.path)
    tensor = graph.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", f"../{'x' * 150}.bin"), ("length", "16")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    content = graph.SerializeToString()
    entry = b"\x0a\x08location\x12\x9d\x01" + f"../{'x' * 150}.bin".encode()
    assert entry in content
    if swapped:  # protobuf takes fields in any order
        content = content.replace(entry, entry[10:] + entry[:10])
    onnx_copy.path.write_bytes(content)
    sidecar_path(onnx_copy.path).unlink()
    artifact.seal(onnx_copy.path.parent, onnx_copy.path.name, onnx_copy.sidecar)
    with pytest.raises(ExporterError, match=r"would be read from \.\./x{150}\.bin, which its sidecar does not name"):
        artifact.load(onnx_copy.path)


def test_an_artifact_whose_file_is_empty_or_no_graph(onnx_copy):
    for content in (b"", b"location" * 9):
        onnx_copy.path.write_bytes(content)
        sidecar_path(onnx_copy.path).unlink()
        artifact.seal(onnx_copy.path.parent, onnx_copy.path.name, onnx_copy.sidecar)
        ours(artifact.load, onnx_copy.path)


@pytest.mark.parametrize("name", ["x" * 300 + ".png", "a/" * 3000 + "b.png", "ü" * 130 + ".png"])
@pytest.mark.parametrize("head", ["", "# convnext-export calibration set\n# source: .\n", "source"])
def test_a_manifest_with_names_that_no_file_can_have(name, head, tmp_path):
    from exporter.data.calibration import open_calibration

    if head == "source":
        head, name = f"# convnext-export calibration set\n# source: {name}\n", "a.png"
    (tmp_path / "m.csv").write_text(f"{head}sha256,path\n{'0' * 64},{name}\n")
    for action in (open_samples, open_calibration):
        with pytest.raises(ExporterError, match="is no name that a file can have"):
            action(
                str(tmp_path / "m.csv"), Preprocessing(size=8, resize=8), *([()] if action is open_samples else []), 10
            )


def test_a_manifest_does_not_follow_links_out_of_its_folder(tmp_path):
    from PIL import Image

    (tmp_path / "in").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "secret.png")
    (tmp_path / "in" / "a.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "in" / "m.csv").write_text("path\na.png\n")
    with pytest.raises(ExporterError, match=r"'a\.png' is a link out of"):
        open_samples(str(tmp_path / "in" / "m.csv"), Preprocessing(size=8, resize=8), (), 10)
    (tmp_path / "in" / "a.png").unlink()
    (tmp_path / "in" / "b.png").write_bytes((tmp_path / "secret.png").read_bytes())
    (tmp_path / "in" / "a.png").symlink_to("b.png")
    assert open_samples(str(tmp_path / "in" / "m.csv"), Preprocessing(size=8, resize=8), (), 10).total == 1


SPOILT = {"checkpoint": 150, "pickle": 150, "recipe": 150, "sidecar": 150, "manifest": 300, "report": 20}


@pytest.mark.slow
def test_hundreds_of_files_spoilt_at_random(tmp_path, monkeypatch):
    """What half an hour of it found is in the results; this is so that it stays as it is."""
    from benchmarks import fuzz

    once.fork_processes_of(fuzz, monkeypatch)
    result = fuzz.fuzz(3600, tmp_path / "faults", most=SPOILT)
    assert not result.faults, result.faults
    assert result.read == SPOILT
    assert all(0 < result.sound[name] < result.read[name] for name in result.read), "none too deep, none too shallow"
    assert result.peak_bytes < fuzz.MOST_BYTES
