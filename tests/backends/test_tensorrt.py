"""TensorRT plans from a machine without a GPU: what they are made of, what is refused, and what is simulated."""

import json
import re
import threading

import numpy as np
import onnx_ir as ir
import pytest
from msgspec.structs import replace

from exporter import artifact, backends
from exporter.backends import Options, tensorrt
from exporter.backends.tensorrt import builder, library, plan, runtime
from exporter.errors import BadRequest, ExporterError, Unavailable
from exporter.verify import VerifyOptions, verify
from tests.conftest import build, copy_artifact, snapshot

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
pytestmark = pytest.mark.skipif("tensorrt-rtx" not in library.here(), reason="needs tensorrt-rtx")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_pointwise_product_is_computed_in_what_was_asked_for(precision, artifacts):
    kernels = plan.read(artifacts["tensorrt", precision])
    products = [k for k in kernels if k.kind == "gemm" and "pwconv" in k.module]
    assert sorted(k.module for k in products) == sorted(
        f"stages.{block}.pwconv{i}" for block in ("0.0", "1.0", "2.0", "2.1", "3.0") for i in (1, 2)
    )
    assert {k.precision for k in products} == {precision}
    depthwise = {k.precision for k in kernels if k.module.endswith("dwconv")}
    assert depthwise == {"fp16" if precision in ("int8", "fp8") else precision}


def test_int8_adds_no_kernel_and_leaves_the_residual_in_fp16(artifacts):
    made, rival = artifacts["tensorrt", "int8"], artifacts["tensorrt", "fp16"]
    found = {f.metric: f for f in backends.target("tensorrt").findings(made, rival)}
    assert found["extra_kernels"].value <= 0
    assert found["pointwise"].detail == "10 of 10 in int8"
    assert found["residual"].detail == f"fp16 after {found['residual'].value} blocks"
    assert found["requantises"].value == 0


def test_what_the_builder_lists_in_another_way_is_left_out():
    assert plan.parse("") == ()
    assert plan.parse("Layers:\nsomething else\nName: a, LayerType") == ()
    assert plan.findings((), "fp16")[0].value is None


def test_a_kernel_that_only_moves_or_rounds_is_counted():
    def kernel(*nodes):
        return plan.Kernel(name="k", kind="kgen", nodes=nodes, reads=("fp16",), writes=("int8",))

    kernels = [
        kernel("stages.0.0/Transpose"),
        kernel("stages.0.0.pwconv1/QuantizeLinear_input_int8", "stages.0.0/Cast_x"),
        kernel("stages.0.0.norm/LayerNormalization", "stages.0.0.pwconv1/QuantizeLinear_input_int8"),
    ]
    found = {f.metric: f.value for f in plan.findings(kernels, "int8")}
    assert (found["reformats"], found["requantises"]) == (1, 1)


def test_the_fp16_graph_has_the_name_of_its_form(artifacts, tmp_path):
    graph = artifacts["onnxruntime", "fp32"]
    form = graph.sidecar.recipe["export"]["form"]
    assert tensorrt.lower(graph, "fp16", tmp_path).path.name == f"custom_{form}_fp16.onnx"
    assert form != tensorrt.FORM


def test_one_command_builds_int8_and_says_what_was_simulated(tiny, run, tmp_path):
    done = run("trt", "--int8", "--weights", tiny, "--calib-size", 24, "-o", tmp_path, "--json")
    assert done.code == 0, done.err
    assert done.json["artifact"]["target"]["flavor"] == "tensorrt-rtx"
    found = {f["metric"]: f for f in done.json["report"]["findings"]}
    if runtime.unable():
        assert (found["gain"]["value"], found["gain"]["detail"]) == (None, f"not timed: {runtime.unable()}")
        assert "custom_linear_int8.onnx, which it was built from, ran on onnxruntime" in found["simulated"]["detail"]
    assert found["cosine"]["value"] > 0.998
    assert found["quantized_macs_pct"]["detail"] == "10 of 10 quantized layers are computed in int8"
    assert found["extra_kernels"]["value"] <= 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "custom_int8.plan", "custom_int8.plan.json", "custom_int8.plan.kernels.json", "custom_int8.plan.report.json",
        "custom_linear_int8.onnx", "custom_linear_int8.onnx.json",
    ]  # fmt: skip
    if runtime.unable():  # its graph runs on the CPU, whatever device the plan is for
        done = run("verify", tmp_path / "custom_int8.plan", "--device", "cuda", "--samples", 2)
        assert done.code == 0, done.err


