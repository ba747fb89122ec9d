"""Everything that an application or a server needs around an artifact, as a folder that works as it is.

PyTorch is not needed: the sidecar has the preprocessing, the labels and what the outputs are. A destination is one
module of `destinations`; the text of its files stands in `templates`.
"""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from msgspec.structs import replace

from exporter.artifact import Artifact, load
from exporter.artifact.sidecar import Record, Sidecar
from exporter.errors import BadRequest, printable
from exporter.model.labels import read_labels
from exporter.package import folder
from exporter.package.contents import Contents, expected_of, sample_of, serving_of
from exporter.package.destinations import Destination, DestinationOptions, destination, names
from exporter.package.rendering import render, verified
from exporter.predict import TOP, PredictOptions
from exporter.predict.answers import Output, answers_of, check_top
from exporter.predict.masks import refuse_one_class
from exporter.progress import note, step
from exporter.recipe import Checks
from exporter.recipe.fields import about
from exporter.verify.checks.segmentation import classes_of

__all__ = ["Destination", "DestinationOptions", "Package", "PackageOptions", "destination", "names", "package"]


class PackageOptions(Record, frozen=True):
    """Options of `package`, whatever it is for."""

    labels: Annotated[
        str | None,
        about("Labels of the classes, in a file: one a line, JSON or CSV.", metavar="FILE", default="the artifact's"),
    ] = None
    sample: Annotated[
        str | None,
        about("Picture for the self-test.", metavar="FILE", default="one that is drawn"),
    ] = None


class Package(Record, frozen=True):
    """A package that was written: its folder, what it is for, its files, and why it has no expected answers, or how
    they were computed where the artifact itself did not run."""

    path: str
    destination: str
    files: tuple[str, ...]
    unexpected: str


def package(
    artifact: Artifact,
    name: str,
    out: Path,
    options: PackageOptions | None = None,
    answers: PredictOptions | None = None,
    own: DestinationOptions | None = None,
) -> Package:
    """Write the package of an artifact to a folder, whole or not at all.

    Args:
        artifact: the one to package.
        name: of the destination.
        out: a folder that is not there yet, or empty.
        options: labels and picture.
        answers: what is kept of the outputs.
        own: options of the destination. None of either stands for the defaults.

    Raises: BadRequest for an artifact that the destination cannot take, labels that do not fit, a picture that cannot
        be read and a folder that is not empty; Unavailable when the disk is full.
    """
    aim = destination(name)
    options, answers, own = options or PackageOptions(), answers or PredictOptions(), own or aim.options()
    serving = serving_of(artifact)
    labels = _labels(options.labels, artifact.sidecar)
    checks = Checks(outputs=answers.outputs, threshold=answers.threshold)
    if artifact.sidecar.task == "segment":
        _refuse_masks(artifact, aim)
    outputs = _outputs(artifact, replace(artifact.sidecar, labels=labels), checks, answers.top or TOP)
    check_top(answers.top, outputs)
    sample = sample_of(None if options.sample is None else Path(options.sample), artifact.sidecar.preprocessing)
    contents = Contents(artifact, serving, outputs, outputs[0].labels, answers.top or TOP, checks, sample, None)
    aim.check(contents, own)
    contents = dataclasses.replace(contents, exact=aim.exact(contents))
    quality = artifact.sidecar.quality
    if quality.get("passed") == "no":
        note(f"{artifact.path}: its last verification {verified(quality)}")
    if assumed := artifact.sidecar.assumed_preprocessing:
        note(f"preprocessing is assumed: images are {assumed}; the weights do not state it")
    with folder.staged(out, artifact.sidecar.bytes) as staging:
        step(f"running {artifact.path.name} on {sample.name}")
        expected, unexpected = expected_of(artifact, sample)
        if expected is None:
            note(f"the package has no expected answers: {unexpected}")
        contents = dataclasses.replace(contents, expected=expected, unexpected=unexpected)
        _write_common(aim, contents, staging)
        aim.write(contents, own, staging)
        _refuse_rebuilt(artifact)
        files = sorted(path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file())
    return Package(path=str(out), destination=name, files=tuple(files), unexpected=unexpected)


def _refuse_rebuilt(artifact: Artifact) -> None:
    """Raises: BadRequest where another process has replaced or removed the artifact since it was opened."""
    if load(artifact.path).sidecar.sha256 != artifact.sidecar.sha256:
        raise BadRequest(f"{artifact.path}: another process has rebuilt it meanwhile; run the same command again")


def _labels(file: str | None, sidecar: Sidecar) -> tuple[str, ...]:
    """The labels of a file, or else those of the artifact.

    Raises: BadRequest for labels of another number than there are classes.
    """
    if file is None:
        return sidecar.labels
    labels, has_classes = read_labels(Path(file)), not {"classify", "segment"}.isdisjoint(sidecar.spec.tasks)
    if not has_classes or len(labels) != sidecar.weights.num_classes:
        what = f"{sidecar.weights.num_classes} classes" if has_classes else "no classes"
        raise BadRequest(f"--labels {file}: {len(labels)} labels, and the artifact has {what}; give one for each class")
    return labels


def _refuse_masks(artifact: Artifact, aim: Destination) -> None:
    """Raises: BadRequest for segmentation where a destination has no code for it, and for other outputs of it."""
    if not aim.segment_answers:
        *others, last = (name for name in names() if destination(name).segment_answers)
        expected = f"{', '.join(others)} or {last}"
        raise BadRequest(f"{artifact.path}: --for {aim.name} does not support segmentation; give --for {expected}")
    if (answer := artifact.sidecar.spec.answer) not in aim.segment_answers:
        expected = " or ".join(aim.segment_answers)
        raise BadRequest(f"{artifact.path}: built with --output {answer}; package one with --output {expected}")
    refuse_one_class(artifact)


def _outputs(artifact: Artifact, sidecar: Sidecar, checks: Checks, top: int) -> tuple[Output, ...]:
    """What the outputs hold.

    Raises: BadRequest for an artifact that takes pictures, for several heads, and for options that do not fit the
        outputs.
    """
    if sidecar.preprocessing.input == "image":
        raise BadRequest(
            f"{artifact.path}: takes pictures (--input image), and packages resize them themselves; export it with "
            "--input uint8"
        )
    heads = sidecar.architecture.get("heads", ())
    if "classify" in sidecar.spec.tasks and len(heads) > 1:
        raise BadRequest(f"{artifact.path}: {len(heads)} heads; packages are written for one")
    return answers_of(sidecar, checks, top, whole=True).outputs


def _write_common(aim: Destination, contents: Contents, out: Path) -> None:
    """The files that every package has: labels, picture, expected answers, and the self-test."""
    if contents.labels:
        folder.write(out / "labels.txt", "".join(f"{printable(label)}\n" for label in contents.labels))
    folder.write(out / contents.sample.name, contents.sample.content)
    if contents.expected is not None:
        arrays: dict[str, Any] = {
            output.name: array for output, array in zip(contents.outputs, contents.expected, strict=True)
        }
        if contents.has_masks:  # 157 MB of logits are 0.3 MB of classes
            classes = classes_of(contents.expected[0])[0].astype(contents.mask_type)
            arrays = {contents.outputs[0].name: classes}
        file = io.BytesIO()
        np.savez(file, **arrays)
        folder.write(out / "expected.npz", file.getvalue())
    folder.write(out / "selftest.py", render(aim.selftest, contents, program=aim.program))
