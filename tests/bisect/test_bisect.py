"""`bisect` names the module that was spoiled on purpose, and how it was spoiled."""

import contextlib
import dataclasses
import json
import shlex
import sys

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from exporter import artifact as artifacts_
from exporter import backends, bisect
from exporter.backends import eager
from exporter.bisect import BisectOptions
from exporter.data import synthetic
from exporter.data.samples import open_samples
from exporter.errors import BadRequest
from exporter.graph import files
from tests.conftest import build, needs_bf16, tiny_state

SPOILT = "stages.2.1"


def spoil(artifact, folder, change):
    """A copy of an ONNX artifact whose graph is another, with its sidecar."""
    model = ir.load(artifact.path)
    change(model)
    target = folder / artifact.path.name
    return artifacts_.publish(target, artifact.sidecar, lambda file: files.save(model, file, artifact.sidecar.facts()))


def scale(model, name, factor):
    """Multiply an initializer, element by element or as a whole."""
    value = model.graph.initializers[name]
    array = value.const_value.numpy()
    value.const_value = ir.tensor((array * np.asarray(factor, array.dtype)).astype(array.dtype), name=name)


def of_operator(model, operator, place=1):
    """The initializer that an operator takes."""
    node = next(node for node in model.graph if node.name == operator)
    return node.inputs[place].name


def examined(artifact, **options):
    report = bisect.bisect(artifact, BisectOptions(**options))
    reason = report.find("reason")
    return report, reason.case if reason else "", reason.detail if reason else ""


def product(model, layer):
    """The weight and the bias of a pointwise layer, in any form."""
    names = {node.name: node for node in model.graph}
    if f"{layer}/MatMul" in names:
        return of_operator(model, f"{layer}/MatMul"), of_operator(model, f"{layer}/Add")
    return of_operator(model, f"{layer}/Conv"), of_operator(model, f"{layer}/Conv", 2)


def test_a_scale(artifacts, tmp_path):
    def change(model):
        for name in product(model, f"{SPOILT}.pwconv2"):
            scale(model, name, 1.5)

    report, module, reason = examined(spoil(artifacts["onnxruntime", "fp32"], tmp_path, change))
    assert not report.passed
    assert module == SPOILT
    assert "1.5 × that of the reference model" in reason
    failed = [finding.case for finding in report.findings if not finding.passed]
    assert failed == [SPOILT, SPOILT], "the parts behind it compute what the network computes"


def test_a_scale_in_openvino(artifacts, tmp_path):
    def change(model):
        for name in product(model, f"{SPOILT}.pwconv2"):
            scale(model, name, 1.5)

    graph = spoil(artifacts["onnxruntime", "fp32"], tmp_path, change)
    target = backends.target("openvino")
    _, module, reason = examined(target.build(graph, "fp32", tmp_path, target.options()))
    assert (module, "1.5 ×" in reason) == (SPOILT, True)


def test_some_channels(artifacts, tmp_path):
    def change(model):
        weight, bias = product(model, f"{SPOILT}.pwconv2")
        factors = np.ones(32, np.float32)
        factors[[3, 8]] = 2
        shape = model.graph.initializers[weight].const_value.numpy().shape
        scale(model, weight, factors if shape[-1] == 32 else factors[:, None, None, None])
        scale(model, bias, factors)

    _, module, reason = examined(spoil(artifacts["onnxruntime", "fp32"], tmp_path, change))
    assert (module, "the scale of channels 3, 8 differs" in reason) == (SPOILT, True)


def test_gelu_in_its_tanh_form(artifacts, tmp_path):
    def change(model):
        node = next(node for node in model.graph if node.name == f"{SPOILT}/Gelu")
        node.attributes["approximate"] = ir.AttrString("approximate", "tanh")

    _, module, reason = examined(spoil(artifacts["onnxruntime", "fp32"], tmp_path, change))
    assert (module, "gelu_tanh in place of gelu" in reason) == (SPOILT, True)


