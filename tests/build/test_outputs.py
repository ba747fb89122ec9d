"""What an artifact returns: heads as logits, probabilities or the first five; feature vectors, tokens and maps."""

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file

from exporter.artifact.sidecar import OutputSpec
from exporter.errors import BadRequest
from exporter.model import weights
from exporter.verify import VerifyOptions, verify
from tests.conftest import PX, build, tiny_state, write_tiny

IMAGES = torch.randn(5, 3, PX, PX, generator=torch.Generator().manual_seed(3))


def outputs(artifact, images=IMAGES):
    from exporter import backends

    runtime = backends.runtime(artifact.sidecar.backend)
    with runtime.open(artifact, runtime.options()) as session:
        return dict(zip([tensor.name for tensor in artifact.sidecar.outputs], session(images.numpy()), strict=True))


def eager(source, *tasks):
    with torch.inference_mode():
        answers = weights.load(str(source)).model(OutputSpec(tasks=tasks))(IMAGES)
    return [tensor.numpy() for tensor in (answers if isinstance(answers, tuple) else (answers,))]


@pytest.fixture(scope="module")
def logits(tiny):
    return torch.from_numpy(eager(tiny, "classify")[0])


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_probabilities_are_those_of_pytorch(backend, tiny, logits, tmp_path):
    for answer, expected in (("softmax", logits.softmax(-1)), ("sigmoid", logits.sigmoid())):
        artifact = build(tiny, tmp_path / answer, backend, output=answer)
        assert [tensor.holds for tensor in artifact.sidecar.outputs] == [answer]
        np.testing.assert_allclose(outputs(artifact)["probabilities"], expected.numpy(), atol=2e-6)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("classes", [10, 3])
def test_top5_are_the_most_probable_classes(backend, classes, tmp_path):
    folder = write_tiny(tmp_path / "weights", classes=classes)
    artifact = build(folder, tmp_path, backend, output="top5")
    probabilities = torch.from_numpy(eager(folder, "classify")[0]).softmax(-1)
    expected = probabilities.topk(min(5, classes))
    answers = outputs(artifact)
    np.testing.assert_array_equal(answers["classes"], expected.indices.numpy())
    np.testing.assert_allclose(answers["probabilities"], expected.values.numpy(), atol=2e-6)
    report = verify(artifact, VerifyOptions(samples=24))
    assert report.value("top1_agreement") == 100
    assert report.passed


@pytest.mark.parametrize("form", ["plain", "linear", "conv", "nchw"])
def test_several_tasks_give_what_each_gives(form, tiny_v2, tmp_path):
    artifact = build(tiny_v2, tmp_path, task="features,tokens,embed,classify", form=form)
    answers = outputs(artifact)
    assert list(answers) == ["logits", "embedding", "tokens", "stage1", "stage2", "stage3", "stage4"]
    each = [tensor for task in ("classify", "embed", "tokens", "features") for tensor in eager(tiny_v2, task)]
    for name, expected in zip(answers, each, strict=True):
        np.testing.assert_allclose(answers[name], expected, atol=1e-4 * expected.std(), err_msg=name)
    assert artifact.path.name == "v2_custom_classify-embed-tokens-features_fp32.onnx"


