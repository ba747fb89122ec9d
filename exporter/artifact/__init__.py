"""An artifact: one file that a stock runtime loads, and a sidecar that describes it.

The sidecar `FILE.json` is checked before anything is loaded: it has the digest of every file, and a seal over itself.
Files are written to a staging folder and flushed. Renaming that folder to `.NAME.commit` commits the artifact; then the
files are moved into place. The next process completes an interrupted move. An artifact of one file is
replaced in one step. One of several files (an OpenVINO graph and its weights) is absent while they are replaced. So a
reader opens the old artifact, the new one or none, never a mixture.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from exporter.artifact.disk import flush, locked, new_folder, write_error, write_file
from exporter.artifact.readers import wait_until_closed
from exporter.artifact.sidecar import File, Sidecar, Weights, decode, encode
from exporter.errors import BadRequest, ExporterError, nearest, some
from exporter.progress import note

_FORCED: ContextVar[bool] = ContextVar("forced", default=False)


@dataclass(frozen=True)
class Artifact:
    """A file that a stock runtime loads, with its sidecar."""

    path: Path
    sidecar: Sidecar

    @property
    def files(self) -> list[Path]:
        """Every file of the artifact but the sidecar."""
        return [self.path.parent / file.name for file in self.sidecar.files]

    def to_dict(self) -> dict[str, Any]:
        """The path and the sidecar, as `--json` prints it."""
        fields: dict[str, Any] = msgspec.to_builtins(self.sidecar)
        return {"path": str(self.path), **fields}


def file_name(sidecar: Sidecar, suffix: str, form: str = "") -> str:
    """The name of an artifact: variant, task and precision. Intermediate ONNX files also carry the form."""
    task = "" if sidecar.task == "classify" else sidecar.task.replace(",", "-")
    words = [sidecar.variant, task, form, sidecar.precision]
    return "_".join(filter(None, words)) + suffix


def sidecar_path(path: Path) -> Path:
    """The path of the sidecar of a file."""
    return path.with_name(path.name + ".json")


def sha256_file(path: Path) -> str:
    """The sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def load(path: Path) -> Artifact:
    """Open an artifact after checking its sidecar and the digest of every file; nothing of it is run.

    Raises: BadRequest for a missing, changed or damaged file or sidecar.
    """
    with locked(path.parent):
        return _load(path)


def _load(path: Path) -> Artifact:
    if path.is_dir():
        example = next((f", such as {path / name}" for name in _artifacts_in(path)), "")
        raise BadRequest(f"{path}: is a folder; give the file{example}")
    _recover(path)
    if not path.is_file():
        known = _artifacts_in(path.parent)
        raise BadRequest(f"{path}: no such file" + (f"; {nearest(path.name, known)}" if known else ""))
    refuse_sidecar(path)
    if not sidecar_path(path).is_file():
        raise BadRequest(f"{path}: {sidecar_path(path).name} is not beside it; copy it too, or build with --weights")
    sidecar = decode(sidecar_path(path))
    if not sidecar.files or sidecar.files[0].name != path.name:
        raise BadRequest(f"{path}: its sidecar describes another file; build the artifact again")
    for file in sidecar.files:
        _check(path.parent / file.name, file)
    if path.suffix == ".onnx" and (stray := _external(path) - {file.name for file in sidecar.files}):
        raise BadRequest(
            f"{path}: its weights would be read from {some(sorted(stray))}, which its sidecar does not name; build "
            "the artifact again"
        )
    return Artifact(path, sidecar)


def refuse_sidecar(path: Path) -> None:
    """Raises: BadRequest for the sidecar of a file, in place of the file."""
    described = path.parent / path.name.removesuffix(".json")
    if described != path and described.is_file():
        raise BadRequest(f"{path}: this is the sidecar; give {described}")


def _artifacts_in(folder: Path) -> list[str]:
    """The names of the artifacts in a folder: files with a sidecar."""
    names = []
    for file in sorted(folder.glob("*.json")):
        described = file.with_name(file.name.removesuffix(".json"))
        with suppress(BadRequest, OSError):
            if described.is_file() and decode(file).files[0].name == described.name:
                names.append(described.name)
    return names


def _external(path: Path) -> set[str]:
    """The external data files of an ONNX graph, without opening them.

    Raises: BadRequest for a file that is not ONNX.
    """
    if not _holds(path, b"location"):  # the key that every external tensor has; looking is quick, parsing is not
        return set()
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load_model(path, load_external_data=False)
    except DecodeError:
        raise BadRequest(f"{path}: no ONNX graph; build the artifact again") from None
    return {entry.value for tensor in _tensors(model) for entry in tensor.external_data if entry.key == "location"}