def test_the_channels_of_the_pictures_in_another_order(artifacts, tmp_path):
    def change(model):
        name = of_operator(model, "downsample_layers.0.0/Conv")
        value = model.graph.initializers[name]
        value.const_value = ir.tensor(np.ascontiguousarray(value.const_value.numpy()[:, ::-1]), name=name)

    _, module, reason = examined(spoil(artifacts["onnxruntime", "fp32"], tmp_path, change))
    assert (module, "order 2, 1, 0 (BGR in place of RGB)" in reason) == ("downsample_layers.0", True)


def test_channels_of_a_block_in_another_order(artifacts, tmp_path):
    def change(model):
        order = np.arange(32)
        order[[4, 9]] = 9, 4
        for name in product(model, f"{SPOILT}.pwconv2"):
            value = model.graph.initializers[name]
            array = value.const_value.numpy()
            axis = array.shape.index(32) if array.ndim == 1 or array.shape[-1] != 32 else array.ndim - 1
            value.const_value = ir.tensor(np.ascontiguousarray(array.take(order, axis)), name=name)

    _, module, reason = examined(spoil(artifacts["onnxruntime", "fp32"], tmp_path, change))
    assert (module, "channels 4, 9 of its output are in another order" in reason) == (SPOILT, True)


def test_another_eps(artifacts, tmp_path):
    def change(model):
        node = next(node for node in model.graph if node.name == f"{SPOILT}.norm/LayerNormalization")
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-3)

    _, module, reason = examined(spoil(artifacts["onnxruntime", "fp32"], tmp_path, change))
    assert (module, f"eps of {SPOILT}.norm is 0.001" in reason) == (SPOILT, True)


def test_a_range_that_is_too_narrow(artifacts, tmp_path):
    """Int8 whose range was chosen on other images: its scale is an eighth."""
    healthy = artifacts["onnxruntime", "int8"]
    assert examined(healthy)[0].passed

    spoilt = spoil(healthy, tmp_path, lambda model: scale(model, f"{SPOILT}.pwconv2.input_scale", 1 / 8))
    _, module, reason = examined(spoilt)
    assert module == SPOILT
    assert f"the input of {SPOILT}.pwconv2 has a range of about" in reason


def overflowing(tiny, tmp_path):
    """Weights whose depthwise convolution reaches what fp16 cannot hold; the norm behind it makes it small again."""
    state = load_file(tiny / "model.safetensors")
    for end in ("weight", "bias"):
        state[f"{SPOILT}.dwconv.{end}"] *= 1e6
    source = tmp_path / "big"
    source.mkdir()
    save_file(state, source / "model.safetensors")
    (source / "config.json").write_text((tiny / "config.json").read_text())
    return source


def test_a_norm_that_overflows(tiny, tmp_path, monkeypatch):
    source = overflowing(tiny, tmp_path)
    kept = build(source, tmp_path / "kept", precision="fp16")
    assert examined(kept)[0].passed, "a build keeps it in fp32"
    monkeypatch.setattr(sys.modules["exporter.build.export"], "_beyond_fp16", lambda network: ())
    _, module, reason = examined(build(source, tmp_path / "not", precision="fp16"))
    assert module == SPOILT
    assert f"fp16 overflow: {SPOILT}.dwconv reaches" in reason


@pytest.mark.parametrize(
    ("backend", "precision"),
    [
        *(("onnxruntime", precision) for precision in ("fp32", "fp16", "int8")),
        *(("openvino", precision) for precision in ("fp32", "fp16", "bf16", "int8")),
        *(("tensorrt", precision) for precision in ("fp32", "fp16", "int8", "fp8")),
    ],
)
def test_a_sound_artifact_leaves_no_tolerance(backend, precision, artifacts):
    """A TensorRT engine is examined by the graph that it was built from."""
    needs_bf16(backend, precision)
    report, module, reason = examined(artifacts[backend, precision])
    assert report.passed, (module, reason)
    assert len([finding for finding in report.findings if finding.metric == "part_error"]) == 10


