"""How fast MLServer answers with a package of `--for kserve`: beside the bare session, for 1, 4 and 16 clients at once.

    python -m benchmarks.serving ARTIFACT --environment VENV -o FILE

VENV is the virtual environment that tests/package/mlserver.sh makes. The ways take turns: over HTTP, over gRPC, and the
session of the package called from as many threads in a process of its own. Clients send one image, prepared before, and
wait for the answer; each request is timed. An answer other than that of the artifact is an error.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import msgspec

from benchmarks.provenance import environment
from exporter import artifact as artifacts
from exporter.artifact.disk import write_file
from exporter.artifact.sidecar import Record
from exporter.errors import BadRequest, Unavailable
from exporter.package import package

CLIENTS = (1, 4, 16)
WAYS = ("session", "http", "grpc")
ROUNDS = 5
SECONDS = 4.0
START_S = 120

# Runs in the environment of the server. Its words: the package, the way, the address, the clients, the seconds.
LOAD = """
import http.client, importlib.util, json, sys, threading, time
from pathlib import Path
import numpy as np
folder, way, address = Path(sys.argv[1]), *sys.argv[2:4]
clients, seconds = int(sys.argv[4]), float(sys.argv[5])
sys.path[:0] = [str(folder), str(next(folder.glob("*/runtime.py")).parent)]
import client
batch = client.preprocess(next(folder.glob("sample.*")))
expected = np.load(folder / "expected.npz")
expected = expected[expected.files[0]]

def session():
    import runtime
    model = runtime.load()
    return lambda: (lambda: runtime.run(model, batch)[0])

def over_http():
    tensor = {"name": client.INPUT, "shape": batch.shape, "datatype": client.DATATYPE, "data": batch.ravel().tolist()}
    body, path = json.dumps({"inputs": [tensor]}).encode(), f"/v2/models/{client.MODEL}/infer"
    def connected():
        connection = http.client.HTTPConnection(address, timeout=client.TIMEOUT_S)
        def ask():
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            answer = json.loads(connection.getresponse().read())["outputs"][0]
            return np.array(answer["data"], np.float32).reshape(answer["shape"])
        return ask
    return connected

def over_grpc():
    return lambda: (lambda: client.over_grpc(f"grpc://{address}", batch)[0])

connect = {"session": session, "http": over_http, "grpc": over_grpc}[way]()
times, errors, begin = [[] for _ in range(clients)], [0] * clients, threading.Barrier(clients + 1)

def work(number):
    ask = connect()
    for _ in range(2):
        ask()
    begin.wait()
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        try:
            good = np.abs(ask() - expected).max() <= 1e-2 * np.abs(expected).max()
        except Exception:
            good = False
        errors[number] += not good
        times[number].append(time.perf_counter() - start)

threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
[one.start() for one in threads]
begin.wait()
start = time.perf_counter()
[one.join() for one in threads]
print(json.dumps({"seconds": time.perf_counter() - start, "times": sum(times, []), "errors": sum(errors)}))
"""


class Round(Record, frozen=True):
    """One turn of a way: requests in a second, milliseconds of the median and of the 99th percentile, errors."""

    way: str
    clients: int
    rate: float
    p50_ms: float
    p99_ms: float
    requests: int
    errors: int


class Result(Record, frozen=True):
    """Every turn of every way, in order."""

    environment: dict[str, Any]
    server: dict[str, str]
    artifact: str
    image_bytes: int
    rounds: list[Round]
    schema: int = 1

    def table(self) -> str:
        """A row for each number of clients, with the medians of the turns."""
        lines = [
            "| clients | p50 ms: session | HTTP | gRPC | images/s: session | HTTP | gRPC | errors |",
            "|--:|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for clients in sorted({one.clients for one in self.rounds}):
            turns = {way: [one for one in self.rounds if (one.way, one.clients) == (way, clients)] for way in WAYS}
            times = (f"{median(one.p50_ms for one in turns[way]):.1f}" for way in WAYS)
            rates = (f"{median(one.rate for one in turns[way]):.0f}" for way in WAYS)
            errors = sum(one.errors for way in WAYS for one in turns[way])
            lines.append(f"| {clients} | {' | '.join(times)} | {' | '.join(rates)} | {errors} |")
        return "\n".join(lines) + "\n"


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@contextmanager
def served(folder: Path, python: Path) -> Iterator[dict[str, str]]:
    """Serve a package; the address of each way.

    Raises: Unavailable where the server does not start.
    """
    http, grpc, metrics = free_ports(3)
    words = ["--http-port", http, "--grpc-port", grpc, "--metrics-port", metrics]
    with (folder / "log").open("w") as log:
        command = [str(word) for word in (python, "serve.py", *words)]
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=own_threads())
    try:
        end = time.monotonic() + START_S
        while not is_ready(http):
            if server.poll() is not None or time.monotonic() > end:
                raise Unavailable(f"MLServer has not started: {(folder / 'log').read_text()[-500:]}")
            time.sleep(0.2)
        yield {"session": "", "http": f"127.0.0.1:{http}", "grpc": f"127.0.0.1:{grpc}"}
    finally:
        server.terminate()
        server.wait()


def is_ready(port: int) -> bool:
    """Whether the server says so."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=10) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def own_threads() -> dict[str, str]:
    """The environment, with as many threads as the runtime chooses."""
    return {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "PYTHONPATH")}


def turn(folder: Path, python: Path, way: str, address: str, clients: int, seconds: float) -> Round:
    """One way for some seconds."""
    words = [str(word) for word in (python, "-c", LOAD, folder, way, address, clients, seconds)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=own_threads())
    if done.returncode:
        raise BadRequest(f"{way}: {done.stderr.strip().splitlines()[-1]}")
    measured = json.loads(done.stdout)
    times = [1000 * one for one in measured["times"]]
    last = quantiles(times, n=100)[98] if len(times) > 1 else times[0]
    return Round(
        way=way, clients=clients, rate=len(times) / measured["seconds"], p50_ms=median(times), p99_ms=last,
        requests=len(times), errors=measured["errors"],
    )  # fmt: skip


def measure(path: Path, python: Path, rounds: int, seconds: float) -> Result:
    """All ways and all numbers of clients in turn."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "package"
        package(artifacts.load(path), "kserve", folder)
        turns = []
        with served(folder, python) as addresses:
            for number in range(rounds):
                for clients in CLIENTS:
                    for way in WAYS if number % 2 == 0 else reversed(WAYS):
                        turns.append(turn(folder, python, way, addresses[way], clients, seconds))
                        print(f"{number + 1}: {turns[-1]}", file=sys.stderr, flush=True)
    recipe = artifacts.load(path).sidecar.preprocessing
    return Result(
        environment=environment(),
        server=versions(python),
        artifact=path.name,
        image_bytes=recipe.channels * recipe.height * recipe.width * (1 if recipe.input == "uint8" else 4),
        rounds=turns,
    )


def versions(python: Path) -> dict[str, str]:
    """The versions of the server's environment."""
    names = ("mlserver", "numpy", "onnxruntime", "openvino", "grpcio", "orjson", "uvicorn")
    program = f"""
import json
from importlib import metadata
installed = {{one.metadata["Name"].lower(): one.version for one in metadata.distributions()}}
print(json.dumps({{name: installed[name] for name in {names!r} if name in installed}}))
"""
    done = subprocess.run([str(python), "-c", program], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def main() -> None:
    """Measure, write the result, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--environment", type=Path, default=Path("build/mlserver"))
    parser.add_argument("-o", type=Path, default=Path("build/serving.json"))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    options = parser.parse_args()
    python = options.environment.absolute() / "bin" / "python"
    if not shutil.which(python):
        sys.exit(f"{python} is missing; tests/package/mlserver.sh {options.environment} makes it")
    result = measure(options.artifact, python, options.rounds, options.seconds)
    write_file(options.o, msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    print(result.table())


if __name__ == "__main__":
    main()
