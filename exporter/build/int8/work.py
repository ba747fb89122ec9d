"""A calibrated network, and artifacts of it with any of its parts in higher precision."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from exporter import artifact as artifacts
from exporter.artifact import Artifact
from exporter.artifact.outputs import DENSE
from exporter.artifact.sidecar import Quantization as QuantizationFacts
from exporter.artifact.sidecar import Sidecar
from exporter.build.export import Network, graph_of, write
from exporter.build.int8.workers import ImageOptions, Workers, measure_on
from exporter.build.resolve import Job
from exporter.data.calibration import CalibrationSet
from exporter.errors import CheckFailed, some
from exporter.graph import files, half
from exporter.model.structure import is_in
from exporter.quantize import QuantizeOptions
from exporter.quantize.placement import Placement, faults, quantize
from exporter.quantize.rounding import Grid, Plan
from exporter.recipe import Quantization
from exporter.verify.outputs import has_classes

if TYPE_CHECKING:
    import onnx_ir as ir

    from exporter.quantize.statistics import Statistics


@dataclass(frozen=True)
class Work:
    """Everything that quantized artifacts are made from: the smoothed fp32 network and graph, and the rounding of each
    layer."""

    job: Job
    quantization: Quantization
    placement: Placement
    grid: Grid
    images: CalibrationSet
    network: Network
    statistics: Statistics
    plan: Plan
    graph: ir.Model
    sidecar: Sidecar

    def make(self, kept: Collection[str], out: Path) -> Artifact:
        """Build an artifact in which these parts stay in higher precision.

        Raises: CheckFailed when the quantized graph has faults, with nothing written.
        """
        job = self.job
        model = quantize(self.graph, self.plan, self.placement, kept)
        if problems := faults(model, self.placement, self.grid):
            raise CheckFailed(f"the quantized graph has faults: {some(problems)}; nothing was written")
        if self.placement.rest != "fp32":
            half.tell(half.to_half(model, self.placement.rest, self.sidecar.beyond_fp16))
        sidecar = self._sidecar(kept)
        graph = artifacts.publish(
            out / job.file(job.recipe.precision).name, sidecar, lambda file: files.save(model, file, sidecar.facts())
        )
        return job.target.build(graph, job.recipe.precision, out, job.options)

    def build_above(self, out: Path) -> Artifact:
        """Build the same network in the next higher precision, from the same graph; smoothing changes no output of it.

        Raises: ExporterError where the target cannot build it.
        """
        job, precision = self.job, self.job.above_int8
        recipe = {**self.sidecar.recipe, "precision": "fp32"}
        sidecar = msgspec.structs.replace(self.sidecar, precision="fp32", recipe=recipe).keeping(())
        graph = artifacts.publish(
            out / job.file("fp32").name, sidecar, lambda file: files.save(self.graph, file, sidecar.facts())
        )
        if job.target.lower is not None:
            graph = job.target.lower(graph, precision, out, ())
        return job.target.build(graph, precision, out, job.options)

    def _sidecar(self, kept: Collection[str]) -> Sidecar:
        layers = {
            name: int(self.statistics.macs(self.network.model, name)) for name in self.plan if not is_in(name, kept)
        }
        facts = QuantizationFacts(
            calib=self.images.source,
            digest=self.images.digest,
            images=self.images.total,
            synthetic=self.images.synthetic,
            method=self.quantization.calib_method,
            smoothing=self.quantization.smoothing,
            bias_correction=self.quantization.bias_correction,
            scope=self.job.scope,
            layers=layers,
            kept=tuple(kept),
            cpu=self.quantization.cpu,
        )
        return msgspec.structs.replace(self.sidecar, quantization=facts)


def prepare(job: Job, folder: Path, workers: Workers | None = None) -> Work:
    """Calibrate, fold scales into the weights, trace, and compare the graph with PyTorch.

    Args:
        job: of precision int8 or fp8.
        folder: for the traced graph; nothing is written elsewhere.
        workers: processes that run the network on the calibration images; by default this one does.

    Raises: ExporterError as `export` does; BadRequest for a calibration set that cannot be used.
    """
    quantization, placement = job.recipe.quantization, job.placement
    assert quantization is not None
    assert placement is not None
    classes = job.sidecar.weights.num_classes if has_classes(job.sidecar, job.recipe.checks.outputs) else None
    options = ImageOptions(
        calib=quantization.calib,
        size=quantization.calib_size,
        seed=quantization.calib_seed,
        preprocessing=job.sidecar.preprocessing,
        classes=classes,
        dense=job.sidecar.task in DENSE,
    )
    images = options.open()
    from exporter.quantize import simulation, smoothing, statistics

    grid: Grid = "fp8" if job.recipe.precision == "fp8" else "int8"
    network = write(job)
    measure = measure_on(workers, job, network.model, options, images) if workers is not None else None
    measured = statistics.collect(
        network.model,
        placement.kinds,
        quantization.smoothing,
        images,
        _cache_key(job.sidecar),
        histogram=quantization.calib_method != "minmax",
        measure=measure,
    )
    smoothing.smooth(network.model, measured.factor)
    quantize_options = QuantizeOptions(
        grid=grid,
        inputs=placement.inputs,
        half=placement.rest == "fp16",
        exact_pairs=placement.exact_pairs,
        method=quantization.calib_method,
        bias_correction=quantization.bias_correction,
    )
    plan = simulation.plan(network.model, placement.kinds, placement.symmetric, measured, images, quantize_options)
    graph, sidecar = graph_of(job, network, folder / "traced.onnx")
    recipe = {**sidecar.recipe, "precision": job.recipe.precision}
    sidecar = msgspec.structs.replace(sidecar, precision=job.recipe.precision, recipe=recipe)
    sidecar = sidecar.keeping(job.recipe.export.keep or ())
    return Work(job, quantization, placement, grid, images, network, measured, plan, graph, sidecar)


def _cache_key(sidecar: Sidecar) -> dict[str, object]:
    """What statistics depend on beside the images; the form does not change the inputs of a layer."""
    return {
        "weights": sidecar.weights.digest,
        "architecture": sidecar.architecture,
        "preprocessing": msgspec.to_builtins(sidecar.preprocessing.of_network()),
    }
