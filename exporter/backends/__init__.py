"""Runtimes and targets. Each module of this folder is one runtime, and ends in
`RUNTIME = Runtime(...)` and, where artifacts are built for it, `TARGET = Target(...)`.

A check sees only `Session`; runtimes never see each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Literal, Protocol, TypeVar

from exporter import discover, machine, precision
from exporter.artifact import Artifact
from exporter.artifact.sidecar import Record, Sidecar
from exporter.data.inputs import Array as Array
from exporter.data.inputs import Outputs as Outputs
from exporter.data.inputs import as_fp32 as as_fp32
from exporter.data.inputs import as_network_takes as as_network_takes
from exporter.data.inputs import as_taken as as_taken
from exporter.errors import BadRequest, Unavailable, nearest
from exporter.precision import PRECISIONS
from exporter.quantize.placement import Placement
from exporter.report import Finding

NARROW = frozenset({"int8", "uint8", "fp8"})
"""8-bit precisions, as `Layer.precision` names them."""


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
    streams: int
    """The number of threads that may call it at once."""

    def __call__(self, images: Array) -> Outputs:
        """Run: images (N, C, H, W) float32, or for `--input image` one picture (1, H, W, C) uint8 in RGB or grey, to
        outputs (N, …) float32, whatever runs inside."""

    def bind(self, batches: Sequence[Array]) -> Bound:
        """Put the inputs in place on the device: one or more batches, as for a call, taken in turn, the first first."""


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
    """Options of a session: the device; the number of threads, None for the runtime's choice; and whether one batch
    runs at a time, or as many at once as the runtime has streams for."""

    device: str = "cpu"
    threads: int | None = None
    hint: Literal["latency", "throughput"] = "latency"


class TargetOptions(Record, frozen=True):
    """Options of a target. Most targets have none."""


Opt = TypeVar("Opt", bound=Options)
DeviceKind = Literal["CPU", "NVIDIA GPU", "Intel GPU", "NPU", "device group"]
CPU_ONLY: Mapping[str, DeviceKind] = {"cpu": "CPU"}


@dataclass(frozen=True)
class TritonModel:
    """How Triton Inference Server runs an artifact.

    backend: its name in Triton.
    devices: that instances run on, the default first.
    batches: whether Triton puts requests together to batches.
    profiles: for an engine, the smallest, best and largest batch of each of its profiles.
    parameters, server_options: of the backend, and of `tritonserver`.
    remark, on_gpu: a sentence for the README, and another one if instances run on a GPU; or "".
    exact: whether the arithmetic is always that of the artifact.
    """

    backend: str
    devices: tuple[Literal["cpu", "gpu"], ...] = ("cpu",)
    batches: bool = True
    profiles: tuple[tuple[int, int, int], ...] = ()
    parameters: Mapping[str, str] = field(default_factory=dict)
    remark: str = ""
    on_gpu: str = ""
    server_options: tuple[str, ...] = ()
    exact: bool = True


@dataclass(frozen=True)
class WebRuntime:
    """What runs artifacts in a browser.

    package, version: of the package of npm that has it in its folder `dist`.
    files: the files of `dist` that a page needs, each with its sha256.
    precisions: that it computes in.
    """

    package: str
    version: str
    files: Mapping[str, str]
    precisions: tuple[str, ...]


@dataclass(frozen=True)
class Serving:
    """How applications and servers run the artifacts of a runtime. Missing parts are None.

    title: the runtime's own name, for texts.
    requirement: what pip installs.
    code: a sidecar to Python source that imports the runtime and, after two blank lines, defines `load()`, which opens
        the file `MODEL`, and `run(model, batch)`, which gives a list of arrays.
    triton: a sidecar to the model's settings in Triton; raises BadRequest for an artifact that Triton does not run.
    model_server: a sidecar to the settings of OpenVINO's plugin in OpenVINO Model Server.
    web: what runs its artifacts in a browser.
    """

    title: str
    requirement: str
    code: Callable[[Sidecar], str] | None = None
    triton: Callable[[Sidecar], TritonModel] | None = None
    model_server: Callable[[Sidecar], dict[str, str]] | None = None
    web: WebRuntime | None = None


@dataclass(frozen=True)
class Runtime(Generic[Opt]):
    """Runs models. Missing parts are None.

    name: of its module, of its target, and in the sidecars of the artifacts that it opens.
    options: the record that `open` takes.
    probe: the installed version, or raises Unavailable with the line that installs it.
    open: opens an artifact.
    distributions: the packages whose versions are recorded beside every artifact and number.
    modules: what `open` imports, in order; timing processes on the CPU are forked from one that has imported them.
        None of them may leave a thread behind, which a forked process lacks.
    devices: the words of `--device` that it takes, each with the kind of device that it names.
    devices_here: what it sees on this machine, for `doctor`, or raises Unavailable with what to do.
    unable: why it can open nothing on this machine, or "".
    opens_onnx: whether `open` takes the fp32 ONNX graph of any target, so that a traced graph can be checked with it.
    layers: what an artifact is made of, layer by layer.
    blocks: opens an artifact so that every block's output can be seen.
    peak: the fastest product (`_peak`) on this runtime in the arithmetic of an artifact, to be timed beside it; given
        the text of a known product, it opens that one without a search.
    serving: how applications and servers run its artifacts.
    """

    name: str
    options: type[Opt]
    probe: Callable[[], str]
    open: Callable[[Artifact, Opt], AbstractContextManager[Session]]
    distributions: tuple[str, ...]
    modules: tuple[str, ...] = ()
    devices: Mapping[str, DeviceKind] = field(default_factory=lambda: CPU_ONLY)
    devices_here: Callable[[], str] | None = None
    unable: Callable[[], str] = lambda: ""
    opens_onnx: bool = False
    layers: Callable[[Artifact, Opt], list[Layer]] | None = None
    blocks: Callable[[Artifact, Opt], AbstractContextManager[Blocks]] | None = None
    peak: Callable[[Artifact, Opt, str], AbstractContextManager[Session]] | None = None
    serving: Serving | None = None


@dataclass(frozen=True)
class Target:
    """A runtime that artifacts are built for, and how it wants them. Missing parts are None.

    name: of the runtime that opens its artifacts.
    command: the word that a user types to build for it.
    summary, description, examples: its help, in the list of commands and on its own page; examples without the name of
        the program.
    suffix: of its artifacts' file names.
    layout: what an artifact is: one file, a file with others beside it, or a directory.
    source: what `build` starts from: the ONNX graph, or the PyTorch network.
    precisions: that it is built in, with the help of each one's flag.
    options: the record that `build` and `check` take.
    form: (precision, batch size or None for any) to the form that the runtime runs best.
    placements: where it wants Q and DQ, if it runs int8, by the scope of what is quantized, its own choice first.
    lower: (fp32 ONNX artifact, precision, folder, parts that stay in fp32) to the graph at that precision; None where
        `build` takes the fp32 one.
    build: (that graph, precision, folder, options) to what the runtime opens.
    above_int8: the next higher precision that this machine computes in, which int8 and fp8 have to beat.
    reproducible: whether the same graph gives the same bytes every time.
    no_pictures: (precision) to the reason why its artifacts cannot take pictures of any size (`--input image`), or "".
    check: (precision, batch size or None for any, `--imgsz`, options): raises BadRequest for what cannot be built,
        Unavailable for what is not installed.
    findings: what is known of an artifact without running it, beside the same network in the next higher precision
        if that is there.
    """

    name: str
    command: str
    summary: str
    description: str
    examples: tuple[str, ...]
    suffix: str
    precisions: Mapping[str, str]
    form: Callable[[str, int | None], str]
    build: Callable[[Artifact, str, Path, TargetOptions], Artifact]
    layout: Literal["file", "files", "directory"] = "file"
    source: Literal["onnx", "torch"] = "onnx"
    options: type[TargetOptions] = TargetOptions
    placements: Mapping[str, Placement] = field(default_factory=dict)
    above_int8: Callable[[], str] = lambda: PRECISIONS["int8"].higher
    reproducible: bool = True
    no_pictures: Callable[[str], str] = lambda _: ""
    lower: Callable[[Artifact, str, Path, Sequence[str]], Artifact] | None = None
    check: Callable[[str, int | None, object, TargetOptions], None] | None = None
    findings: Callable[[Artifact, Artifact | None], list[Finding]] | None = None


ONNX = "onnxruntime"
"""The backend that fp32 ONNX graphs are recorded under, intermediate ones included."""


def runtimes() -> list[str]:
    """The names of all runtimes: the modules of this folder."""
    return discover.names(__name__)


def targets() -> list[str]:
    """The names of the runtimes that something is built for."""
    return [name for name in runtimes() if hasattr(discover.module(__name__, name), "TARGET")]


def name_of(word: str) -> str:
    """The name of the backend whose build command is `word`; any other word is returned as it is."""
    return next((name for name in targets() if target(name).command == word), word)


def runtime(name: str) -> Runtime[Options]:
    """The runtime of that name.

    Raises: BadRequest for an unknown one, with the nearest.
    """
    found: Runtime[Options] = discover.load(__name__, name, "RUNTIME")
    return found


def _commands(known: Sequence[str]) -> list[str]:
    """The build commands of targets whose name is another one."""
    return [command for name in known if (command := target(name).command) != name]


def target(name: str) -> Target:
    """The target of that name.

    Raises: BadRequest for an unknown one, or a runtime that nothing is built for, with the nearest.
    """
    known = targets()
    if name not in known:
        what = "nothing is built for" if name in runtimes() else "unknown"
        raise BadRequest(f"{what} backend {name!r}; {nearest(name, [*known, *_commands(known)])}")
    found: Target = discover.load(__name__, name, "TARGET")
    return found


def runtime_of(artifact: Artifact) -> Runtime[Options]:
    """The runtime that opens an artifact.

    Raises: BadRequest for a runtime or precision that this version does not know, with the file.
    """
    name, known = artifact.sidecar.backend, targets()
    if name not in known:
        raise BadRequest(
            f"{artifact.path}: built for {name!r}, which is not known to this version; {nearest(name, known)}"
        )
    precision.get(artifact.sidecar.precision, artifact.path)
    return runtime(name)


def device_of(artifact: Artifact, device: str | None = None) -> str:
    """The device that runs an artifact: the one of `--device`, else the first that its runtime takes.

    Raises: BadRequest for a device that its runtime does not take.
    """
    runtime = runtime_of(artifact)
    if device is None:
        return next(iter(runtime.devices))
    kind_of(device, runtime, artifact.path)
    return device.lower()


def device_kind(artifact: Artifact, device: str | None = None) -> DeviceKind:
    """The kind of device that runs an artifact.

    Raises: BadRequest for a device that its runtime does not take.
    """
    return kind_of(device_of(artifact, device), runtime_of(artifact), artifact.path)


def kind_of(device: str, runtime: Runtime[Options], what: object) -> DeviceKind:
    """The kind of a device. `what` runs on it, for the message.

    Raises: BadRequest for a device that the runtime does not take.
    """
    if (kind := runtime.devices.get(_kind_word(device))) is None:
        known = ", ".join(runtime.devices)
        raise BadRequest(f"--device {device}: {what} is for {runtime.name}, which takes {known}")
    return kind


def check_cache_dir(runtime: Runtime[Options], folder: str, what: object) -> None:
    """Raises: BadRequest where the runtime keeps no folder of compiled models. `what` runs on it, for the message."""
    if not folder or (Path(folder).exists() and not Path(folder).is_dir()):
        raise BadRequest(f"--cache-dir {folder!r}: expected a folder")
    if "cache_dir" not in runtime.options.__struct_fields__:
        raise BadRequest(f"--cache-dir: {what} is for {runtime.name}, which keeps no folder of compiled models")


def _kind_word(device: str) -> str:
    """The device without its number or its group: "gpu" of "gpu.1", "cuda" of "cuda:0", "auto" of "auto:gpu,cpu"."""
    return device.lower().partition(":")[0].partition(".")[0]


def distributions() -> list[str]:
    """The packages of all runtimes whose versions are recorded."""
    return sorted({distribution for name in runtimes() for distribution in runtime(name).distributions})


def versions() -> dict[str, str]:
    """The versions of the tools and runtimes that are installed here."""
    return machine.versions(distributions())


def computing_versions(runtime: Runtime[Options]) -> dict[str, str]:
    """The versions of what determines answers: this tool, PyTorch, the runtime, and what reads images."""
    names = ("convnext-export", "torch", "numpy", "pillow", *runtime.distributions)
    return {name: version for name in names if (version := machine.installed(name)) is not None}


def refuse_other_versions(versions: Mapping[str, str]) -> None:
    """Raises: BadRequest where this process has other versions than these of `computing_versions`."""
    for name, version in versions.items():
        if (here := machine.installed(name)) != version:
            raise BadRequest(
                f"{name} {here or 'is missing'}, but the work was begun with {version}; install that version"
            )


def environment() -> dict[str, object]:
    """The machine, with the versions of the tools and runtimes, for a report."""
    return machine.environment(distributions())


def require(distribution: str, extra: str) -> str:
    """The version of a distribution.

    Raises: Unavailable with the line that installs it.
    """
    version = machine.installed(distribution)
    if version is None:
        raise Unavailable(f"{distribution} is not installed; pip install 'convnext-export[{extra}]'")
    return version
