"""The two formats of PyTorch files: an archive with one entry a storage (since 1.6), and one stream of pickles.

Tensors are read one by one when they are needed, so the optimizer's state beside a model is never in memory.
"""

from __future__ import annotations

import contextlib
import io
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from exporter.errors import BadRequest, first_line
from exporter.model.harmful import Harmful
from exporter.model.pickled import CONSTRUCTORS, ELEMENT_BYTES, STORAGES, Pointer, plain_name
from exporter.model.unpickler import Damage, Storage, Stub, Unpickler

if TYPE_CHECKING:
    from torch import Tensor

_BOMB_BYTES = 2**20
_STREAM_MAGIC = 0x1950A86A20F9469CFC6C
_CHUNK_BYTES = 2**24
# What the standard library and PyTorch raise over damaged files.
_DAMAGE = (
    *(Damage, zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, EOFError, ValueError, LookupError, OSError),
    *(ArithmeticError, MemoryError),
)


@dataclass(frozen=True)
class PyTorchFile:
    """The content of an open file, with a Pointer for each tensor.

    read: fills a buffer with the bytes of a storage, from an offset in bytes.
    swapped: the numbers have the byte order of another machine.
    """

    path: Path
    content: Any
    read: Callable[[Storage, int, memoryview], None]
    swapped: bool = False

    def tensor(self, pointer: Pointer) -> Tensor:
        """Read a tensor; only the part of the storage that it covers.

        Raises: BadRequest when the file ends before it.
        """
        import torch

        width = ELEMENT_BYTES[pointer.dtype]
        try:
            if pointer.reach * width > self.path.stat().st_size:
                raise Damage("a tensor larger than the file")
            buffer = torch.empty(pointer.reach * width, dtype=torch.uint8)
            self.read(pointer.storage, pointer.offset * width, memoryview(buffer.numpy()))  # type: ignore[arg-type]
            values = buffer.view(getattr(torch, pointer.dtype))
            if self.swapped:
                values.untyped_storage().byteswap(values.dtype)  # type: ignore[no-untyped-call]
            return values.as_strided(pointer.size, pointer.stride)
        except _DAMAGE as error:
            raise _damaged(self.path, error) from None


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[PyTorchFile]:
    """Open a PyTorch file and read its structure; none of its code runs.

    Raises: BadRequest for a file that is damaged, carries code, or is an archive of another kind.
    """
    with contextlib.ExitStack() as stack:
        try:
            _refuse_bomb(path)
            if zipfile.is_zipfile(path):
                file = _archive(path, stack.enter_context(zipfile.ZipFile(path)))
            else:
                file = _stream(path, stack.enter_context(path.open("rb")))
        except Harmful as error:
            raise BadRequest(
                f"{path}: refused, it carries code ({error}) and nothing of it was run; "
                "convert it to .safetensors where it is trusted"
            ) from None
        except _DAMAGE as error:
            raise _damaged(path, error) from None
        yield file


def _damaged(path: Path, error: Exception) -> BadRequest:
    return BadRequest(f"{path}: truncated or no PyTorch file ({first_line(error)}); fetch it again")


