"""OpenVINO: the ONNX graph as IR, run at the precision that was asked for and no other.

Left to itself the CPU plugin computes an fp32 IR in bf16 wherever the CPU has it, so the precision of the
arithmetic is always set, and read back. fp16 halves the file; on a CPU it is computed in fp32, so that it answers the
same on every machine. On other devices it is computed in fp16.
"""

from __future__ import annotations

import errno
import itertools
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from exporter.artifact import Artifact, file_name, publish
from exporter.artifact.sidecar import Preprocessing
from exporter.backends import (
    NARROW,
    Array,
    Blocks,
    Bound,
    Layer,
    Options,
    Outputs,
    Runtime,
    Target,
    TargetOptions,
    as_fp32,
    as_taken,
    require,
)
from exporter.backends._peak import PeakProduct, Product, fastest_product
from exporter.backends.openvino.devices import arithmetic_of, in_use, members, no_pictures, properties, text
from exporter.backends.openvino.products import peak_model
from exporter.backends.openvino.serving import SERVING
from exporter.errors import BadRequest, ExporterError, Unavailable, last_line, run_failed
from exporter.model.structure import last_operators, module_of
from exporter.quantize.placement import Placement
from exporter.quantize.rounding import largest_pair

# OpenVINO reports each import to Intel through this package, from a thread and a process. Without it OpenVINO reports
# nothing, and timing processes are forked from a process that has no such thread.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

_NAMES = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "i8": "int8", "u8": "uint8"}


class OpenVinoOptions(Options, frozen=True):
    """Options of a session: those of every runtime, and the folder where OpenVINO keeps compiled models, or None."""

    cache_dir: str | None = None


def probe() -> str:
    """The version of OpenVINO."""
    return require("openvino", "openvino")


class OpenVinoSession:
    """A compiled IR."""

    def __init__(self, compiled: Any, recipe: Preprocessing, device: str, arithmetic: str, streams: int) -> None:
        self.compiled, self.recipe, self.streams = compiled, recipe, streams
        self.requests: SimpleQueue[Any] = SimpleQueue()  # a call takes one and puts it back
        for _ in range(streams):
            self.requests.put(compiled.create_infer_request())
        # The first call builds a static table of types. Two threads at once wait for each other for ever: one holds the
        # lock of the table and needs Python's, the other the reverse.
        compiled.inputs[0].get_element_type().to_dtype()
        self.facts = {"device": device, "arithmetic": _NAMES[arithmetic]}

    def __call__(self, images: Array) -> Outputs:
        """Run: images (N, C, H, W) float32 to outputs (N, …) float32.

        Raises: RunFailed where OpenVINO fails, as without memory.
        """
        taken, request = as_taken(images, self.recipe), self.requests.get()
        try:
            results = request.infer([taken], share_inputs=True)
            return as_fp32(results[output] for output in self.compiled.outputs)
        except RuntimeError as error:
            raise run_failed("OpenVINO", last_line(error)) from error
        finally:
            self.requests.put(request)

    def bind(self, batches: Sequence[Array]) -> Bound:
        """The inputs as the requests' own tensors, and one run over them."""
        import openvino as ov

        turn = itertools.cycle([ov.Tensor(as_taken(images, self.recipe)) for images in batches])
        requests = [self.compiled.create_infer_request() for _ in range(self.streams)]

        def run() -> None:  # one call instead of start and wait: less overhead
            requests[0].set_input_tensor(next(turn))
            requests[0].infer()

        def run_all() -> None:
            for request in requests:
                request.set_input_tensor(next(turn))
                request.start_async()
            for request in requests:
                request.wait()

        def outputs() -> Outputs:
            return tuple(np.array(tensor.data, np.float32) for tensor in requests[0].output_tensors)

        return Bound(run if self.streams == 1 else run_all, outputs, self.streams)


def devices_here() -> str:
    """The devices that OpenVINO sees, each with the arithmetic that it is optimized for."""
    probe()
    import openvino as ov

    core = ov.Core()
    seen = []
    for device in core.available_devices:
        try:
            all_abilities = core.get_property(device, "OPTIMIZATION_CAPABILITIES")
        except RuntimeError as error:
            seen.append(f"{device.lower()} (does not load: {last_line(error)})")
            continue
        abilities = sorted({"BF16", "FP16", "INT8"} & set(all_abilities))
        seen.append(f"{device.lower()} ({', '.join(abilities).lower()})")
    return ", ".join(seen)


@contextmanager
def session(artifact: Artifact, options: OpenVinoOptions) -> Iterator[OpenVinoSession]:
    """Compile an IR for the device that was asked for, at the precision of the artifact.

    Raises: Unavailable when the device is not there or cannot compute in that precision.
    """
    compiled, device, arithmetic = _compile(artifact, options)
    opened = _session(compiled, device, arithmetic, artifact.sidecar.preprocessing, options)
    if options.cache_dir:
        cached = compiled.get_property("LOADED_FROM_CACHE")
        opened.facts["loaded"] = "from the cache of compiled models" if cached else "compiled"
    if artifact.sidecar.precision == "int8":
        opened.facts |= {"arithmetic": "int8", "rest": opened.facts["arithmetic"]}
    yield opened


