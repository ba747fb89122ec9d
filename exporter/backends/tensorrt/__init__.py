"""TensorRT 10, 11 and TensorRT-RTX, always strongly typed: the precision is in the graph, and the builder is told none.

A plan is the builder's bytes and nothing else, as trtexec and Triton read it; what it was built for is in the sidecar,
and what it is made of in `FILE.kernels.json` beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from exporter.artifact import Artifact, file_name, publish
from exporter.artifact.disk import check_space
from exporter.backends import Layer, Options, Runtime, Target, TargetOptions
from exporter.backends.tensorrt import builder, library, lint, plan, runtime
from exporter.backends.tensorrt.library import OS, TensorRtOptions
from exporter.backends.tensorrt.serving import SERVING
from exporter.errors import BadRequest, some
from exporter.graph import half
from exporter.model.structure import KINDS
from exporter.progress import note, step
from exporter.quantize.placement import Placement
from exporter.report import Finding

# Matrix products over the last axis, which the library fuses GELU, bias, residual and Q into kernels around: in int8 of
# the pointwise layers no kernel is added, and LayerNorm and GELU write int8 themselves.
FORM = "linear"
POINTWISE = frozenset({"pwconv1", "pwconv2"})
LINEAR = Placement(kinds=POINTWISE, forms=(FORM,), symmetric=True, rest="fp16")
PLACEMENTS = {
    "linear": LINEAR,
    "linear+conv": dataclasses.replace(LINEAR, kinds=POINTWISE | {"downsampling", "decoder"}),
    "all": dataclasses.replace(LINEAR, kinds=frozenset(KINDS)),
    "weights": dataclasses.replace(LINEAR, inputs=False),
}


def probe() -> str:
    """The version of the library that is used where none is named."""
    found = library.find()
    return f"{found.flavor} {found.version}"


def lower(artifact: Artifact, wanted: str, out: Path, keep: Sequence[str] = ()) -> Artifact:
    """The graph in fp16 or bf16, with statistics in fp32; others are what they have to be already."""
    form = artifact.sidecar.recipe["export"]["form"]
    return half.lower(artifact, wanted, out, form, keep) if wanted in half.HALVES else artifact


def check(wanted: str, batch: int | None, imgsz: object, options: TargetOptions) -> None:
    """Refuse what the flavor or the options cannot do, and profiles of a fixed batch or size.

    Raises: BadRequest for that; Unavailable when the flavor is not installed.
    """
    assert isinstance(options, TensorRtOptions)
    library.check(library.find(options.flavor), wanted, batch, options)
    library.check_sizes(imgsz, options)


def build(artifact: Artifact, wanted: str, out: Path, options: TargetOptions) -> Artifact:
    """ONNX to `FILE.plan`.

    Raises: BadRequest for Q and DQ where they must not be; Unavailable without a library or the space for a plan;
        ExporterError for a graph that it refuses.
    """
    import onnx_ir as ir

    assert isinstance(options, TensorRtOptions)
    trt = library.find(options.flavor)
    graph = ir.load(artifact.path)
    if found := lint.lint(graph):
        raise BadRequest(f"{artifact.path.name}: not suitable for TensorRT: {some(found)}")
    if trt.rtx and wanted == "int8" and any(node.op_type == "QuantizeLinear" for node in graph.graph):
        note("int8 activations on TensorRT-RTX are outside its support matrix; measure the engine on its GPU")
    macs = plan.macs_of(graph)
    del graph  # its weights are not needed twice
    shapes = builder.profiles(artifact.sidecar, options)
    is_dynamic = any(isinstance(side, str) for side in artifact.sidecar.inputs[0].shape[1:])
    sizes = builder.image_sizes(artifact.sidecar, options) if is_dynamic else ()
    check_space(out, artifact.sidecar.bytes)  # a plan is as large as the weights in it
    step(f"building a {trt.flavor} {trt.version} engine of {artifact.path.name}")
    engine, listing = builder.build(trt, artifact.path, artifact.sidecar, options)
    sidecar = artifact.sidecar.derived(
        tools={trt.flavor: trt.version},
        backend="tensorrt",
        precision=wanted,
        recipe={"target": msgspec.to_builtins(options)},
        target={
            **msgspec.to_builtins(options),
            "flavor": trt.flavor,
            "version": trt.version,
            "os": OS,
            "sizes": list(sizes),
            "profiles": [list(msgspec.to_builtins(profile)) for profile in shapes],
            "compute_capability": list(options.compute_capability) or library.default_capabilities(trt, wanted),
        },
    )

    def write(file: Path) -> None:
        file.write_bytes(engine)
        if kernels := plan.parse(listing, len(shapes), macs):
            file.with_name(f"{file.name}{plan.SUFFIX}").write_bytes(plan.encode(kernels))

    return publish(out / file_name(sidecar, TARGET.suffix), sidecar, write)


@contextmanager
def session(artifact: Artifact, options: Options) -> Iterator[runtime.PlanSession]:
    """Open a plan on the GPU, after what it was built for is found to be here.

    Raises: BadRequest for a plan of something else, and for a GPU other than the first; Unavailable without a library
        or a GPU.
    """
    number = options.device.partition(":")[2]
    if number not in ("", "0"):
        raise BadRequest(
            f"--device {options.device}: engines run on the first GPU; set CUDA_VISIBLE_DEVICES={number} and give cuda"
        )
    trt = library.find(artifact.sidecar.target.get("flavor"))
    runtime.check(artifact, trt)
    yield runtime.PlanSession(artifact, trt)


def layers(artifact: Artifact, options: Options) -> list[Layer]:
    """The kernels that the builder listed; no GPU is needed to see them."""
    del options
    return plan.layers(plan.read(artifact))


def findings(artifact: Artifact, baseline: Artifact | None) -> list[Finding]:
    """The plan report."""
    above = baseline.sidecar.precision if baseline else ""
    return plan.findings(
        plan.read(artifact), artifact.sidecar.precision, plan.read(baseline) if baseline else (), above
    )


def form(precision: str, batch: int | None) -> str:
    """Pointwise layers as matrix products, in every precision."""
    del precision, batch
    return FORM


# A plan shows no block's output, and a matrix product would need a plan of its own.
RUNTIME = Runtime(
    name="tensorrt",
    options=Options,
    probe=probe,
    open=session,
    distributions=tuple(library.MODULES),
    devices={"cuda": "NVIDIA GPU"},
    unable=runtime.unable,
    layers=layers,
    serving=SERVING,
)

TARGET = Target(
    name="tensorrt",
    command="trt",
    summary="→ TensorRT engine.",
    description=(
        "Build a TensorRT engine, and list its kernels; with TensorRT-RTX also on a machine without a GPU. "
        "The file suffix is .plan."
    ),
    examples=(
        "trt --fp16 --max-batch 32",
        "trt --int8 --calib my_images --data imagenet/val",
        "trt --flavor tensorrt-rtx --compute-capability 8.9 --compute-capability 12.0",
    ),
    suffix=".plan",
    layout="files",
    precisions={
        "fp32": "Weights and arithmetic in fp32.",
        "fp16": "Half the size, computed in fp16; statistics of norms stay in fp32.",
        "bf16": "Half the size, computed in bf16; statistics of norms stay in fp32.",
        "int8": "8-bit integers in the layers that keep their accuracy, calibrated on the images of --calib.",
        "fp8": "8-bit floats (E4M3), for compute capability 8.9 and above, calibrated on the images of --calib.",
    },
    options=TensorRtOptions,
    form=form,
    build=build,
    placements=PLACEMENTS,
    reproducible=False,
    no_pictures=lambda _: "a TensorRT engine has fixed image sizes",
    lower=lower,
    check=check,
    findings=findings,
)
