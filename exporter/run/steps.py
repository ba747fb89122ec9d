"""The steps of a recipe: their cache keys, and their stored results."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from exporter import artifact as artifacts
from exporter import backends, machine
from exporter.artifact import Artifact
from exporter.artifact.disk import write_file
from exporter.artifact.sidecar import Record
from exporter.bench.latency import BenchOptions
from exporter.data.fingerprint import fingerprint
from exporter.errors import BadRequest, Unavailable
from exporter.model import reference, weights
from exporter.progress import note
from exporter.recipe import Bench, Recipe
from exporter.recipe.file import NOT_PATHS
from exporter.report import Report
from exporter.verify import VerifyOptions
from exporter.verify.budgets import when_unsure

STEPS = ("build", "verify", "bench")
MEASURED = ("int8_speedup", "tried_loss", "tried_ms")
"""Metrics of a build that hold only on the machine that it was done on, beside `gain`."""
MAX_PART_BYTES = 512 * 2**20


class Part(Record, frozen=True):
    """The result of a step: its cache key, the artifact's file and digest, the report, and the machine it is of."""

    key: str
    file: str
    sha256: str
    report: Report | None = None
    machine: str = "an unknown machine"


class Steps:
    """The stored results of a recipe's steps.

    Args:
        recipe, out, folder: as in `RecipeRun`.
        done: steps that were just done in this run, perhaps on another machine: their cache keys are not compared.
        cluster: the address of the cluster that verifies, or "".
    """

    def __init__(self, recipe: Recipe, out: Path, folder: Path, done: Sequence[str] = (), cluster: str = "") -> None:
        self.recipe, self.out, self.folder, self.done, self.cluster = recipe, out, folder, done, cluster

    def key(self, name: str, artifact: Artifact | None = None) -> str:
        """The cache key of a step: a digest of all its inputs; "" where it is unknown before the step is done.

        Raises: BadRequest for weights or images that are not there.
        """
        facts = getattr(self, f"_{name}")() if artifact is None else getattr(self, f"_{name}")(artifact)
        if facts is None:
            return ""
        of_images = machine.versions(["pillow"])  # which reads and resizes them
        facts |= {"versions": {**backends.versions(), **of_images, "backend": _version(self.recipe.backend)}}
        return hashlib.sha256(msgspec.json.encode(facts, order="deterministic")).hexdigest()

    def _build(self) -> dict[str, Any] | None:
        recipe, model = self.recipe, self.recipe.model
        labels = Path(model.labels) if model.labels else None
        of_weights = weights.fingerprint(model.weights, model.variant, labels)
        if of_weights is None:
            return None
        fields = recipe.of_build()
        del fields["model"]["weights"], fields["model"]["labels"]
        facts: dict[str, Any] = {"recipe": fields, "weights": of_weights}
        if recipe.quantization is not None:
            del fields["quantization"]["calib"]
            quantization = recipe.quantization
            facts |= {"reference": reference.fingerprint(model.reference)}
            facts |= {"calib": fingerprint(quantization.calib), "max_drop": quantization.max_drop}
            facts |= {name: getattr(recipe.checks, name) for name in ("outputs", "threshold", "reduce_zero_label")}
            facts |= {"when_unsure": when_unsure(recipe.checks.when_unsure)}
            timing = recipe.bench or Bench()
            facts |= {"timing": [timing.threads, timing.hint, timing.device]}
            facts |= {"data": fingerprint(quantization.data) if quantization.data else None}
        this_cpu = recipe.quantization is not None and recipe.quantization.cpu == "this"
        if recipe.export.form == "auto" or this_cpu:
            facts |= {"machine": machine.identity()}
        if not backends.target(recipe.backend).reproducible:  # an engine may be for the GPU that it is built beside
            facts |= {"gpu": (machine.gpu() or {}).get("name")}
        return facts

    def _verify(self, artifact: Artifact) -> dict[str, Any]:
        options = msgspec.to_builtins(verify_options(self.recipe))
        images = fingerprint(options.pop("data"))
        del options["weights"]
        options["when_unsure"] = when_unsure(self.recipe.checks.when_unsure)
        # Which machines will measure the shards is not known yet: the cluster's address stands for them.
        where = self.cluster if "://" in self.cluster else machine.identity()
        of_reference = reference.fingerprint(self.recipe.model.reference)
        return {
            "artifact": artifact.sidecar.sha256,
            "facts": artifact.sidecar.facts(),  # a changed fact does not change the file of an engine
            "options": options,
            "images": images,
            "machine": where,
            # Where an engine cannot run, its graph is verified.
            "unable": "" if "://" in self.cluster else backends.runtime_of(artifact).unable(),
            "reference": of_reference,
        }

    def _bench(self, artifact: Artifact) -> dict[str, Any]:
        options = msgspec.to_builtins(bench_options(self.recipe))
        for name in ("weights", "min_speedup", "max_p50_ms"):  # limits are judged anew each time
            del options[name]
        of_reference = reference.fingerprint(self.recipe.model.reference)
        return {
            "artifact": artifact.sidecar.sha256,
            "options": options,
            "machine": machine.identity(),
            "reference": of_reference,
        }

    def artifact(self) -> Artifact | None:
        """The artifact of this recipe, if it is whole and its inputs are unchanged."""
        part = self._read("build")
        if part is None or not self._is_valid("build", part, None):
            return None
        path = self.out / part.file
        if not path.exists():
            return None
        try:
            artifact = artifacts.load(path)
        except BadRequest as error:
            note(f"{error} – doing so")
            return None
        return artifact if artifact.sidecar.sha256 == part.sha256 else None

    def part(self, name: str, artifact: Artifact | None) -> Part | None:
        """The result of a step for this artifact, if the step's inputs are unchanged.

        A build may be of another machine; then the figures that were measured there are left out.
        """
        if artifact is None:
            return None
        part = self._read(name)
        if part is None or part.sha256 != artifact.sidecar.sha256:
            return None
        if not self._is_valid(name, part, None if name == "build" else artifact):
            return None
        if name == "build" and part.report is not None and part.machine != _machine_text():
            again = f"remove {self.folder / name}.json to build and time it here"
            return replace(part, report=_without_times(part.report, f"timed on {part.machine}, not here; {again}"))
        return part

    def _is_valid(self, name: str, part: Part, artifact: Artifact | None) -> bool:
        """Whether a stored result can be used: its cache key is unchanged, or this run has just stored it."""
        return name in self.done or (bool(part.key) and part.key == self.key(name, artifact))

    def keep(self, name: str, part: Part) -> None:
        """Store the result of a step that was done on this machine."""
        write_file(self.folder / f"{name}.json", msgspec.json.encode(replace(part, machine=_machine_text())))

    def _read(self, name: str) -> Part | None:
        """The stored result of a step; None where it cannot be read, so that the step is done again."""
        path = self.folder / f"{name}.json"
        try:
            if not path.is_file() or path.stat().st_size > MAX_PART_BYTES:
                return None
            part = msgspec.json.decode(path.read_bytes(), type=Part)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OSError):
            note(f"{path} cannot be read; the step is done again")
            return None
        return part if Path(part.file).name == part.file else None


