"""The order of the steps: checkpoint → graph → backend → checks → report."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from exporter import artifact as artifacts
from exporter import backends, discover, machine
from exporter.artifact import Artifact
from exporter.artifact.sidecar import Preprocessing, Sidecar
from exporter.backends import Array, Outputs
from exporter.build import tune
from exporter.data import images, synthetic
from exporter.errors import BadRequest, CheckFailed, Unavailable, nearest
from exporter.graph import files, simplify, trace
from exporter.graph.trace import TraceOptions
from exporter.model import weights
from exporter.model.variants import count_macs
from exporter.model.weights import Checkpoint
from exporter.progress import note, step
from exporter.recipe import EIGHT_BITS, Recipe
from exporter.verify import VerifyOptions as VerifyOptions
from exporter.verify import record_quality as record_quality
from exporter.verify import run_batch
from exporter.verify import verify as verify

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch.nn import Module

    from exporter.model.convnext import ConvNeXt, Features

FP16_REACH = 65504 / 4  # other images reach further than the few that are looked at
TRACE_SHARE = 1e-4  # of the spread: 20 times fp32 rounding; GELU's tanh form, the smallest real mistake, is above


def build(recipe: Recipe, out: Path) -> Artifact:
    """Everything from the weights to what the backend loads.

    Raises: ExporterError, with nothing changed on disk.
    """
    backend = backends.get(recipe.backend)
    check_precision(recipe)
    if recipe.precision in EIGHT_BITS:
        raise BadRequest(f"{recipe.precision} needs calibration and a budget: it is built by exporter.build.int8")
    backend.probe()
    target = target_of(recipe)
    backend.check(recipe.precision, batch_of(recipe), target)
    form = tune.fastest(recipe, build) if recipe.form == "auto" else _form(recipe)
    recipe = msgspec.structs.replace(recipe, form=form)
    graph = export(recipe, out)
    if recipe.precision != "fp32":
        step(f"{recipe.precision} for {recipe.backend}")
    gc.collect()  # networks and graphs are circular: what is done with goes before the next is made
    lowered = backend.lower(graph, recipe.precision, out)
    gc.collect()
    return backend.build(lowered, recipe.precision, out, target)


def check_precision(recipe: Recipe) -> None:
    """Refuse a precision that the backend does not have.

    Raises: BadRequest.
    """
    known = backends.get(recipe.backend).precisions
    if recipe.precision not in known:
        others = [
            name for name in discover.names("exporter.backends") if recipe.precision in backends.get(name).precisions
        ]
        hint = f"{' and '.join(others)} can" if others else nearest(recipe.precision, known)
        raise BadRequest(f"{recipe.backend} cannot run {recipe.precision}; {hint}")


def target_of(recipe: Recipe) -> backends.Target:
    """What the backend of a recipe is told to build for.

    Raises: BadRequest for a word that it does not know.
    """
    try:
        return msgspec.convert(recipe.target, backends.get(recipe.backend).target)
    except msgspec.ValidationError as error:
        raise BadRequest(f"target of {recipe.backend}: {error}") from None


def form_in_name(recipe: Recipe) -> str:
    """The form, for the name of a graph that is but a step on the way to another backend's file; else ""."""
    return "" if recipe.backend == "onnxruntime" else str(recipe.form)


def _form(recipe: Recipe) -> str:
    """The form that was asked for, or the one that the backend runs best."""
    return recipe.form or backends.get(recipe.backend).form(recipe.precision, batch_of(recipe))


def batch_of(recipe: Recipe) -> int | None:
    """The batch size of a recipe, or None for any."""
    return recipe.batch if isinstance(recipe.batch, int) else None


def export(recipe: Recipe, out: Path) -> Artifact:
    """The fp32 ONNX artifact of a recipe: the one on disk if it is still that, else a new one.

    What is but a step on the way to another backend's file has its form in its name.

    Raises: BadRequest for a recipe, weights or folder that cannot be used; Unavailable when no runtime is here to
        check the graph with; CheckFailed when the graph is not the model.
    """
    recipe = msgspec.structs.replace(recipe, form=_form(recipe))
    checkpoint, options, sidecar = read(recipe, out)
    target = out / artifacts.file_name(sidecar, ".onnx", form_in_name(recipe))
    if (found := _still_there(target, sidecar)) is not None:
        note(f"{target.name} is already there, from the same weights and options")
        return found
    return _trace(checkpoint, options, sidecar, target)


