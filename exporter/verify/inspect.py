"""Layers and findings of an artifact, without running it."""

from __future__ import annotations

from dataclasses import dataclass

from exporter import backends
from exporter.artifact import Artifact, load
from exporter.backends import Layer, Target
from exporter.errors import BadRequest, Unavailable
from exporter.report import Finding
from exporter.verify.checks import structure


@dataclass(frozen=True)
class Inspection:
    """Layers and findings; `reason` is why the layers are not known, or ""."""

    layers: list[Layer]
    findings: list[Finding]
    reason: str = ""


def inspect(artifact: Artifact) -> Inspection:
    """Inspect an artifact without running it.

    Raises: BadRequest for an unknown backend or precision.
    """
    runtime = backends.runtime_of(artifact)
    target = backends.target(runtime.name)
    reason = f"{runtime.name} does not show layers" if runtime.layers is None else ""
    try:
        layers = [] if runtime.layers is None else runtime.layers(artifact, runtime.options())
        findings = target.findings(artifact, _baseline(artifact, target)) if target.findings is not None else []
    except Unavailable as error:
        return Inspection([], [], str(error))
    reason = reason or ("" if layers else f"{runtime.name} listed none")
    return Inspection(layers, [*structure.saturation(layers), *findings], reason)


def _baseline(artifact: Artifact, target: Target) -> Artifact | None:
    """The same network in the next higher precision, if it is in the folder of a quantized artifact."""
    sidecar = artifact.sidecar
    if sidecar.quantization is None:
        return None
    above = target.above_int8()
    name = artifact.path.name.replace(f"_{sidecar.precision}.", f"_{above}.")
    try:
        baseline = load(artifact.path.with_name(name))
    except BadRequest:
        return None
    return baseline if baseline.sidecar.weights.digest == sidecar.weights.digest else None
