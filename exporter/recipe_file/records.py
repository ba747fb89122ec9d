"""What stands in a recipe, section by section, and what it comes to."""

from __future__ import annotations

import re
from typing import Any, Literal

import msgspec

from exporter.artifact.sidecar import Record
from exporter.bench.latency import BenchOptions
from exporter.build import int8
from exporter.data.calibration import SYNTHETIC
from exporter.recipe import Recipe
from exporter.verify import VerifyOptions

SCHEMA = 1
PATHS = ("weights", "labels", "calib", "data", "timing_cache")
WORDS = re.compile(r"^(hub|synthetic|random(:.*)?|hf-hub:.*)$")


class Model(Record, frozen=True):
    """Which network, from which weights, and what it gives out."""

    variant: str | None = None
    weights: str = "hub"
    labels: str | None = None
    task: Literal["classify", "features"] = "classify"


class Export(Record, frozen=True):
    """How its graph is cut and written."""

    imgsz: int | Literal["dynamic"] | None = None
    batch: int | Literal["dynamic"] = "dynamic"
    opset: int = 20
    simplify: bool = True
    form: str | None = None
    input: Literal["normalized", "float01", "uint8"] = "normalized"


class Quantizing(Record, frozen=True):
    """How it comes to eight bits, and what it may lose by that: its budget, which decides what is kept back."""

    calib: str
    calib_size: int | None = None
    calib_seed: int = 0
    calib_method: Literal["minmax", "entropy", "percentile", "mse"] = "minmax"
    smoothing: float = 0.5
    bias_correction: Literal["none", "fast", "full"] = "fast"
    int8_scope: str | None = None
    max_drop: float | None = None
    data: str | None = None


class Checks(Record, frozen=True):
    """What it is verified on, and by which limits; None is each precision's own."""

    data: str = SYNTHETIC
    samples: int | None = None
    max_drop: float | None = None
    min_agreement: float | None = None
    min_cosine: float | None = None
    atol: float | None = None
    device: str = "cpu"


class Bench(Record, frozen=True):
    """How it is timed beside eager PyTorch; `min_speedup` is over that, `max_p50_ms` a time in milliseconds, both for
    every batch size. None for `batch` is what was exported, or 1."""

    batch: tuple[int, ...] | None = None
    threads: int | None = None
    hint: Literal["latency", "throughput"] = "latency"
    device: str = "cpu"
    duration: float = 10.0
    until: float | None = None
    seed: int = 0
    also: tuple[Literal["torch.compile", "tf32", "fp16"], ...] = ()
    min_speedup: float | None = None
    max_p50_ms: float | None = None


class RecipeFile(Record, frozen=True):
    """One build. Without `bench: null` it is timed too."""

    backend: str
    precision: str
    schema: Literal[1] = 1
    model: Model = Model()
    export: Export = Export()
    quantization: Quantizing | None = None
    target: dict[str, Any] = msgspec.field(default_factory=dict)
    checks: Checks = Checks()
    bench: Bench | None = Bench()

    def recipe(self) -> Recipe:
        """What is built."""
        told = {} if self.quantization is None else msgspec.structs.asdict(self.quantization)
        told = {word: value for word, value in told.items() if word not in ("max_drop", "data")}
        parts = {**msgspec.structs.asdict(self.model), **msgspec.structs.asdict(self.export), **told}
        return Recipe(backend=self.backend, precision=self.precision, target=self.target, **parts)

    def budget(self) -> int8.Budget:
        """What eight bits may lose."""
        asked = self.quantization
        return int8.Budget() if asked is None else int8.Budget(max_drop=asked.max_drop, data=asked.data)

    def verify_options(self) -> VerifyOptions:
        """How it is verified."""
        told = msgspec.structs.asdict(self.checks)
        return VerifyOptions(most=told.pop("samples"), weights=_elsewhere(self.model.weights), **told)

    def bench_options(self) -> BenchOptions | None:
        """How it is timed, or None."""
        if self.bench is None:
            return None
        told = msgspec.structs.asdict(self.bench)
        fixed = self.export.batch if isinstance(self.export.batch, int) else 1
        batch = told.pop("batch") or (fixed,)
        told = {word: value for word, value in told.items() if word not in ("min_speedup", "max_p50_ms")}
        return BenchOptions(batch=batch, weights=_elsewhere(self.model.weights), **told)


def _elsewhere(weights: str) -> str | None:
    """Weights that lie in a file are named, for it may have been moved since; others are found by their name."""
    return None if WORDS.match(weights) else weights
