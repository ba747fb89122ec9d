"""The first part of an artifact whose output differs from the reference model by more than its precision explains, and
the likely cause.

Every part (downsampling layer, block, head) of the reference model runs on the input that the part has in the artifact.
So the error of a part is its own, whatever the parts before it did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import msgspec
import numpy as np

from exporter import backends
from exporter.artifact import Artifact
from exporter.artifact.outputs import DENSE
from exporter.artifact.sidecar import Record
from exporter.backends import Array, Layer, Outputs, as_network_takes
from exporter.bisect import reasons
from exporter.bisect.network import TAIL, Chain
from exporter.bisect.parts import TOLERANCES, Part, Precisions, measure, share_of_deviation
from exporter.data.samples import Samples, open_samples
from exporter.errors import BadRequest, some
from exporter.progress import note, step, track
from exporter.recipe import SYNTHETIC, Count, Device, MovedWeights, RuntimeThreads
from exporter.recipe.fields import about
from exporter.report import Finding, Report, number
from exporter.verify import Runnable, open_runnable, run_batch

IMAGES, WORST = 64, 4  # that are compared by default, and that are examined
PICTURE_LIMIT = 2e-3  # of the first part, which resizes pictures: Pillow rounds a sum near half a level otherwise


class BisectOptions(Record, frozen=True):
    """Options of `bisect`."""

    data: Annotated[
        str, about("Images as for verify; those with the largest output error are examined.", metavar="SRC", path=True)
    ] = SYNTHETIC
    samples: Annotated[Count, about("Largest number of images.", metavar="N")] = IMAGES
    weights: MovedWeights = None
    device: Device = None
    threads: RuntimeThreads = None


@dataclass(frozen=True)
class Examination:
    """The parts of an artifact in order, up to the first whose output is not finite.

    artifact: the one that was examined.
    images: (N, C, H, W), those that the parts ran on.
    output_error: root mean square of the difference of the outputs from those of PyTorch, over the standard deviation
        of these; of several outputs the largest.
    reason: why the first part that exceeds its limit does; None where there is none.
    notes: how the artifact was run.
    """

    artifact: Artifact
    images: Array
    parts: tuple[Part, ...]
    output_error: float
    reason: reasons.Reason | None
    notes: tuple[Finding, ...]

    @property
    def first(self) -> Part | None:
        """The first part that exceeds its limit."""
        return next((part for part in self.parts if not part.passed), None)


def bisect(artifact: Artifact, options: BisectOptions) -> Report:
    """Find the parts of an artifact whose error is larger than its precision explains.

    Args:
        artifact: what to examine; one that cannot run here is examined by the graph that it was built from.
        options: images, weights, device, threads.

    Returns: a report with the error of every part, in order, and for the first that exceeds its limit a finding
        `reason`; it passes where there is none.

    Raises: as `examine` does.
    """
    return report_of(examine(artifact, options), options)


def examine(artifact: Artifact, options: BisectOptions, images: Array | None = None) -> Examination:
    """Compare every part of an artifact with PyTorch.

    Args:
        artifact, options: as for `bisect`.
        images: (N, C, H, W), of a batch that the artifact takes, to run the parts on; by default the images of
            `options.data` that differ most.

    Raises: BadRequest for an artifact whose runtime shows no blocks, and for data or weights that cannot be used;
        Unavailable when the weights are missing.
    """
    from exporter.model import weights

    if artifact.sidecar.task in DENSE:
        raise BadRequest(
            f"{artifact.path}: bisect measures the parts of a classifier, and this is --task {artifact.sidecar.task}; "
            "verify --blocks compares its blocks"
        )
    runtime = backends.runtime_of(artifact)
    backends.device_of(artifact, options.device)
    samples = _open_images(artifact, options)
    chain = Chain(weights.reload(artifact, options.weights).model(artifact.sidecar.spec))
    with open_runnable(artifact, runtime) as runnable:
        if runnable.runtime.blocks is None:
            raise BadRequest(f"{artifact.path}: {runnable.runtime.name} does not show the outputs of blocks")
        session_options = runnable.options(options.device, options.threads)
        if images is None:
            step(f"comparing {artifact.path.name} with PyTorch on {samples.total} images of {options.data}")
            images, outputs = _worst_images(chain, runnable, options, samples)
        else:
            with runnable.runtime.open(runnable.artifact, session_options) as session:
                outputs = run_batch(session, images, artifact.sidecar.batch)
        step(f"running {len(chain.names)} parts on the {len(images)} images that differ most")
        with runnable.runtime.blocks(runnable.artifact, session_options) as blocks:
            every = run_batch(blocks.run, images, artifact.sidecar.batch)
            block_outputs = dict(zip(blocks.names, every, strict=True))
        layers: Sequence[Layer] = ()
        if runnable.runtime.layers is not None and not runnable.is_simulated:  # else its layers are others
            layers = runnable.runtime.layers(artifact, session_options)
    precisions = Precisions(layers, artifact.sidecar.precision)
    named = dict(zip((tensor.name for tensor in artifact.sidecar.outputs), outputs, strict=True))
    inputs = as_network_takes(images, artifact.sidecar.preprocessing)
    parts = list(measure(chain, block_outputs, inputs, named, precisions))
    if artifact.sidecar.preprocessing.input == "image":
        parts[0] = replace(parts[0], limit=max(parts[0].limit, PICTURE_LIMIT))
    if any(tensor.dtype == "float16" for tensor in (*artifact.sidecar.inputs, *artifact.sidecar.outputs)):
        tail = [place for place, part in enumerate(parts) if TAIL in part.name]
        for place in (0, *tail):  # those that are computed from or to fp16
            parts[place] = replace(parts[place], limit=max(parts[place].limit, TOLERANCES["fp16"][0]))
    first = next((part for part in parts if not part.passed), None)
    reason = reasons.of(chain, first) if first is not None else None
    whole = zip(outputs, chain.whole(inputs), strict=True)
    output_error = max(share_of_deviation(y, expected) for y, expected in whole if expected.dtype.kind == "f")
    return Examination(artifact, images, tuple(parts), output_error, reason, runnable.findings)


def _open_images(artifact: Artifact, options: BisectOptions) -> Samples:
    """The images. Labels are not needed, so none are read."""
    return open_samples(options.data, artifact.sidecar.preprocessing, (), None, options.samples)


def _worst_images(chain: Chain, runnable: Runnable, options: BisectOptions, samples: Samples) -> tuple[Array, Outputs]:
    """The images that differ most, `WORST` or a fixed batch if that is more, and the outputs of the artifact for them.

    Raises: BadRequest where none can be read.
    """
    fixed, recipe = runnable.artifact.sidecar.batch, runnable.artifact.sidecar.preprocessing
    size = 1 if recipe.input == "image" else max(WORST, fixed or 0)  # pictures have different sizes
    seen: list[tuple[float, Array, Outputs]] = []
    session_options = runnable.options(options.device, options.threads)
    with runnable.runtime.open(runnable.artifact, session_options) as session:
        for batch in track(samples.batches(fixed or size), samples.total, "images", lambda batch: len(batch.names)):
            outputs = run_batch(session, batch.images, fixed)
            seen += _with_errors(batch.images, outputs, chain.whole(as_network_takes(batch.images, recipe)))
            seen = sorted(seen, key=lambda one: -one[0])[:size]
    if samples.skipped:
        note(f"{len(samples.skipped)} of {samples.total} images cannot be read: {some(samples.skipped)}")
    if not seen:
        raise BadRequest(f"{options.data}: none of its {samples.total} images gives outputs of PyTorch that are finite")
    rows = zip(*(outputs for _, _, outputs in seen), strict=True)
    return np.stack([image for _, image, _ in seen]), tuple(map(np.stack, rows))


def _with_errors(images: Array, outputs: Outputs, expected: Outputs) -> list[tuple[float, Array, Outputs]]:
    """Each image with its mean square error, infinite where an output is not finite, and its outputs; without images
    for which the outputs of the reference model are not finite."""
    errors, sound = np.zeros(len(images)), np.ones(len(images), bool)
    for output, reference in zip(outputs, expected, strict=True):
        if reference.dtype.kind == "i":  # numbers of classes have no distance
            continue
        rows = (len(images), -1)
        with np.errstate(invalid="ignore", over="ignore"):
            difference = np.square((output - reference).reshape(rows), dtype=np.float64).mean(1)
        errors += np.nan_to_num(difference, nan=np.inf, posinf=np.inf)
        sound &= np.isfinite(reference.reshape(rows)).all(1)
    rows_kept = np.flatnonzero(sound)
    return [(float(errors[row]), images[row], tuple(one[row] for one in outputs)) for row in rows_kept]


def report_of(examined: Examination, options: BisectOptions) -> Report:
    """The report of an examination."""
    findings = [
        Finding(
            check="bisect", metric="part_error", case=part.name, value=number(100 * part.error), unit="%",
            limit=100 * part.limit, passed=part.passed, detail=f"{percent(part.accumulated)} so far",
        )
        for part in examined.parts
    ]  # fmt: skip
    first, reason, sidecar = examined.first, examined.reason, examined.artifact.sidecar
    if first is not None and reason is not None:
        findings.insert(
            0, Finding(check="bisect", metric="reason", case=first.name, value=None, passed=False, detail=reason.text)
        )
    return Report(
        passed=first is None,
        recipe={**sidecar.recipe, "bisect": msgspec.to_builtins(options)},
        artifact=examined.artifact.to_dict(),
        environment=backends.environment(),
        findings=(*findings, *examined.notes),
    )


def percent(share: float) -> str:
    """A share as a text in percent."""
    return f"{100 * share:.2g} %" if np.isfinite(share) else "not finite"