@pytest.mark.parametrize(("task", "parts"), [("embed", 10), ("features", 13)])
def test_artifacts_without_a_head(task, parts, tiny_v2, tmp_path):
    report, *_ = examined(build(tiny_v2, tmp_path, task=task, batch=2))
    assert report.passed
    assert len([finding for finding in report.findings if finding.metric == "part_error"]) == parts


@pytest.mark.parametrize("hidden", [{"stages.2.0"}, {SPOILT}, {"stages.3.0"}, {"downsample_layers.3", "stages.3.0"}])
def test_parts_that_the_artifact_does_not_show_are_examined_together(hidden, artifacts, tiny, tmp_path, monkeypatch):
    """An optimizer may remove the operators by which the output of a block is recognized."""
    runtime = backends.runtime("onnxruntime")

    @contextlib.contextmanager
    def some_blocks(artifact, options):
        with runtime.blocks(artifact, options) as every:
            places = [place for place, name in enumerate(every.names) if name not in hidden]
            names = tuple(every.names[place] for place in places)
            yield backends.Blocks(names, lambda images: tuple(every.run(images)[place] for place in places))

    monkeypatch.setattr(backends, "runtime_of", lambda artifact: dataclasses.replace(runtime, blocks=some_blocks))
    assert examined(artifacts["onnxruntime", "fp32"])[0].passed
    assert examined(build(tiny, tmp_path / "io", io="fp16"))[0].passed

    def change(model):
        for name in product(model, f"{max(hidden)}.pwconv2"):
            scale(model, name, 1.5)

    report, module, reason = examined(spoil(artifacts["onnxruntime", "fp32"], tmp_path, change))
    assert not report.passed
    assert module.startswith(min(hidden))
    assert reason == "the artifact shows no output between these parts"


def test_every_head_is_examined(tmp_path):
    state = tiny_state()
    for name, size in (("kind", 4), ("age", 3)):
        state |= {f"{name}.{end}": state[f"head.{end}"][:size].clone() for end in ("weight", "bias")}
    for end in ("weight", "bias"):
        del state[f"head.{end}"]
    save_file(state, tmp_path / "two.safetensors")
    sound = build(tmp_path / "two.safetensors", tmp_path / "out", head="kind,age")
    assert examined(sound)[0].passed

    def change(model):
        names = [name for name in model.graph.initializers if "heads.age" in name and name.endswith("bias")]
        value = model.graph.initializers[names[0]]
        value.const_value = ir.tensor(value.const_value.numpy() + np.float32(1), name=names[0])

    _, module, reason = examined(spoil(sound, tmp_path, change))
    assert module.startswith("norm and head (")
    assert "age" in module
    assert "channel 2 the most, by 1 (100 % of the error)" in reason


def test_the_images_that_differ_most_are_examined(artifacts, tmp_path, monkeypatch):
    artifact = artifacts["onnxruntime", "int8"]
    pictures = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=pictures)
    samples = open_samples(str(tmp_path / "a.npz"), artifact.sidecar.preprocessing, (), 10)
    (batch,) = samples.batches(40)
    with eager.RUNTIME.open(artifact, eager.EagerOptions()) as network:
        (expected,) = network(batch.images)
    session = onnxruntime.InferenceSession(str(artifact.path), providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {session.get_inputs()[0].name: batch.images})
    worst = np.argsort(-np.square(outputs - expected).mean(1))[:4]
    seen = []
    real = bisect.measure
    monkeypatch.setattr(bisect, "measure", lambda *words: seen.append(words[2]) or real(*words))
    examined(artifact, data=str(tmp_path / "a.npz"))
    assert np.array_equal(seen[0], batch.images[worst])


