"""An artifact with one more part in higher precision: the command that builds it, and what that changes."""

from __future__ import annotations

import os
import shlex
import tempfile
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec.structs import replace

from exporter import backends, precision
from exporter.artifact import Artifact
from exporter.artifact.outputs import DENSE
from exporter.bisect import BisectOptions, Examination, examine, percent, report_of
from exporter.bisect.network import TAIL
from exporter.build import build, check, check_sources, resolve
from exporter.build.int8.work import prepare
from exporter.build.problems import scope_of
from exporter.data.calibration import usual_size
from exporter.errors import BadRequest
from exporter.model import weights
from exporter.progress import note, step
from exporter.recipe import Export, Model, Recipe
from exporter.recipe.fields import about
from exporter.recipe.words import words
from exporter.report import Finding, Report, number

PROGRAM = "convnext-export"


class KeepOptions(BisectOptions, frozen=True):
    """Options of `bisect`, and whether its advice is tried."""

    try_keep: Annotated[
        bool,
        about(
            "Build the artifact again in a temporary folder, with the part that exceeds its limit in higher precision, "
            "and compare the errors."
        ),
    ] = False


def bisect(artifact: Artifact, options: KeepOptions) -> Report:
    """The report of `bisect` with advice. If the first part that exceeds its limit needs higher precision, the finding
    `keep` has the command that builds it so; with `try_keep`, `kept_error` and `kept_output_error` are the errors of
    the part and of the outputs of such an artifact.

    Raises: as `bisect.examine` and `build` do.
    """
    examined = examine(artifact, options)
    report = report_of(examined, options)
    if examined.first is None:
        return report
    if not _helps(examined):
        if options.try_keep:
            note("higher precision does not reduce this error; nothing was built")
        return report
    report = _with(report, _few_images(artifact))
    part = _word(examined.first.name)
    try:
        recipe = recipe_with(artifact, part, options.weights)
    except BadRequest as error:
        if options.try_keep:
            note(f"nothing was built: {error}")
        detail = f"higher precision of {part} would help, and this artifact cannot be built so: {error}"
        return _with(report, [Finding(check="bisect", metric="keep", case=part, value=None, detail=detail)])
    findings = [Finding(check="bisect", metric="keep", case=part, value=None, detail=command(recipe, artifact))]
    if options.try_keep:
        step(f"building {artifact.path.name} again with {part} in higher precision")
        findings += _tried(examined, recipe, part, options)
    return _with(report, findings)


def _few_images(artifact: Artifact) -> list[Finding]:
    """Advice to calibrate on more images, where there were fewer than by default: few images give ranges that are too
    narrow, and more images do not slow the artifact."""
    sidecar, quantization = artifact.sidecar, artifact.sidecar.quantization
    if quantization is None:
        return []
    usual = usual_size(quantization.synthetic, sidecar.task in DENSE)
    if quantization.images >= usual:
        return []
    images = quantization.images
    detail = f"first calibrate on more images (--calib, --calib-size): {images} were used, the default is {usual}"
    return [Finding(check="bisect", metric="few_images", value=images, unit="images", detail=detail)]


def _with(report: Report, findings: list[Finding]) -> Report:
    """The report with findings behind the reason, which is the first."""
    reason, *others = report.findings
    return replace(report, findings=(reason, *findings, *others))


def _helps(examined: Examination) -> bool:
    """Whether higher precision of the part removes the cause: an overflow of fp16, or a range of int8 or fp8."""
    lacks = examined.reason.missing if examined.reason is not None else ""
    own = precision.get(examined.artifact.sidecar.precision)
    return lacks == "range" if own.needs_calibration else lacks == "overflow"


def _word(name: str) -> str:
    """The word of `--keep` for a part."""
    return "head" if name.startswith(TAIL) else name


