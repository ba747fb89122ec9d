"""`package --for kserve`: a real MLServer answers as the artifact does, refuses what is wrong, and goes on."""

import json
import os
import re
import shlex
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from exporter import package, predict
from exporter.errors import BadRequest
from exporter.package.destinations import kserve
from exporter.predict import PredictOptions
from tests.conftest import build
from tests.package.conftest import execute

MLSERVER = "CONVNEXT_EXPORT_MLSERVER"  # the virtual environment that tests/package/mlserver.sh made
SHAPE = (1, 3, 64, 64)


@pytest.fixture(scope="session")
def environment():
    """A virtual environment with MLServer."""
    folder = os.environ.get(MLSERVER)
    if folder is None:
        pytest.skip(f"{MLSERVER} does not name an environment that tests/package/mlserver.sh made")
    return Path(folder)


def free_ports(count):
    """Ports of this machine that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def commands(out):
    """The lines of the README: those that install, the one that serves, and those that ask."""
    blocks = re.findall(r"```console\n(.*?)```", (out / "README.md").read_text(), flags=re.S)
    lines = "".join(blocks).splitlines()
    assert lines[:2] == ["python3 -m venv .venv", ".venv/bin/pip install -r requirements.txt"]
    return lines[2], lines[3:]


@contextmanager
def served(out, environment, http, grpc, metrics):
    """Serve a package with the command of its README, at other ports."""
    if not (out / ".venv").exists():
        (out / ".venv").symlink_to(environment)
    line, _ = commands(out)
    words = [*shlex.split(line), "--http-port", http, "--grpc-port", grpc, "--metrics-port", metrics]
    with (out / "log").open("w") as log:
        server = subprocess.Popen([str(word) for word in words], cwd=out, stdout=log, stderr=log)
    try:
        wait_until_ready(http, server, out / "log")
        yield server
    finally:
        server.terminate()
        assert server.wait(30) in (0, -15), (out / "log").read_text()[-2000:]


def wait_until_ready(port, server, log, seconds=120):
    end = time.monotonic() + seconds
    while not is_ready(port):
        assert server.poll() is None, log.read_text()[-2000:]
        assert time.monotonic() < end, log.read_text()[-2000:]
        time.sleep(0.2)


def is_ready(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=10) as answer:
            return answer.status == 200
    except OSError:
        return False


@pytest.fixture(scope="session")
def server(artifacts, environment, tmp_path_factory):
    """A package, and the ports at which it is served."""
    out, ports = tmp_path_factory.mktemp("kserve") / "package", free_ports(3)
    package.package(artifacts["onnxruntime", "fp32"], "kserve", out)
    with served(out, environment, *ports):
        yield out, *ports


def tensor(**changes):
    values = np.zeros(SHAPE, np.float32)
    fields = {"name": "images", "shape": SHAPE, "datatype": "FP32", "data": values.ravel().tolist()}
    return {**fields, **changes}


def post(port, body, model="custom_fp32", **headers):
    """Status and answer."""
    address = f"http://127.0.0.1:{port}/v2/models/{model}/infer"
    names = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    try:
        with urllib.request.urlopen(urllib.request.Request(address, body, names), timeout=120) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def infer(port, *tensors):
    return post(port, json.dumps({"inputs": tensors}).encode())


@pytest.mark.slow
def test_the_commands_of_its_readme_give_the_answers_of_predict(artifacts, server):
    out, http, grpc, _ = server
    ports = {"http://127.0.0.1:8080": http, "grpc://127.0.0.1:8081": grpc}
    _, lines = commands(out)
    assert [line.split()[1] for line in lines] == ["client.py", "selftest.py", "selftest.py"]
    outputs = []
    for line in lines:
        program, *words = shlex.split(line)
        words = [f"{word.rsplit(':', 1)[0]}:{ports[word]}" if word in ports else word for word in words]
        if words[0] == "client.py":
            words += ["--url", f"http://127.0.0.1:{http}"]
        elif len(words) == 1:
            words.append(f"http://127.0.0.1:{http}")
        result = execute(out / program, *words, folder=out)
        assert result.returncode == 0, f"{line}\n{result.stdout}{result.stderr}"
        outputs.append(result.stdout)
    record = json.loads(outputs[0])
    (expected,) = predict.answer(artifacts["onnxruntime", "fp32"], [str(out / "sample.png")], PredictOptions())
    assert [one["label"] for one in record["predictions"]] == [one["label"] for one in expected["predictions"]]
    for one, other in zip(record["predictions"], expected["predictions"], strict=True):
        assert one["probability"] == pytest.approx(other["probability"], abs=2e-5)
    assert [text.splitlines()[-1] for text in outputs[1:]] == ["passed", "passed"]
    versions = "from importlib.metadata import version; print(version('mlserver'))"
    needed = (out / "requirements.txt").read_text().splitlines()
    assert f"mlserver=={execute(out / '.venv/bin/python', '-c', versions, folder=out).stdout.strip()}" in needed


@pytest.mark.slow
def test_the_server_names_its_tensors_and_takes_several_images(server):
    _, http, _, metrics = server
    with urllib.request.urlopen(f"http://127.0.0.1:{http}/v2/models/custom_fp32", timeout=60) as answer:
        facts = json.load(answer)
    assert facts["inputs"] == [{"name": "images", "datatype": "FP32", "shape": [-1, 3, 64, 64]}]
    assert facts["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 10]}]
    images = np.random.default_rng(0).standard_normal((8, *SHAPE[1:])).astype(np.float32)
    status, text = infer(http, tensor(shape=images.shape, data=images.tolist()))
    assert (status, json.loads(text)["outputs"][0]["shape"]) == (200, [8, 10])
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics}/metrics", timeout=60) as answer:
        assert b"model_infer_request_success" in answer.read()


WRONG = {
    "another shape": (tensor(shape=(1, 3, 32, 32)), "shape .1, 3, 32, 32., expected .-1, 3, 64, 64."),
    "too few axes": (tensor(shape=(3, 64, 64)), "expected .-1, 3, 64, 64."),
    "a negative side": (tensor(shape=(-1, 3, 64, 64)), "expected .-1, 3, 64, 64."),
    "too many images": (tensor(shape=(9, 3, 64, 64)), "9 images, expected at most 8"),
    "too few values": (tensor(data=[1.0]), "1 values, expected 12288"),
    "no values": (tensor(data=[]), "0 values, expected 12288"),
    "another datatype": (tensor(datatype="FP64"), "datatype FP64, expected FP32"),
    "an unknown datatype": (tensor(datatype="FP7"), "FP7"),
    "another name": (tensor(name="pixels"), "inputs: pixels; expected one, images"),
    "above fp32": (tensor(data=[1e39] + [0.0] * 12287), "not finite"),
    "null": (tensor(data=[None] + [0.0] * 12287), "no numbers"),
    "text": (tensor(data=["0.5"] + [0.0] * 12287), "no numbers"),
    "truth values": (tensor(data=[True] * 12288), "no numbers"),
    "ragged lists": (tensor(data=[[1.0, 2.0], [3.0]]), "lists of different lengths"),
}


@pytest.mark.slow
def test_bad_requests_are_answered_with_4xx_and_the_server_goes_on(server):
    out, http, _, _ = server
    for name, (wrong, message) in WRONG.items():
        status, text = infer(http, wrong)
        assert status in (400, 422), f"{name}: {status} {text[:300]}"
        assert re.search(message, text), f"{name}: {text[:300]}"
        assert len(text) < 5000, f"{name}: the request is not sent back"
    good = json.dumps({"inputs": [tensor()]}).encode()
    for body in (
        good.replace(b"0.0", b"NaN", 1),
        good.replace(b"0.0", b"1e999", 1),
        b"hello",
        b"{}",
        b"",
        b"[" * 100_000,
    ):
        assert post(http, body)[0] in (400, 422), body[:30]
    assert infer(http)[0] == 400
    assert infer(http, tensor(), tensor())[0] == 400
    assert post(http, good, model="another")[0] == 404
    assert post(http, good, Content_Encoding="gzip")[0] == 415
    assert post(http, good)[0] == 200
    assert "Internal Server Error" not in (out / "log").read_text()


@pytest.mark.slow
def test_bodies_of_100_mb_are_refused_with_and_without_a_length(server):
    out, http, _, _ = server
    body = b"[" + b"0," * 50_000_000 + b"0]"
    status, text = post(http, body)
    assert (status, "larger than" in text) == (413, True)
    assert " 413 " in chunked(http, body)
    assert infer(http, tensor())[0] == 200
    limit = int(re.search(r"LARGEST_BODY = (\d+)", (out / "serve.py").read_text())[1])
    whole = json.dumps({"inputs": [tensor(shape=(8, 3, 64, 64), data=[-0.12345678901234567] * 8 * 12288)]})
    assert len(whole) < limit < 100_000_000, "the largest batch fits with all digits of its numbers"
    assert post(http, whole.encode())[0] == 200


def chunked(port, body):
    """The first line of the answer to a body without a length."""
    with socket.create_connection(("127.0.0.1", port)) as one:
        head = "POST /v2/models/custom_fp32/infer HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        one.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        try:
            for start in range(0, len(body), 1 << 20):
                part = body[start : start + (1 << 20)]
                one.sendall(b"%x\r\n%s\r\n" % (len(part), part))
        except ConnectionError:
            pass  # the server has answered, and hears no more
        return one.recv(1000).decode().partition("\r\n")[0]


@pytest.mark.slow
def test_clients_that_hang_up_do_not_stop_the_server(server):
    _, http, _, _ = server
    body = json.dumps({"inputs": [tensor()]}).encode()
    head = b"POST /v2/models/custom_fp32/infer HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    for sent in (0.5, 1.0):
        for _ in range(4):
            with socket.create_connection(("127.0.0.1", http)) as one:
                one.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body[: int(sent * len(body))])
    assert infer(http, tensor())[0] == 200
    assert is_ready(http)


GRPC = """
import sys, numpy as np, grpc
from mlserver.grpc import dataplane_pb2 as protocol
from mlserver.grpc.dataplane_pb2_grpc import GRPCInferenceServiceStub
server = GRPCInferenceServiceStub(grpc.insecure_channel(sys.argv[1], options=[("grpc.max_send_message_length", -1)]))
zeros = np.zeros((1, 3, 64, 64), np.float32)
nan = np.full_like(zeros, np.nan)
def ask(raw, shape=zeros.shape, datatype="FP32", model="custom_fp32"):
    tensor = protocol.ModelInferRequest.InferInputTensor(name="images", datatype=datatype, shape=shape)
    request = protocol.ModelInferRequest(model_name=model, inputs=[tensor], raw_input_contents=raw)
    try:
        server.ModelInfer(request, timeout=60)
        return "OK"
    except grpc.RpcError as error:
        return error.code().name