def _holds(path: Path, word: bytes) -> bool:
    """Whether a file contains a word, without reading it into memory."""
    if path.stat().st_size == 0:  # which cannot be mapped
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(word) >= 0


def _tensors(message: Any) -> Iterator[Any]:
    """Every tensor of a protobuf message, however deep: initialisers, attributes, functions."""
    if message.DESCRIPTOR.name == "TensorProto":
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in [value] if hasattr(value, "ListFields") else value:
                yield from _tensors(inner)


def _check(path: Path, file: File) -> None:
    if Path(file.name).name != file.name:
        raise BadRequest(f"{path}: a sidecar may only name files beside it")
    if not path.is_file():
        raise BadRequest(f"{path}: missing; the artifact needs it, so build it again")
    if path.stat().st_size != file.bytes:
        raise BadRequest(f"{path}: {path.stat().st_size} bytes, expected {file.bytes}; build the artifact again")
    found = sha256_file(path)
    if found != file.sha256:
        raise BadRequest(
            f"{path}: changed since it was built (sha256 {found[:12]}…, expected {file.sha256[:12]}…); "
            "build the artifact again"
        )


def read_sidecar(path: Path) -> Sidecar:
    """Read the sidecar of a file, without reading the file.

    Raises: BadRequest when it is damaged or was changed.
    """
    return decode(sidecar_path(path))


@contextmanager
def forced(force: bool = True) -> Iterator[None]:
    """Inside this block, builds replace artifacts of other weights."""
    token = _FORCED.set(force)
    try:
        yield
    finally:
        _FORCED.reset(token)


def refuse_other_weights(target: Path, weights: Weights) -> None:
    """Refuse to replace an artifact of other weights, except inside `forced`; note that a source has new weights.

    Raises: BadRequest for an artifact whose weights have another digest and another source.
    """
    if _FORCED.get() or not sidecar_path(target).is_file():
        return
    try:
        old = decode(sidecar_path(target)).weights
    except BadRequest:
        return  # its sidecar is unreadable
    if old.digest == weights.digest:
        return
    here, there = (os.path.normpath(target.parent.absolute() / one.source) for one in (old, weights))
    if here != there:
        raise BadRequest(
            f"{target}: built from other weights ({old.source}, digest {old.digest[:12]}…; these are {weights.source}, "
            f"{weights.digest[:12]}…); give --force to replace it, or another folder with -o"
        )
    note(f"{target.name} is replaced: {weights.source} has other weights than when it was built")


@contextmanager
def staging(target: Path, weights: Weights | None = None) -> Iterator[Path]:
    """A folder to write the files of `target` into. They move into place when the block ends without an error.

    After an error or Ctrl-C the folder is removed, and the old files are unchanged. The next process removes the folder
    of a killed one.

    Raises: Unavailable when the disk is full; BadRequest when the folder cannot be written, or a file that is not ours
        or, where `weights` are given, an artifact of other weights is at `target`.
    """
    out = target.parent
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out):
            _recover(target)
            _refuse_foreign(target)
        with new_folder(target) as folder:
            yield folder
            for path in folder.iterdir():
                flush(path)
            with locked(out):
                _recover(target)
                if weights is not None:  # another process may have written it meanwhile
                    refuse_other_weights(target, weights)
                os.rename(folder, _commit_folder(target))  # noqa: PTH104  (the one step that decides)
                _recover(target)
    except OSError as error:
        raise write_error(error, out) from None


def publish(target: Path, sidecar: Sidecar, write: Callable[[Path], object]) -> Artifact:
    """Write an artifact: stage its files, seal them with a sidecar, and move them into place.

    Args:
        target: the file that a runtime opens.
        sidecar: without files and digests, which are added.
        write: writes the file, and other files beside it; called with the path in the staging folder. It may return
            the sidecar with facts that are known only now.

    Raises: as `staging` and `write` do, with nothing changed at `target`.
    """
    refuse_other_weights(target, sidecar.weights)
    with staging(target, sidecar.weights) as folder:
        completed = write(folder / target.name)
        seal(folder, target.name, completed if isinstance(completed, Sidecar) else sidecar)
    return load(target)


def _refuse_foreign(target: Path) -> None:
    if target.is_dir() or sidecar_path(target).is_dir() or (target.exists() and not sidecar_path(target).exists()):
        raise BadRequest(f"{target}: not written by this tool; choose another folder with -o")


