"""A graph in any opset is the graph that was traced, and runtimes of that time open it."""

import subprocess
import sys

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from exporter import backends
from exporter.errors import BadRequest
from exporter.graph import half, opset
from exporter.model import FORMS, structure
from exporter.quantize.placement import quantize
from exporter.quantize.rounding import Rounding
from tests.conftest import PX, build, recipe_of

OPSETS = range(13, 24)
NOISE = {"fp32": 1e-5, "fp16": 6e-3, "int8": 0.02}  # of the spread: int8 rounds some values to the next step
OLD = "onnxruntime==1.15.1"  # the first whose wheels are for Python 3.11; it runs opsets up to 18


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(2, 3, PX, PX)).astype(np.float32)


@pytest.fixture(scope="module", params=[(source, form) for source in ("tiny", "tiny_v2") for form in FORMS], ids=str)
def traced(request, tmp_path_factory):
    """A function that gives the graph in an opset and precision, and the form."""
    source, form = request.param
    path = build(request.getfixturevalue(source), tmp_path_factory.mktemp("traced"), form=form).path
    return path, form


def written(path, wanted, precision):
    graph = ir.load(path)
    opset.convert(graph, wanted)
    graph.ir_version = opset.least_ir_version(wanted)
    if precision == "fp16":
        half.to_half(graph)
    if precision == "int8":
        placement = backends.target("onnxruntime").placements["linear"]
        graph = quantize(graph, {node.metadata_props["module"]: rounding(node) for node in pointwise(graph)}, placement)
    return ir.serde.serialize_model(graph)


def pointwise(graph):
    nodes = [node for node in graph.graph if node.op_type in ("MatMul", "Conv")]
    return [node for node in nodes if structure.kind(node.metadata_props["module"]) in ("pwconv1", "pwconv2")]


def rounding(node):
    outputs = node.inputs[1].shape[1 if node.op_type == "MatMul" else 0]
    return Rounding(8 / 255, 128, False, np.zeros(outputs, np.float32))


def answer(proto, images):
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    session = onnxruntime.InferenceSession(proto.SerializeToString(), settings)
    return session.run(None, {"images": images})[0]


@pytest.mark.parametrize("precision", NOISE)
def test_it_gives_the_same_in_every_opset(precision, traced, images):
    path, form = traced
    if precision == "int8" and form == "plain":
        pytest.skip("no target quantizes the plain form")
    expected = answer(written(path, opset.TRACED, precision), images)
    for wanted in OPSETS:
        proto = written(path, wanted, precision)
        onnx.checker.check_model(proto, full_check=True)
        assert (proto.opset_import[0].version, len(proto.opset_import)) == (wanted, 1)
        assert proto.ir_version == {13: 7, 14: 7, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11}.get(wanted, 8)
        assert np.abs(answer(proto, images) - expected).max() <= NOISE[precision] * expected.std(), wanted


def test_norms_and_activations_are_written_in_parts_where_they_do_not_exist(traced):
    path, form = traced
    operators = {wanted: [node.op_type for node in written(path, wanted, "fp32").graph.node] for wanted in OPSETS}
    for wanted, listed in operators.items():
        assert listed.count("Gelu") == (5 if wanted >= 20 else 0)
        assert listed.count("Erf") == (0 if wanted >= 20 else 5)
        norms = 1 if form == "nchw" else 10
        assert listed.count("LayerNormalization") == (norms if wanted >= 17 else 0)


def test_parts_belong_to_the_module_of_the_operator(traced):
    path, _ = traced
    graph = ir.serde.deserialize_model(written(path, 13, "fp32")).graph
    names = [node.name for node in graph]
    assert len(set(names)) == len(names)
    assert {node.metadata_props["module"] for node in graph if node.op_type == "Erf"} == {
        f"stages.{block}" for block in ("0.0", "1.0", "2.0", "2.1", "3.0")
    }
    for node in graph:
        module = node.metadata_props["module"]
        assert node.name.startswith(f"{module}/" if module else node.op_type)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_both_kinds_of_gelu(approximate):
    from onnx import TensorProto, helper

    x = np.linspace(-6, 6, 1001, dtype=np.float32)
    node = helper.make_node("Gelu", ["images"], ["y"], name="act/Gelu", approximate=approximate)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1001]) for name in ("images", "y")]
    proto = helper.make_model(
        helper.make_graph([node], "act", ends[:1], ends[1:]), opset_imports=[helper.make_opsetid("", 20)], ir_version=9
    )
    graph = opset.convert(ir.serde.deserialize_model(proto), 13)
    assert answer(ir.serde.serialize_model(graph), x) == pytest.approx(answer(proto, x), abs=1e-6)