def _session(
    compiled: Any, device: str, arithmetic: str, recipe: Preprocessing, options: OpenVinoOptions
) -> OpenVinoSession:
    streams = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS") if options.hint == "throughput" else 1
    return OpenVinoSession(compiled, recipe, device, arithmetic, streams)


def _compile(
    artifact: Artifact, options: OpenVinoOptions, change: Callable[[Any], Any] = lambda model: model
) -> tuple[Any, str, str]:
    """The compiled model, the device with those that a group really uses, and the arithmetic in use."""
    probe()
    import openvino as ov

    core = ov.Core()
    device, devices = members(options.device.upper(), core.available_devices)
    dynamic = any(isinstance(side, str) for tensor in artifact.sidecar.inputs for side in tensor.shape)
    if dynamic and any(name.startswith("NPU") for name in devices):
        raise BadRequest(
            f"{artifact.path}: an NPU takes fixed shapes only; build it with --batch, and --imgsz in pixels"
        )
    arithmetic = arithmetic_of(artifact, device, devices)
    for member in devices if arithmetic == "bf16" else ():
        if "BF16" not in core.get_property(member, "OPTIMIZATION_CAPABILITIES"):
            raise Unavailable(f"this {member} has no bf16 arithmetic; build fp32 or fp16 for it")
    settings = properties(device, devices, arithmetic, options.threads) | {"PERFORMANCE_HINT": options.hint.upper()}
    if options.cache_dir:
        settings["CACHE_DIR"] = options.cache_dir
    try:
        compiled = core.compile_model(change(core.read_model(artifact.path)), device, settings)
    except RuntimeError as error:
        raise ExporterError(f"{artifact.path}: OpenVINO cannot load it: {last_line(error)}") from error
    device, computed = in_use(compiled, device)
    if computed != [arithmetic]:
        raise Unavailable(
            f"{device} computes in {' and '.join(computed)} where {arithmetic} is set; build another precision for it"
        )
    return compiled, device, arithmetic


def build(artifact: Artifact, precision: str, out: Path, options: TargetOptions) -> Artifact:
    """ONNX to IR: `FILE.xml` and `FILE.bin`, the weights in fp16 for fp16 and bf16.

    Raises: ExporterError when OpenVINO cannot convert the graph.
    """
    import openvino as ov

    del options
    sidecar = artifact.sidecar.derived(tools={"openvino": probe()}, backend="openvino", precision=precision)
    try:
        model = ov.Core().read_model(artifact.path)
    except RuntimeError as error:
        raise ExporterError(f"{artifact.path}: OpenVINO cannot convert it: {last_line(error)}") from error
    for key, value in sidecar.facts().items():
        model.set_rt_info(value, ["convnext_export", key])
    target = out / file_name(sidecar, TARGET.suffix)
    return publish(target, sidecar, lambda file: _write(model, file, compress=precision in ("fp16", "bf16")))


def _name(model: Any) -> None:
    """Name what has no name by its place: OpenVINO would number it by all that its process made before."""
    for index, operator in enumerate(model.get_ordered_ops()):
        if operator.get_friendly_name() == operator.get_name():
            operator.set_friendly_name(f"{operator.get_type_name()}#{index}")


FULL_BYTES = 1 << 20  # the writer fills a disk up before it fails


def _write(model: Any, path: Path, compress: bool) -> None:
    """Write an IR and read it again.

    Raises: OSError when either fails and the disk is full: the writer names no reason, or ends short without a word;
        ExporterError when it fails for another reason.
    """
    import openvino as ov

    _name(model)
    try:
        ov.save_model(model, path, compress_to_fp16=compress)
        ov.Core().read_model(path)
    except RuntimeError as error:
        if shutil.disk_usage(path.parent).free < FULL_BYTES:
            raise OSError(errno.ENOSPC, "the IR could not be written whole") from None
        raise ExporterError(f"{path.name}: OpenVINO cannot write it and read it again: {last_line(error)}") from None


def layers(artifact: Artifact, options: OpenVinoOptions) -> list[Layer]:
    """The layers of the compiled model in the order they run, with the precision each really runs in on this device.

    What OpenVINO puts in front of a layer (a reorder, the parts of a norm) counts to that layer's module.
    """
    sums: dict[str, int] = {}

    def read_sums(model: Any) -> Any:
        sums.update(_pair_sums(model) if artifact.sidecar.precision == "int8" else {})
        return model

    compiled, _, _ = _compile(artifact, options, read_sums)
    found: list[Layer] = []
    module = ""
    for op in reversed(compiled.get_runtime_model().get_ordered_ops()):
        info = {key: text(value) for key, value in op.get_rt_info().items()}
        if info["layerType"] in ("Const", "Input", "Output"):
            continue
        name, precision = op.get_friendly_name(), info["runtimePrecision"]
        origins = info.get("originalLayersNames") or name
        module = module_of(origins) or module
        narrow = _NAMES.get(precision, precision) in NARROW
        found.append(
            Layer(
                name=name,
                module=module,
                operator=info["layerType"],
                precision=_NAMES.get(precision, precision),
                pair_sum=next((sums[one] for one in origins.split(",") if one in sums), None) if narrow else None,
            )
        )
    return found[::-1]


