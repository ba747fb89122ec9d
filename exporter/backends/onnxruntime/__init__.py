"""ONNX Runtime: runs the ONNX graph as it is, on the CPU or through a provider that has to prove it is there."""

from __future__ import annotations

import itertools
import os
import platform
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

from exporter.artifact import Artifact
from exporter.artifact.sidecar import Preprocessing
from exporter.backends import (
    Array,
    Blocks,
    Bound,
    Layer,
    Options,
    Outputs,
    Runtime,
    Target,
    TargetOptions,
    _cuda,
    as_fp32,
    as_taken,
    require,
)
from exporter.backends._peak import PeakProduct, Product, fastest_product
from exporter.backends.onnxruntime.products import peak_model
from exporter.backends.onnxruntime.serving import SERVING
from exporter.errors import BadRequest, ExporterError, Unavailable, first_line, run_failed
from exporter.graph import files, half
from exporter.machine import cores, installed
from exporter.model.structure import last_operators
from exporter.quantize.placement import Placement, pair_sums

# ONNX Runtime reports its use to Microsoft from a thread that starts with the import. A process that is forked for
# timing lacks that thread, and can wait for it forever.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_INT8 = {
    "QGemm", "MatMulIntegerToFloat", "QLinearConv", "QLinearMatMul", "MatMulInteger", "ConvInteger",
    "DynamicQuantizeMatMul",
}  # fmt: skip
_PRECISIONS = {
    "FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16", "INT8": "int8", "UINT8": "uint8", "FLOAT8E4M3FN": "fp8",
}  # fmt: skip


def probe() -> str:
    """The version of ONNX Runtime.

    Raises: Unavailable when it is missing, or when its CPU and GPU builds overwrote each other.
    """
    if installed("onnxruntime") and installed("onnxruntime-gpu"):
        raise Unavailable(
            "onnxruntime and onnxruntime-gpu are both installed, and they fill the same folder; "
            "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime (or onnxruntime-gpu)"
        )
    return installed("onnxruntime-gpu") or require("onnxruntime", "cpu")


class OrtSession:
    """A loaded ONNX graph."""

    def __init__(self, session: Any, recipe: Preprocessing, device: str, precision: str, streams: int) -> None:
        self.session, self.recipe, self.device, self.streams = session, recipe, device, streams
        self.input = session.get_inputs()[0].name
        self.facts = {"provider": session.get_providers()[0], "device": device}
        # ONNX Runtime has no fp16 arithmetic on these CPUs: it casts to fp32 around every operator.
        is_x86 = device == "cpu" and platform.machine() in ("x86_64", "AMD64")
        self.facts["arithmetic"] = "fp32" if is_x86 and precision == "fp16" else precision

    def __call__(self, images: Array) -> Outputs:
        """Run: images (N, C, H, W) float32 to outputs (N, …) float32.

        Raises: RunFailed where ONNX Runtime fails, as without memory.
        """
        taken = as_taken(images, self.recipe)
        try:
            return as_fp32(self.session.run(None, {self.input: taken}))
        except Exception as error:  # its errors have no common type
            raise run_failed("ONNX Runtime", first_line(error)) from error

    def bind(self, batches: Sequence[Array]) -> Bound:
        """Input and outputs on the device, and one run over them."""
        bindings = [self._binding(images) for images in batches]
        turn, last = itertools.cycle(bindings), bindings[0]

        def run() -> None:
            nonlocal last
            last = next(turn)
            self.session.run_with_iobinding(last)
            last.synchronize_outputs()

        def outputs() -> Outputs:
            return as_fp32(last.copy_outputs_to_cpu())

        if self.streams == 1:
            return Bound(run, outputs)
        pool = ThreadPoolExecutor(self.streams)
        others = [self._binding(batches[index % len(batches)]) for index in range(self.streams - 1)]

        def run_all() -> None:
            waiting = [pool.submit(self.session.run_with_iobinding, other) for other in others]
            run()
            for one in waiting:
                one.result()

        return Bound(run_all, outputs, self.streams)

    def _binding(self, images: Array) -> Any:
        import onnxruntime as ort

        device = "cpu" if self.device == "cpu" else "cuda"
        binding = self.session.io_binding()
        taken = as_taken(images, self.recipe)
        binding.bind_ortvalue_input(self.input, ort.OrtValue.ortvalue_from_numpy(taken, device, 0))
        for output in self.session.get_outputs():
            binding.bind_output(output.name, device)
        return binding