def test_a_plan_is_the_builders_bytes_and_inspect_shows_its_kernels(tiny, run, tmp_path):
    done = run("trt", "--fp16", "--weights", tiny, "-o", tmp_path)
    assert done.code == 0, done.err
    assert "10 of 10 in fp16" in done.out
    made = artifact.load(tmp_path / "custom_fp16.plan")
    size = int.from_bytes(made.path.read_bytes()[0x10:0x18], "little")
    assert made.path.read_bytes().startswith(b"vtrt")
    assert size <= made.path.stat().st_size
    shown = run("inspect", made.path).out
    assert "gemm" in shown
    assert "stages.2.1" in shown


@pytest.mark.parametrize("content", ["{}", "[", '{"schema": 3, "backend": "onnxruntime"}', ""])
def test_old_files_beside_a_plan_do_not_stop_its_verification(content, artifacts, tmp_path):
    built = artifacts["tensorrt", "fp16"]
    made = copy_artifact(built, tmp_path)
    copy_artifact(artifact.load(built.path.with_name("custom_linear_fp16.onnx")), tmp_path)
    (tmp_path / "a_year_old.onnx.json").write_text(content)
    assert verify(made, VerifyOptions(samples=4)).find("simulated") is not None


def test_verify_without_a_gpu_runs_the_graph_behind_the_plan(artifacts, run, tmp_path):
    made = artifacts["tensorrt", "fp16"]
    report = verify(made, VerifyOptions(samples=8))
    assert report.passed
    assert "custom_linear_fp16.onnx" in report.find("simulated").detail
    assert report.environment["session"]["provider"] == "CPUExecutionProvider"
    alone = copy_artifact(made, tmp_path)
    done = run("verify", alone.path)
    assert done.code == 3
    assert "the ONNX graph that it was built from is missing" in done.err
    with pytest.raises(Unavailable, match="onnxruntime cannot run its graph in bf16"):
        verify(artifacts["tensorrt", "bf16"], VerifyOptions(samples=8))


REFUSED = [
    (["--compute-capability", "9.0"], "TensorRT-RTX .* builds for 7.5, 8.0, .*; --flavor tensorrt builds for it"),
    (["--compute-capability", "8.7"], "builds for 7.5, 8.0"),
    (["--compute-capability", "7.5"], "no fp32 below 8.0; build fp16 or int8"),
    (["--bf16", "--compute-capability", "7.5"], "no bf16 below 8.0"),
    (["--version-compatible"], "--version-compatible: not available in TensorRT-RTX"),
    (["--hardware-compat", "same"], "--hardware-compat: not available in TensorRT-RTX"),
    (["--strip-weights"], "--strip-weights: not available in TensorRT-RTX"),
    (["--opt-level", "6"], "expected a whole number from 0 to 5"),
    (["--workspace", "0"], "expected a number above 0"),
    (["--min-batch", "4", "--max-batch", "2"], "expected 1 ≤ --min-batch ≤ --opt-batch ≤ --max-batch"),
    (["--min-batch", "1", "--min-batch", "2", "--max-batch", "4"], "2 of --min-batch, 0 of --opt-batch and 1"),
    (["--batch", "2", "--max-batch", "8"], "--batch 2 is fixed, and a profile asks for others"),
    (["--timing-cache", "t.cache"], "--timing-cache: not available in TensorRT-RTX"),
    (["--fp8", "--compute-capability", "8.6"], "no fp8 below 8.9; build fp16 or int8"),
    (["--fp8", "--compute-capability", "8.9", "--compute-capability", "7.5"], "no fp8 below 8.9"),
    (["--fp8", "--int8-scope", "all"], "--int8-scope all is for int8"),
    (["--fp8", "--calib-method", "mse"], "fp8 takes minmax or percentile"),
    (["--fp16", "--int8-scope", "all"], "--int8-scope is for int8 and fp8; add --int8 or --fp8, or leave it out"),
]


