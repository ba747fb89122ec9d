"""Runtimes, one module each, which ends in `RUNTIME = Runtime(...)` and, where something is built for it,
`TARGET = Target(...)`. Adding one is adding one file; `null.py` is a worked example.

Checks see only a `Session`; backends never see each other.
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

from exporter import discover, precision
from exporter.artifact import Artifact
from exporter.artifact.sidecar import Preprocessing, Record
from exporter.errors import BadRequest, Unavailable, nearest
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
    """Options of a session: the device; the number of threads, None for the runtime's choice; and whether one batch is
    run at a time, or as many at once as the runtime has streams for."""

    device: str = "cpu"
    threads: int | None = None
    hint: Literal["latency", "throughput"] = "latency"


class TargetOptions(Record, frozen=True):
    """Options of a target. Most targets have none."""


Opt = TypeVar("Opt", bound=Options)


@dataclass(frozen=True)
class Runtime(Generic[Opt]):
    """A library that runs models. Functions that are None are not offered by the runtime.

    name: of the module.
    options: the record of a session's options.
    probe: the installed version; raises Unavailable with the line that installs it.
    open: opens an artifact as a session.
    devices: what `--device` takes, each with whether it is an NVIDIA GPU.
    layers: the layers of an artifact, with the precision that each is computed in.
    blocks: opens an artifact so that it gives the output of every block.
    peak: a large matrix product on this runtime in the arithmetic of an artifact.
    unable: why no artifact can run on this machine, or "".
    describe: a line for `doctor` about each kind of device; raises Unavailable where there is none.
    distributions: packages whose versions are recorded.
    opens_onnx: whether it opens fp32 ONNX graphs, so that a traced graph can be compared with PyTorch.
    """

    name: str
    options: type[Opt]
    probe: Callable[[], str]
    open: Callable[[Artifact, Opt], AbstractContextManager[Session]]
    devices: Mapping[str, bool]
    layers: Callable[[Artifact, Opt], list[Layer]] | None = None
    blocks: Callable[[Artifact, Opt], AbstractContextManager[Blocks]] | None = None
    peak: Callable[[Artifact, Opt], AbstractContextManager[Product]] | None = None
    unable: Callable[[], str] = lambda: ""
    describe: Mapping[str, Callable[[], str]] = field(default_factory=dict)
    distributions: tuple[str, ...] = ()
    opens_onnx: bool = False


@dataclass(frozen=True)
class Target:
    """What artifacts are built for. Functions that are None are not needed by the target.

    name: of the module, whose runtime opens the artifacts.
    command, summary, description, examples: the command that builds, and its help.
    suffix: of the file that the runtime opens.
    layout: whether an artifact is one file, several files, or a directory.
    source: whether it is built from an ONNX graph or from the PyTorch network.
    precisions: that it can build.
    computes: the precisions that this machine's device computes in.
    options: the record of target options.
    form: (precision, batch size or None for any) to the form that the runtime runs fastest.
    build: (graph at the precision, precision, folder, options) to the artifact.
    lower: (fp32 ONNX artifact, precision, folder) to the graph at that precision.
    placements: where Q and DQ go, by the scope of the quantized layers; the first is the default.
    check: (precision, batch size or None for any, options): raises BadRequest for what cannot be built, Unavailable for
        what is not installed.
    findings: what is known of an artifact without running it, compared with that of the next higher precision.
    reproducible: whether the same graph gives the same bytes every time.
    """

    name: str
    command: str
    summary: str
    description: str
    examples: tuple[str, ...]
    suffix: str
    precisions: frozenset[str]
    form: Callable[[str, int | None], str]
    build: Callable[[Artifact, str, Path, TargetOptions], Artifact]
    computes: Callable[[], frozenset[str]] = lambda: frozenset({"fp32"})
    layout: Literal["file", "files", "directory"] = "file"
    source: Literal["onnx", "torch"] = "onnx"
    options: type[TargetOptions] = TargetOptions
    lower: Callable[[Artifact, str, Path], Artifact] | None = None
    placements: Mapping[str, Placement] = field(default_factory=dict)
    check: Callable[[str, int | None, TargetOptions], None] | None = None
    findings: Callable[[Artifact, Artifact | None], list[Finding]] | None = None
    reproducible: bool = True

    def above(self, name: str) -> str:
        """The next higher precision that this machine's device computes in."""
        return precision.next_higher(name, self.computes())


ONNX = "onnxruntime"
"""The backend under which fp32 ONNX graphs are recorded, intermediate ones included."""


def runtimes() -> list[str]:
    """The names of all runtimes."""
    return discover.names(__name__)


def targets() -> list[str]:
    """The names of the runtimes that something is built for."""
    return [name for name in runtimes() if hasattr(discover.module(__name__, name), "TARGET")]


def runtime(name: str) -> Runtime[Options]:
    """The runtime of that name.

    Raises: BadRequest for an unknown one.
    """
    found: Runtime[Options] = discover.load(__name__, name, "RUNTIME")
    return found


def target(name: str) -> Target:
    """The target of that name.

    Raises: BadRequest for an unknown one, or a runtime that nothing is built for.
    """
    if name not in (names := targets()):
        raise BadRequest(f"backend {name!r}: {nearest(name, names)}")
    found: Target = discover.load(__name__, name, "TARGET")
    return found


def devices() -> dict[str, bool]:
    """The devices of all runtimes, each with whether it is an NVIDIA GPU."""
    return {name: is_gpu for one in runtimes() for name, is_gpu in runtime(one).devices.items()}


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