def read(recipe: Recipe, out: Path) -> tuple[Checkpoint, TraceOptions, Sidecar]:
    """The weights of a recipe, how its graph is cut, and all that can be said of its fp32 graph beforehand.

    Raises: as `export` does, for a recipe or weights.
    """
    trace.check_options(recipe.trace_options(224))
    _checker()
    step(f"reading weights {recipe.weights}")
    checkpoint = weights.load(recipe.weights, recipe.variant, Path(recipe.labels) if recipe.labels else None)
    weights.tell_license(checkpoint.weights)
    options = recipe.trace_options(checkpoint.preprocessing.size)
    if options.task == "features" and checkpoint.variant.architecture.isotropic:
        raise BadRequest(f"--task features: {checkpoint.variant.name} has one stage, not four; use --task classify")
    return checkpoint, options, _sidecar(recipe, checkpoint, options, out)


def _sidecar(recipe: Recipe, checkpoint: Checkpoint, options: TraceOptions, out: Path) -> Sidecar:
    recipe = msgspec.structs.replace(recipe, backend="onnxruntime", precision="fp32", target={})
    preprocessing = checkpoint.preprocessing
    preprocessing = preprocessing.at(options.imgsz) if options.imgsz else preprocessing
    source = weights.relative(checkpoint.weights.source, out)
    classes = checkpoint.weights.num_classes if options.task == "classify" else 0
    return Sidecar(
        backend="onnxruntime",
        precision="fp32",
        variant=checkpoint.variant.name,
        task=options.task,
        weights=msgspec.structs.replace(checkpoint.weights, source=source),
        inputs=(),
        outputs=(),
        preprocessing=msgspec.structs.replace(preprocessing, input=recipe.input),
        macs=count_macs(checkpoint.variant.architecture, preprocessing.size, classes),
        labels=checkpoint.labels,
        versions=machine.versions(),
        recipe=msgspec.to_builtins(recipe),
    )


def _still_there(target: Path, sidecar: Sidecar) -> Artifact | None:
    """The artifact at `target`, if it is whole and was made from the same facts."""
    if not artifacts.sidecar_path(target).exists():
        return None
    try:
        found = artifacts.load(target)
    except BadRequest as error:
        note(f"{error} – doing so")
        return None
    return found if _made_from(found.sidecar) == _made_from(sidecar) else None


def _made_from(sidecar: Sidecar) -> dict[str, str]:
    """What decides what a graph is: every fact but what is seen of it; and where its weights lie, to be found again."""
    facts = msgspec.structs.replace(sidecar, inputs=(), outputs=(), beyond_fp16=()).facts()
    return {**facts, "source": sidecar.weights.source}


def _trace(checkpoint: Checkpoint, options: TraceOptions, sidecar: Sidecar, target: Path) -> Artifact:
    network = write(checkpoint, options, sidecar)
    with artifacts.staging(target) as folder:
        _, sidecar = graph_of(network, options, sidecar, folder / target.name)
        artifacts.seal(folder, target.name, sidecar)
    _let_go(network.model)
    return artifacts.load(target)


def _let_go(model: Module) -> None:
    """Free the weights of a network: PyTorch's exporter goes on holding the last graph that it wrote, and they are in
    it."""
    import torch

    for parameter in model.parameters():
        parameter.data = torch.empty(0)


@dataclass(frozen=True)
class Network:
    """A network written in a form, and what it gave for a few images before it was."""

    model: ConvNeXt | Features
    stride: int
    probe: Array
    expected: Outputs


def write(checkpoint: Checkpoint, options: TraceOptions, sidecar: Sidecar) -> Network:
    """The network of a checkpoint in the form that a sidecar says; the checkpoint lets go of its tensors."""
    from exporter.model import forms

    model = checkpoint.model(options.task)
    probe = _probe_images(options, sidecar.preprocessing)
    expected = _expected(model, probe)
    checkpoint.state.clear()  # else every weight that a form makes anew would be in memory twice
    forms.rewrite(model, sidecar.recipe["form"])
    return Network(model, checkpoint.variant.architecture.stride, probe, expected)