@pytest.mark.parametrize(("words", "said"), REFUSED, ids=[" ".join(words) for words, _ in REFUSED])
def test_what_cannot_be_is_refused_and_no_plan_is_written(words, said, tiny, run, tmp_path):
    done = run("trt", *words, "--weights", tiny, "-o", tmp_path)
    assert done.code == 2, done.err
    assert re.search(said, done.err), done.err
    assert not list(tmp_path.iterdir()), "before anything is done"


SCOPES = {
    "linear": {"pwconv1", "pwconv2"},
    "linear+conv": {"pwconv1", "pwconv2", "1"},
    "all": {"pwconv1", "pwconv2", "1", "0", "dwconv", "head"},
    "weights": {"pwconv1", "pwconv2"},
}


@pytest.mark.parametrize("scope", SCOPES)
def test_a_scope_says_what_is_rounded(scope, tiny, tmp_path):
    made = build(tiny, tmp_path, "tensorrt", "int8", int8_scope=scope)
    told = made.sidecar.quantization
    assert told.scope == scope
    assert {name.rpartition(".")[2] for name in told.layers} == SCOPES[scope]
    graph = ir.load(tmp_path / "custom_linear_int8.onnx").graph
    rounded = [node for node in graph if node.op_type == "QuantizeLinear"]
    assert len(rounded) == (0 if scope == "weights" else len(told.layers))
    assert sum(node.op_type == "DequantizeLinear" for node in graph) == len(rounded) + len(told.layers)
    report = verify(made, VerifyOptions(samples=8))
    assert report.find("cosine").value > 0.999
    if scope == "weights":
        assert report.find("quantized_macs_pct").detail == "only the weights of 10 layers are in int8"
    if scope == "all":
        assert report.value("quantized_macs_pct") == pytest.approx(100)


def test_fp8_is_e4m3_and_nearly_the_same_network(artifacts):
    made = artifacts["tensorrt", "fp8"]
    graph = ir.load(made.path.with_name("custom_linear_fp8.onnx")).graph
    types = {node.inputs[2].dtype for node in graph if node.op_type == "QuantizeLinear"}
    assert types == {ir.DataType.FLOAT8E4M3FN}
    report = verify(made, VerifyOptions(samples=8))
    assert report.passed
    assert 1 - report.find("cosine").value > 1e-6, "three bits of mantissa cost something"
    assert "custom_linear_fp8.onnx" in report.find("simulated").detail


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_weights_too_small_for_a_scale_in_fp16_are_no_reason_to_refuse(precision, tmp_path):
    from safetensors.torch import load_file, save_file

    from tests.conftest import write_tiny

    source = write_tiny(tmp_path / "small")
    state = load_file(source / "model.safetensors")
    state["stages.0.0.pwconv2.weight"][:4] *= 1e-7
    save_file(state, source / "model.safetensors")
    made = build(source, tmp_path, "tensorrt", precision)
    assert verify(made, VerifyOptions(samples=8)).find("cosine").value > 0.999


def test_the_share_of_work_in_the_asked_precision_is_told(artifacts):
    for precision, least, most in (("fp16", 100, 100), ("int8", 60, 99)):
        found = backends.target("tensorrt").findings(artifacts["tensorrt", precision], None)
        share = next(f for f in found if f.metric == "macs_pct")
        assert least <= share.value <= most, share