def devices_here() -> str:
    """The execution providers of this build. Whether the CUDA provider loads is only known when a session is opened.

    Raises: Unavailable for a build or machine without CUDA.
    """
    probe()
    import onnxruntime as ort

    if PROVIDERS["cuda"] not in ort.get_available_providers():
        raise Unavailable(
            "cpu alone, for this build has no CUDA; on a GPU machine: pip uninstall -y onnxruntime && "
            "pip install onnxruntime-gpu"
        )
    return f"cpu, cuda ({_cuda.name()}; `verify --device cuda` proves it)"


@contextmanager
def session(artifact: Artifact, options: Options, optimized: Path | None = None) -> Iterator[OrtSession]:
    """Load an ONNX artifact on the device of `options` and on no other.

    Args:
        artifact: the ONNX file.
        options: the device and threads.
        optimized: a file to which the graph is written after ONNX Runtime's optimizations.

    Raises: Unavailable when the provider is not really in use; BadRequest for an unknown device.
    """
    probe()
    import onnxruntime as ort

    if options.device not in PROVIDERS:
        raise BadRequest(f"--device {options.device}: ONNX Runtime takes {', '.join(PROVIDERS)}")
    provider = PROVIDERS[options.device]
    if provider not in ort.get_available_providers():
        raise Unavailable(
            f"this ONNX Runtime has no {provider}; "
            "on a GPU machine: pip uninstall -y onnxruntime && pip install onnxruntime-gpu"
        )
    settings = ort.SessionOptions()
    settings.log_severity_level = 4  # what fails is raised, and said once
    if options.device != "cpu":  # else nodes the provider does not take would run on the CPU unseen
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    # Else its threads go on spinning after a run, and slow down the session that runs next on the same cores.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    if optimized:
        settings.optimized_model_filepath = str(optimized)
    streams = (options.threads or cores()) if options.hint == "throughput" and options.device == "cpu" else 1
    if streams > 1:  # one image a thread needs no waiting for each other
        settings.intra_op_num_threads = 1
    elif options.threads:
        settings.intra_op_num_threads = options.threads
    try:
        opened = ort.InferenceSession(artifact.path, settings, providers=[provider_of(options.device)])
    except Exception as error:
        if "fallback to CPU EP has been explicitly disabled" in str(error):
            raise Unavailable(_not_in_use(provider)) from error
        raise ExporterError(f"{artifact.path}: ONNX Runtime cannot load it: {first_line(error)}") from error
    opened.disable_fallback()
    if opened.get_providers()[0] != provider:
        raise Unavailable(_not_in_use(provider))
    yield OrtSession(opened, artifact.sidecar.preprocessing, options.device, artifact.sidecar.precision, streams)


def _not_in_use(provider: str) -> str:
    return (
        f"{provider} is not in use: CUDA, cuDNN or the driver does not load here; "
        "see `convnext-export doctor`, or use --device cpu"
    )


def provider_of(device: str) -> Any:
    """The provider of a device, as ONNX Runtime takes it: its name, with settings where the defaults do not fit."""
    if device == "cpu":
        return PROVIDERS[device]
    import torch  # noqa: F401  loads CUDA and cuDNN, which the provider does not find by itself

    # ONNX Runtime rounds the inputs of fp32 products to TF32 by default.
    return (PROVIDERS["cuda"], {"use_tf32": "0"}) if device == "cuda" else PROVIDERS[device]


def lower(artifact: Artifact, wanted: str, out: Path, keep: Sequence[str] = ()) -> Artifact:
    """The fp16 graph of an fp32 one; others are what they have to be already."""
    return half.lower(artifact, wanted, out, keep=keep) if wanted == "fp16" else artifact


def build(artifact: Artifact, wanted: str, out: Path, options: TargetOptions) -> Artifact:
    """ONNX Runtime loads the graph itself: nothing is left to build."""
    del wanted, out, options
    return artifact


def layers(artifact: Artifact, options: Options) -> list[Layer]:
    """The nodes of the graph; a node's precision is that of what it gives out, or int8 for a product that ONNX
    Runtime really computes in it here."""
    import onnx_ir as ir

    int8_sums = _int8_nodes(artifact, options) if artifact.sidecar.precision == "int8" else {}
    return [
        Layer(
            name=node.name or "",
            module=node.metadata_props.get("module", ""),
            operator=node.op_type,
            precision="int8" if node.name in int8_sums else _precision(node),
            pair_sum=int8_sums.get(node.name or ""),
        )
        for node in ir.load(artifact.path).graph
    ]


