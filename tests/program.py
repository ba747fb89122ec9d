"""`convnext-export` as a program that starts at once: a process that has imported the libraries forks for each command.

What a shell runs is a small client, which sends its words, folder, environment and streams to that process.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path

import pytest

from exporter.bench import supervisor
from tests import once

ROOT = Path(__file__).parent.parent
CLIENT = """#!{python} -IS
import json, os, socket, sys
line = socket.socket(socket.AF_UNIX)
line.connect({address!r})
command = {{"words": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}
socket.send_fds(line, [json.dumps(command).encode() + b"\\n"], [0, 1, 2])
sys.exit(int(line.recv(16) or 1))
"""


@contextlib.contextmanager
def installed(folder: Path, graphs: Path) -> Iterator[Path]:
    """The path of a `convnext-export` in a folder, whose traced graphs are remembered in another."""
    path, address = folder / "convnext-export", folder / "socket"
    path.write_text(CLIENT.format(python=sys.executable, address=str(address)))
    path.chmod(0o755)
    words = [sys.executable, "-m", "tests.program", address, graphs]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE) as server:
        assert server.stdout.readline() == b"ready\n"
        yield path
        server.terminate()


def serve(address: str, graphs: Path) -> None:
    """Fork for each command that comes, and wait for none of them."""
    for module in once.PRELOADED:
        importlib.import_module(module)
    patch = pytest.MonkeyPatch()
    once.keep_the_exporters_functions(patch)
    once.remember_traces(graphs, patch)
    once.fork_processes_of(supervisor, patch)
    forkserver.ensure_running()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        print("ready", flush=True)
        while True:
            line, _ = server.accept()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:  # commands that ended
                    pass
            if os.fork() == 0:
                os._exit(answer(line))
            line.close()


def answer(line: socket.socket) -> int:
    """Run one command as its client would have, and send its exit code."""
    content, streams, _, _ = socket.recv_fds(line, 1 << 20, 3)
    while not content.endswith(b"\n"):
        content += line.recv(1 << 20)
    command = json.loads(content)
    forkserver._forkserver.ensure_running = lambda: None  # it runs, as a child of the parent of this process
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(command["folder"])
    os.environ.clear()
    os.environ.update(command["environment"])
    sys.argv = ["convnext-export", *command["words"]]
    code = _run()
    sys.stdout.flush()
    sys.stderr.flush()
    line.sendall(str(code).encode())
    return code


def _run() -> int:
    from exporter.cli import main

    try:
        main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:  # noqa: BLE001  (printed as Python would)
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]))
