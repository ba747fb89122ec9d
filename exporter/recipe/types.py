"""Types of the fields of a recipe, with their bounds."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from exporter.recipe.fields import about

SYNTHETIC = "synthetic"
TASKS = ("classify", "embed", "tokens", "features", "segment", "pyramid")
Tasks = Annotated[
    str,
    Meta(
        pattern=rf"^({'|'.join(TASKS)})(,({'|'.join(TASKS)}))*$",
        title=f"{', '.join(TASKS[:-1])} or {TASKS[-1]}, or several as in classify,embed",
    ),
]
Form = Literal["plain", "linear", "conv", "nchw"]
CalibMethod = Literal["minmax", "entropy", "percentile", "mse"]
BiasCorrection = Literal["none", "fast", "full"]
OutputKind = Literal["classes", "multilabel", "values"]
WhenUnsure = Literal["fail", "pass", "warn"]
CpuClass = Literal["portable", "vnni", "arm", "this"]
Count = Annotated[int, Meta(ge=1)]
Threads = Annotated[int, Meta(ge=1, le=512)]
Seconds = Annotated[float, Meta(ge=0.5, le=86400)]
Side = Annotated[int, Meta(ge=32, le=4096)]
Reference = Annotated[
    str,
    Meta(
        pattern=r"^(timm|transformers|torchvision|[^:]+:[^:]+)$",
        title="one of module:callable, timm, transformers, torchvision",
    ),
]
BatchSize = Annotated[int, Meta(ge=1, le=4096)]
# Fields of several records.
Device = Annotated[
    str | None, about("Device that runs the artifact.", metavar="NAME", default="the first that its runtime takes")
]
RuntimeThreads = Annotated[Threads | None, about("Threads; by default the runtime's choice.", metavar="N")]
ReduceZeroLabel = Annotated[bool, about("Masks number classes from 1, and 0 is a pixel without a class, as in ADE20K.")]
MovedWeights = Annotated[
    str | None, about("Path of the weights if they were moved; other weights are refused.", metavar="SRC")
]