def test_inspect_holds_eight_bits_against_fp16_beside_and_draws_the_network(artifacts, run, tmp_path):
    assert artifacts["tensorrt", "fp16"].path.parent == artifacts["tensorrt", "int8"].path.parent
    done = run("inspect", artifacts["tensorrt", "int8"].path, "--picture", tmp_path / "plan.svg", "--json")
    assert done.code == 0, done.err
    found = {f["metric"]: f for f in done.json["findings"]}
    assert re.fullmatch(r"\d+ kernels, \d+ in fp16", found["extra_kernels"]["detail"])
    svg = (tmp_path / "plan.svg").read_text()
    for word in ("stages.2.1", "int8", "fp16", "gemm"):
        assert word in svg, word


def test_a_plan_that_would_not_fit_on_the_disk_is_not_begun(artifacts, tmp_path, monkeypatch):
    from collections import namedtuple

    from exporter.artifact import disk

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    made = artifact.load(artifacts["tensorrt", "fp16"].path.with_name("custom_linear_fp16.onnx"))
    with pytest.raises(Unavailable, match=r"MB are needed and 0 MB are free; free some or choose another"):
        backends.target("tensorrt").build(made, "fp16", tmp_path / "new", library.TensorRtOptions())
    assert not (tmp_path / "new").exists()


def test_what_is_not_installed_is_offered_with_the_other_that_is(tiny, run, tmp_path):
    if "tensorrt" in library.here():
        pytest.skip("tensorrt is installed here")
    done = run("trt", "--flavor", "tensorrt", "--weights", tiny, "-o", tmp_path)
    assert done.code == 3
    assert "pip install 'convnext-export[tensorrt]', or use --flavor tensorrt-rtx, which is here" in done.err
    assert not list(tmp_path.iterdir()), "nothing is done before"


def test_without_any_the_line_that_installs_one(monkeypatch):
    monkeypatch.setattr(library, "here", list)
    with pytest.raises(Unavailable, match=r"pip install 'convnext-export\[tensorrt-rtx\]'"):
        library.find()


@pytest.mark.parametrize("told", [{"batch": 2}, {"imgsz": "dynamic"}, {"task": "features"}, {"input": "uint8"}])
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_whatever_else_can_be_built(told, precision, tiny_v2, tmp_path):
    made = build(tiny_v2, tmp_path, "tensorrt", precision, **told)
    assert {k.precision for k in plan.read(made) if k.kind == "gemm" and "pwconv" in k.module} == {precision}
    if "batch" in told:
        assert made.sidecar.target["profiles"] == [[2, 2, 2]]


def test_profiles_and_targets_are_told_in_the_sidecar(tiny, tmp_path):
    target = {"profiles": [[1, 1, 4], [8, 16, 32]], "compute_capability": ["8.9", "12.0"]}
    made = build(tiny, tmp_path, "tensorrt", "fp16", target=target)
    assert made.sidecar.target["profiles"] == target["profiles"]
    assert made.sidecar.target["compute_capability"] == ["8.9", "12.0"]
    one = build(tiny, tmp_path / "one", "tensorrt", "fp16")
    assert len(plan.read(made)) == len(plan.read(one)), "the kernels of one profile"


def test_a_word_that_the_builder_does_not_know_is_refused(tiny, tmp_path):
    with pytest.raises(BadRequest, match="target of tensorrt"):
        build(tiny, tmp_path, "tensorrt", target={"flavour": "tensorrt"})


@pytest.mark.parametrize(("fact", "value"), [("version", "10.0.1"), ("os", "windows"), ("flavor", "tensorrt")])
def test_a_plan_of_something_else_is_refused_before_it_is_opened(fact, value, artifacts):
    made = artifacts["tensorrt", "fp16"]
    other = artifact.Artifact(made.path, replace(made.sidecar, target={**made.sidecar.target, fact: value}))
    with pytest.raises(BadRequest, match=f"built for {fact} {value}"):
        runtime.check(other, library.find("tensorrt-rtx"))


