"""`--keep`: parts stay in higher precision, whatever the artifact's is; and a recipe as the command that builds it."""

import shlex
from types import SimpleNamespace

import msgspec
import onnx_ir as ir
import pytest

from exporter import backends, keep
from exporter import build as builds
from exporter.build import resolve
from exporter.build.int8.search import search
from exporter.errors import BadRequest
from exporter.model import structure
from exporter.recipe import Export, Model, PreprocessingOptions, Quantization, Recipe
from tests.build.test_int8 import candidate
from tests.conftest import build, recipe_of

KEPT = ("stages.1.0", "downsample_layers.2", "head")


def dtypes(artifact):
    """The types of the weights of each part."""
    graph = ir.load(artifact.path).graph
    every = {}
    for node in graph:
        module = node.metadata_props.get("module", "") or node.name.rpartition("/")[0]
        weights = [value for value in node.inputs[1:] if value is not None and value.const_value is not None]
        if node.op_type in ("Conv", "MatMul", "Gemm") and weights:
            part = next((name for name in (*KEPT, "head") if structure.is_in(module, [name])), "others")
            every.setdefault(part, set()).add(str(weights[0].dtype))
    return every


def test_parts_stay_in_fp32_and_the_rest_is_fp16(tiny, tmp_path):
    artifact = build(tiny, tmp_path, precision="fp16", keep=KEPT)
    assert dtypes(artifact) == {**{part: {"FLOAT"} for part in KEPT}, "others": {"FLOAT16"}}
    assert artifact.sidecar.recipe["export"]["keep"] == list(KEPT)


def test_a_build_without_the_option_says_what_changes(tiny, tmp_path, run):
    words = ("onnx", "--weights", tiny, "--fp16", "-o", tmp_path)
    assert run(*words).code == 0
    kept = run(*words, "--keep", "stages.1.0")
    assert "custom_fp16.onnx is replaced: keep None → ['stages.1.0']" in kept.err
    assert "custom_fp32.onnx is replaced" not in kept.err
    assert "keep ['stages.1.0'] → None" in run(*words).err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("onnx", "--keep", "stages.1.0"), "--keep: fp32 is the highest precision; leave --keep out"),
        (("onnx", "--fp16", "--keep", "stages.9.0"), "the network has no such part; did you mean"),
        (("onnx", "--fp16", "--keep", "pwconv1"), "the network has no such part"),
        (("onnx", "--fp16", "--task", "features", "--keep", "head"), "the network has no such part"),
        (("openvino", "--fp16", "--keep", "stages.1.0"), "onnxruntime and tensorrt can keep parts in fp32"),
        (("onnx", "--int8", "--keep", "head"), "--keep head: it is not quantized anyway; leave it out"),
    ],
)
def test_what_cannot_be_kept_is_refused(words, message, tiny, tmp_path, refused):
    assert message in refused(2, *words, "--weights", tiny, "-o", tmp_path / "out", folder=tmp_path)


def test_something_is_left_to_quantize(tiny, tmp_path):
    blocks = [name for name in structure.parts((1, 1, 2, 1)) if name.startswith("stages")]
    with pytest.raises(BadRequest, match="nothing would be left to quantize"):
        resolve(recipe_of(precision="int8", weights=str(tiny), keep=tuple(blocks)), tmp_path)


def test_the_search_for_int8_never_quantizes_what_is_kept():
    order, tried = [f"stages.2.{number}" for number in range(4)], []

    def judge(work, kept):
        tried.append(kept)
        return candidate(kept, len(kept) >= 3)

    result = search(None, judge, lambda: dict.fromkeys(order, 0.1), ("stages.2.2",))
    assert result.best.kept == ("stages.2.2", "stages.2.0", "stages.2.1")
    assert all(kept[0] == "stages.2.2" for kept in tried)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(backend="onnxruntime", precision="fp16", export=Export(keep=("stages.1.0", "head"), simplify=False)),
        Recipe(
            backend="openvino",
            precision="int8",
            model=Model(weights="a b.safetensors", head="kind,age", task="classify"),
            preprocessing=PreprocessingOptions(mean=(0.1, 0.25, 1.0), crop_pct=0.875),
            export=Export(imgsz=(320, 256), batch=4, keep=("stages.1.0",)),
            quantization=Quantization(smoothing=0.0, even_if_slower=True, calib_seed=3),
        ),
        Recipe(
            backend="tensorrt",
            precision="int8",
            export=Export(imgsz="dynamic", keep=("stages.1.0",)),
            quantization=Quantization(int8_scope="all"),
            target={"profiles": [[1, 2, 4], [8, 8, 8]], "compute_capability": ["8.9", "12.0"], "tf32": True},
        ),
    ],
)
def test_the_command_of_a_recipe_is_read_as_the_same_recipe(recipe, tmp_path, run, monkeypatch):
    for name in ("check", "check_sources"):
        monkeypatch.setattr(builds, name, lambda recipe: None)
    line = keep.command(recipe, SimpleNamespace(path=tmp_path / "x.onnx"))
    read = run(*shlex.split(line)[1:], "--dry-run", "--json").json["recipe"]
    again = msgspec.convert({**read, "checks": {}, "bench": {}}, Recipe)
    assert again == recipe


def test_every_target_with_a_graph_in_half_precision_takes_parts_to_keep(tiny, tmp_path):
    half = [name for name in backends.targets() if backends.target(name).lower is not None]
    assert len(half) == 2
    fp32 = build(tiny, tmp_path)
    for name in half:
        kept = backends.target(name).lower(fp32, "fp16", tmp_path / name, ["stages.1.0"])
        assert dtypes(kept)["stages.1.0"] == {"FLOAT"}
