"""A recipe, validated once, and everything that its build needs, looked up once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec.structs import replace

from exporter import artifact as artifacts
from exporter import backends, machine, precision
from exporter.artifact.sidecar import OutputSpec, Preprocessing, Record, Sidecar, Size
from exporter.backends import Options, Runtime, Target, TargetOptions
from exporter.build.problems import (
    check_keep,
    find_problems,
    refuse_picture,
    refuse_quantization,
    scope_of,
)
from exporter.data import calibration, samples
from exporter.errors import BadRequest, Unavailable
from exporter.graph.trace import TraceOptions
from exporter.model import reference as references
from exporter.model import sources, variants, weights
from exporter.model.labels import read_labels
from exporter.model.reference import Reference
from exporter.model.weights import Checkpoint
from exporter.precision import Precision
from exporter.progress import note, step
from exporter.quantize.cpus import of_this_machine, placement_for
from exporter.quantize.placement import Placement
from exporter.recipe import TASKS, CpuClass, Export, Quantization, Recipe, file
from exporter.recipe.fields import problems
from exporter.recipe.strict import Marks


@dataclass(frozen=True)
class Job:
    """A valid recipe with everything that its build needs.

    recipe: what to build, with the backend's own name and the class of this machine's CPU in place of `this`.
    out: the folder for the artifact and its intermediate files.
    precision: limits and number format of the recipe's precision.
    target: builds the artifact; `options` are its options.
    runtime: opens the artifact.
    checker: runs the traced fp32 graph, to compare it with PyTorch.
    form: the form that the network is written in, or `auto`.
    scope, placement: which layers are quantized and where Q and DQ go; "" and None without quantization.
    reference: the model that the network is compared with; None for none.
    checkpoint: the weights. A network takes its tensors, so a job is built once.
    trace: options of the traced graph.
    sidecar: facts of the fp32 graph, without its inputs and outputs.
    """

    recipe: Recipe
    out: Path
    precision: Precision
    target: Target
    options: TargetOptions
    runtime: Runtime[Options]
    checker: Runtime[Options]
    form: str
    scope: str
    placement: Placement | None
    reference: Reference | None
    checkpoint: Checkpoint
    trace: TraceOptions
    sidecar: Sidecar

    def file(self, precision: str) -> Path:
        """The ONNX file of this job's graph at a precision; intermediate files carry the form in their name."""
        form = "" if self.target.name == backends.ONNX else self.form
        return self.out / artifacts.file_name(replace(self.sidecar, precision=precision), ".onnx", form)

    @property
    def files(self) -> list[Path]:
        """The artifact, and the intermediate ONNX files that are kept beside it. Builds of int8 and fp8 keep no fp32
        graph."""
        built = replace(self.sidecar, precision=self.precision.name)
        kept = (self.precision.name,) if self.precision.needs_calibration else ("fp32", self.precision.name)
        graphs = [self.file(name) for name in kept]
        return list(dict.fromkeys([*graphs, self.out / artifacts.file_name(built, self.target.suffix)]))

    @property
    def above_int8(self) -> str:
        """The next higher precision that int8 and fp8 have to beat; fp32 where that one cannot take pictures."""
        above = self.target.above_int8()
        return "fp32" if self.trace.picture and self.target.no_pictures(above) else above

    def in_form(self, form: str) -> Job:
        """The same job with the network written in another form."""
        macs = _macs(self.checkpoint, self.trace, self.sidecar.preprocessing.size, form)
        sidecar = replace(self.sidecar, macs=macs, recipe=_with_form(self.sidecar.recipe, form))
        return dataclasses.replace(self, form=form, sidecar=sidecar)