def test_without_a_gpu_no_plan_is_opened(artifacts):
    with (
        pytest.raises(Unavailable, match="an engine runs only on a GPU"),
        backends.runtime("tensorrt").open(artifacts["tensorrt", "fp16"], Options()),
    ):
        pass


def test_a_plan_of_another_gpu_is_refused(artifacts, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(BadRequest, match=r"built for compute capability 8.0, .*, and this GPU has 9.0"):
        runtime.check(artifacts["tensorrt", "fp16"], library.find("tensorrt-rtx"))


def test_what_the_parser_refuses_is_said_with_the_node(artifacts, tmp_path):
    model = ir.load(artifacts["onnxruntime", "fp32"].path)
    node = next(node for node in model.graph if node.op_type == "Gelu")
    node.op_type, node.domain = "NoSuchOperator", "ours"
    model.opset_imports["ours"] = 1
    ir.save(model, tmp_path / "odd.onnx")
    trt, sidecar = library.find("tensorrt-rtx"), artifacts["onnxruntime", "fp32"].sidecar
    with pytest.raises(
        ExporterError, match=r"odd.onnx: tensorrt-rtx .* cannot read it: stages.0.0, node Gelu \(NoSuchOperator\)"
    ):
        builder.build(trt, tmp_path / "odd.onnx", sidecar, library.TensorRtOptions())


def test_ctrl_c_stops_the_builder_and_leaves_nothing(tiny, tmp_path, monkeypatch):
    build(tiny, tmp_path, "tensorrt", "fp16")
    before = snapshot(tmp_path)

    def interrupted(items, total, text, count):
        next(iter(items))
        raise KeyboardInterrupt

    monkeypatch.setattr(builder, "track", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(tiny, tmp_path, "tensorrt", "fp16", target={"opt_level": 1})
    assert snapshot(tmp_path) == before
    assert not [thread for thread in threading.enumerate() if thread.name == "tensorrt-builder"]


def test_the_kernels_of_a_plan_are_sealed_like_the_plan(tiny, tmp_path):
    made = build(tiny, tmp_path, "tensorrt", "fp16")
    beside = made.path.with_name(made.path.name + plan.SUFFIX)
    beside.write_text(json.dumps(json.loads(beside.read_text())[:-1]))
    with pytest.raises(BadRequest, match="expected"):
        artifact.load(made.path)


def test_the_lowered_int8_graph_is_the_same_network(artifacts):
    parent = artifact.load(artifacts["tensorrt", "int8"].path.with_name("custom_linear_int8.onnx"))
    images = np.random.default_rng(0).normal(size=(4, 3, 64, 64)).astype(np.float32)
    eager, ort = backends.runtime("eager"), backends.runtime("onnxruntime")
    with ort.open(parent, Options()) as session, eager.open(parent, eager.options()) as reference:
        (got,), (expected,) = session(images), reference(images)
    assert 1e-4 * expected.std() < np.abs(got - expected).max() < 0.5 * expected.std()
    rounding = [node for node in ir.load(parent.path).graph if node.op_type == "QuantizeLinear"]
    assert len(rounding) == 10
    assert all(node.inputs[0].dtype == ir.DataType.FLOAT16 for node in rounding), "the rest is in fp16"


@pytest.mark.gpu
@pytest.mark.skipif(bool(runtime.unable()), reason="needs an NVIDIA GPU, and pytest -m gpu")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("flavor", library.here())
def test_a_plan_runs_and_is_the_same_network(flavor, precision, tiny, tmp_path):
    made = build(tiny, tmp_path, "tensorrt", precision, target={"flavor": flavor})
    report = verify(made, VerifyOptions(samples=8))
    assert report.passed
    assert report.find("simulated") is None
    images = np.random.default_rng(0).normal(size=(4, 3, 64, 64)).astype(np.float32)
    with backends.runtime("tensorrt").open(made, Options()) as session:
        bound = session.bind([images])
        bound.run()
        assert np.abs(bound.outputs()[0] - session(images)[0]).max() < 1e-3
        assert min(bound.parts().values()) > 0
