"""What `optimize` is asked for: the model, the images, the budgets and the goal."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from msgspec import Meta
from msgspec.structs import replace

from exporter.artifact.sidecar import Record
from exporter.recipe import (
    SYNTHETIC,
    BatchSize,
    Checks,
    Export,
    Model,
    PreprocessingOptions,
    Quantization,
    Recipe,
    Seconds,
    Threads,
)
from exporter.recipe.fields import about

Goal = Literal["latency", "throughput", "size"]
_LATENCY = re.compile(r"(\d+(?:\.\d+)?)(ms|s)?")
_BYTES = re.compile(r"(\d+(?:\.\d+)?)([kmg]?b|[kmg]ib)?", re.IGNORECASE)
_POWERS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


class OptimizeOptions(Record, frozen=True):
    """The goal of a search, its limits, and what is tried."""

    goal: Annotated[
        Goal, about("What the artifact is chosen by: median latency, images a second, or bytes of its files.")
    ] = "latency"
    batch: Annotated[BatchSize, about("Batch size that the artifact is built and timed for.", metavar="N")] = 1
    max_latency: Annotated[
        Annotated[str, Meta(pattern=r"^\d+(\.\d+)?(ms|s)?$", title="a time, as in 15ms or 0.2s")] | None,
        about("Largest median latency of a batch, as in 15ms; without a unit, milliseconds.", metavar="TIME"),
    ] = None
    max_bytes: Annotated[
        Annotated[
            str, Meta(pattern=r"(?i)^\d+(\.\d+)?([kmg]?b|[kmg]ib)?$", title="a size in B, kB, MB, GB, KiB, MiB or GiB")
        ]
        | None,
        about("Largest size of the artifact's files, as in 30MB.", metavar="SIZE"),
    ] = None
    backend: Annotated[
        tuple[str, ...] | None,
        about("Runtimes to try.", metavar="NAME,…", commas=True, default="all that run on the device here"),
    ] = None
    precision: Annotated[
        tuple[str, ...] | None,
        about("Precisions to try.", metavar="NAME,…", commas=True, default="all that the device computes in"),
    ] = None
    threads: Annotated[
        Threads | None,
        about("Number of threads.", metavar="N", default="each power of two up to all physical cores is tried"),
    ] = None
    device: Annotated[str, about("Device that runs the artifact.", metavar="NAME")] = "cpu"
    duration: Annotated[
        Seconds, about("Seconds that each model is timed in the last comparison.", metavar="SECONDS")
    ] = 2.0
    seed: Annotated[int, about("Seed of the order in which models are timed.", metavar="N")] = 0

    @property
    def latency_limit_ms(self) -> float | None:
        """The largest median latency, in milliseconds."""
        if self.max_latency is None:
            return None
        match = _LATENCY.fullmatch(self.max_latency)
        assert match is not None
        return float(match[1]) * (1000 if match[2] == "s" else 1)

    @property
    def bytes_limit(self) -> float | None:
        """The largest size, in bytes."""
        if self.max_bytes is None:
            return None
        match = _BYTES.fullmatch(self.max_bytes)
        assert match is not None
        return float(match[1]) * _POWERS[(match[2] or "").lower()]


class Request(Record, frozen=True):
    """A model with its preprocessing and graph, images, budgets, and the goal of the search."""

    model: Model = Model()
    preprocessing: PreprocessingOptions = PreprocessingOptions()
    export: Export = Export()
    quantization: Quantization = Quantization()
    checks: Checks = Checks()
    options: OptimizeOptions = OptimizeOptions()

    def recipe(self, backend: str, precision: str, form: str, scope: str = "") -> Recipe:
        """The recipe of one build; `scope` is that of a quantized one, "" for others."""
        quantization = replace(self.quantization, int8_scope=scope) if scope else None
        export = replace(self.export, batch=self.options.batch, form=form)
        checks = replace(self.checks, data=self.quantization.data or SYNTHETIC)
        return Recipe(
            backend=backend,
            precision=precision,
            model=self.model,
            preprocessing=self.preprocessing,
            export=export,
            quantization=quantization,
            checks=checks,
        )
