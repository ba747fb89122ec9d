"""`package --for triton` and `--for ovms`: configurations that the servers read, and clients that speak to them."""

import importlib.util
import json
import sys
from functools import cache
from pathlib import Path

import pytest
from msgspec.structs import replace

from exporter import package, predict
from exporter.errors import BadRequest
from exporter.package.destinations import triton
from exporter.package.destinations.triton import TritonOptions
from exporter.predict import PredictOptions
from tests.conftest import build
from tests.package.conftest import execute
from tests.package.servers import served


@cache
def model_config():
    """The messages of Triton's `model_config.proto`, from its client, which need nothing but protobuf."""
    client = importlib.util.find_spec("tritonclient")
    if client is None:
        pytest.skip("tritonclient is not installed")
    file = Path(client.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config_of(folder):
    """The `config.pbtxt` of a model as Triton's own protobuf reads it."""
    messages = model_config()
    from google.protobuf import text_format

    return text_format.Parse((folder / "config.pbtxt").read_text(), messages.ModelConfig())


def test_a_dynamic_batch_is_put_together_by_triton(artifacts, tmp_path):
    artifact, out = artifacts["onnxruntime", "fp32"], tmp_path / "package"
    package.package(artifact, "triton", out, own=TritonOptions(instances=2, max_batch=8))
    name = artifact.path.stem
    config = config_of(out / "models" / name)
    assert (config.name, config.backend, config.max_batch_size) == (name, "onnxruntime", 8)
    assert config.default_model_filename == artifact.path.name
    assert config.HasField("dynamic_batching")
    (tensor,) = config.input
    assert (tensor.name, list(tensor.dims)) == (artifact.sidecar.inputs[0].name, [3, 64, 64])
    assert (
        tensor.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[tensor.data_type].name == "TYPE_FP32"
    )
    (output,) = config.output
    assert (output.name, list(output.dims), output.label_filename) == ("logits", [10], "labels.txt")
    (group,) = config.instance_group
    assert (group.count, group.Kind.Name(group.kind)) == (2, "KIND_CPU")
    (warmup,) = config.model_warmup
    assert list(warmup.inputs[tensor.name].dims) == [3, 64, 64]
    folder = out / "models" / name
    assert (folder / "1" / artifact.path.name).read_bytes() == artifact.path.read_bytes()
    assert (folder / "labels.txt").read_text().splitlines() == [f"class {number}" for number in range(10)]


def test_a_fixed_batch_stands_in_the_dimensions(tiny, tmp_path):
    artifact = build(tiny, tmp_path, batch=3, input="uint8")
    package.package(artifact, "triton", tmp_path / "package")
    config = config_of(tmp_path / "package" / "models" / artifact.path.stem)
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    assert list(config.input[0].dims) == [3, 3, 64, 64]
    assert config.input[0].data_type == 2, "TYPE_UINT8"
    assert list(config.output[0].dims) == [3, 10]
    assert list(config.model_warmup[0].inputs[config.input[0].name].dims) == [3, 3, 64, 64]
    for options in (TritonOptions(max_batch=4), TritonOptions(ensemble=True)):
        with pytest.raises(BadRequest, match="has a fixed batch of 3"):
            package.package(artifact, "triton", tmp_path / "other", own=options)


def test_openvino_is_given_whole_batches(artifacts, tmp_path):
    artifact = artifacts["openvino", "fp32"]
    package.package(artifact, "triton", tmp_path / "package")
    config = config_of(tmp_path / "package" / "models" / artifact.path.stem)
    assert (config.backend, config.max_batch_size, list(config.input[0].dims)) == ("openvino", 0, [-1, 3, 64, 64])
    assert config.parameters["PERFORMANCE_HINT"].string_value == "LATENCY"
    assert "LIMIT = 0.05" in (tmp_path / "package" / "selftest.py").read_text(), "its arithmetic may be bf16"
    with pytest.raises(BadRequest, match=r"--max-batch 4: .* puts no requests together"):
        package.package(artifact, "triton", tmp_path / "other", own=TritonOptions(max_batch=4))
    with pytest.raises(BadRequest, match="--on gpu: Triton runs OpenVINO on the cpu"):
        package.package(artifact, "triton", tmp_path / "other", own=TritonOptions(on="gpu"))


def engine(artifact, tmp_path, *profiles, **target):
    """An engine of TensorRT, as far as its sidecar says."""
    from exporter.artifact import publish

    tensor = artifact.sidecar.inputs[0]
    facts = {"flavor": "tensorrt", "version": "10.13", "profiles": [list(profile) for profile in profiles], **target}
    sidecar = replace(artifact.sidecar, backend="tensorrt", inputs=(tensor,), target=facts, parents=("",))
    path = tmp_path / "tiny_fp32.plan"
    return publish(path, sidecar, lambda file: file.write_bytes(b"engine"))


def test_the_profiles_of_an_engine_are_its_batches(artifacts, tmp_path, monkeypatch):
    artifact = engine(artifacts["onnxruntime", "fp32"], tmp_path, (1, 1, 4), (1, 8, 32))
    written = package.package(artifact, "triton", tmp_path / "package")
    config = config_of(tmp_path / "package" / "models" / "tiny_fp32")
    assert (config.backend, config.max_batch_size) == ("tensorrt", 32)
    assert list(config.dynamic_batching.preferred_batch_size) == [8]
    (group,) = config.instance_group
    assert (group.Kind.Name(group.kind), list(group.profile)) == ("KIND_GPU", ["0", "1"])
    assert "engine" in written.unexpected
    assert "expected.npz" not in written.files
    readme = (tmp_path / "package" / "README.md").read_text()
    assert "`expected.npz` is missing" in readme
    assert "TensorRT 10.13" in readme
    assert "NOT FINITE" in (tmp_path / "package" / "selftest.py").read_text()


@pytest.mark.parametrize(
    ("target", "profiles", "message"),
    [
        ({"flavor": "tensorrt-rtx"}, [(1, 1, 4)], "an engine of tensorrt-rtx, and Triton opens those of TensorRT"),
        ({"strip_weights": True}, [(1, 1, 4)], "built without weights"),
        ({}, [(2, 4, 8)], "its profiles begin at 2 images"),
        (
            {},
            [(8, 8, 16), (1, 1, 4)],
            "none of its profiles has 5 images, and Triton puts any number of requests together",
        ),
    ],
)
def test_an_engine_that_triton_cannot_serve_is_refused(target, profiles, message, artifacts, tmp_path):
    artifact = engine(artifacts["onnxruntime", "fp32"], tmp_path, *profiles, **target)
    with pytest.raises(BadRequest, match=message):
        package.package(artifact, "triton", tmp_path / "package")
    assert not (tmp_path / "package").exists()


def test_an_engine_for_later_versions_is_started_with_the_option_that_loads_it(artifacts, tmp_path):
    artifact = engine(artifacts["onnxruntime", "fp32"], tmp_path, (1, 1, 4), version_compatible=True)
    package.package(artifact, "triton", tmp_path / "package")
    readme = (tmp_path / "package" / "README.md").read_text()
    assert readme.count("models --backend-config=tensorrt,version-compatible=true") == 2
    assert "this version, or a later one of the same major version" in readme


@pytest.mark.parametrize(
    ("precision", "on", "noted"), [("fp32", "gpu", True), ("fp16", "gpu", False), ("fp32", "cpu", False)]
)
def test_products_in_tf32_are_noted_where_they_are_on_a_gpu(precision, on, noted, artifacts, tmp_path):
    package.package(artifacts["onnxruntime", precision], "triton", tmp_path / "package", own=TritonOptions(on=on))
    assert ("NVIDIA_TF32_OVERRIDE=0" in (tmp_path / "package" / "README.md").read_text()) == noted


def test_an_engine_cannot_run_where_pytorch_cannot_be_imported(monkeypatch):
    from exporter.backends.tensorrt import runtime

    monkeypatch.setitem(sys.modules, "torch", None)
    assert runtime.unable() == "PyTorch, whose memory it uses, is not installed"


@pytest.mark.parametrize("destination", ["python", "ovms"])
def test_an_engine_is_refused_elsewhere(destination, artifacts, tmp_path):
    artifact = engine(artifacts["onnxruntime", "fp32"], tmp_path, (1, 1, 4))
    with pytest.raises(BadRequest, match=rf"--for {destination} .*; package the ONNX file, or use --for triton"):
        package.package(artifact, destination, tmp_path / "package")


def test_an_ensemble_hands_images_to_the_model(artifacts, tmp_path):
    artifact, out = artifacts["onnxruntime", "fp32"], tmp_path / "package"
    package.package(artifact, "triton", out, own=TritonOptions(ensemble=True))
    name = artifact.path.stem
    pipeline, first = config_of(out / "models" / f"{name}_pipeline"), config_of(out / "models" / f"{name}_preprocess")
    assert [step.model_name for step in pipeline.ensemble_scheduling.step] == [f"{name}_preprocess", name]
    given, taken = first.output[0], config_of(out / "models" / name).input[0]
    assert (given.name, given.data_type, given.dims) == (taken.name, taken.data_type, taken.dims)
    assert pipeline.output[0] == config_of(out / "models" / name).output[0]
    assert (out / "requirements.txt").read_text() == "numpy>=1.26\n"
    assert all(any((folder / "1").iterdir()) for folder in (out / "models").iterdir())


def test_text_of_protobuf_quotes_names():
    messages = model_config()
    from google.protobuf import text_format

    name = 'a "b"\\\n✓'
    text = triton.text({"name": name, "max_batch_size": 0})
    assert text_format.Parse(text, messages.ModelConfig()).name == name


def runner(artifact):
    """A function that runs an artifact on arrays as it takes them."""
    import onnxruntime

    session = onnxruntime.InferenceSession(artifact.path, providers=["CPUExecutionProvider"])
    return lambda batch: session.run(None, {session.get_inputs()[0].name: batch})


@pytest.mark.parametrize("destination", ["triton", "ovms"])
@pytest.mark.parametrize("text", [False, True])
def test_the_client_gives_the_answers_of_predict(destination, text, artifacts, bare, tmp_path):
    artifact, out = artifacts["onnxruntime", "fp32"], tmp_path / "package"
    package.package(artifact, destination, out)
    with served(
        artifact.path.stem, runner(artifact), artifact.sidecar.inputs[0], artifact.sidecar.outputs, text
    ) as url:
        result = execute(bare, "client.py", "--url", url, "sample.png", folder=out)
        test = execute(bare, "selftest.py", url, folder=out)
    assert (test.returncode, test.stdout.splitlines()[-1]) == (0, "passed"), test.stderr
    (expected,) = predict.answer(artifact, [str(out / "sample.png")], PredictOptions())
    answers = json.loads(result.stdout)["predictions"]
    assert [one["label"] for one in answers] == [one["label"] for one in expected["predictions"]]
    probabilities = [one["probability"] for one in expected["predictions"]]
    assert [one["probability"] for one in answers] == pytest.approx(probabilities, abs=2e-5)


def test_a_server_that_refuses_hangs_up_or_is_not_there_is_one_line(artifacts, bare, tmp_path):
    artifact, out = artifacts["onnxruntime", "fp32"], tmp_path / "package"
    package.package(artifact, "ovms", out)
    facts = (artifact.path.stem, runner(artifact), artifact.sidecar.inputs[0], artifact.sidecar.outputs)
    with served(*facts, error=(400, "no such model")) as url:
        result = execute(bare, "client.py", "--url", url, "sample.png", folder=out)
        assert "400" in json.loads(result.stdout)["error"]
        assert "no such model" in json.loads(result.stdout)["error"]
    with served(*facts, hang_up=True) as url:
        result = execute(bare, "client.py", "--url", url, "sample.png", folder=out)
        assert "the server hung up: IncompleteRead" in json.loads(result.stdout)["error"]
        result = execute(bare, "selftest.py", url, folder=out)
        assert (result.returncode, len(result.stderr.splitlines())) == (1, 1)
    result = execute(bare, "selftest.py", url, folder=out)
    assert (result.returncode, len(result.stderr.splitlines())) == (1, 1)
    assert result.stderr.startswith(f"{url}/v2/models/{artifact.path.stem}/infer: no answer: ")
    result = execute(bare, "client.py", "--url", url, "sample.png", folder=out)
    assert (result.returncode, url in json.loads(result.stdout)["error"]) == (1, True)


def test_the_folder_of_openvino_model_server_is_what_it_reads(artifacts, tmp_path):
    """`config.json` has only keys of its schema (src/schema.cpp), and the folder what its loader looks for."""
    import openvino

    artifact, out = artifacts["openvino", "fp32"], tmp_path / "package"
    package.package(artifact, "ovms", out)
    (entry,) = json.loads((out / "config.json").read_text())["model_config_list"]
    assert entry["config"].keys() <= {
        "name", "base_path", "batch_size", "model_version_policy", "shape", "layout", "nireq", "target_device",
        "allow_cache", "plugin_config",
    }  # fmt: skip
    version = out / entry["config"]["base_path"] / "1"
    (graph,), (weights,) = version.glob("*.xml"), version.glob("*.bin")
    assert graph.with_suffix(".bin") == weights
    compiled = openvino.Core().compile_model(graph, "CPU", entry["config"]["plugin_config"])
    assert compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"
    onnx = tmp_path / "onnx"
    package.package(artifacts["onnxruntime", "fp32"], "ovms", onnx)
    assert len(list((onnx / "models").glob("*/1/*.onnx"))) == 1