def _refuse_bomb(path: Path) -> None:
    """Refuse an archive that unpacks to more than its size: PyTorch does not compress tensors.

    Raises: BadRequest.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            whole = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
        return  # of the older format, or damaged: that is found when it is read
    size = path.stat().st_size
    if whole > size + _BOMB_BYTES:
        raise BadRequest(f"{path}: refused, {size} bytes that unpack to {whole}; a checkpoint is not compressed")


def _storage(saved: Any, stream: bool) -> Storage:
    """The storage of a persistent id: ("storage", type, key, location, elements), in a stream with a view after it."""
    if not isinstance(saved, tuple) or len(saved) != (6 if stream else 5) or saved[0] != "storage":
        raise Damage("a persistent id of another program")
    _, kind, key, _, elements, *view = saved
    name = kind.name.rpartition(".") if isinstance(kind, Stub) else ("", "", "")
    if not name[0].startswith("torch") or name[2] not in STORAGES or not isinstance(key, str | int):
        raise Damage("a storage of an unknown type")
    if type(elements) is not int or not 0 <= elements < 1 << 62:
        raise Damage("a storage of impossible size")
    if view and view[0] is not None:
        raise Damage("a storage that is a view of another one")
    return Storage(str(key), STORAGES[name[2]], elements)


def _archive(path: Path, archive: zipfile.ZipFile) -> PyTorchFile:
    entries = {entry.filename: entry for entry in archive.infolist()}
    root = next(iter(entries), "").partition("/")[0]
    if f"{root}/constants.pkl" in entries:
        raise BadRequest(
            f"{path}: a TorchScript program; where it is trusted, save its weights: "
            f"torch.save(torch.jit.load({path.name!r}).state_dict(), 'weights.pth')"
        )
    if f"{root}/archive_format" in entries or f"{root}/models/model.json" in entries:
        raise BadRequest(
            f"{path}: written by torch.export.save; where it is trusted, save its weights: "
            f"torch.save(torch.export.load({path.name!r}).state_dict, 'weights.pth')"
        )
    if f"{root}/data.pkl" not in entries:
        raise Damage("an archive without data.pkl")
    if any(entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for entry in entries.values()):
        raise Damage("an archive with a compression that PyTorch does not use")
    content = archive.read(f"{root}/data.pkl")
    order = archive.read(f"{root}/byteorder") if f"{root}/byteorder" in entries else b"little"
    machine = Unpickler(lambda saved: _storage(saved, stream=False), CONSTRUCTORS, plain_name)

    def read(storage: Storage, start: int, buffer: memoryview) -> None:
        with archive.open(f"{root}/data/{storage.key}") as file:
            file.seek(start)
            _fill(file, buffer)

    swapped = order != sys.byteorder.encode()
    return PyTorchFile(path, machine.load(io.BytesIO(content), len(content)), read, swapped)


def _stream(path: Path, file: IO[bytes]) -> PyTorchFile:
    size = path.stat().st_size
    machine = Unpickler(lambda saved: _storage(saved, stream=True), CONSTRUCTORS, plain_name)
    if machine.load(file, size) != _STREAM_MAGIC:
        raise Damage("a pickle that torch.save did not write")
    machine.load(file, size)  # the version of the format
    machine.load(file, size)  # the sizes of numbers on the machine that wrote it
    used: dict[str, Storage] = {}

    def storage(saved: Any) -> Storage:
        one = _storage(saved, stream=True)
        return used.setdefault(one.key, one)

    machine.storage = storage
    content = machine.load(file, size)
    starts = _starts(file, machine.load(file, size), used, size)

    def read(storage: Storage, start: int, buffer: memoryview) -> None:
        file.seek(starts[storage.key] + start)
        _fill(file, buffer)

    return PyTorchFile(path, content, read)


def _starts(file: IO[bytes], keys: Any, used: dict[str, Storage], size: int) -> dict[str, int]:
    """Where the bytes of each storage begin: each has its number of elements in front."""
    if not isinstance(keys, list):
        raise Damage("no list of storages")
    starts: dict[str, int] = {}
    for key in keys:
        storage = used.get(str(key)) if isinstance(key, str | int) else None
        (elements,) = struct.unpack("<q", file.read(8))
        if storage is None or elements != storage.elements:
            raise Damage("its list of storages does not fit its tensors")
        starts[storage.key] = file.tell()
        end = starts[storage.key] + elements * ELEMENT_BYTES[storage.dtype]
        if end > size:
            raise Damage("it ends within a storage")
        file.seek(end)
    return starts


def _fill(file: IO[bytes], buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done : done + _CHUNK_BYTES])  # type: ignore[attr-defined]
        if not count:
            raise Damage(f"it ends {len(buffer) - done} bytes before a tensor does")
        done += count