def test_the_command(artifacts, tmp_path, run):
    sound = artifacts["onnxruntime", "fp32"]
    good = run("bisect", sound.path)
    assert (good.code, "every part is within its limit" in good.out) == (0, True)

    def change(model):
        for name in product(model, f"{SPOILT}.pwconv2"):
            scale(model, name, 1.5)

    bad = run("bisect", spoil(sound, tmp_path, change).path)
    assert bad.code == 5
    assert bad.out.splitlines()[-1].startswith(f"{SPOILT}: the update is 1.5 ×")
    assert "largest activation" in bad.out
    as_json = json.loads(run("bisect", sound.path, "--json").out)
    assert as_json["passed"]


def test_weights_of_another_network_are_refused(artifacts, tiny_v2):
    with pytest.raises(BadRequest):
        examined(artifacts["onnxruntime", "fp32"], weights=str(tiny_v2))


def typed(line, run):
    """The result of a printed command."""
    program, *words = shlex.split(line)
    assert program == "convnext-export"
    return run(*words)


def advice(result):
    """The command at the end of what `bisect` printed, or ""."""
    first, separator, command = result.out.splitlines()[-1].partition(" in higher precision: ")
    return command if separator and first.startswith("keep ") else ""


def test_the_command_it_prints_keeps_an_overflowing_block_in_fp32(tiny, tmp_path, monkeypatch, run):
    source = overflowing(tiny, tmp_path)
    monkeypatch.setattr(sys.modules["exporter.build.export"], "_beyond_fp16", lambda network: ())
    artifact = build(source, tmp_path / "two words", precision="fp16", color="bgr")
    before = run("bisect", artifact.path)
    assert (before.code, f"--keep {SPOILT}" in advice(before)) == (5, True)
    tried = json.loads(run("bisect", artifact.path, "--try-keep", "--json").out)["findings"]
    values = {one["metric"]: one for one in tried if one["metric"].startswith("kept_")}
    assert values["kept_error"]["passed"]
    assert values["kept_error"]["value"] < 1
    assert values["kept_error"]["detail"] == "not finite before"
    assert values["kept_output_error"]["value"] < 1
    assert artifacts_.load(artifact.path).sidecar.sha256 == artifact.sidecar.sha256, "it was built elsewhere"
    assert typed(advice(before), run).code == 0
    after = artifacts_.load(artifact.path)
    assert after.sidecar.recipe["export"]["keep"] == [SPOILT]
    assert after.sidecar.preprocessing.color == "BGR", "the other options are those of the build before"
    assert run("bisect", artifact.path).code == 0


def narrowed(monkeypatch):
    """From now on the range of one layer is chosen too narrow."""
    from exporter.quantize import simulation

    real = simulation.plan

    def plan(*words):
        planned, layer = dict(real(*words)), f"{SPOILT}.pwconv2"
        planned[layer] = dataclasses.replace(planned[layer], scale=planned[layer].scale / 8)
        return planned

    monkeypatch.setattr(simulation, "plan", plan)


def test_the_command_it_prints_keeps_a_block_with_a_bad_range_in_fp32(tiny, tmp_path, monkeypatch, run):
    narrowed(monkeypatch)
    artifact = build(tiny, tmp_path / "out", precision="int8")
    before = run("bisect", artifact.path, "--try-keep")
    assert (before.code, f"--keep {SPOILT}" in advice(before)) == (5, True)
    used = artifact.sidecar.quantization.images
    assert f"first calibrate on more images (--calib, --calib-size): {used} were used" in before.out.splitlines()[-2]
    (row,) = [line for line in before.out.splitlines() if "error if kept" in line]
    assert "% before" in row
    typed(advice(before), run)
    after = artifacts_.load(artifact.path)
    assert after.sidecar.recipe["export"]["keep"] == [SPOILT]
    assert SPOILT in after.sidecar.quantization.kept
    assert not any(name.startswith(SPOILT) for name in after.sidecar.quantization.layers)
    assert after.sidecar.quantization.images == artifact.sidecar.quantization.images
    assert run("bisect", artifact.path).code == 0