print(ask([zeros.tobytes()]), ask([nan.tobytes()]), ask([b"123"]), ask([]), ask([zeros.tobytes()], (1, 3, 32, 32)),
      ask([zeros.tobytes()], datatype="FP64"), ask([zeros.tobytes()], datatype="FP7"), ask([bytes(100_000_000)]),
      ask([zeros.tobytes()], model="another"), ask([zeros.tobytes()]))
"""


@pytest.mark.slow
def test_bad_requests_over_grpc_are_errors_of_the_client(server):
    out, _, grpc, _ = server
    result = execute(out / ".venv/bin/python", "-c", GRPC, f"127.0.0.1:{grpc}", folder=out)
    assert result.returncode == 0, result.stderr
    wrong = ["INVALID_ARGUMENT"] * 6
    assert result.stdout.split() == ["OK", *wrong, "RESOURCE_EXHAUSTED", "NOT_FOUND", "OK"]


@pytest.mark.slow
def test_a_port_in_use_is_named_in_one_line(server):
    out, http, _, _ = server
    unused = free_ports(1)[0]
    for option, port in (("--http-port", http), ("--grpc-port", server[2]), ("--metrics-port", server[3])):
        others = {"--http-port": unused, "--grpc-port": unused, "--metrics-port": unused} | {option: port}
        words = [str(word) for pair in others.items() for word in pair]
        result = execute(out / ".venv/bin/python", "serve.py", *words, folder=out)
        assert result.returncode == 1
        assert result.stderr.splitlines() == [
            f"serve.py: 127.0.0.1:{port}: Address already in use; choose another with {option}"
        ]
    assert is_ready(http)


@pytest.mark.slow
def test_pixels_in_a_fixed_batch_are_served_and_the_self_test_sees_another_model(tiny, environment, tmp_path):
    artifact, out = build(tiny, tmp_path / "build", batch=2, input="uint8", layout="nhwc"), tmp_path / "package"
    package.package(artifact, "kserve", out)
    ports = free_ports(3)
    with served(out, environment, *ports):
        for url in (f"http://127.0.0.1:{ports[0]}", f"grpc://127.0.0.1:{ports[1]}"):
            result = execute(out / ".venv/bin/python", "selftest.py", url, folder=out)
            assert (result.returncode, result.stdout.splitlines()[-1]) == (0, "passed"), result.stderr
        pixels = tensor(shape=(2, 64, 64, 3), datatype="UINT8", data=[255] * 24576)
        assert infer(ports[0], pixels)[0] == 200
        for value in (256, -1, 0.5):
            status, text = infer(ports[0], {**pixels, "data": [value] * 24576})
            assert (status, "whole numbers from 0 to 255" in text) == (400, True)
        assert infer(ports[0], {**pixels, "shape": (1, 64, 64, 3), "data": [0] * 12288})[0] == 400
        expected = dict(np.load(out / "expected.npz"))
        np.savez(out / "expected.npz", **{name: -array for name, array in expected.items()})
        result = execute(out / ".venv/bin/python", "selftest.py", f"http://127.0.0.1:{ports[0]}", folder=out)
        assert (result.returncode, result.stdout.splitlines()[-1]) == (1, "FAILED")


def test_a_package_has_the_files_that_its_readme_names(artifacts, tmp_path):
    written = package.package(artifacts["openvino", "fp32"], "kserve", tmp_path / "package")
    assert set(written.files) == {
        "README.md", "client.py", "expected.npz", "labels.txt", "requirements.txt", "sample.png", "selftest.py",
        "serve.py", "settings.json", *(f"custom_fp32/{name}" for name in (
            "custom_fp32.bin", "custom_fp32.xml", "custom_fp32.xml.json", "model-settings.json", "runtime.py")),
    }  # fmt: skip
    for name in ("client.py", "serve.py", "custom_fp32/runtime.py", "selftest.py"):
        text = (tmp_path / "package" / name).read_text()
        compile(text, name, "exec")
        assert max(map(len, text.splitlines())) <= 120, name
    assert "import openvino" in (tmp_path / "package" / "custom_fp32" / "runtime.py").read_text()


def test_outputs_that_the_protocol_does_not_name_are_refused(artifacts, tmp_path):
    artifact = artifacts["onnxruntime", "fp32"]
    outputs = (replace(artifact.sidecar.outputs[0], dtype="bfloat16"),)
    other = type(artifact)(artifact.path, replace(artifact.sidecar, outputs=outputs))
    with pytest.raises(BadRequest, match="outputs of bfloat16, and --for kserve takes float32, uint8; export it"):
        package.package(other, "kserve", tmp_path / "package")
    assert not (tmp_path / "package").exists()
    assert kserve.DATATYPES["float32"] == "FP32"
