"""The fp32 ONNX graph of a job: the network in its form, traced, simplified and compared with PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from exporter import artifact as artifacts
from exporter.artifact import Artifact
from exporter.artifact.sidecar import PROBABILITIES, Content, Preprocessing, Sidecar
from exporter.backends import Array, Outputs
from exporter.build.resolve import Job
from exporter.data import images, inputs, synthetic
from exporter.errors import BadRequest, CheckFailed, first_line
from exporter.graph import files, opset, simplify, trace
from exporter.graph.trace import TraceOptions
from exporter.progress import note, step
from exporter.verify import run_batch

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch.nn import Module

    from exporter.model.convnext import ConvNeXt
    from exporter.model.reference import Reference

FP16_MAX = 65504
FP16_REACH = FP16_MAX / 4  # other images reach further than the few that are looked at
# Of an output's scale: 20 times fp32 rounding; GELU's tanh form, the smallest real mistake, is above.
TRACE_SHARE = 1e-4
FEW_PIXELS = 2  # whose two largest logits may be equal but for rounding
FP16_STEP = 2.0**-10  # between neighbouring fp16 numbers, as a share of them
# Root mean square, of pictures: a sum of pixels near a half is rounded to either level.
PICTURE_SHARE = 2e-3
FIRST_PROBE_SEED = 1003  # on these images the tanh form in one block of a small network differs by 2e-4


def export(job: Job) -> Artifact:
    """The fp32 ONNX artifact of a job: the one on disk if it has the same inputs, else a new one.

    Raises: CheckFailed when the traced graph differs from the network, with nothing written.
    """
    target = job.file("fp32")
    if job.reference is None and (present := _present(target, job.sidecar)) is not None:
        note(f"{target.name} is already there, from the same weights and options")
        job.checkpoint.state.clear()  # the weights are not needed any more
        return present
    network = write(job)
    artifact = artifacts.publish(target, job.sidecar, lambda file: graph_of(job, network, file)[1])
    _free(network.model)
    return artifact


def _present(target: Path, sidecar: Sidecar) -> Artifact | None:
    """The artifact at `target`, if it is whole and was built from the same facts."""
    if not artifacts.sidecar_path(target).exists():
        return None
    try:
        artifact = artifacts.load(target)
    except BadRequest as error:
        note(f"{error} – doing so")
        return None
    return artifact if _cache_key(artifact.sidecar) == _cache_key(sidecar) else None


def _cache_key(sidecar: Sidecar) -> dict[str, str]:
    """Cache key of a graph: every input that determines it, and the path of its weights."""
    facts = msgspec.structs.replace(sidecar, inputs=(), outputs=(), beyond_fp16=()).facts()
    return {**facts, "source": sidecar.weights.source}


def _free(model: Module) -> None:
    """Free the weights of a network: PyTorch's exporter keeps the last graph it wrote, which holds them."""
    import torch

    for parameter in model.parameters():
        parameter.data = torch.empty(0)


@dataclass(frozen=True)
class Network:
    """A network written in a form, a few images, and for each output what the plain form gives and its scale."""

    model: ConvNeXt
    probe: Array
    expected: Outputs
    scales: tuple[float, ...]


def write(job: Job) -> Network:
    """The network of a job in its form; the checkpoint's tensors move into it.

    Raises: CheckFailed when the network differs from the job's reference.
    """
    from exporter.model import forms

    checkpoint = job.checkpoint
    model = checkpoint.model(job.trace.spec)
    probe = _probe_images(job.trace, job.sidecar.preprocessing)
    expected = _expected(model, probe)
    scales = _scales(model, probe, expected, list(job.trace.outputs.values()))
    if job.reference is not None:
        expected = _compared(Network(model, probe, expected, scales), job.reference, job.trace)
    checkpoint.state.clear()  # else every weight that a form changes would be in memory twice
    forms.rewrite(model, job.form)
    return Network(model, probe, expected, scales)


