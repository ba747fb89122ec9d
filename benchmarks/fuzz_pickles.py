"""The pickles of checkpoints as a target of `benchmarks.fuzz`: nothing that one names may be imported or run."""

from __future__ import annotations

import argparse
import collections
import io
import zipfile
from pathlib import Path
from typing import Any

from exporter.errors import ExporterError

# Opcodes and the beginnings of attacks.
WORDS = [
    b"cnt\nsystem\n", b"(X\x01\x00\x00\x00aios\nsystem\n", b"\x8c\x02os\x8c\x06system\x93", b")R", b")\x81", b"}b",
    b"Q", b"2\x86" * 40, b"h\x00", b"q\x00", b"\x94", b"e", b"u", b"s", b"t", b"0", b"(", b"a", b"o", b"]" * 5000,
    b"\x8e" + b"\xff" * 7 + b"\x3f", b"cbuiltins\nlist\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ca\nB\n",
    b"cnumpy.core.multiarray\n_reconstruct\n", b"ccopyreg\n_reconstructor\n", b"ccollections\nOrderedDict\n",
]  # fmt: skip
_RUNS = ("import", "exec", "compile", "os.", "subprocess.", "socket.", "ctypes.", "shutil.", "marshal.", "pickle.")
_ALONE: list[str] = []  # the file that is read now, beside which nothing may be opened or imported


class _Unknown:
    """An object of a class that the reader does not know."""

    def __init__(self) -> None:
        self.values = {"a": [1, (2, None)], "b": {3.0}}


def seeds(folder: Path) -> list[tuple[str, bytes]]:
    """Pickles of checkpoints with everything in them, without the archive, whose checksum any change would break."""
    import numpy as np
    import torch

    del folder
    kinds = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.int64]
    state = {f"layer{i}.weight": torch.ones(2, 3, dtype=kind) for i, kind in enumerate(kinds)}
    extras = {
        "args": argparse.Namespace(path=Path("/a/b"), size=torch.Size([1]), kind=torch.float16, unknown=_Unknown()),
        "counts": collections.defaultdict(list, a=[1]),
        "classes": np.array(["cat", "dog"]),
        "best": np.float64(3),
        "values": np.arange(4, dtype=">i2"),
        "set": {1, 2},
        "z": 1j,
        "raw": bytearray(b"abc"),
    }
    pickles = []
    for number, content in enumerate(({"model": state, **extras}, {"model": {"p": torch.nn.Parameter(torch.ones(3))}})):
        for protocol in (2, 4):
            whole = io.BytesIO()
            torch.save(content, whole, pickle_protocol=protocol)
            with zipfile.ZipFile(whole) as archive:
                name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                pickles.append((f"{number}_{protocol}.pkl", archive.read(name)))
    return pickles


def read(path: Path) -> None:
    """Put the pickle into a file of each format, and read both.

    Raises: ExporterError when both are refused.
    """
    import torch

    from exporter.model import checkpoint

    content = path.read_bytes()
    archive, stream = path.with_suffix(".zip.pth"), path.with_suffix(".stream.pth")
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a/data.pkl", content)
        for key in range(8):
            file.writestr(f"a/data/{key}", bytes(64))
    nothing = io.BytesIO()
    torch.save(None, nothing, _use_new_zipfile_serialization=False)
    stream.write_bytes(nothing.getvalue().replace(b"\x80\x02N.", content, 1))
    refusals = []
    for file_path in (archive, stream):
        _ALONE.append(str(file_path))
        try:
            checkpoint.read(file_path)
        except ExporterError as error:
            refusals.append(error)
        finally:
            _ALONE.clear()
    if len(refusals) == 2:
        raise refusals[0]


def is_run(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether an audit event is something that reading a checkpoint must not do."""
    return bool(_ALONE) and (event.startswith(_RUNS) or (event == "open" and str(arguments[0]) != _ALONE[0]))
