"""Finds every contradiction in a recipe before weights or images are read."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import msgspec

from exporter import backends, precision
from exporter.artifact.sidecar import OutputSpec, Preprocessing
from exporter.backends import Target, TargetOptions
from exporter.build import budget
from exporter.data.samples import is_synthetic
from exporter.errors import BadRequest, Unavailable, nearest, some
from exporter.graph import opset
from exporter.model import structure, variants
from exporter.model.preprocessing import refuse_contradiction
from exporter.model.variants import Architecture
from exporter.quantize.cpus import placement_for
from exporter.quantize.placement import Placement
from exporter.recipe import Recipe, strict
from exporter.recipe.strict import Marks
from exporter.verify.outputs import check_threshold


def scope_of(recipe: Recipe, target: Target) -> str:
    """The layers that are quantized: the recipe's choice or the target's; "" without quantization."""
    if recipe.quantization is None:
        return ""
    return recipe.quantization.int8_scope or next(iter(target.placements))


def find_problems(recipe: Recipe, marks: Marks) -> None:
    """Add every contradiction in a recipe to the marks; each of its fields fits its type."""
    if _refused(marks, ("backend",), lambda: backends.target(recipe.backend)):
        return
    target = backends.target(recipe.backend)
    checks: list[tuple[strict.Path, Callable[[], object]]] = [
        (("precision",), lambda: _check_precision(recipe, target)),
        (("model", "variant"), lambda: variants.resolve(recipe.model.variant) if recipe.model.variant else None),
        (("preprocessing",), lambda: refuse_contradiction(recipe.preprocessing)),
        (("export",), lambda: _check_opset(recipe, target)),
        (("export",), lambda: _check_precision_of_kept(recipe, target)),
        (("export",), lambda: _check_picture(recipe, target)),
        (("target",), lambda: _options(recipe, target)),
        (("quantization",), lambda: _check_quantization(recipe, target)),
        (("model",), lambda: _check_outputs(recipe)),
        (("checks",), lambda: _check_checks(recipe)),
        (("checks",), lambda: _check_device(recipe, recipe.checks.device)),
        (("bench",), lambda: _check_bench(recipe)),
        (("bench",), lambda: _check_device(recipe, recipe.bench.device if recipe.bench else None)),
    ]
    refused = [_refused(marks, path, look) for path, look in checks]  # a list: every check runs
    if not any(refused) and target.check is not None:
        with suppress(Unavailable):  # the recipe may be built on another machine
            options = _options(recipe, target)
            _refused(
                marks,
                ("target",),
                partial(target.check, recipe.precision, recipe.fixed_batch, recipe.export.imgsz, options),
            )


def _refused(marks: Marks, path: strict.Path, look: Callable[[], object]) -> bool:
    """Whether a check fails. Its problem is placed at the first key of this section that the message names."""
    try:
        look()
    except BadRequest as error:
        text = str(error)
        if marks.source:  # a file has keys, not options
            text = re.sub(r"--([a-z][a-z0-9-]+)", lambda match: match[1].replace("-", "_"), text)
        names = re.findall(r"[a-z0-9_]+", text.replace("--", "").replace("-", "_"))
        known = {place[-1]: place for place in marks.places if place[: len(path)] == path}
        marks.at(next((known[name] for name in names if name in known), path), text)
        return True
    return False


def _check_precision(recipe: Recipe, target: Target) -> None:
    if recipe.precision not in target.precisions:
        others = [name for name in backends.targets() if recipe.precision in backends.target(name).precisions]
        hint = f"{' and '.join(others)} can" if others else nearest(recipe.precision, target.precisions)
        raise BadRequest(f"{recipe.backend} cannot run {recipe.precision}; {hint}")


def _options(recipe: Recipe, target: Target) -> TargetOptions:
    try:
        return msgspec.convert(recipe.target, target.options)
    except msgspec.ValidationError as error:
        raise BadRequest(f"target of {recipe.backend}: {error}") from None


def _check_opset(recipe: Recipe, target: Target) -> None:
    """The ONNX graph can be written in the opset and version of the file format."""
    if recipe.precision not in target.precisions:
        return  # reported already
    quantized = precision.get(recipe.precision).needs_calibration and recipe.quantization is not None
    graph = recipe.precision if quantized or target.lower is not None else "fp32"
    placement = target.placements.get(scope_of(recipe, target)) if quantized else None
    opset.check(recipe.export.opset, recipe.export.ir_version, graph, placement.rest if placement else "fp32")


def _check_picture(recipe: Recipe, target: Target) -> None:
    """Pictures of any size go with the other options and the target."""
    export = recipe.export
    if export.input != "image":
        return
    if reason := target.no_pictures(recipe.precision):
        raise BadRequest(f"--input image: {reason}; give --input uint8, and resize images before the artifact")
    if export.layout != "nchw":
        raise BadRequest(f"--layout {export.layout}: it is for batches, and a picture is (H, W, C); leave it out")
    if export.imgsz == "dynamic":
        raise BadRequest("--imgsz dynamic: pictures of any size are resized to one size; give it in pixels")
    if export.batch not in ("dynamic", 1):
        raise BadRequest(f"--batch {export.batch}: pictures of any size run one at a time; leave it out")
    _refuse_interpolation(recipe.preprocessing.interpolation)


def _refuse_interpolation(interpolation: str | None) -> None:
    if interpolation in ("nearest", "box"):
        raise BadRequest(
            f"--input image: {interpolation} picks pixels by the last bit of a sum, and runtimes compute this bit "
            "differently; give --interpolation bilinear, bicubic, hamming or lanczos"
        )


def refuse_picture(preprocessing: Preprocessing) -> None:
    """Raises: BadRequest for preprocessing of pictures that a graph does not have."""
    _refuse_interpolation(preprocessing.interpolation)
    if preprocessing.channels not in (1, 3):
        raise BadRequest(
            f"--input image: the network takes {preprocessing.channels} channels, and pictures have 1 (grey) or 3; "
            "give --input uint8, and resize images before the artifact"
        )


def refuse_quantization(recipe: Recipe, task: str) -> None:
    """Raises: BadRequest for int8 and fp8 of a pyramid, which is not quantized."""
    if task == "pyramid" and recipe.quantization is not None:
        raise BadRequest(f"--task pyramid: an FPN is not quantized, so {recipe.precision} is not built; give fp16")


def _check_quantization(recipe: Recipe, target: Target) -> None:
    if recipe.precision not in target.precisions:
        return  # reported already
    needed = precision.get(recipe.precision).needs_calibration
    if recipe.quantization is None and needed:
        raise BadRequest(
            f"precision {recipe.precision} needs calibration; add 'quantization:' with 'calib:', a manifest, a folder, "
            "an .npz file or 'synthetic'"
        )
    if recipe.quantization is not None and not needed:
        raise BadRequest(f"quantization is for int8 and fp8, and precision is {recipe.precision}; remove one of them")
    if recipe.quantization is not None:
        _check_placement(recipe, target)
        if recipe.precision == "fp8" and recipe.quantization.calib_method not in ("minmax", "percentile"):
            raise BadRequest(
                f"--calib-method {recipe.quantization.calib_method}: it is for int8's equal steps; fp8 takes minmax or "
                "percentile"
            )
        source = recipe.quantization.data or recipe.quantization.calib
        budget.points(recipe.quantization, recipe.precision, source, recipe.model.weights)


def _check_precision_of_kept(recipe: Recipe, target: Target) -> None:
    """The target can keep parts in higher precision than the recipe's."""
    if not recipe.export.keep or recipe.precision not in target.precisions:
        return
    if recipe.precision == "fp32":
        raise BadRequest("--keep: fp32 is the highest precision; leave --keep out")
    if target.lower is None and not precision.get(recipe.precision).needs_calibration:
        every = {name: backends.target(name) for name in backends.targets()}
        others = [name for name, one in every.items() if one.lower is not None and recipe.precision in one.precisions]
        raise BadRequest(
            f"--keep: {recipe.backend} takes one precision for all layers, {recipe.precision} or another; "
            f"{' and '.join(others) or 'no other'} can keep parts in fp32"
        )