def _compared(network: Network, reference: Reference, options: TraceOptions) -> Outputs:
    """The outputs of the reference for a few images, which those of the network must equal.

    Raises: CheckFailed with the first module that differs; BadRequest for a reference with other outputs.
    """
    import torch

    from exporter.model.reference import first_difference

    probe, expected = network.probe, network.expected
    step(f"comparing with {reference.name}")
    try:
        answers = _expected(reference.with_outputs(options.spec), probe)
    except BadRequest:
        raise
    except Exception as error:  # noqa: BLE001  (the user's own code)
        raise BadRequest(
            f"the reference {reference.name} raised {type(error).__name__} for images {probe.shape}: "
            f"{first_line(error)}"
        ) from None
    shapes = [[output.shape for output in outputs] for outputs in (answers, expected)]
    if shapes[0] != shapes[1]:
        task = ",".join(options.spec.tasks)
        every = "; let it return the map of every stage" if "features" in options.spec.tasks else ""
        raise BadRequest(f"the reference {reference.name} returns {shapes[0]}, task {task} has {shapes[1]}{every}")
    shares = _shares(options, answers, expected, network.scales)
    if not max(shares) <= TRACE_SHARE:
        where = first_difference(network.model, reference, torch.from_numpy(probe), TRACE_SHARE)
        where = f"the first difference: {where}" if where else "all modules agree, only the outputs differ"
        raise CheckFailed(
            f"the network is not the reference {reference.name}: its outputs differ by {max(shares):.2g} of their "
            f"scale; {where}; no artifact was written"
        )
    step(f"equal to {reference.name}: outputs differ by at most {max(shares):.2g} of their scale")
    return answers


def _shares(
    options: TraceOptions,
    expected: Outputs,
    outputs: Outputs,
    scales: Sequence[float],
    limit: float = TRACE_SHARE,
    half_outputs: bool = False,
) -> list[float]:
    """The largest difference of each output as a share of its scale; of pictures the root mean square. For numbers of
    classes it is infinite where one differs whose probability is further than the limit from that of its neighbours;
    the last of five may have an unknown neighbour. For labels of pixels it is the share of other labels, not
    counting `FEW_PIXELS`. Of outputs in fp16 the step to the next fp16 number is subtracted from each difference."""
    shares = []
    for index, holds in enumerate(options.outputs.values()):
        difference = np.abs(expected[index].astype(np.float64) - outputs[index])
        if half_outputs and holds not in ("classes", "labels"):
            difference = np.maximum(difference - FP16_STEP * np.abs(expected[index]), 0)
        if holds == "classes":
            gaps = np.abs(np.diff(expected[index + 1], axis=1)) / scales[index + 1] > limit
            clear = np.pad(gaps, ((0, 0), (1, 0)), constant_values=True) & np.pad(gaps, ((0, 0), (0, 1)))
            shares.append(float("inf") if (difference[clear] > 0).any() else 0.0)
        elif holds == "labels":
            shares.append(max(0, int((difference > 0).sum()) - FEW_PIXELS) / difference.size)
        else:
            size = np.sqrt(np.square(difference).mean()) if options.picture else difference.max()
            shares.append(float(size / scales[index]))
    return shares


def _scales(model: Module, probe: Array, expected: Outputs, contents: Sequence[Content]) -> tuple[float, ...]:
    """What differences of each output are compared with: its standard deviation, of probabilities their root mean
    square; of a head with one output, if larger, the size of the products that its linear layer adds up, √Σ(w·x)².

    Such a head may give nearly the same value for all images, or the bias may cancel the sum; rounding is in proportion
    to the products then.
    """
    from torch import nn

    sizes: dict[int, float] = {}

    def see(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        assert isinstance(module, nn.Linear)
        products = inputs[0].square() @ module.weight.square().T
        products = products if module.bias is None else products + module.bias.square()
        if output.shape[-1] == 1:
            sizes[output.data_ptr()] = float(products.max().sqrt())

    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_hook(see) for module in linear[-len(expected) :]]
    try:
        outputs = _expected(model, probe)
    finally:
        for handle in handles:
            handle.remove()
    spreads = [
        float(np.sqrt(np.square(output, dtype=np.float64).mean()) if holds in PROBABILITIES else output.std())
        for output, holds in zip(outputs, contents, strict=True)
    ]
    added = [sizes.get(output.ctypes.data, 0.0) for output in outputs]
    return tuple(max(spread, size) or 1.0 for spread, size in zip(spreads, added, strict=True))


def graph_of(job: Job, network: Network, file: Path) -> tuple[ir.Model, Sidecar]:
    """The graph of a network, simplified, written to a file and compared with the network.

    Returns: the graph, and the sidecar with its inputs and outputs.

    Raises: CheckFailed when the graph differs from the network by more than `TRACE_SHARE`.
    """
    step(f"tracing to ONNX in the form {job.form}")
    wanted = job.recipe.export
    graph = opset.convert(_traced(network, job.trace, job.sidecar.preprocessing), wanted.opset)
    inputs, outputs = files.signature(graph)
    outputs = tuple(msgspec.structs.replace(tensor, holds=job.trace.outputs[tensor.name]) for tensor in outputs)
    sidecar = msgspec.structs.replace(job.sidecar, inputs=inputs, outputs=outputs, beyond_fp16=_beyond_fp16(network))
    candidate, reason = graph, ""
    if wanted.simplify:
        step("simplifying with onnxsim")
        candidate, reason = simplify.simplify(graph)
    graph.ir_version = candidate.ir_version = wanted.ir_version or opset.least_ir_version(wanted.opset)
    files.save(candidate, file, sidecar.facts())
    difference = _difference(job, file, sidecar, network)
    if difference and candidate is not graph:
        candidate, reason = graph, difference
        files.save(graph, file, sidecar.facts())
        difference = _difference(job, file, sidecar, network)
    if difference:
        raise CheckFailed(f"{file.name}: the traced graph is not the model: {difference}; nothing was written")
    if reason:
        note(f"onnxsim: {reason}; the graph stays as it was")
    return candidate, sidecar