def test_vectors_of_unit_length_point_where_the_others_point(tiny, tmp_path):
    (plain,) = eager(tiny, "embed")
    units = outputs(build(tiny, tmp_path, task="embed", l2=True))["embedding"]
    np.testing.assert_allclose(np.linalg.norm(units, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(units, plain / np.linalg.norm(plain, axis=1, keepdims=True), atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_inputs_and_outputs_in_fp16(backend, precision, tiny, logits, tmp_path):
    artifact = build(tiny, tmp_path, backend, precision, io="fp16")
    sidecar = artifact.sidecar
    assert (sidecar.inputs[0].dtype, sidecar.outputs[0].dtype) == ("float16", "float16")
    np.testing.assert_allclose(outputs(artifact)["logits"], logits.numpy(), atol=0.03 * float(logits.std()))
    assert verify(artifact, VerifyOptions(samples=24)).passed
    if backend == "onnxruntime":
        session = onnxruntime.InferenceSession(artifact.path)
        (answer,) = session.run(None, {"images": IMAGES.numpy().astype(np.float16)})
        assert answer.dtype == np.float16


def test_bytes_stay_bytes_where_outputs_are_in_fp16(tiny, tmp_path):
    sidecar = build(tiny, tmp_path, io="fp16", input="uint8", output="top5").sidecar
    assert [tensor.dtype for tensor in (*sidecar.inputs, *sidecar.outputs)] == ["uint8", "int64", "float16"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "embed", "output": "softmax"}, "task embed has no classifier"),
        ({"task": "features", "l2": True}, "task features has no single feature vector"),
        ({"task": "embed,embed"}, "give each task once"),
        (
            {"task": "embed,clasify"},
            "expected classify, embed, tokens, features, segment or pyramid, or several as in classify,embed",
        ),
    ],
)
def test_outputs_that_do_not_fit_each_other_are_refused(fields, message, tiny, tmp_path):
    with pytest.raises(BadRequest, match=message):
        build(tiny, tmp_path, **fields)
    assert not list(tmp_path.iterdir())


def test_a_choice_of_one_is_refused(tmp_path):
    folder = write_tiny(tmp_path / "weights", classes=1)
    with pytest.raises(BadRequest, match="--output top5: a head has one output"):
        build(folder, tmp_path / "out", output="top5")


def test_outputs_option_that_contradicts_the_artifact_is_refused(tiny, tmp_path):
    artifact = build(tiny, tmp_path, output="softmax")
    with pytest.raises(BadRequest, match="built with --output softmax, which is of classes"):
        verify(artifact, VerifyOptions(outputs="multilabel", samples=2))


def test_several_outputs_are_said_on_a_line(tiny, tmp_path):
    from exporter import predict
    from exporter.predict import PredictOptions

    artifact = build(tiny, tmp_path, task="classify,embed", l2=True)
    record = next(iter(predict.answer(artifact, ["synthetic"], PredictOptions(top=2))))
    line = predict.as_text(record)
    assert line.startswith(f"{record['image']}  logits: class ")
    assert "; embedding: 48 numbers: " in line


def test_artifacts_that_return_other_things_are_not_compared(tiny, tmp_path):
    from exporter.bench import latency
    from exporter.compare import artifacts as comparing

    logits, five = build(tiny, tmp_path / "a"), build(tiny, tmp_path / "b", output="top5")
    with pytest.raises(BadRequest, match=r"returns classify \(top5\), and .* classify; bench them separately"):
        latency.bench([logits, five], latency.BenchOptions())
    with pytest.raises(BadRequest, match=r"returns classify \(top5\), .*same --output and --l2"):
        comparing.check_pair(comparing.Pair(logits, five), comparing.CompareOptions())


def test_outputs_beyond_fp16_are_refused_by_name(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = write_tiny(tmp_path / "weights")
    state = load_file(folder / "model.safetensors")
    state["head.weight"] *= 1e7
    save_file(state, folder / "model.safetensors")
    with pytest.raises(BadRequest, match=r"--io fp16: logits reaches .*, and fp16 holds 65,504"):
        build(folder, tmp_path / "out", io="fp16")


@pytest.mark.parametrize("pixels", ["normalized", "float01"])
def test_a_network_that_depends_on_the_last_bits_of_images_in_fp16(pixels, tmp_path):
    """Its first filters see the differences of neighbouring pixels alone."""
    state = tiny_state()
    stem = state["downsample_layers.0.0.weight"]
    state["downsample_layers.0.0.weight"] = 5 * (stem - stem.mean((2, 3), keepdim=True))
    save_file(state, tmp_path / "weights.safetensors")
    artifact = build(tmp_path / "weights.safetensors", tmp_path, task="features", io="fp16", input=pixels)
    assert [tensor.dtype for tensor in artifact.sidecar.outputs] == ["float16"] * 4


@pytest.mark.slow
def test_the_most_probable_classes_beside_a_vector_are_verified(tiny, tmp_path):
    artifact = build(tiny, tmp_path, output="top5", task="classify,embed")
    assert verify(artifact, VerifyOptions(samples=8)).passed