def check_keep(recipe: Recipe, placement: Placement | None, arch: Architecture, task: str) -> None:
    """Refuse to keep parts that the network does not have, that are not quantized anyway, or all that are.

    Args:
        recipe: its `export.keep` names the parts.
        placement: of quantization; None for other precisions.
        arch: of the network.
        task: whose network has a head, or not.

    Raises: BadRequest.
    """
    keep, known = recipe.export.keep or (), structure.parts(arch.depths)
    if task == "features":
        known.remove("head")
    elif task == "segment" and arch.decoder is not None:
        known += structure.decoder_parts(len(arch.decoder.levels))
    for name in keep:
        if name not in known:
            raise BadRequest(f"--keep {name}: the network has no such part; {nearest(name, known)}")
    if not keep or placement is None:
        return
    quantized = [name for name in known if structure.kinds_of(name) & placement.kinds]
    for name in keep:
        if not any(structure.is_in(one, [name]) for one in quantized):
            raise BadRequest(f"--keep {name}: it is not quantized anyway; leave it out")
    if all(structure.is_in(name, keep) for name in quantized):
        raise BadRequest(f"--keep: nothing would be left to quantize; take {precision.get(recipe.precision).higher}")


def _check_placement(recipe: Recipe, target: Target) -> None:
    """The scope is one of the target's, and the form one of its placement's."""
    scope, form = scope_of(recipe, target), recipe.export.form
    if scope not in target.placements:
        raise BadRequest(f"--int8-scope {scope}: {recipe.backend} takes {', '.join(target.placements)}")
    if recipe.precision == "fp8" and scope != next(iter(target.placements)):
        raise BadRequest(f"--int8-scope {scope} is for int8: only the pointwise layers gain by fp8; leave it out")
    placement_for(target.placements[scope], recipe.quantization.cpu if recipe.quantization else "portable", target.name)
    forms = target.placements[scope].forms
    if form not in (None, *forms):
        known = " or ".join(forms)
        raise BadRequest(
            f"--form {form}: {recipe.precision} for {recipe.backend} is written in the form {known}; leave --form out"
        )


