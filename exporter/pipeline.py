"""The order of the steps: checkpoint → graph → backend → checks → report."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from exporter import artifact as artifacts
from exporter import backends, checks, discover, tuning
from exporter.artifact import Artifact, Preprocessing, Sidecar
from exporter.backends import Array, Outputs, Session
from exporter.checks._blocks import block_errors
from exporter.data import images, synthetic
from exporter.data.samples import Samples, open_samples
from exporter.errors import BadRequest, CheckFailed, Unavailable, nearest
from exporter.graph import files, simplify, trace
from exporter.graph.trace import TraceOptions
from exporter.measure import machine
from exporter.model import weights
from exporter.model.variants import count_macs
from exporter.model.weights import Checkpoint
from exporter.progress import note, step, track
from exporter.recipe import Recipe
from exporter.report import Finding, Report, judged

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch.nn import Module

    from exporter.model.convnext import ConvNeXt, Features

TRACE_SHARE = 1e-4  # of the spread: 20 times fp32 rounding; GELU's tanh form, the smallest real mistake, is above
BATCH = 16
MAX_UNREADABLE_PCT = 10


def build(recipe: Recipe, out: Path) -> Artifact:
    """Everything from the weights to what the backend loads.

    Raises: ExporterError, with nothing changed on disk.
    """
    backend = backends.get(recipe.backend)
    if recipe.precision == "int8" and backend.placement is not None:
        raise BadRequest("int8 needs calibration and a budget: it is built by exporter.int8")
    if recipe.precision not in backend.precisions:
        others = [
            name for name in discover.names("exporter.backends") if recipe.precision in backends.get(name).precisions
        ]
        hint = f"{' and '.join(others)} can" if others else nearest(recipe.precision, backend.precisions)
        raise BadRequest(f"{recipe.backend} cannot run {recipe.precision}; {hint}")
    backend.probe()
    form = tuning.fastest(recipe, build) if recipe.form == "auto" else _form(recipe)
    recipe = msgspec.structs.replace(recipe, form=form)
    graph = export(recipe, out)
    if recipe.precision != "fp32":
        step(f"{recipe.precision} for {recipe.backend}")
    lowered = backend.lower(graph, recipe.precision, out)
    return backend.build(lowered, recipe.precision, out)


def _form(recipe: Recipe) -> str:
    """The form that was asked for, or the one that the backend runs best."""
    batch = recipe.batch if isinstance(recipe.batch, int) else None
    return recipe.form or backends.get(recipe.backend).form(recipe.precision, batch)


def export(recipe: Recipe, out: Path) -> Artifact:
    """The fp32 ONNX artifact of a recipe: the one on disk if it is still that, else a new one.

    What is but a step on the way to another backend's file has its form in its name.

    Raises: BadRequest for a recipe, weights or folder that cannot be used; Unavailable when no runtime is here to
        check the graph with; CheckFailed when the graph is not the model.
    """
    form = _form(recipe)
    checkpoint, options, sidecar = read(msgspec.structs.replace(recipe, form=form), out)
    target = out / artifacts.file_name(sidecar, ".onnx", form if recipe.backend != "onnxruntime" else "")
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
    options = recipe.trace_options(checkpoint.preprocessing.size)
    if options.task == "features" and checkpoint.variant.architecture.isotropic:
        raise BadRequest(f"--task features: {checkpoint.variant.name} has one stage, not four; use --task classify")
    return checkpoint, options, _sidecar(recipe, checkpoint, options, out)


def _sidecar(recipe: Recipe, checkpoint: Checkpoint, options: TraceOptions, out: Path) -> Sidecar:
    recipe = msgspec.structs.replace(recipe, backend="onnxruntime", precision="fp32")
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
    """What decides what a graph is: every fact but its own shapes and the words that named its weights."""
    words = {key: word for key, word in sidecar.recipe.items() if key not in ("variant", "weights", "labels")}
    return msgspec.structs.replace(sidecar, inputs=(), outputs=(), recipe=words).facts()


def _trace(checkpoint: Checkpoint, options: TraceOptions, sidecar: Sidecar, target: Path) -> Artifact:
    network = write(checkpoint, options, sidecar)
    with artifacts.staging(target) as folder:
        _, sidecar = graph_of(network, options, sidecar, folder / target.name)
        artifacts.seal(folder, target.name, sidecar)
    return artifacts.load(target)


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
    sidecar = msgspec.structs.replace(sidecar, inputs=inputs, outputs=outputs)
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
        got = _run(session, probe, sidecar.inputs[0].shape[0])
    for tensor, a, b in zip(sidecar.outputs, expected, got, strict=True):
        if a.shape != b.shape:
            return f"{tensor.name} is {b.shape}, in PyTorch {a.shape}"
        share = float(np.abs(a - b).max() / (a.std() or np.abs(a).max() or 1))
        if not share <= TRACE_SHARE:
            return f"{tensor.name} differs by {share:.2g} of its spread"
    return ""


class VerifyOptions(checks.Options, frozen=True):
    """What `verify` can be told. `data` as in `open_samples`; `weights` says where the checkpoint lies now; `blocks`
    compares the output of every block too, on the first batch."""

    data: str = "synthetic"
    most: int | None = None
    weights: str | None = None
    device: str = "cpu"
    threads: int | None = None
    blocks: bool = False


class Remembered:
    """Eager PyTorch that runs once over the images, and gives the same answers to who looks at these again."""

    def __init__(self, session: Session) -> None:
        self.session, self.facts = session, session.facts
        self.answers: list[Outputs] = []
        self.turn = 0

    def __call__(self, images: Array) -> Outputs:
        """Run, or remember: images (N, 3, H, W) to outputs (N, …)."""
        if self.turn == len(self.answers):
            self.answers.append(self.session(images))
        self.turn += 1
        return self.answers[self.turn - 1]

    def bind(self, batches: Sequence[Array]) -> backends.Bound:
        """As the session does: nothing is remembered."""
        return self.session.bind(batches)

    def again(self) -> None:
        """The first batch is next."""
        self.turn = 0


def verify(
    artifact: Artifact, options: VerifyOptions, samples: Samples | None = None, reference: Session | None = None
) -> Report:
    """Hold an artifact against eager PyTorch on the same images.

    Args:
        artifact: what to verify.
        options: the data, the limits, where the weights are now.
        samples: the images, when they are already open.
        reference: eager PyTorch, when it is.

    Raises: BadRequest for data or weights that cannot be used; Unavailable when the device or weights are missing.
    """
    checks.check_options(options)
    sidecar = artifact.sidecar
    backend, eager = backends.get(sidecar.backend), backends.get("eager")
    samples = samples or open_samples(
        options.data, sidecar.preprocessing, sidecar.labels, sidecar.weights.num_classes, options.most
    )
    if options.max_drop is not None and not (samples.labelled and sidecar.task == "classify"):
        raise BadRequest(f"--max-drop: {options.data} has no labels to measure a drop on; give labelled --data")
    told = backend.options(device=options.device, threads=options.threads)
    layers = backend.layers(artifact, told)
    meters = checks.start_all(options, checks.Subject(artifact, layers))
    step(f"verifying {artifact.path.name} on {samples.total} images of {options.data}")
    eager_told = eager.options(threads=options.threads, weights=options.weights)  # type: ignore[call-arg]
    held = nullcontext(reference) if reference else eager.session(artifact, eager_told)
    with held as original, backend.session(artifact, told) as candidate:
        fixed = sidecar.inputs[0].shape[0]
        size = fixed if isinstance(fixed, int) else BATCH
        seen = 0
        for batch in track(samples.batches(size), samples.total, "images", lambda batch: len(batch.names)):
            seen += len(batch.names)
            both = [_run(session, batch.images, fixed) for session in (original, candidate)]
            for meter in meters:
                meter.see(checks.Seen(batch.labels, *both))
        facts = candidate.facts
    if not seen:
        raise BadRequest(f"{options.data}: none of its {samples.total} images can be read ({samples.skipped[0]})")
    findings = [finding for meter in meters for finding in meter.findings()]
    findings += _data_findings(samples.skipped, seen, options.data)
    if options.blocks:
        step("comparing block by block")
        images_seen = next(iter(samples.batches(fixed if isinstance(fixed, int) else 2))).images
        with eager.blocks(artifact, eager_told) as expected, backend.blocks(artifact, told) as given:
            findings += block_errors(expected, given, layers, images_seen)
    return Report(
        passed=all(finding.passed for finding in findings),
        recipe={**sidecar.recipe, "verify": msgspec.to_builtins(options)},
        artifact=artifact.to_dict(),
        environment={**machine.environment(), "session": facts},
        findings=tuple(findings),
    )


def _run(session: Session, pixels: Array, fixed: int | str) -> Outputs:
    """One batch; for an artifact of a fixed batch the last one is filled up and cut again."""
    count = len(pixels)
    if isinstance(fixed, int) and count < fixed:
        pixels = np.concatenate([pixels, np.repeat(pixels[-1:], fixed - count, axis=0)])
    return tuple(output[:count] for output in session(pixels))


def _data_findings(skipped: list[str], seen: int, source: str) -> list[Finding]:
    """How many images were measured, and how many could not be read, by name; too many of these is a failure."""
    detail = f"{seen} of {source}"
    if source == "synthetic":
        detail += " images (dead leaves): parity is measured, accuracy needs --data"
    found = [Finding(check="data", metric="images", value=seen, unit="images", detail=detail)]
    if skipped:
        shown = "; ".join(skipped[:20]) + (f"; and {len(skipped) - 20} more" if len(skipped) > 20 else "")
        share = 100 * len(skipped) / (seen + len(skipped))
        unreadable = Finding(
            check="data", metric="unreadable", value=share, unit="%", detail=f"{len(skipped)}: {shown}"
        )
        found.append(judged(unreadable, MAX_UNREADABLE_PCT, "low"))
    return found


def record_quality(artifact: Artifact, report: Report) -> None:
    """Write what a report found into the artifact's sidecar."""
    metrics = ("images", "cosine", "max_abs", "top1_agreement", "top1_eager", "top1", "top1_drop")
    values = {metric: report.value(metric) for metric in metrics}
    known = {metric: float(value) for metric, value in values.items() if value is not None}
    data = str(report.recipe["verify"]["data"])
    artifacts.update_quality(artifact, {"data": data, "passed": "yes" if report.passed else "no", **known})