def graph_of(network: Network, options: TraceOptions, sidecar: Sidecar, file: Path) -> tuple[ir.Model, Sidecar]:
    """The graph of a network, simplified, written to a file and held against what the network gave.

    Returns: the graph, and the sidecar with its inputs and outputs.

    Raises: CheckFailed when it is not the same model.
    """
    step(f"tracing to ONNX in the form {sidecar.recipe['form']}")
    graph = _traced(network, options, sidecar.preprocessing)
    inputs, outputs = files.signature(graph)
    sidecar = msgspec.structs.replace(sidecar, inputs=inputs, outputs=outputs, beyond_fp16=_beyond_fp16(network))
    candidate, reason = graph, ""
    if sidecar.recipe["simplify"]:
        step("simplifying with onnxsim")
        candidate, reason = simplify.simplify(graph)
    files.save(candidate, file, sidecar.facts())
    difference = _difference(file, sidecar, network.probe, network.expected)
    if difference and candidate is not graph:
        candidate, reason = graph, difference
        files.save(graph, file, sidecar.facts())
        difference = _difference(file, sidecar, network.probe, network.expected)
    if difference:
        raise CheckFailed(f"{file.name}: the traced graph is not the model: {difference}; nothing was written")
    if reason:
        note(f"onnxsim: {reason}; the graph stays as it was")
    return candidate, sidecar


def _beyond_fp16(network: Network) -> tuple[str, ...]:
    """The modules that take or give activations which come near the end of fp16's range, on the few images."""
    import torch

    found: dict[str, None] = {}

    def see(name: str, module: Module, given: tuple[Any, ...], output: Any) -> None:
        tensors = (*given, *(output if isinstance(output, tuple) else (output,)))
        if any(float(tensor.abs().max()) > FP16_REACH for tensor in tensors if isinstance(tensor, torch.Tensor)):
            found[name] = None

    handles = [module.register_forward_hook(partial(see, name)) for name, module in network.model.named_modules()]
    try:
        with torch.inference_mode():
            network.model(torch.from_numpy(network.probe))
    finally:
        for handle in handles:
            handle.remove()
    return tuple(found)


def _traced(network: Network, options: TraceOptions, preprocessing: Preprocessing) -> ir.Model:
    """The graph, from the pixels that the artifact takes; the network itself goes on taking normalised ones."""
    from exporter.model import forms

    first = network.model.downsample_layers[0]
    try:
        forms.take_pixels(network.model, preprocessing)
        return trace.trace(network.model, options, network.stride)
    finally:
        network.model.downsample_layers[0] = first


def _probe_images(options: TraceOptions, preprocessing: Preprocessing) -> Array:
    """A few images for comparing, of other numbers than were traced with where axes are dynamic."""
    recipe = preprocessing if options.imgsz else preprocessing.at(96)
    count = min(3, options.batch or 3)
    return np.stack([images.normalise(synthetic.dead_leaves(recipe.size, 1000 + i), recipe) for i in range(count)])


def _expected(model: Module, probe: Array) -> Outputs:
    """What eager PyTorch gives for these images."""
    import torch

    with torch.inference_mode():
        outputs = model(torch.from_numpy(probe))
    return tuple(output.numpy() for output in (outputs if isinstance(outputs, tuple) else (outputs,)))


def _checker() -> backends.Backend[backends.Options]:
    """The runtime that a traced graph is checked with: the first of those that run ONNX and are installed.

    Raises: Unavailable when there is none.
    """
    missing = []
    for backend in map(backends.get, discover.names("exporter.backends")):
        try:
            if backend.opens_onnx:
                backend.probe()
                return backend
        except Unavailable as error:
            missing.append(str(error))
    raise Unavailable(f"nothing here to check the traced graph with: {'; or '.join(missing)}")


def _difference(file: Path, sidecar: Sidecar, probe: Array, expected: Outputs) -> str:
    """Why the graph in this file is not the model, or "" when it is."""
    backend = _checker()
    with backend.session(Artifact(file, sidecar), backend.options()) as session:
        got = run_batch(session, probe, sidecar.inputs[0].shape[0])
    for tensor, a, b in zip(sidecar.outputs, expected, got, strict=True):
        if a.shape != b.shape:
            return f"{tensor.name} is {b.shape}, in PyTorch {a.shape}"
        share = float(np.abs(a - b).max() / (a.std() or np.abs(a).max() or 1))
        if not share <= TRACE_SHARE:
            return f"{tensor.name} differs by {share:.2g} of its spread"
    return ""