def _check_outputs(recipe: Recipe) -> None:
    """Options of outputs are for tasks that the recipe has; a task that is left out is known with the weights."""
    if recipe.model.task is not None:
        tasks: Any = tuple(recipe.model.task.split(","))
        spec = OutputSpec(tasks=tasks, answer=recipe.export.output, l2=recipe.export.l2)
        if problem := spec.contradiction():
            raise BadRequest(problem)
    if recipe.model.head == "none":
        _refuse_classifier(recipe)


def _refuse_classifier(recipe: Recipe) -> None:
    """Raises: BadRequest where a recipe that leaves out the classifier has options that need one."""
    needs = ""
    if recipe.export.output != "logits":
        needs = f"--output {recipe.export.output}"
    elif "classify" in (recipe.model.task or "").split(","):
        needs = "--task classify"
    if needs:
        raise BadRequest(f"--head none leaves out the classifier that {needs} needs; leave one of them out")


def _check_checks(recipe: Recipe) -> None:
    check_threshold(checks := recipe.checks, recipe.export.output)
    on_synthetic = is_synthetic(recipe.verified_on)
    tasks = set((recipe.model.task or "classify").split(","))
    if checks.max_drop is not None and (on_synthetic or not tasks & {"classify", "segment"}):
        raise BadRequest("--max-drop: a loss is measured on images with labels or masks; set 'data' under 'checks'")
    if checks.reduce_zero_label and on_synthetic:
        raise BadRequest("--reduce-zero-label: synthetic images have no masks; give --data with masks, or leave it out")


def _check_bench(recipe: Recipe) -> None:
    """The runtime keeps a cache if one is asked for, and the batch sizes that are timed can be run."""
    if recipe.bench is not None and recipe.bench.cache_dir is not None:
        backends.check_cache_dir(backends.runtime(recipe.backend), recipe.bench.cache_dir, "this recipe")
    if recipe.bench is None or recipe.bench.batch is None:
        return
    fixed, batches = recipe.fixed_batch, recipe.bench.batch
    if fixed is not None and set(batches) != {fixed}:
        raise BadRequest(
            f"batch {some(map(str, batches))}: the artifact is exported for batch {fixed} alone; time that one"
        )
    profiles = recipe.target.get("profiles") or []
    beyond = [size for size in batches if not any(least <= size <= most for least, _, most in profiles)]
    if profiles and beyond:
        raise BadRequest(
            f"batch {beyond[0]} of 'bench' is in none of the profiles {profiles}; add a profile for it, or leave it out"
        )


def _check_device(recipe: Recipe, device: str | None) -> None:
    """The runtime takes the device, and the device takes the shapes."""
    if device is None:
        return
    backends.kind_of(device, backends.runtime(recipe.backend), "this recipe")
    on_npu = any(name.strip().startswith("npu") for name in re.split("[:,]", device.lower()))
    dynamic = recipe.fixed_batch is None or recipe.export.imgsz == "dynamic" or recipe.export.input == "image"
    if on_npu and dynamic:
        raise BadRequest(f"--device {device}: an NPU takes fixed shapes only; give --batch, and --imgsz in pixels")