def _pair_sums(model: Any) -> dict[str, int]:
    """The largest sum of two adjacent products (`rounding.largest_pair`) by name of each product with int8 weights."""
    sums = {}
    for op in model.get_ordered_ops():
        if op.get_type_name() in ("Convolution", "GroupConvolution", "MatMul"):
            weight = op.input_value(1).get_node()
            while weight.get_type_name() in ("Multiply", "Subtract", "Convert"):
                weight = weight.input_value(0).get_node()
            if weight.get_type_name() == "Constant" and weight.get_element_type().get_type_name() == "i8":
                whole = weight.data
                if op.get_type_name() == "GroupConvolution":  # (groups, out, in, …)
                    whole = whole.reshape(-1, *whole.shape[2:])
                elif op.get_type_name() == "MatMul":  # (…, in, out), or (…, out, in)
                    rows = whole if op.get_attributes()["transpose_b"] else np.swapaxes(whole, -1, -2)
                    whole = rows.reshape(-1, rows.shape[-1])
                sums[op.get_friendly_name()] = largest_pair(whole, 0)
    return sums


@contextmanager
def blocks(artifact: Artifact, options: OpenVinoOptions) -> Iterator[Blocks]:
    """The IR with every block's output as an output of its own."""
    names: tuple[str, ...] = ()

    def cut_open(model: Any) -> Any:
        nonlocal names
        import openvino as ov

        operators = {op.get_friendly_name(): op for op in model.get_ordered_ops() if op.get_type_name() != "Constant"}
        ends = last_operators(operators)
        names = tuple(ends)
        return ov.Model([operators[name].output(0) for name in ends.values()], model.get_parameters(), "blocks")

    compiled, device, arithmetic = _compile(artifact, options, cut_open)
    opened = OpenVinoSession(compiled, artifact.sidecar.preprocessing, device, arithmetic, 1)
    yield Blocks(names, opened)


@contextmanager
def peak(artifact: Artifact, options: OpenVinoOptions, known: str = "") -> Iterator[Product]:
    """The fastest product of OpenVINO's, or the `known` one, each compiled as the artifact is."""

    @contextmanager
    def open_product(product: PeakProduct) -> Iterator[OpenVinoSession]:
        compiled = _compile(artifact, options, lambda _: peak_model(product, artifact.sidecar.precision))
        yield _session(*compiled, Preprocessing(), options)

    with fastest_product(open_product, artifact.sidecar.precision, known) as fastest:
        yield fastest


def form(precision: str, batch: int | None) -> str:
    """Nothing transposed: the plugin then keeps one layout from the stem to the head, fuses GELU and the residual
    into the convolutions and the norm's parts into each other, at every batch size and precision (`docs/forms.md`).
    """
    del precision, batch
    return "nchw"


def above_int8() -> str:
    """bf16 where the CPU has it."""
    import openvino as ov

    return "bf16" if "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "fp32"


# Pointwise and downsampling layers, 97 % of ConvNeXt-T, and the convolutions of UPerNet. Depthwise convolutions are no
# faster in int8 and cost accuracy; inside norms and on the residual Q and DQ cost both.
KINDS = frozenset({"pwconv1", "pwconv2", "downsampling", "decoder"})
PLACEMENT = Placement(kinds=KINDS, forms=("nchw", "conv", "linear"), exact_pairs=True)


RUNTIME = Runtime(
    name="openvino",
    options=OpenVinoOptions,
    probe=probe,
    open=session,
    distributions=("openvino",),
    modules=(__name__, "openvino"),
    devices={
        "cpu": "CPU",
        "gpu": "Intel GPU",
        "npu": "NPU",
        "auto": "device group",
        "multi": "device group",
        "hetero": "device group",
    },
    devices_here=devices_here,
    opens_onnx=True,
    layers=layers,
    blocks=blocks,
    peak=peak,
    serving=SERVING,
)

TARGET = Target(
    name="openvino",
    command="openvino",
    summary="→ OpenVINO IR.",
    description="Build an OpenVINO IR; the intermediate ONNX file is kept in the same folder.",
    examples=(
        "openvino --variant tiny --fp16",
        "openvino --weights my_convnext.safetensors --bf16",
        "openvino --int8 --calib my_images --data imagenet/val --max-drop 0.3",
    ),
    suffix=".xml",
    layout="files",
    precisions={
        "fp32": "Weights and arithmetic in fp32.",
        "fp16": "Half the size; statistics of norms stay in fp32, and CPUs compute in fp32.",
        "bf16": "Half the size, computed in bf16 where the device has it; statistics of norms stay in fp32.",
        "int8": "8-bit integers in the layers that keep their accuracy, calibrated on the images of --calib.",
    },
    form=form,
    build=build,
    placements={"linear+conv": PLACEMENT},
    no_pictures=no_pictures,
    above_int8=above_int8,
)