def _int8_nodes(artifact: Artifact, options: Options) -> dict[str, int | None]:
    """Integer products of the graph that ONNX Runtime optimized for this machine, by node name, with the largest sum of
    two adjacent products; None if the weights are not int8 constants."""
    import onnx_ir as ir

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        with session(artifact, options, path):
            optimized = ir.load(path)
        sums = pair_sums(optimized)
        names = [node.name or "" for node in optimized.graph if node.op_type in _INT8]
    return {name: sums.get(name) for name in names}


def _precision(node: Any) -> str:
    dtype = node.outputs[0].dtype
    return _PRECISIONS.get(dtype.name, dtype.name.lower()) if dtype is not None else "?"


@contextmanager
def blocks(artifact: Artifact, options: Options) -> Iterator[Blocks]:
    """A copy of the graph in a temporary folder, in which every block's output is one of the graph's."""
    import onnx_ir as ir

    model = ir.load(artifact.path)
    nodes = {node.name: node for node in model.graph if node.name}
    ends = last_operators(nodes)
    model.graph.outputs[:] = [nodes[name].outputs[0] for name in ends.values()]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / artifact.path.name
        files.save(model, path, {})
        with session(Artifact(path, artifact.sidecar), options) as opened:
            yield Blocks(tuple(ends), lambda images: tuple(np.asarray(x, np.float32) for x in opened(images)))


@contextmanager
def peak(artifact: Artifact, options: Options, known: str = "") -> Iterator[Product]:
    """The fastest product of ONNX Runtime's, or the `known` one; in fp16 on a GPU, for a CPU computes fp16 in fp32 or
    slower."""
    sidecar = replace(artifact.sidecar, preprocessing=Preprocessing())
    precision = artifact.sidecar.precision
    precision = "fp32" if precision == "fp16" and options.device == "cpu" else precision

    @contextmanager
    def open_product(product: PeakProduct) -> Iterator[OrtSession]:
        with ExitStack() as stack:
            with tempfile.TemporaryDirectory() as folder:  # only until it is loaded: a timing process may be killed
                path = Path(folder) / "peak.onnx"
                files.save(peak_model(product, precision), path, {})
                opened = stack.enter_context(session(Artifact(path, sidecar), options))
            yield opened

    with fastest_product(open_product, precision, known) as fastest:
        yield fastest


def form(precision: str, batch: int | None) -> str:
    """1×1 convolutions: ONNX Runtime keeps them in its own blocked layout, and adds bias and residual in them.

    From two images on the norm in parts is faster too, for between transposes it goes through memory more often
    (`docs/forms.md`).
    """
    if precision == "int8":
        return PLACEMENT.forms[0]
    return "nchw" if batch is not None and batch > 1 else "conv"


# A matrix product whose input and weights are rounded gives fp32 (MatMulIntegerToFloat); a convolution would have to
# round its output too.
PLACEMENT = Placement(kinds=frozenset({"pwconv1", "pwconv2"}), forms=("linear",), exact_pairs=True, on_arm=True)


RUNTIME = Runtime(
    name="onnxruntime",
    options=Options,
    probe=probe,
    open=session,
    distributions=("onnxruntime", "onnxruntime-gpu"),
    modules=(__name__, "onnxruntime"),
    devices={"cpu": "CPU", "cuda": "NVIDIA GPU", "tensorrt": "NVIDIA GPU"},
    devices_here=devices_here,
    opens_onnx=True,
    layers=layers,
    blocks=blocks,
    peak=peak,
    serving=SERVING,
)

TARGET = Target(
    name="onnxruntime",
    command="onnx",
    summary="PyTorch → ONNX, simplified; runs on ONNX Runtime.",
    description="Trace a ConvNeXt to ONNX, simplify it, and write it with a sidecar that describes it.",
    examples=(
        "onnx --variant base",
        "onnx --weights my_convnext.pth --imgsz dynamic --task features",
        "onnx --weights my_convnext.pth --imgsz 320,256 --opset 13",
        "onnx --int8 --calib calibration/mine.tsv --data imagenet/val",
    ),
    suffix=".onnx",
    precisions={
        "fp32": "Weights and arithmetic in fp32.",
        "fp16": "Half the size; statistics of norms stay in fp32, and CPUs compute in fp32.",
        "int8": "8-bit integers in the layers that keep their accuracy, calibrated on the images of --calib.",
    },
    form=form,
    build=build,
    placements={"linear": PLACEMENT},
    above_int8=lambda: "fp32",  # a CPU computes fp16 in it
    lower=lower,
)