def test_a_dynamic_shape_and_axes_behind_the_first(tiny_v2, tmp_path):
    """GRN of the linear form needs the size of the image, which is cut out of all axes."""
    path = build(tiny_v2, tmp_path, imgsz="dynamic", form="linear").path
    images = np.random.default_rng(0).normal(size=(3, 3, 64, 96)).astype(np.float32)
    proto = written(path, 13, "fp32")
    onnx.checker.check_model(proto, full_check=True)
    assert "Slice" in [node.op_type for node in proto.graph.node]
    expected = answer(onnx.load(path), images)
    assert np.abs(answer(proto, images) - expected).max() <= 1e-5 * expected.std()


@pytest.mark.parametrize(
    ("backend", "precision", "wanted", "told"),
    [
        ("tensorrt", "fp8", 18, "--opset 18: a graph in fp8 needs opset 19: 8-bit floats exist from there on"),
        ("tensorrt", "int8", 18, "--opset 18: a graph in int8 needs opset 19: Q and DQ take fp16 scales"),
        ("tensorrt", "bf16", 17, "--opset 17: a graph in bf16 needs opset 18: "),
    ],
)
def test_what_an_opset_cannot_hold_is_refused_before_anything_is_read(backend, precision, wanted, told):
    from exporter.build import check

    with pytest.raises(BadRequest, match=told):
        check(recipe_of(backend, precision, weights="never-read.pth", opset=wanted))
    check(recipe_of(backend, precision, weights="never-read.pth", opset=int(told.split("needs opset ")[1][:2])))


@pytest.mark.parametrize(
    ("backend", "precision"), [("openvino", "bf16"), ("onnxruntime", "int8"), ("tensorrt", "fp16")]
)
def test_other_precisions_are_built_from_opset_13_on(backend, precision):
    from exporter.build import check

    check(recipe_of(backend, precision, weights="never-read.pth", opset=13))


@pytest.fixture(scope="module")
def old_runtime(tmp_path_factory):
    """A folder with an ONNX Runtime of 2023."""
    folder = tmp_path_factory.mktemp("old")
    words = ["-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:", "--target", str(folder)]
    found = subprocess.run([sys.executable, *words, OLD, "numpy<2"], capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip(f"pip cannot install {OLD} here: {found.stderr.strip().splitlines()[-1][:200]}")
    return folder


OPEN = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy, onnxruntime
assert onnxruntime.__version__ == "1.15.1", onnxruntime.__version__
for path in sys.argv[3:]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    numpy.save(path + ".npy", session.run(None, {"images": numpy.load(sys.argv[2])})[0])
"""


# This version lacks kernels of opset 19, and writes LayerNormalization of fp16 in parts at opset 18, wrongly.
OPENED = {"fp32": (13, 17, 18), "fp16": (13, 17), "int8": (13, 17, 18)}


@pytest.mark.parametrize("source", ["tiny", "tiny_v2"])
def test_a_runtime_of_that_time_opens_it(source, old_runtime, images, request, tmp_path):
    files = []
    for form in FORMS:
        path = build(request.getfixturevalue(source), tmp_path / form, form=form).path
        expected = answer(onnx.load(path), images)
        for precision, opsets in OPENED.items():
            for wanted in opsets if (precision, form) != ("int8", "plain") else ():
                files.append((tmp_path / f"{form}_{precision}_{wanted}.onnx", precision, expected))
                files[-1][0].write_bytes(written(path, wanted, precision).SerializeToString())
    np.save(tmp_path / "images.npy", images)
    words = [sys.executable, "-c", OPEN, old_runtime, tmp_path / "images.npy", *(path for path, _, _ in files)]
    found = subprocess.run(words, capture_output=True, text=True, check=False, env={})
    assert found.returncode == 0, found.stderr
    for path, precision, expected in files:
        if precision != "int8":  # whose ranges are made up here
            got = np.load(f"{path}.npy")
            assert got.shape == expected.shape
            assert np.abs(got - expected).max() <= NOISE[precision] * expected.std(), path.name
