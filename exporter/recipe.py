"""A recipe: everything that one build was asked for, as a frozen record."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from exporter.artifact.sidecar import Record
from exporter.errors import BadRequest
from exporter.graph.trace import TraceOptions

EIGHT_BITS = ("int8", "fp8")


class Recipe(Record, frozen=True):
    """One build.

    None for `variant` is what the weights are; for `imgsz` the size that was published with them; for `form` and
    `int8_scope` what the backend runs best, and the form `auto` what is measured to be fastest on this machine; for
    `calib_size` all of a manifest, else 256. What begins with `calib`, `smoothing` and `bias_correction` is for int8
    and fp8; `target` is what the backend's builder is told, in the words of its own record."""

    variant: str | None = None
    weights: str = "hub"
    labels: str | None = None
    task: Literal["classify", "features"] = "classify"
    imgsz: int | Literal["dynamic"] | None = None
    batch: int | Literal["dynamic"] = "dynamic"
    opset: int = 20
    simplify: bool = True
    form: str | None = None
    input: Literal["normalized", "float01", "uint8"] = "normalized"
    backend: str = "onnxruntime"
    precision: str = "fp32"
    calib: str = "synthetic"
    calib_size: int | None = None
    calib_seed: int = 0
    int8_scope: str | None = None
    calib_method: Literal["minmax", "entropy", "percentile", "mse"] = "minmax"
    smoothing: float = 0.5
    bias_correction: Literal["none", "fast", "full"] = "fast"
    target: dict[str, Any] = msgspec.field(default_factory=dict)

    def trace_options(self, published_size: int) -> TraceOptions:
        """How the graph is cut, once the weights have told their size."""
        size = self.imgsz if self.imgsz is not None else published_size
        return TraceOptions(
            task=self.task,
            imgsz=None if size == "dynamic" else size,
            batch=None if self.batch == "dynamic" else self.batch,
            opset=self.opset,
            uint8=self.input == "uint8",
        )


def size_or_dynamic(option: str, word: str | None) -> int | Literal["dynamic"] | None:
    """What `--imgsz` and `--batch` take.

    Raises: BadRequest for anything but a whole number or `dynamic`.
    """
    if word is None:
        return None
    if word == "dynamic":
        return "dynamic"
    if not word.isdecimal():
        raise BadRequest(f"{option} {word}: expected a whole number or 'dynamic'")
    return int(word)
