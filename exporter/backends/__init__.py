"""What runs a model. Each module of this folder is one runtime, and ends in `BACKEND = Backend(...)`.

A check sees only `Session`; backends never see each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Generic, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from exporter import discover
from exporter.artifact import Artifact
from exporter.artifact.sidecar import Preprocessing, Record
from exporter.errors import Unavailable
from exporter.quantize.placement import Placement
from exporter.report import Finding

Array = NDArray[np.float32]
Outputs = tuple[Array, ...]

NARROW = frozenset({"int8", "uint8", "fp8"})
"""Precisions of eight bits, as layers tell them."""
PEAK_SIDE = 1024
PEAK_MACS = PEAK_SIDE**3


@dataclass(frozen=True)
class Bound:
    """Inputs in place on the device.

    run: runs `streams` batches at once and waits for them; it is what is timed. Each call takes the next inputs.
    outputs: what the last run gave for its first batch.
    parts: milliseconds of one run's parts by a GPU's clock (`_cuda.parts`), where there are any.
    """

    run: Callable[[], None]
    outputs: Callable[[], Outputs]
    streams: int = 1
    parts: Callable[[], dict[str, float]] | None = None


class Session(Protocol):
    """A loaded model."""

    facts: dict[str, str]
    """What is really in use: device or provider, and the precision of its arithmetic."""

    def __call__(self, images: Array) -> Outputs:
        """Run: images (N, 3, H, W) float32 to outputs (N, …) float32, whatever runs inside."""

    def bind(self, batches: Sequence[Array]) -> Bound:
        """Put the inputs in place on the device: one or more batches (N, 3, H, W), taken in turn, the first first."""


class Product:
    """A product of two matrices of `PEAK_SIDE` on a runtime, as a session: what it reaches with a ConvNeXt is held
    against what it reaches with this."""

    def __init__(self, session: Session) -> None:
        self.session, self.facts = session, session.facts

    def __call__(self, images: Array) -> Outputs:
        """The product; the images are not looked at."""
        del images
        return self.session(peak_matrix())

    def bind(self, batches: Sequence[Array]) -> Bound:
        """The product, whatever the batches are."""
        del batches
        return self.session.bind([peak_matrix()])


def peak_matrix() -> Array:
    """One of the two matrices."""
    return np.random.default_rng(0).normal(size=(PEAK_SIDE, PEAK_SIDE)).astype(np.float32)


def as_taken(images: Array, recipe: Preprocessing) -> NDArray[np.float32] | NDArray[np.uint8]:
    """Normalised images (N, 3, H, W) as an artifact takes them: these, or the pixels that they were made from."""
    if recipe.input == "normalized":
        return np.ascontiguousarray(images)
    mean, std = (np.asarray(values, np.float32)[:, None, None] for values in (recipe.mean, recipe.std))
    pixels = images * std + mean
    return np.rint(pixels * 255).clip(0, 255).astype(np.uint8) if recipe.input == "uint8" else pixels


@dataclass(frozen=True)
class Blocks:
    """A model cut open: the names of its downsampling layers and blocks, and what each of them gives for images."""

    names: tuple[str, ...]
    run: Callable[[Array], Outputs]


class Layer(Record, frozen=True):
    """One layer of a built model: its name, the ConvNeXt module it belongs to, its operator and precision.

    `pair_sum`: for a matrix product or convolution with constant int8 weights, the largest |sum| of two adjacent
    products over all 8-bit inputs, 0 to 65,280 (`rounding.largest_pair`). Otherwise None.
    """

    name: str
    module: str
    operator: str
    precision: str
    pair_sum: int | None = None


class Options(Record, frozen=True):
    """What every backend can be told: the device, how many threads (None is the runtime's own choice), and the way
    of using the machine: one batch at a time as fast as can be, or as many at once as it has streams for."""

    device: str = "cpu"
    threads: int | None = None
    hint: Literal["latency", "throughput"] = "latency"


class Target(Record, frozen=True):
    """What a backend's builder can be told about where its artifacts will run. Most need to be told nothing."""


Opt = TypeVar("Opt", bound=Options)


@dataclass(frozen=True)
class Backend(Generic[Opt]):
    """A runtime as a record of functions.

    probe: the installed version, or raises Unavailable with the line that installs it.
    lower: (fp32 ONNX artifact, precision, folder) to the graph at that precision.
    build: (that graph, precision, folder, target) to what the runtime loads.
    target: the record that `build` takes.
    session: opens an artifact.
    layers: what an artifact is made of, layer by layer.
    blocks: opens an artifact so that every block's output can be seen.
    peak: a large matrix product on this runtime in the arithmetic of an artifact, to be timed beside it.
    form: (precision, batch size or None for any) to the form that it runs best.
    placements: where it wants Q and DQ, if it runs eight bits, by the scope of what is rounded, its own choice first.
    above_int8: the next higher precision that this machine's CPU computes in, which int8 and fp8 have to beat.
    check: (precision, batch size or None for any, target): raises BadRequest for what cannot be built, Unavailable for
        what is not installed.
    unable: why nothing that it builds can run on this machine, or "".
    findings: what is known of an artifact without running it, beside that of the next higher precision if there is one.
    opens_onnx: whether `session` opens an fp32 ONNX artifact too, so that a traced graph can be checked with it.
    reproducible: whether the same graph gives the same bytes every time.
    """

    name: str
    precisions: frozenset[str]
    options: type[Opt]
    probe: Callable[[], str]
    lower: Callable[[Artifact, str, Path], Artifact]
    build: Callable[[Artifact, str, Path, Target], Artifact]
    session: Callable[[Artifact, Opt], AbstractContextManager[Session]]
    layers: Callable[[Artifact, Opt], list[Layer]]
    blocks: Callable[[Artifact, Opt], AbstractContextManager[Blocks]]
    peak: Callable[[Artifact, Opt], AbstractContextManager[Product]]
    form: Callable[[str, int | None], str]
    placements: Mapping[str, Placement] = field(default_factory=dict)
    above_int8: Callable[[], str] = lambda: "fp32"
    target: type[Target] = Target
    check: Callable[[str, int | None, Target], None] = lambda precision, batch, target: None
    unable: Callable[[], str] = lambda: ""
    findings: Callable[[Artifact, Artifact | None], list[Finding]] = lambda artifact, rival: []
    opens_onnx: bool = False
    reproducible: bool = True


def get(name: str) -> Backend[Options]:
    """The backend of that name.

    Raises: BadRequest for an unknown one.
    """
    backend: Backend[Options] = discover.load(__name__, name, "BACKEND")
    return backend


def installed(distribution: str) -> str | None:
    """The version of an installed distribution, without importing it."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def require(distribution: str, extra: str) -> str:
    """The version of a distribution.

    Raises: Unavailable with the line that installs it.
    """
    version = installed(distribution)
    if version is None:
        raise Unavailable(f"{distribution} is not installed; pip install 'convnext-export[{extra}]'")
    return version
