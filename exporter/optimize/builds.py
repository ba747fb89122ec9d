"""Builds the candidates of a search into its store; graphs of one form are traced once."""

from __future__ import annotations

import gc
import shutil
from dataclasses import dataclass

from msgspec.structs import replace

from exporter import artifact as artifacts
from exporter import backends, build
from exporter.artifact import Artifact
from exporter.artifact.sidecar import Record
from exporter.build.int8.work import Work, prepare
from exporter.errors import ExporterError, Unavailable, first_line
from exporter.optimize.candidates import Candidate
from exporter.optimize.options import Request
from exporter.optimize.store import Store
from exporter.progress import note, silent, step
from exporter.recipe import Recipe


class Build(Record, frozen=True):
    """The build of a candidate: its file with its size, and the parts kept in higher precision; or why it failed."""

    file: str = ""
    bytes: int = 0
    kept: tuple[str, ...] = ()
    failure: str = ""


@dataclass(frozen=True)
class Builder:
    """Builds candidates, each in a folder of its own."""

    request: Request
    store: Store

    def build(self, candidate: Candidate) -> Build:
        """Build a candidate, or take what was built before. A quantized one keeps no part in higher precision, or those
        that its verification needed."""
        built = self.store.read(f"built-{candidate.name}", Build)
        if built is not None and (built.failure or self.store.artifact(candidate.name, built.file) is not None):
            return built
        step(f"building {candidate}")
        kept = built.kept if built is not None else ()
        try:
            artifact = self._artifact(candidate, kept)
        except ExporterError as error:
            note(f"{candidate} cannot be built: {first_line(error)}")
            failed = Build(failure=first_line(error))
            # Not stored where it may succeed later: the disk is full, or something is not installed.
            return failed if isinstance(error, Unavailable) else self.keep(candidate, failed)
        gc.collect()  # networks and graphs have reference cycles
        return self.keep(candidate, Build(file=artifact.path.name, bytes=artifact.sidecar.bytes, kept=kept))

    def keep(self, candidate: Candidate, built: Build) -> Build:
        """Store the build of a candidate."""
        self.store.write(f"built-{candidate.name}", built)
        return built

    def artifact(self, candidate: Candidate) -> Artifact:
        """The artifact of a candidate that was built."""
        built = self.build(candidate)
        return artifacts.load(self.store.artifacts(candidate.name) / built.file)

    def work(self, candidate: Candidate) -> Work:
        """The calibrated network of a quantized candidate.

        Raises: ExporterError as `prepare` does.
        """
        folder = self.store.artifacts(candidate.name)
        folder.mkdir(parents=True, exist_ok=True)
        return prepare(build.resolve(self._recipe(candidate), folder), folder)

    def _recipe(self, candidate: Candidate) -> Recipe:
        return self.request.recipe(candidate.backend, candidate.precision, candidate.form, candidate.scope)

    def _artifact(self, candidate: Candidate, kept: tuple[str, ...]) -> Artifact:
        folder = self.store.artifacts(candidate.name)
        if candidate.scope:
            return self.work(candidate).make(kept, folder)
        with silent(notes=True):  # each takes seconds; int8 shows its calibration
            self._copy_graph(candidate)
            return build.build(self._recipe(candidate), folder).artifact

    def _copy_graph(self, candidate: Candidate) -> None:
        """Put the fp32 graph of the same form, if there is one, where the build of a candidate finds it."""
        source = Candidate(backend=backends.ONNX, precision="fp32", form=candidate.form)
        built = self.store.read(f"built-{source.name}", Build)
        graph = self.store.artifact(source.name, built.file) if built is not None and source != candidate else None
        if graph is None or len(graph.files) > 1:  # weights above 2 GB, in a file that the graph names
            return
        form = "" if candidate.backend == backends.ONNX else candidate.form
        target = self.store.artifacts(candidate.name) / artifacts.file_name(graph.sidecar, ".onnx", form)
        sidecar = replace(graph.sidecar, files=(), sha256="", bytes=0, quality={}, seal="")
        target.parent.mkdir(parents=True, exist_ok=True)
        artifacts.publish(target, sidecar, lambda file: shutil.copyfile(graph.path, file))