def _beyond_fp16(network: Network) -> tuple[str, ...]:
    """The modules whose inputs or outputs come near the end of fp16's range on the few images."""
    import torch

    names: dict[str, None] = {}

    def see(name: str, module: Module, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = (*inputs, *(output if isinstance(output, tuple) else (output,)))
        if any(float(tensor.abs().max()) > FP16_REACH for tensor in tensors if isinstance(tensor, torch.Tensor)):
            names[name] = None

    handles = [module.register_forward_hook(partial(see, name)) for name, module in network.model.named_modules()]
    try:
        with torch.inference_mode():
            network.model(torch.from_numpy(network.probe))
    finally:
        for handle in handles:
            handle.remove()
    return tuple(names)


def _traced(network: Network, options: TraceOptions, preprocessing: Preprocessing) -> ir.Model:
    """The graph, whose input and types are the artifact's; those of the network itself stay normalized and fp32."""
    from exporter.model import forms

    change_back = forms.take_input(network.model, preprocessing)
    try:
        network.model.half_outputs = options.half_outputs
        return trace.trace(network.model, options)
    finally:
        change_back()
        network.model.half_outputs = False


def _probe_images(options: TraceOptions, preprocessing: Preprocessing) -> Array:
    """A few images (N, C, H, W); where axes are dynamic, N, H and W differ from those of the trace."""
    if pictures := _probe_pictures(preprocessing):
        return np.concatenate([images.preprocess_pictures(picture, preprocessing) for picture in pictures])
    resized = preprocessing if options.imgsz else preprocessing.at((96, 131) if options.has_any_size else 96)
    count = min(3, options.batch or 3)
    pixels = [synthetic.dead_leaves(resized.size, FIRST_PROBE_SEED + i, resized.channels) for i in range(count)]
    return inputs.rounded(np.stack([images.normalise(one, resized) for one in pixels]), preprocessing)


def _probe_pictures(preprocessing: Preprocessing) -> list[NDArray[Any]]:
    """A few pictures (1, H, W, C), for an artifact that takes them: smaller and larger than they are resized to."""
    if preprocessing.input != "image":
        return []
    sizes = synthetic.PICTURES[:3]
    return [synthetic.dead_leaves(size, FIRST_PROBE_SEED, preprocessing.channels)[None] for size in sizes]


def _expected(model: Module, probe: Array) -> Outputs:
    """The outputs of PyTorch for these images."""
    import torch

    with torch.inference_mode():
        outputs = model(torch.from_numpy(probe))
    return tuple(output.numpy() for output in (outputs if isinstance(outputs, tuple) else (outputs,)))


def _difference(job: Job, file: Path, sidecar: Sidecar, network: Network) -> str:
    """How the graph in a file differs from the network, or "" where it does not."""
    checker, pictures = job.checker, _probe_pictures(sidecar.preprocessing)
    with checker.open(Artifact(file, sidecar), checker.options()) as session:
        batches = [run_batch(session, images, sidecar.batch) for images in pictures or [network.probe]]
    outputs = tuple(np.concatenate(parts) for parts in zip(*batches, strict=True))
    for tensor, a, b in zip(sidecar.outputs, network.expected, outputs, strict=True):
        if a.shape != b.shape:
            return f"{tensor.name} is {b.shape}, in PyTorch {a.shape}"
    for tensor, a in zip(sidecar.outputs, network.expected, strict=True):
        if tensor.dtype == "float16" and float(np.abs(a).max()) > FP16_MAX:
            raise BadRequest(
                f"--io fp16: {tensor.name} reaches {np.abs(a).max():.3g}, and fp16 holds 65,504; leave --io fp16 out"
            )
    limit = PICTURE_SHARE if pictures else TRACE_SHARE
    shares = _shares(job.trace, network.expected, outputs, network.scales, limit, job.trace.half_outputs)
    for tensor, share in zip(sidecar.outputs, shares, strict=True):
        if not share <= limit:
            return f"{tensor.name} differs by {share:.2g} of its scale"
    return ""
