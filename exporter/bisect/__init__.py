"""The first module of an artifact that does not compute what the network computes, and why.

Every part (downsampling layer, block, head) of the network is run in PyTorch on the input that the part has in the
artifact. So the error of a part is its own, whatever the parts before it did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import msgspec
import numpy as np

from exporter import backends
from exporter.artifact import Artifact
from exporter.artifact.sidecar import Record
from exporter.backends import Array, Layer, Options, Outputs
from exporter.bisect import reasons
from exporter.bisect.network import TAIL, Chain
from exporter.data.samples import Samples
from exporter.errors import BadRequest
from exporter.progress import step, track
from exporter.recipe import SYNTHETIC, Count, Threads
from exporter.recipe.fields import about
from exporter.report import Finding, Report, number
from exporter.verify import Runnable, VerifyOptions, open_data, run_batch, runnable
from exporter.verify.blocks import belongs

IMAGES, WORST = 64, 4
# The largest error of a part, as a share of what it adds to its input and of its output. Of trained networks (V1 and
# V2 atto, ONNX Runtime and OpenVINO) the errors are at most 7e-7 and 5e-7 in fp32, 2e-3 and 5e-4 in fp16, where the
# second is that of rounding the sum, and 3e-2 and 1e-2 in int8. GELU's tanh form gives 1e-4 in fp32.
Tolerance = tuple[float, float]
TOLERANCES: dict[str, Tolerance] = {
    "fp32": (2e-5, 2e-6),
    "fp16": (4e-3, 2e-3),
    "bf16": (3e-2, 1.6e-2),
    "int8": (0.1, 0.01),
    "fp8": (0.2, 0.02),
}


class BisectOptions(Record, frozen=True):
    """Options of `bisect`."""

    data: Annotated[
        str, about("Images to compare on, as for verify; the worst of them are examined.", metavar="SRC", path=True)
    ] = SYNTHETIC
    samples: Annotated[Count, about("Largest number of images.", metavar="N")] = IMAGES
    weights: Annotated[
        str | None, about("Path of the weights if they were moved; other weights are refused.", metavar="SRC")
    ] = None
    device: Annotated[
        str | None,
        about("Device that runs the artifact.", metavar="NAME", default="the first that its runtime takes"),
    ] = None
    threads: Annotated[Threads | None, about("Threads; by default the runtime's choice.", metavar="N")] = None


@dataclass(frozen=True)
class Part:
    """A part of the network, or several whose outputs the artifact does not show apart.

    x, y: its input and output in the artifact; `expected` is what the network gives for `x`.
    error, limit: root mean square error, and the largest one, as shares of what the part adds to its input.
    grown: error of `y` against the network from the images on, as a share of the standard deviation.
    """

    name: str
    x: Array
    y: Array
    expected: Array
    error: float
    limit: float
    grown: float

    @property
    def passed(self) -> bool:
        """Whether the error is within its limit."""
        return self.error <= self.limit


def bisect(artifact: Artifact, options: BisectOptions) -> Report:
    """Find the parts of an artifact that leave the tolerance of its precision.

    Args:
        artifact: what to examine; one that cannot run here is examined by the graph that it was built from.
        options: images, weights, device, threads.

    Returns: a report with the error of every part, in order, and for the first that leaves the tolerance a finding
        `reason`; it passes where there is none.

    Raises: BadRequest for an artifact whose runtime shows no blocks, and for data or weights that cannot be used;
        Unavailable when the weights are missing.
    """
    from exporter.model import weights

    runtime = backends.runtime_of(artifact)
    backends.device_of(artifact, options.device)
    samples = open_data(
        artifact.sidecar, VerifyOptions(data=options.data, samples=options.samples, weights=options.weights)
    )
    chain = Chain(weights.reload(artifact, options.weights).model(artifact.sidecar.task))
    with runnable(artifact, runtime) as stand_in:
        if stand_in.runtime.blocks is None:
            raise BadRequest(f"{artifact.path}: {stand_in.runtime.name} does not show the outputs of blocks")
        step(f"comparing {artifact.path.name} with PyTorch on {samples.total} images of {options.data}")
        images, outputs = _worst_images(chain, stand_in, options, samples)
        step(f"running {len(chain.names)} parts on the {len(images)} images that differ most")
        session_options = _session_options(stand_in, options)
        with stand_in.runtime.blocks(stand_in.artifact, session_options) as blocks:
            shown = dict(zip(blocks.names, blocks.run(images), strict=True))
        layers: Sequence[Layer] = ()
        if stand_in.runtime.layers is not None and stand_in.artifact is artifact:  # else its layers are others
            layers = stand_in.runtime.layers(artifact, session_options)
    parts = list(_parts(chain, shown, images, outputs, partial(_tolerance, layers, artifact.sidecar.precision)))
    return _report(artifact, chain, parts, options, stand_in.findings)


def _session_options(stand_in: Runnable, options: BisectOptions) -> Options:
    chosen = stand_in.runtime.options(threads=options.threads)
    if options.device is None or stand_in.findings:
        return chosen
    return msgspec.structs.replace(chosen, device=options.device)


def _worst_images(chain: Chain, stand_in: Runnable, options: BisectOptions, samples: Samples) -> tuple[Array, Outputs]:
    """The images that differ most, `WORST` or a fixed batch of them, and the outputs of the artifact for them.

    Raises: BadRequest where none can be read.
    """
    fixed = stand_in.artifact.sidecar.inputs[0].shape[0]
    size = fixed if isinstance(fixed, int) else WORST
    seen: list[tuple[float, Array, Outputs]] = []
    with stand_in.runtime.open(stand_in.artifact, _session_options(stand_in, options)) as session:
        for batch in track(samples.batches(size), samples.total, "images", lambda batch: len(batch.names)):
            outputs = run_batch(session, batch.images, fixed)
            seen += _with_errors(batch.images, outputs, chain.whole(batch.images))
            seen = sorted(seen, key=lambda one: -one[0])[:size]
    if not seen:
        raise BadRequest(f"{options.data}: none of its {samples.total} images can be read ({samples.skipped[0]})")
    if isinstance(fixed, int):  # a batch that the artifact takes
        seen += [seen[-1]] * (fixed - len(seen))
    rows = zip(*(outputs for _, _, outputs in seen), strict=True)
    return np.stack([image for _, image, _ in seen]), tuple(map(np.stack, rows))


def _with_errors(images: Array, outputs: Outputs, expected: Outputs) -> list[tuple[float, Array, Outputs]]:
    """Each image with its mean square error, infinite where an output is not finite, and its outputs."""
    errors = np.zeros(len(images))
    for output, reference in zip(outputs, expected, strict=True):
        difference = np.square((output - reference).reshape(len(images), -1), dtype=np.float64).mean(1)
        errors += np.nan_to_num(difference, nan=np.inf, posinf=np.inf)
    return [(float(error), images[row], tuple(one[row] for one in outputs)) for row, error in enumerate(errors)]


def _parts(
    chain: Chain, shown: Mapping[str, Array], images: Array, outputs: Outputs, tolerances: Callable[[str], Tolerance]
) -> Iterator[Part]:
    """The parts in order, up to the first whose output is not finite."""
    x, truth, waiting = images, images, list[str]()
    for name in chain.names:
        truth = chain.run(name, truth)
        waiting.append(name)
        if name not in shown:
            continue
        expected = x
        for one in waiting:
            expected = chain.run(one, expected)
        adds = expected - x if len(waiting) == 1 and chain.is_block(name) else expected
        y = shown[name]
        yield _part(" … ".join(dict.fromkeys([waiting[0], name])), x, y, expected, adds, truth, tolerances(name))
        if not np.isfinite(y).all():
            return
        x, waiting = y, []
    finished, whole = chain.tail(x), chain.tail(truth)
    if not waiting and finished is not None and whole is not None:
        y, expected, truth = outputs[0], finished[0], whole[0]
        yield _part(TAIL, x, y, expected, expected, truth, tolerances("head"))


def _tolerance(layers: Sequence[Layer], precision: str, part: str) -> Tolerance:
    """The tolerance of a part: that of the narrowest precision of its products, or else of the artifact."""
    found = {"int8" if layer.precision == "uint8" else layer.precision for layer in layers if belongs(layer, part)}
    return max((TOLERANCES[one] for one in found if one in TOLERANCES), default=TOLERANCES[precision])


def _part(name: str, x: Array, y: Array, expected: Array, adds: Array, truth: Array, tolerance: Tolerance) -> Part:
    of_update, of_output = tolerance
    size = reasons.rms(adds) or 1.0
    with np.errstate(invalid="ignore"):
        error, grown = reasons.rms(y - expected) / size, reasons.rms(y - truth) / (float(truth.std()) or 1.0)
    limit = of_update + of_output * reasons.rms(expected) / size
    return Part(name, x, y, expected, error if np.isfinite(error) else np.inf, limit, grown)


def _report(
    artifact: Artifact, chain: Chain, parts: list[Part], options: BisectOptions, more: tuple[Finding, ...]
) -> Report:
    findings = [
        Finding(
            check="bisect", metric="part_error", case=part.name, value=number(100 * part.error), unit="%",
            limit=100 * part.limit, passed=part.passed, detail=f"{_percent(part.grown)} so far",
        )
        for part in parts
    ]  # fmt: skip
    first = next((part for part in parts if not part.passed), None)
    if first is not None:
        text = reasons.of(chain, first.name, first.x, first.y, first.expected, artifact.sidecar.precision)
        findings.insert(
            0, Finding(check="bisect", metric="reason", case=first.name, value=None, passed=False, detail=text)
        )
    return Report(
        passed=first is None,
        recipe={**artifact.sidecar.recipe, "bisect": msgspec.to_builtins(options)},
        artifact=artifact.to_dict(),
        environment=backends.environment(),
        findings=(*findings, *more),
    )


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if np.isfinite(share) else "not finite"
