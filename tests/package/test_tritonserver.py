"""A real tritonserver loads the repositories and answers.

It is that of the wheel `nvidia-pytriton`, in a Python of its own, which `tests/package/tritonserver.sh` prepares; the
environment variable CONVNEXT_EXPORT_TRITON has its folder. Its only backend is that for Python, so ONNX Runtime and
OpenVINO run in a stand-in for Triton's own backends (`stand_in.py`). All else is Triton: the repository, the
configurations, label files, warm-up, batching, ensembles, HTTP.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
import urllib.request
from pathlib import Path

import pytest

from exporter import package, predict
from exporter.backends import as_taken
from exporter.data import images
from exporter.package.destinations.triton import TritonOptions
from exporter.predict import PredictOptions
from tests.package.conftest import execute

FOLDER = os.environ.get("CONVNEXT_EXPORT_TRITON", "")
pytestmark = pytest.mark.skipif(
    not FOLDER, reason="needs a Python with nvidia-pytriton (tests/package/tritonserver.sh)"
)
START_S = 90


@pytest.fixture(scope="module")
def backends(tmp_path_factory):
    """A folder of backends: Triton's for Python, and the stand-ins."""
    folder = tmp_path_factory.mktemp("backends")
    wheel = next(Path(FOLDER).glob("lib/python3*/site-packages/pytriton/tritonserver"))
    shutil.copytree(wheel / "backends" / "python", folder / "python")
    version = re.search(r"python(3\.\d+)", str(wheel))[1]
    stub = Path(shutil.copy(wheel / "python_backend_stubs" / version / "triton_python_backend_stub", folder / "python"))
    stub.chmod(0o755)
    for name in ("onnxruntime", "openvino"):
        (folder / name).mkdir()
        shutil.copy(Path(__file__).with_name("stand_in.py"), folder / name / "model.py")
    return folder


@contextlib.contextmanager
def started(package_folder, backends):
    """The address of a server, which is started with the command of the README."""
    (command,) = re.findall(r"^tritonserver .*$", (package_folder / "README.md").read_text(), flags=re.M)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    wheel = next(Path(FOLDER).glob("lib/python3*/site-packages/pytriton/tritonserver"))
    words = [wheel / "bin" / command.split()[0], *command.split()[1:], "--http-port", str(port)]
    words += ["--allow-grpc", "false", "--allow-metrics", "false", "--backend-directory", backends]
    libraries = f"{wheel.parent.parent / 'nvidia_pytriton.libs'}:{sysconfig.get_config_var('LIBDIR')}"
    environment = {"PATH": f"{FOLDER}/bin:{os.environ['PATH']}", "LD_LIBRARY_PATH": libraries}
    log = package_folder.with_suffix(".log")
    with log.open("wb") as out:
        server = subprocess.Popen(
            list(map(str, words)), cwd=package_folder, env=environment, stdout=out, stderr=out, start_new_session=True
        )
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + START_S
    try:
        while not is_ready(url):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield url
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def is_ready(url):
    try:
        return urllib.request.urlopen(f"{url}/v2/health/ready", timeout=5).status == 200
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "ensemble"), [("onnxruntime", False), ("onnxruntime", True), ("openvino", True)])
def test_a_real_server_gives_the_answers_of_predict(backend, ensemble, artifacts, bare, backends, tmp_path):
    artifact, out = artifacts[backend, "fp32"], tmp_path / "package"
    package.package(artifact, "triton", out, own=TritonOptions(ensemble=ensemble, instances=2))
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    with started(out, backends) as url:
        result = execute(bare, "client.py", "--url", url, "sample.png", tmp_path / "page.jpg", folder=out)
        test = execute(bare, "selftest.py", url, folder=out)
        labelled = classified(url, artifact.path.stem, artifact, out / "sample.png")
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    (expected,) = predict.answer(artifact, [str(out / "sample.png")], PredictOptions())
    first = [one["probability"] for one in expected["predictions"]]
    assert [one["probability"] for one in answers[0]["predictions"]] == pytest.approx(first, abs=2e-5)
    assert [one["label"] for one in answers[0]["predictions"]] == [one["label"] for one in expected["predictions"]]
    assert "cannot identify" in answers[1]["error"]
    assert (test.returncode, test.stdout.splitlines()[-1]) == (0, "passed"), test.stderr
    assert labelled.endswith(f":{expected['predictions'][0]['label']}"), "Triton has read the label file"


def classified(url, name, artifact, picture):
    """The first class of a picture, as Triton's classification extension names it: score, number and label."""
    recipe = artifact.sidecar.preprocessing
    batch = as_taken(images.read(picture, recipe)[None], recipe)
    tensor = {"name": "images", "shape": batch.shape, "datatype": "FP32", "data": batch.ravel().tolist()}
    wanted = [{"name": "logits", "parameters": {"classification": 1}}]
    content = json.dumps({"inputs": [tensor], "outputs": wanted}).encode()
    with urllib.request.urlopen(urllib.request.Request(f"{url}/v2/models/{name}/infer", content)) as response:
        return json.loads(response.read())["outputs"][0]["data"][0]