def verify_options(recipe: Recipe) -> VerifyOptions:
    """Options of `verify` for a recipe."""
    model, checks = recipe.model, replace(recipe.checks, data=recipe.verified_on)
    return VerifyOptions(weights=_path_of(model.weights), reference=model.reference, **msgspec.structs.asdict(checks))


def bench_options(recipe: Recipe) -> BenchOptions | None:
    """How a recipe's artifact is timed, or None."""
    if recipe.bench is None:
        return None
    model = recipe.model
    return BenchOptions(
        weights=_path_of(model.weights), reference=model.reference, **msgspec.structs.asdict(recipe.bench)
    )


def _path_of(weights: str) -> str | None:
    """Weights that are a file, by their path, for they may have been moved since; others are found by their name."""
    return None if NOT_PATHS.match(weights) else weights


def _version(backend: str) -> str:
    try:
        return backends.runtime(backend).probe()
    except Unavailable:
        return ""


def _machine_text() -> str:
    cpu, isa, cores, *gpu = machine.identity()
    return ", ".join(map(str, [cpu, f"{cores} cores", *(isa if isinstance(isa, list | tuple) else [isa]), *gpu]))


def _without_times(report: Report, why: str) -> Report:
    """The report of a build without the figures and facts of the machine that it was built on."""
    findings = []
    for finding in report.findings:
        if finding.metric == "gain":
            findings.append(replace(finding, value=None, low=None, high=None, samples=(), launches=(), detail=why))
        elif finding.metric == "kept_back":
            findings.append(replace(finding, detail="not timed here"))
        elif finding.metric not in MEASURED:
            findings.append(finding)
    return replace(report, environment={}, findings=tuple(findings))
