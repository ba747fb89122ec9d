"""What a search has built and measured so far, on disk, so that an interrupted search goes on where it stopped."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from exporter import artifact as artifacts
from exporter import backends, machine
from exporter.artifact import Artifact
from exporter.artifact.disk import write_file
from exporter.data.fingerprint import fingerprint
from exporter.errors import BadRequest
from exporter.model import reference, weights
from exporter.optimize.options import Request
from exporter.verify.budgets import when_unsure

T = TypeVar("T")
VERSION = 1
MAX_BYTES = 512 * 2**20


def key_of(request: Request) -> str:
    """A digest of everything that the search depends on; "" for weights that are not downloaded yet.

    Raises: BadRequest for weights or images that do not exist.
    """
    model, quantization = request.model, request.quantization
    of_weights = weights.fingerprint(model.weights, model.variant, Path(model.labels) if model.labels else None)
    if of_weights is None:
        return ""
    fields: dict[str, Any] = msgspec.to_builtins(request)
    for name in ("weights", "labels"):
        del fields["model"][name]
    for name in ("calib", "data"):
        del fields["quantization"][name]
    del fields["checks"]["data"]
    fields["checks"]["when_unsure"] = when_unsure(request.checks.when_unsure)
    facts = {
        "request": fields,
        "weights": of_weights,
        "calib": fingerprint(quantization.calib),
        "data": fingerprint(quantization.data) if quantization.data else None,
        "reference": reference.fingerprint(model.reference),
        "machine": machine.identity(),
        "versions": {**backends.versions(), **machine.versions(["pillow"])},
        "version": VERSION,
    }
    return hashlib.sha256(msgspec.json.encode(facts, order="deterministic")).hexdigest()[:16]


class Store:
    """The results of one search: records by name, and the folders of its artifacts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, name: str, kind: type[T]) -> T | None:
        """A stored result; None where there is none, or it cannot be read."""
        path = self.folder / f"{name}.json"
        try:
            if not path.is_file() or path.stat().st_size > MAX_BYTES:
                return None
            return msgspec.json.decode(path.read_bytes(), type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OSError):
            return None

    def write(self, name: str, result: object) -> None:
        """Store a result."""
        write_file(self.folder / f"{name}.json", msgspec.json.encode(result))

    def artifact(self, name: str, file: str) -> Artifact | None:
        """The artifact of that name and file, if it is whole."""
        try:
            return artifacts.load(self.artifacts(name) / file) if file else None
        except BadRequest:
            return None

    def artifacts(self, name: str) -> Path:
        """The folder of an artifact of that name."""
        return self.folder / "artifacts" / name

    def drop(self, name: str) -> None:
        """Remove an artifact that is not needed any more."""
        shutil.rmtree(self.artifacts(name), ignore_errors=True)

    def drop_artifacts(self) -> None:
        """Remove all artifacts, also those that interrupted searches of other options left beside this one."""
        for folder in self.folder.parent.glob("*/artifacts"):
            shutil.rmtree(folder, ignore_errors=True)