def seal(folder: Path, name: str, sidecar: Sidecar) -> None:
    """Write the sidecar of the staged file `name`, with the digests of all that was staged."""
    paths = sorted(folder.iterdir(), key=lambda path: (path.name != name, path.name))
    files = tuple(File(name=p.name, bytes=p.stat().st_size, sha256=sha256_file(p)) for p in paths)
    total = sum(file.bytes for file in files)
    whole = msgspec.structs.replace(sidecar, files=files, sha256=files[0].sha256, bytes=total)
    sidecar_path(folder / name).write_bytes(encode(whole))


def update_quality(artifact: Artifact, quality: Mapping[str, float | str]) -> None:
    """Write the quality of an artifact, as just verified, into its sidecar.

    If the artifact was rebuilt meanwhile, or the sidecar cannot be written, a note is printed.
    """
    try:
        with locked(artifact.path.parent):
            now = _load(artifact.path).sidecar
            if now.sha256 != artifact.sidecar.sha256:
                note(f"{artifact.path.name} was rebuilt meanwhile; its sidecar is not changed")
                return
            fresh = msgspec.structs.replace(now, quality=dict(quality))
            write_file(sidecar_path(artifact.path), encode(fresh))
    except ExporterError as error:
        note(f"the results are not recorded in the sidecar: {error}")


def check_output(path: Path, inputs: Sequence[Path] = ()) -> None:
    """Refuse to write a report or table over an artifact, its sidecar, a folder, a device, a link to nothing, or one
    of the files that are read, and into a folder that cannot be written.

    Raises: BadRequest.
    """
    if any(one.exists() and path.exists() and one.samefile(path) for one in inputs):
        raise BadRequest(f"{path}: is read, and would be replaced; write to another file")
    is_sidecar = path.name.endswith(".json") and path.with_name(path.name.removesuffix(".json")).is_file()
    if is_sidecar or sidecar_path(path).exists():
        raise BadRequest(f"{path}: an artifact or its sidecar has this name; write to another file")
    if path.exists() and not path.is_file():
        raise BadRequest(f"{path}: not a regular file; give the name of one")
    if path.is_symlink() and not path.exists():
        raise BadRequest(f"{path}: a link to a file that does not exist; remove it, or give the name of the file")
    folder = next((folder for folder in path.resolve().parents if folder.exists()), None)
    if folder is None or not os.access(folder, os.W_OK):
        raise BadRequest(f"{path}: its folder cannot be written; choose another folder")


def _commit_folder(target: Path) -> Path:
    return target.with_name(f".{target.name}.commit")


def _recover(target: Path) -> None:
    """Complete the interrupted move of a committed artifact.

    A runtime opens the target first and the files beside it by their names. So where one of those changes, the old
    target is taken away until nobody has it open, and the new one comes last.
    """
    _remove_withdrawn(target)
    commit = _commit_folder(target)
    if not commit.is_dir():
        return
    if _changes_beside(target):
        with suppress(FileNotFoundError):
            target.replace(_withdrawn(target))
        _remove_withdrawn(target)
    _drop_old_files(target)
    order = {target.name: 1, sidecar_path(target).name: 2}
    for path in sorted(commit.iterdir(), key=lambda path: (order.get(path.name, 0), path.name)):
        with suppress(FileNotFoundError):  # another process is finishing it too
            path.replace(target.parent / path.name)
    flush(target.parent)
    with suppress(FileNotFoundError):
        commit.rmdir()


def _withdrawn(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _remove_withdrawn(target: Path) -> None:
    """Remove the old target once its readers have opened the files beside it."""
    with suppress(FileNotFoundError):
        wait_until_closed(_withdrawn(target))
        _withdrawn(target).unlink()


def _changes_beside(target: Path) -> bool:
    """Whether the present target is the old one, and a file that a runtime reads beside it changes."""
    if not (target.is_file() and (_commit_folder(target) / target.name).is_file()):
        return False
    old, new = (_digests_beside(folder / target.name) for folder in (target.parent, _commit_folder(target)))
    return new is not None and old != new


def _digests_beside(path: Path) -> dict[str, str] | None:
    """The digest of each file that a runtime reads beside an artifact's own; None where the sidecar is unreadable."""
    try:
        files = decode(sidecar_path(path)).files
    except (BadRequest, OSError):
        return None
    return {file.name: file.sha256 for file in files if file.name != path.name and not file.name.endswith(".json")}


def _drop_old_files(target: Path) -> None:
    """Remove the files of the old artifact that the new one does not replace."""
    commit, old = _commit_folder(target), sidecar_path(target)
    new = sidecar_path(commit / target.name)
    if not (old.is_file() and new.is_file()):
        return
    try:
        old_names = {file.name for file in decode(old).files}
    except BadRequest:
        return  # what cannot be read names nothing to remove
    for name in old_names - {file.name for file in decode(new).files}:
        if Path(name).name == name:
            (target.parent / name).unlink(missing_ok=True)