def test_no_command_is_printed_where_precision_is_not_what_lacks(artifacts, tmp_path, run):
    def change(model):
        for name in product(model, f"{SPOILT}.pwconv2"):
            scale(model, name, 1.5)

    bad = run("bisect", spoil(artifacts["onnxruntime", "fp16"], tmp_path, change).path, "--try-keep")
    assert bad.code == 5
    assert "--keep" not in bad.out
    assert "higher precision does not reduce this error" in bad.err


def test_files_of_the_build_that_are_gone_leave_no_command(tiny, tmp_path, monkeypatch, run):
    source = overflowing(tiny, tmp_path)
    monkeypatch.setattr(sys.modules["exporter.build.export"], "_beyond_fp16", lambda network: ())
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(f"class {number}" for number in range(10)))
    artifact = build(source, tmp_path / "out", precision="fp16", labels=str(labels))
    labels.unlink()
    bad = run("bisect", artifact.path)
    assert bad.code == 5
    assert f"higher precision of {SPOILT} would help, and this artifact cannot be built so: {labels}" in advice(bad)


FIRST = "stages.0.0"  # its output has many more numbers than it has weights


def own_initializer(model, operator, place, change):
    """Give an operator a changed initializer of its own."""
    node = next(node for node in model.graph if node.name == operator)
    array = np.ascontiguousarray(change(node.inputs[place].const_value.numpy().copy()))
    name = f"{operator}/spoilt"
    value = ir.Value(name=name, type=node.inputs[place].type, shape=ir.Shape(array.shape), const_value=ir.tensor(array))
    value.const_value.name = name
    model.graph.register_initializer(value)
    node.replace_input_with(place, value)


def some_rows(rows, sigma=0.5):
    """A change of some output channels, another in each weight."""

    def change(array):
        array[rows] += (sigma * np.random.default_rng(0).standard_normal(array[rows].shape)).astype(array.dtype)
        return array

    return change


def test_the_weights_of_a_depthwise_convolution(artifacts, tmp_path):
    def change(model):
        own_initializer(model, f"{FIRST}.dwconv/Conv", 1, some_rows([2, 5]))

    _, module, reason = examined(spoil(artifacts["onnxruntime", "fp32"], tmp_path, change))
    assert module == FIRST
    assert f"{FIRST}.dwconv.weight differs in channels 2, 5" in reason


def test_a_weight_of_the_norm_of_a_block(artifacts, tmp_path):
    def change(model):
        own_initializer(model, f"{FIRST}.norm/LayerNormalization", 1, some_rows([3]))

    _, module, reason = examined(spoil(artifacts["onnxruntime", "fp32"], tmp_path, change))
    assert module == FIRST
    assert f"{FIRST}.norm.weight differs in channels 3" in reason


def test_weights_of_some_classes_of_the_head(artifacts, tmp_path):
    def change(model):
        node = next(node for node in model.graph if node.outputs[0].name == "logits")
        transposed = node.attributes.get_int("transB", 0)
        rows = [3, 7] if transposed else (slice(None), [3, 7])
        own_initializer(model, node.name, 1, some_rows(rows))

    report, module, reason = examined(spoil(artifacts["onnxruntime", "fp32"], tmp_path, change))
    assert module == "norm and head"
    assert "the weights of classes 3, 7 of the head differ" in reason
    assert not report.passed


@pytest.mark.parametrize(
    ("operator", "cause"),
    [("eps", "eps of norm is 0.001 in place of 1e-06"), ("pooling", "the pooling is max in place of avg")],
)
def test_another_operator_in_the_tail(operator, cause, artifacts, tmp_path):
    def change(model):
        if operator == "eps":
            node = next(node for node in model.graph if node.name == "norm/LayerNormalization")
            node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-3)
        else:
            node = [node for node in model.graph if node.op_type in ("ReduceMean", "GlobalAveragePool")][-1]
            node.op_type = {"ReduceMean": "ReduceMax", "GlobalAveragePool": "GlobalMaxPool"}[node.op_type]

    _, module, reason = examined(spoil(artifacts["onnxruntime", "fp32"], tmp_path, change))
    assert (module, cause in reason) == ("norm and head", True), reason


