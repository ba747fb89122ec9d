"""`convnext-export` as a program that starts at once: a process that has imported the libraries forks for each command.

What a shell runs is a small client, which sends its words, folder, environment and streams to that process.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests import once

CLIENT = """#!{python} -IS
import json, os, socket, sys
line = socket.socket(socket.AF_UNIX)
line.connect({address!r})
command = {{"words": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}
socket.send_fds(line, [json.dumps(command).encode() + b"\\n"], [0, 1, 2])
sys.exit(int(line.recv(16) or 1))
"""


@contextlib.contextmanager
def installed(folder: Path) -> Iterator[Path]:
    """The path of a `convnext-export` in a folder."""
    path, address = folder / "convnext-export", str(folder / "socket")
    path.write_text(CLIENT.format(python=sys.executable, address=address))
    path.chmod(0o755)
    context = once.forking()
    ready = context.Event()
    server = context.Process(target=serve, args=(address, ready))
    server.start()
    assert ready.wait(60)
    yield path
    server.terminate()
    server.join()


def serve(address: str, ready: Any) -> None:
    """Fork for each command that comes, and wait for none of them.

    Args:
        address: of the socket that clients connect to.
        ready: set when clients may connect.
    """
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        ready.set()
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
    except BaseException:  # noqa: BLE001  (a program that ends with a traceback)
        sys.excepthook(*sys.exc_info())
        return 1
    return 0