def read(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe's file and check it.

    Raises: BadRequest with every problem, each on a line of its own with line and column.
    """
    recipe, marks = file.read(path, overrides, target_options)
    if recipe is not None:
        recipe = _with_name_of_backend(recipe)
        find_problems(recipe, marks)
    marks.refuse()
    assert recipe is not None
    return recipe


def target_options(backend: str) -> type[Record]:
    """The record of a backend's target options.

    Raises: BadRequest for an unknown backend.
    """
    return backends.target(backends.name_of(backend)).options


def _with_name_of_backend(recipe: Recipe) -> Recipe:
    """The recipe with the name of its backend, where it has the name of the build command instead."""
    return msgspec.structs.replace(recipe, backend=backends.name_of(recipe.backend))


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors."""
    targets = [backends.target(name) for name in backends.targets()]
    precisions = {word for target in targets for word in target.precisions}
    options = {tuple(dict.fromkeys((target.name, target.command))): target.options for target in targets}
    return file.schema(options, precisions)


def check(recipe: Recipe) -> None:
    """Refuse a recipe that cannot be built; no weights or images are read.

    Raises: BadRequest with every problem.
    """
    recipe = _with_name_of_backend(recipe)
    marks = Marks("")
    for path, text in problems(recipe):
        marks.at(path, text)
    marks.refuse()
    find_problems(recipe, marks)
    marks.refuse()


def check_sources(recipe: Recipe) -> None:
    """Refuse weights, labels or images that do not exist; no tensor and no image is read.

    Raises: BadRequest.
    """
    model = recipe.model
    if model.weights == "hub":
        variant, repository = variants.resolve(model.variant or "tiny")
        if repository is None:
            sources.default_repository(variant)
    elif not sources.is_random(model.weights) and not model.weights.startswith("hf-hub:"):
        sources.from_disk(model.weights)
    if model.labels:
        read_labels(Path(model.labels))
    if recipe.quantization is not None:
        calibration.check_source(recipe.quantization.calib)
        if recipe.quantization.data is not None:
            samples.check_source(recipe.quantization.data)
    samples.check_source(recipe.checks.data)


def resolve(recipe: Recipe, out: Path, reference: Reference | None = None) -> Job:
    """Validate a recipe and look up everything that its build needs; the weights are read.

    Args:
        recipe: what to build.
        out: the folder to write to.
        reference: the model that the network is compared with; by default the one that the recipe names.

    Raises: BadRequest with every problem of the recipe, for weights that cannot be used, or where the folder has an
        artifact of other weights under the same name; Unavailable when a runtime or weights are missing here.
    """
    recipe = _with_name_of_backend(recipe)
    check(recipe)
    target, runtime = backends.target(recipe.backend), backends.runtime(recipe.backend)
    runtime.probe()
    options = msgspec.convert(recipe.target, target.options)
    if target.check is not None:
        target.check(recipe.precision, recipe.fixed_batch, recipe.export.imgsz, options)
    checker = _checker()
    scope = scope_of(recipe, target)
    placement = target.placements[scope] if scope else None
    if placement is not None and recipe.quantization is not None:
        recipe = _with_cpu(recipe, recipe.quantization)
        placement = placement_for(placement, cpu_of(recipe), target.name)
    own_form = placement.forms[0] if placement else target.form(recipe.precision, recipe.fixed_batch)
    step(f"reading weights {recipe.model.weights}")
    labels = Path(recipe.model.labels) if recipe.model.labels else None
    choices = weights.choices_of(msgspec.to_builtins(recipe.model))
    checkpoint = weights.load(recipe.model.weights, recipe.model.variant, labels, choices)
    weights.note_license(checkpoint.weights)
    checkpoint.check(_output_spec(recipe, checkpoint))
    checkpoint = _with_channels(checkpoint)
    check_keep(recipe, placement, checkpoint.variant.architecture, recipe.model.task or checkpoint.task)
    trace = _trace_options(recipe, checkpoint)
    refuse_quantization(recipe, trace.spec.tasks[0])
    if reference is None and recipe.model.reference is not None:
        step(f"loading the reference {recipe.model.reference}")
        reference = references.load(recipe.model.reference, checkpoint, checkpoint.weights.source, choices)
    job = Job(
        recipe=recipe,
        out=out,
        precision=precision.get(recipe.precision),
        target=target,
        options=options,
        runtime=runtime,
        checker=checker,
        form=recipe.export.form or own_form,
        scope=scope,
        placement=placement,
        reference=reference,
        checkpoint=checkpoint,
        trace=trace,
        sidecar=_sidecar(recipe, recipe.export.form or own_form, checkpoint, trace, out, reference),
    )
    for path in job.files:
        artifacts.refuse_other_weights(path, job.sidecar.weights)
    _note_assumed(job.sidecar)
    return job


def _note_assumed(sidecar: Sidecar) -> None:
    if assumed := sidecar.assumed_preprocessing:
        note(
            f"the weights do not state the preprocessing of training, so images are {assumed}; if training differed, "
            "give --resize, --crop-mode, --mean or --std"
        )


def cpu_of(recipe: Recipe) -> CpuClass:
    """The class of CPUs that a recipe quantizes for; "portable" without quantization."""
    return recipe.quantization.cpu if recipe.quantization is not None else "portable"


def _with_cpu(recipe: Recipe, quantization: Quantization) -> Recipe:
    """The recipe with the class of this machine in place of `this`, so that the artifact says what it was built for."""
    if quantization.cpu != "this":
        return recipe
    return replace(recipe, quantization=replace(quantization, cpu=of_this_machine()))


def _with_channels(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with a mean and deviation for each channel of its network, printed where they are derived."""
    stated, count = checkpoint.stated, checkpoint.variant.architecture.in_chans
    if count == stated.preprocessing.channels:
        return checkpoint
    derived = stated.preprocessing.of_channels(count)
    mean, std = f"{derived.mean[0]:.4g}", f"{derived.std[0]:.4g}"
    note(f"input channels: {count}; mean {mean} and std {std} for each are the averages of the known ones")
    return dataclasses.replace(checkpoint, stated=dataclasses.replace(stated, preprocessing=derived))


def _output_spec(recipe: Recipe, checkpoint: Checkpoint) -> OutputSpec:
    """The outputs of a recipe, in one order for all."""
    wanted = (recipe.model.task or checkpoint.task).split(",")
    tasks: Any = tuple(task for task in TASKS if task in wanted)
    return OutputSpec(tasks=tasks, answer=recipe.export.output, l2=recipe.export.l2)


def _trace_options(recipe: Recipe, checkpoint: Checkpoint) -> TraceOptions:
    arch, spec = checkpoint.variant.architecture, _output_spec(recipe, checkpoint)
    strides = arch.strides
    if arch.decoder and "segment" in spec.tasks:
        strides = strides[arch.decoder.levels[0] : arch.decoder.levels[-1] + 1]
    elif arch.pyramid and "pyramid" in spec.tasks:
        strides = arch.pyramid.strides(strides)
    size: Size | str = recipe.export.imgsz or checkpoint.stated.preprocessing.size
    return TraceOptions(
        spec=spec,
        strides=strides,
        heads=tuple(variants.head_layer(head)[0] for head in arch.heads),
        imgsz=None if isinstance(size, str) else size,
        batch=recipe.fixed_batch,
        dtype=_input_type(recipe.export),
        channels=checkpoint.stated.preprocessing.channels,
        channels_last=recipe.export.layout == "nhwc",
        half_outputs=recipe.export.io == "fp16",
        picture=recipe.export.input == "image",
    )


def _input_type(export: Export) -> Literal["float32", "float16", "uint8"]:
    if export.input in ("uint8", "image"):
        return "uint8"
    return "float16" if export.io == "fp16" else "float32"


def _of_artifact(preprocessing: Preprocessing, export: Export) -> Preprocessing:
    """The preprocessing with the input that the artifact takes.

    Raises: BadRequest for BGR of a network that does not take three channels.
    """
    color = preprocessing.color
    if export.color == "bgr":
        if preprocessing.channels != 3:
            raise BadRequest(
                f"--color bgr: the network takes {preprocessing.channels} channels; it is for 3, leave it out"
            )
        color = "BGR"
    if export.input == "image":
        refuse_picture(preprocessing)
    layout: Literal["NCHW", "NHWC"] = "NHWC" if export.layout == "nhwc" or export.input == "image" else "NCHW"
    dtype: Literal["float32", "float16"] = "float16" if _input_type(export) == "float16" else "float32"
    return replace(preprocessing, input=export.input, dtype=dtype, layout=layout, color=color)


def _sidecar(
    recipe: Recipe, form: str, checkpoint: Checkpoint, trace: TraceOptions, out: Path, reference: Reference | None
) -> Sidecar:
    """Facts of the fp32 graph that are known before it is traced."""
    preprocessing, origins = checkpoint.stated.resolve(recipe.preprocessing, trace.imgsz)
    if recipe.export.imgsz and trace.imgsz:
        origins["size"] = "--imgsz"  # also where it is the size that the weights state
    arch = checkpoint.variant.architecture
    source = weights.relative(checkpoint.weights.source, out)
    export = replace(recipe.export, keep=None)
    fp32 = replace(recipe, backend=backends.ONNX, precision="fp32", target={}, export=export)
    return Sidecar(
        backend=backends.ONNX,
        precision="fp32",
        variant=checkpoint.variant.name,
        task=",".join(trace.spec.tasks),
        weights=replace(checkpoint.weights, source=source),
        inputs=(),
        outputs=(),
        reference=reference.name if reference is not None else references.OURS,
        architecture=msgspec.to_builtins(arch),
        preprocessing=_of_artifact(preprocessing, recipe.export),
        macs=_macs(checkpoint, trace, preprocessing.size, form),
        labels=checkpoint.labels,
        origins=checkpoint.origins | origins,
        versions=backends.versions() | (machine.versions(["Pillow"]) if trace.picture else {}),
        recipe=_with_form(fp32.of_build(), form),
    )


def _macs(checkpoint: Checkpoint, trace: TraceOptions, size: Size, form: str) -> int:
    """Multiply-accumulates of one image in a form; `auto` counts as one of the fast forms."""
    classes = checkpoint.weights.num_classes if "classify" in trace.spec.tasks else 0
    arch = checkpoint.variant.architecture
    counted = arch if trace.has_any_size else replace(arch, decoder=None, pyramid=None)
    return variants.count_macs(counted, size, classes, is_split=form != "plain")


def _with_form(recipe: dict[str, object], form: str) -> dict[str, object]:
    export = recipe["export"]
    assert isinstance(export, dict)
    return {**recipe, "export": {**export, "form": form}}


def _checker() -> Runtime[Options]:
    """The runtime that checks a traced graph: the first that opens ONNX and is installed.

    Raises: Unavailable when there is none.
    """
    missing = []
    for runtime in map(backends.runtime, backends.runtimes()):
        try:
            if runtime.opens_onnx:
                runtime.probe()
                return runtime
        except Unavailable as error:
            missing.append(str(error))
    raise Unavailable(f"no runtime is installed that can check the traced graph: {'; or '.join(missing)}")
