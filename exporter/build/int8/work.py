"""A network made ready for eight bits once, and artifacts of it with any parts kept back."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from exporter import artifact as artifacts
from exporter import backends
from exporter.artifact import Artifact
from exporter.artifact.sidecar import Quantization, Sidecar
from exporter.backends import Backend, Options
from exporter.build import pipeline
from exporter.data.calibration import CalibrationSet, open_calibration
from exporter.errors import BadRequest, CheckFailed, some
from exporter.graph import files, half
from exporter.model.structure import part
from exporter.quantize import QuantizeOptions
from exporter.quantize.placement import Placement, faults, quantize
from exporter.quantize.rounding import Grid, Plan
from exporter.recipe import Recipe

if TYPE_CHECKING:
    import onnx_ir as ir

    from exporter.quantize.statistics import Statistics


@dataclass(frozen=True)
class Work:
    """All that artifacts are made from: the fp32 graph and network, smoothed, and how each layer is rounded."""

    recipe: Recipe
    backend: Backend[Options]
    placement: Placement
    images: CalibrationSet
    network: pipeline.Network
    statistics: Statistics
    plan: Plan
    graph: ir.Model
    sidecar: Sidecar

    def make(self, kept: Collection[str], out: Path) -> Artifact:
        """The Q/DQ graph without these parts, and what the backend builds from it.

        Raises: CheckFailed when the graph has faults, with nothing written.
        """
        model = quantize(self.graph, self.plan, self.placement, kept)
        if found := faults(model, self.placement, _grid(self.recipe)):
            raise CheckFailed(f"the quantised graph is at fault: {some(found)}; nothing was written")
        if self.placement.rest != "fp32":
            half.tell(half.to_half(model, self.placement.rest, self.sidecar.beyond_fp16))
        sidecar = self._sidecar(kept)
        target = out / artifacts.file_name(sidecar, ".onnx", pipeline.form_in_name(self.recipe))
        with artifacts.staging(target) as folder:
            files.save(model, folder / target.name, sidecar.facts())
            artifacts.seal(folder, target.name, sidecar)
        return self.backend.build(artifacts.load(target), self.recipe.precision, out, pipeline.target_of(self.recipe))

    def _sidecar(self, kept: Collection[str]) -> Sidecar:
        layers = {
            name: int(self.statistics.macs(self.network.model, name)) for name in self.plan if part(name) not in kept
        }
        told = Quantization(
            calib=self.images.source,
            digest=self.images.digest,
            images=self.images.total,
            synthetic=self.images.synthetic,
            method=self.recipe.calib_method,
            smoothing=self.recipe.smoothing,
            bias_correction=self.recipe.bias_correction,
            scope=scope_of(self.recipe),
            layers=layers,
            kept=tuple(kept),
        )
        return msgspec.structs.replace(self.sidecar, quantization=told)


def prepare(recipe: Recipe, out: Path, folder: Path) -> Work:
    """Read weights, calibrate, fold scales, trace, and hold the graph against eager; nothing is written to `out`.

    Args:
        recipe: of precision int8 or fp8.
        out: where artifacts will go, for the weights' path in their sidecars.
        folder: for the traced graph.

    Raises: ExporterError as `pipeline.export` does; BadRequest for a form or calibration set that cannot be used.
    """
    backend = backends.get(recipe.backend)
    placement = placement_of(recipe)
    check_form(recipe, placement)
    recipe = msgspec.structs.replace(recipe, form=recipe.form or placement.forms[0])
    checkpoint, options, sidecar = pipeline.read(recipe, out)
    images = open_calibration(
        recipe.calib, sidecar.preprocessing, sidecar.weights.num_classes, recipe.calib_size, recipe.calib_seed
    )
    from exporter.quantize import simulation, smoothing, statistics

    network = pipeline.write(checkpoint, options, sidecar)
    found = statistics.collect(
        network.model,
        placement.kinds,
        recipe.smoothing,
        images,
        _about(sidecar),
        histogram=recipe.calib_method != "minmax",
    )
    smoothing.smooth(network.model, found.factor)
    plan = simulation.plan(
        network.model, placement.kinds, placement.symmetric, found, images, _options(recipe, placement)
    )
    graph, sidecar = pipeline.graph_of(network, options, sidecar, folder / "traced.onnx")
    told = {**sidecar.recipe, "precision": recipe.precision}
    sidecar = msgspec.structs.replace(sidecar, precision=recipe.precision, recipe=told)
    return Work(recipe, backend, placement, images, network, found, plan, graph, sidecar)


def placement_of(recipe: Recipe) -> Placement:
    """Where Q and DQ go: the scope that a recipe asks for, or its backend's own.

    Raises: BadRequest for a backend without eight bits, or a scope that it has not.
    """
    known = backends.get(recipe.backend).placements
    if not known:
        raise BadRequest(f"{recipe.backend} runs no {recipe.precision} here")
    scope = scope_of(recipe)
    if scope not in known:
        raise BadRequest(f"--int8-scope {scope}: {recipe.backend} takes {', '.join(known)}")
    if recipe.precision == "fp8" and scope != next(iter(known)):
        raise BadRequest(f"--int8-scope {scope} is for int8: only the pointwise layers gain by fp8; leave it out")
    return known[scope]


def scope_of(recipe: Recipe) -> str:
    """What is rounded: what a recipe asks for, or what its backend runs best."""
    return recipe.int8_scope or next(iter(backends.get(recipe.backend).placements))


def _grid(recipe: Recipe) -> Grid:
    return "fp8" if recipe.precision == "fp8" else "int8"


def check_form(recipe: Recipe, placement: Placement) -> None:
    """Refuse a form that a placement does not know.

    Raises: BadRequest.
    """
    if recipe.form not in (None, *placement.forms):
        forms = " or ".join(placement.forms)
        raise BadRequest(
            f"--form {recipe.form}: {recipe.precision} for {recipe.backend} is written in the form {forms}; leave "
            "--form out"
        )


def _options(recipe: Recipe, placement: Placement) -> QuantizeOptions:
    return QuantizeOptions(
        grid=_grid(recipe),
        inputs=placement.inputs,
        half=placement.rest == "fp16",
        exact_pairs=placement.exact_pairs,
        method=recipe.calib_method,
        smoothing=recipe.smoothing,
        bias_correction=recipe.bias_correction,
    )


def _about(sidecar: Sidecar) -> dict[str, object]:
    """What statistics depend on beside the images; the form does not change what a layer is given."""
    return {
        "weights": sidecar.weights.digest,
        "variant": sidecar.variant,
        "preprocessing": msgspec.to_builtins(msgspec.structs.replace(sidecar.preprocessing, input="normalized")),
    }
