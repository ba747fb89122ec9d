"""TensorRT 10, 11 and TensorRT-RTX, always strongly typed: the precision is in the graph, and the builder is told none.

A plan is the builder's bytes and nothing else, as trtexec and Triton read it; what it was built for is in the sidecar,
and what it is made of in `FILE.kernels.json` beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
from msgspec.structs import replace

from exporter.artifact import Artifact, file_name, load, seal, staging
from exporter.artifact.disk import check_space
from exporter.backends import Backend, Blocks, Layer, Options, Product, Target
from exporter.backends.tensorrt import builder, library, lint, plan, runtime
from exporter.backends.tensorrt.library import OS, TensorRtTarget
from exporter.errors import BadRequest, Unavailable, some
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
    "linear+conv": dataclasses.replace(LINEAR, kinds=POINTWISE | {"downsampling"}),
    "all": dataclasses.replace(LINEAR, kinds=frozenset(KINDS)),
    "weights": dataclasses.replace(LINEAR, inputs=False),
}


def probe() -> str:
    """The version of the library that is used where none is named."""
    found = library.find()
    return f"{found.flavor} {found.version}"


def lower(artifact: Artifact, wanted: str, out: Path) -> Artifact:
    """The graph in fp16 or bf16, with statistics in fp32; others are what they have to be already."""
    return half.lower(artifact, wanted, out, FORM) if wanted in half.HALVES else artifact


def check(wanted: str, batch: int | None, target: Target) -> None:
    """Refuse what the flavor or the target cannot do, and profiles of a fixed batch.

    Raises: BadRequest for that; Unavailable when the flavor is not installed.
    """
    assert isinstance(target, TensorRtTarget)
    library.check(library.find(target.flavor), wanted, batch, target)


def build(artifact: Artifact, wanted: str, out: Path, target: Target) -> Artifact:
    """ONNX to `FILE.plan`.

    Raises: BadRequest for Q and DQ where they must not be; Unavailable without a library or the space for a plan;
        ExporterError for a graph that it refuses.
    """
    import onnx_ir as ir

    assert isinstance(target, TensorRtTarget)
    trt = library.find(target.flavor)
    graph = ir.load(artifact.path)
    if found := lint.lint(graph):
        raise BadRequest(f"{artifact.path.name}: TensorRT would not run it well: {some(found)}")
    if trt.rtx and wanted == "int8" and any(node.op_type == "QuantizeLinear" for node in graph.graph):
        note("int8 activations on TensorRT-RTX are outside its support matrix; measure the plan where it will run")
    macs = plan.macs_of(graph)
    del graph  # its weights are not needed twice
    shapes = builder.profiles(artifact.sidecar, target)
    check_space(out, artifact.sidecar.bytes)  # a plan is as large as the weights in it
    step(f"building a {trt.flavor} {trt.version} plan of {artifact.path.name}")
    made, listing = builder.build(trt, artifact.path, artifact.sidecar, target)
    told = {
        **msgspec.to_builtins(target),
        "flavor": trt.flavor,
        "version": trt.version,
        "os": OS,
        "profiles": [list(msgspec.to_builtins(profile)) for profile in shapes],
        "compute_capability": list(target.compute_capability) or _default_capabilities(trt),
    }
    sidecar = replace(
        artifact.sidecar,
        backend="tensorrt",
        precision=wanted,
        parents=(artifact.sidecar.sha256,),
        versions={**artifact.sidecar.versions, trt.flavor: trt.version},
        recipe={
            **artifact.sidecar.recipe, "backend": "tensorrt", "precision": wanted, "target": msgspec.to_builtins(target)
        },
        target=told,
        quality={},
    )  # fmt: skip
    place = out / file_name(sidecar, ".plan")
    with staging(place) as folder:
        (folder / place.name).write_bytes(made)
        if kernels := plan.parse(listing, len(shapes), macs):
            (folder / f"{place.name}{plan.SUFFIX}").write_bytes(plan.encode(kernels))
        seal(folder, place.name, sidecar)
    return load(place)


def _default_capabilities(trt: library.Library) -> list[str]:
    """What a plan runs on when nothing was asked for: TensorRT-RTX leaves Turing out; TensorRT takes the GPU here."""
    if trt.rtx:
        return [capability for capability in trt.capabilities() if capability != "7.5"]
    import torch

    return ["{}.{}".format(*torch.cuda.get_device_capability())] if torch.cuda.is_available() else []


@contextmanager
def session(artifact: Artifact, options: Options) -> Iterator[runtime.PlanSession]:
    """Open a plan on the GPU, after what it was built for is found to be here.

    Raises: BadRequest for a plan of something else; Unavailable without a library or a GPU.
    """
    del options
    trt = library.find(artifact.sidecar.target.get("flavor"))
    runtime.check(artifact, trt)
    yield runtime.PlanSession(artifact, trt)


def layers(artifact: Artifact, options: Options) -> list[Layer]:
    """The kernels that the builder listed; no GPU is needed to see them."""
    del options
    return plan.layers(plan.read(artifact))


def findings(artifact: Artifact, rival: Artifact | None) -> list[Finding]:
    """The plan report."""
    above = rival.sidecar.precision if rival else ""
    return plan.findings(plan.read(artifact), artifact.sidecar.precision, plan.read(rival) if rival else (), above)


@contextmanager
def blocks(artifact: Artifact, options: Options) -> Iterator[Blocks]:
    """A plan cannot be cut open; the graph that it was built from can."""
    del options
    raise Unavailable(f"{artifact.path}: a plan shows no block's output; look at the ONNX that it was built from")
    yield


@contextmanager
def peak(artifact: Artifact, options: Options) -> Iterator[Product]:
    """Not known: the product would need a plan of its own."""
    del options
    raise Unavailable(f"{artifact.path}: the peak of this GPU is not measured")
    yield


def form(precision: str, batch: int | None) -> str:
    """Pointwise layers as matrix products, in every precision."""
    del precision, batch
    return FORM


BACKEND = Backend(
    name="tensorrt",
    precisions=frozenset({"fp32", "fp16", "bf16", "int8", "fp8"}),
    options=Options,
    probe=probe,
    lower=lower,
    build=build,
    session=session,
    layers=layers,
    blocks=blocks,
    peak=peak,
    form=form,
    placements=PLACEMENTS,
    above_int8=lambda: "fp16",
    target=TensorRtTarget,
    check=check,
    unable=runtime.unable,
    findings=findings,
    reproducible=False,
)