def test_a_norm_of_pooled_features_that_is_missing(tiny, tmp_path):
    def change(model):
        node = next(
            node for node in model.graph if node.op_type == "LayerNormalization" and node.name.startswith("norm")
        )
        node.op_type = "Identity"
        node.attributes.clear()
        node.resize_inputs(1)

    _, module, reason = examined(spoil(build(tiny, tmp_path, task="embed"), tmp_path / "spoilt", change))
    assert module == "norm and head"
    assert "norm is missing" in reason


@pytest.mark.parametrize("fields", [{"output": "top5"}, {"task": "classify,embed,tokens,features"}, {"io": "fp16"}])
def test_a_sound_artifact_with_other_outputs_passes(fields, tiny, tmp_path):
    artifact = build(tiny, tmp_path, precision="fp16", **fields)
    assert bisect.bisect(artifact, BisectOptions(samples=16)).passed


def head_bias(model):
    """The bias of the head of a graph, whatever follows the head."""
    node = next(node for node in model.graph if node.name.startswith("head/") and node.op_type in ("Gemm", "Add"))
    return node.inputs[2 if node.op_type == "Gemm" else 1].name


def test_a_scale_of_the_head_of_an_artifact_for_one_image(tiny, tmp_path):
    def change(model):
        node = next(node for node in model.graph if node.name.startswith("head/"))
        scale(model, node.inputs[1].name, 1.5)
        scale(model, head_bias(model), 1.5)

    _, module, reason = examined(spoil(build(tiny, tmp_path, batch=1), tmp_path / "spoilt", change))
    assert module == "norm and head"
    assert "1.5 × that of the reference model" in reason


@pytest.mark.parametrize("task", ["classify", "classify,embed,tokens,features", "features,classify"])
def test_a_bias_of_the_head_below_probabilities(task, tiny, tmp_path):
    def change(model):
        scale(model, head_bias(model), np.where(np.arange(10) == 2, -20, 1))

    artifact = build(tiny, tmp_path, task=task, output="softmax")
    _, module, reason = examined(spoil(artifact, tmp_path / "spoilt", change))
    assert module.startswith("norm and head"), reason
    assert "head.bias differs" in reason  # in which channels, a softmax does not show: it ignores a common shift


def test_a_shift_of_all_channels_is_not_the_fault_of_one(artifacts, tmp_path):
    def change(model):
        scale(model, product(model, f"{FIRST}.pwconv2")[1], 1.5)

    _, module, reason = examined(spoil(artifacts["onnxruntime", "fp32"], tmp_path, change))
    assert module == FIRST
    assert "a bias differs: most channels are shifted" in reason


@pytest.mark.slow
def test_images_with_several_labels_need_no_option(artifacts, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for index in range(3):
        Image.fromarray(synthetic.dead_leaves(64, index)).save(images / f"{index}.png")
    (tmp_path / "several.csv").write_text("path,label\n" + "".join(f"images/{i}.png,1;2\n" for i in range(3)))
    report, _, _ = examined(artifacts["onnxruntime", "fp32"], data=str(tmp_path / "several.csv"))
    assert report.passed


@pytest.mark.slow
def test_folders_of_images_need_no_classes(artifacts, tmp_path):
    for year in ("2023", "2024"):
        (tmp_path / "images" / year).mkdir(parents=True)
        Image.fromarray(synthetic.dead_leaves(64, int(year))).save(tmp_path / "images" / year / "a.png")
    Image.fromarray(synthetic.dead_leaves(64, 1)).save(tmp_path / "images" / "b.png")
    report, _, _ = examined(artifacts["onnxruntime", "fp32"], data=str(tmp_path / "images"))
    assert report.passed