def recipe_with(artifact: Artifact, part: str, source: str | None = None) -> Recipe:
    """The recipe of an artifact with one more part in higher precision.

    Args:
        artifact: its sidecar has the recipe.
        part: its name (`structure.parts`).
        source: the weights, if they were moved.

    Raises: BadRequest where weights, labels or images are not where they were, and where the target cannot keep parts.
    """
    sidecar = artifact.sidecar
    recipe = msgspec.convert(sidecar.recipe, Recipe)
    target = backends.target(recipe.backend)
    model = replace(recipe.model, weights=source or _weights(artifact, recipe.model))
    recipe = replace(recipe, model=model, export=_with_part(recipe.export, part))
    if recipe.quantization is not None:  # it was faster enough when it was built
        recipe = replace(recipe, quantization=replace(recipe.quantization, even_if_slower=True))
    scope = scope_of(recipe, target)
    own_form = target.placements[scope].forms[0] if scope else target.form(recipe.precision, recipe.fixed_batch)
    if recipe.export.form == own_form:
        recipe = replace(recipe, export=replace(recipe.export, form=None))
    if recipe.quantization is not None and scope == next(iter(target.placements)):
        recipe = replace(recipe, quantization=replace(recipe.quantization, int8_scope=None))
    check(recipe)
    check_sources(recipe)
    return recipe


def _with_part(export: Export, part: str) -> Export:
    return replace(export, keep=tuple(dict.fromkeys((*(export.keep or ()), part))))


def _weights(artifact: Artifact, model: Model) -> str:
    """The weights of an artifact as a user would type them here."""
    if model.weights == "hub":
        return model.weights
    source = weights.absolute(artifact.sidecar.weights.source, artifact.path.parent)
    return os.path.relpath(source) if Path(source).is_relative_to(Path.cwd()) else source


def command(recipe: Recipe, artifact: Artifact) -> str:
    """The command that builds a recipe in place of an artifact."""
    target = backends.target(recipe.backend)
    options = [
        *words(replace(recipe.model, weights=Model().weights)),
        *words(recipe.preprocessing),
        *words(recipe.export),
        *(words(recipe.quantization) if recipe.quantization is not None else ()),
        *words(msgspec.convert(recipe.target, target.options)),
    ]
    first = [PROGRAM, target.command, "--weights", recipe.model.weights, f"--{recipe.precision}"]
    return shlex.join([*first, *options, "-o", str(artifact.path.parent)])


def _tried(examined: Examination, recipe: Recipe, part: str, options: KeepOptions) -> list[Finding]:
    """The error of the part, and of the outputs, where the part is in higher precision, on the same images."""
    with tempfile.TemporaryDirectory(prefix="convnext-export-keep-") as temporary:
        kept = _built(examined.artifact, recipe, part, Path(temporary))
        after = examine(kept, replace(options, weights=recipe.model.weights), examined.images)
    first = examined.first
    assert first is not None
    now = next((one for one in after.parts if one.name == first.name), None)
    if now is None:
        return [
            Finding(
                check="bisect", metric="kept_error", case=part, value=None, passed=False,
                detail=f"not reached: the outputs of {after.parts[-1].name} are not finite",
            )
        ]  # fmt: skip
    return [
        Finding(
            check="bisect", metric="kept_error", case=part, value=number(100 * now.error), unit="%",
            limit=100 * now.limit, passed=now.passed, detail=f"{percent(first.error)} before",
        ),
        Finding(
            check="bisect", metric="kept_output_error", value=number(100 * after.output_error), unit="%",
            passed=after.output_error < examined.output_error, detail=f"{percent(examined.output_error)} before",
        ),
    ]  # fmt: skip


def _built(artifact: Artifact, recipe: Recipe, part: str, folder: Path) -> Artifact:
    """The artifact of a recipe in a folder; an int8 one keeps what the search had kept, without another search."""
    quantization = artifact.sidecar.quantization
    if quantization is None:
        return build(recipe, folder).artifact
    work = prepare(resolve(recipe, folder), folder)
    return work.make(tuple(dict.fromkeys((*quantization.kept, part))), folder)
