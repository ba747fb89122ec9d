"""Accuracy of an artifact, compared with PyTorch on the same images."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import msgspec

from exporter import artifact as artifacts
from exporter import backends
from exporter.artifact import Artifact
from exporter.artifact.outputs import DENSE
from exporter.artifact.sidecar import Sidecar
from exporter.backends import Array, Layer, Options, Runtime, Session, eager
from exporter.data import masks
from exporter.data.samples import Samples, is_synthetic, open_samples
from exporter.errors import BadRequest, Unavailable
from exporter.graph import files, half
from exporter.progress import note, step, track
from exporter.recipe import Checks, MovedWeights, Reference, RuntimeThreads
from exporter.recipe.fields import about
from exporter.report import Finding, Report, judged
from exporter.verify import answers, checks, outputs
from exporter.verify.batches import Pair, Tally
from exporter.verify.batches import batch_size as batch_size
from exporter.verify.batches import run_batch as run_batch
from exporter.verify.blocks import block_errors
from exporter.verify.checks import Meter
from exporter.verify.checks.structure import other_cpu
from exporter.verify.page_images import PageImages, page_images
from exporter.verify.slide import Windows, whole, windows_of

MAX_UNREADABLE_PCT = 10
QUALITY = (
    *("images", "cosine", "max_abs", "top1_agreement", "top1_eager", "top1", "top1_drop"),
    *("relative_error", "r2", "spearman"),
    *("pixel_agreement", "boundary_agreement", "miou_to_eager", "miou_eager", "miou", "miou_drop"),
    *("label_agreement", "map_eager", "map", "map_drop", "neighbour_agreement"),
)
"""The metrics that an artifact's sidecar keeps."""


class VerifyOptions(Checks, frozen=True):
    """Options of `verify`."""

    weights: MovedWeights = None
    reference: Annotated[
        Reference | None,
        about(
            "Compare with this model instead: module:callable, or timm, transformers or torchvision.", metavar="NAME"
        ),
    ] = None
    threads: RuntimeThreads = None
    blocks: Annotated[bool, about("Also compare the output of each ConvNeXt block, on the first images.")] = False


def verify(
    artifact: Artifact,
    options: VerifyOptions,
    samples: Samples | None = None,
    reference_session: Session | None = None,
    runtime: Runtime[Options] | None = None,
) -> Report:
    """Compare an artifact with PyTorch on the same images.

    Args:
        artifact: what to verify.
        options: the data, the limits, the path of the weights.
        samples: the images, if they are already open.
        reference_session: PyTorch, if it is already open.
        runtime: opens the artifact; by default the one that its sidecar names.

    Raises: BadRequest for data, weights or a device that cannot be used; Unavailable when the device or weights are
    missing.
    """
    runtime, samples = prepared(artifact, options, samples, runtime)
    layers = layers_of(artifact, runtime, options)
    with open_runnable(artifact, runtime) as runnable:
        measured = _measured(artifact, runnable, layers, options, samples, reference_session)
    environment = {**backends.environment(), "session": measured.facts}
    return report_of(artifact, options, measured.findings, environment, measured.images, measured.page_images)


def prepared(
    artifact: Artifact,
    options: VerifyOptions,
    samples: Samples | None = None,
    runtime: Runtime[Options] | None = None,
) -> tuple[Runtime[Options], Samples]:
    """The runtime and the images of a verification, after everything that can be refused was refused.

    Raises: as `verify` does.
    """
    sidecar = artifact.sidecar
    if runtime is None:
        runtime = backends.runtime_of(artifact)
        backends.device_of(artifact, options.device)  # refuses one that the runtime does not take
    outputs.check(sidecar, options)
    windows = windows_of(sidecar, options)
    if windows is not None and options.blocks:
        raise BadRequest("--blocks: compares images of one size, and --slide keeps their aspect ratios; leave one out")
    if options.reference is not None and options.blocks:
        raise BadRequest(
            f"--blocks: compares blocks of this tool's network, and {options.reference} has modules of its own; build "
            f"the artifact with --reference {options.reference} to compare each module, or leave --blocks out"
        )
    samples = samples or open_data(sidecar, options, windows)
    outputs.refuse_limits(sidecar, options, samples.labelled)
    return runtime, samples


def layers_of(artifact: Artifact, runtime: Runtime[Options], options: VerifyOptions) -> list[Layer]:
    """The layers of an artifact, where its runtime lists them."""
    session_options = Runnable(artifact, runtime).options(options.device, options.threads)
    return runtime.layers(artifact, session_options) if runtime.layers is not None else []


def report_of(
    artifact: Artifact,
    options: VerifyOptions,
    findings: Sequence[Finding],
    environment: dict[str, object],
    images: str,
    of_page: PageImages,
) -> Report:
    """The report of a verification; `images` is a digest of the images in their order, with their classes. It leaves
    out the quality that an earlier verification wrote to the sidecar, so the same verification gives the same bytes."""
    facts = msgspec.structs.replace(artifact.sidecar, quality={}, seal="")
    return Report(
        passed=all(finding.passed for finding in findings),
        recipe={**artifact.sidecar.recipe, "verify": {**msgspec.to_builtins(options), "images": images}},
        artifact=Artifact(artifact.path, facts).to_dict(),
        environment=environment,
        findings=tuple(findings),
        pictures=of_page.pictures,
        differences=of_page.differences,
    )


def open_data(sidecar: Sidecar, options: Checks, windows: Windows | None = None) -> Samples:
    """The images to verify on, with their labels where the outputs are scores of classes or of labels, or with masks
    where they are of each pixel. With windows images keep their aspect ratio.

    Raises: BadRequest for data that cannot be used.
    """
    if outputs.has_masks(sidecar) and (pairs := masks.pairs_of(options.data)) is not None:
        values = masks.Values(sidecar.weights.num_classes, options.reduce_zero_label)
        preprocessing_of = (
            partial(whole, sidecar.preprocessing, windows) if windows else lambda _: sidecar.preprocessing
        )
        return masks.open_masks(options.data, pairs, preprocessing_of, values, options.samples)
    if windows:
        raise BadRequest(
            f"--slide: {options.data} has no masks to measure mIoU with; leave --slide out, or give --data with masks"
        )
    if options.reduce_zero_label:
        raise BadRequest(f"--reduce-zero-label: {options.data} has no masks for this artifact; leave it out")
    if set(DENSE) & set(sidecar.spec.tasks) and masks.pairs_of(options.data) is not None:
        why = "the artifact returns no classes at the size of the input"
        if sidecar.weights.num_classes == 1:
            why = "the network has one class"
        note(f"{options.data}: masks are ignored, because {why}")
    if outputs.has_masks(sidecar) and not is_synthetic(options.data):
        note(f"{options.data} has no masks: pixels are compared with PyTorch's, and mIoU is not measured")
    has_labels = outputs.has_labels(sidecar, options.outputs) and not outputs.has_masks(sidecar)
    classes = sidecar.weights.num_classes if has_labels else None
    several = outputs.first(sidecar, options.outputs) == "multilabel"
    return open_samples(options.data, sidecar.preprocessing, sidecar.labels, classes, options.samples, several)


def reference(artifact: Artifact, options: VerifyOptions) -> AbstractContextManager[Session]:
    """The PyTorch model that an artifact was built from, opened for a comparison, with its answers cached (`answers`).

    Raises: BadRequest when the weights have changed; Unavailable when they are missing.
    """
    return answers.open_reference(artifact, _eager_options(options))


def _eager_options(options: VerifyOptions) -> eager.EagerOptions:
    return eager.EagerOptions(threads=options.threads, weights=options.weights, reference=options.reference)


@dataclass(frozen=True)
class Measured:
    """The findings of all checks, the facts of the artifact's session, a digest of the images in their order, with
    their classes, and the images on the page."""

    findings: list[Finding]
    facts: dict[str, str]
    images: str
    page_images: PageImages


def _measured(
    artifact: Artifact,
    runnable: Runnable,
    layers: list[Layer],
    options: VerifyOptions,
    samples: Samples,
    reference_session: Session | None,
) -> Measured:
    """Run the images through both models.

    Raises: BadRequest for blocks of a runtime that does not show them.
    """
    runtime = runnable.runtime
    if options.blocks and runtime.blocks is None:
        raise BadRequest(f"--blocks: {artifact.path}: {runtime.name} does not show the outputs of blocks; leave it out")
    step(f"verifying {artifact.path.name} on {samples.total} images of {options.data}")
    tally = Tally(checks.start_all(options, checks.Subject(artifact, layers)))
    with open_pair(artifact, runnable, options, tally.meters, reference_session) as pair:
        for batch in track(pair.measured(samples), samples.total, "images", lambda batch: len(batch.names)):
            tally.add(batch)
        facts = pair.candidate.facts
    tally.skipped += samples.skipped
    of_machine = [*runnable.findings, *other_cpu(artifact.sidecar.quantization)]
    findings = findings_of(tally, options.data, pair.windows, of_machine)
    if options.blocks:
        images = next(iter(samples.batches(artifact.sidecar.batch or 2))).images
        findings += _compare_blocks(artifact, runnable, layers, options, images)
    return Measured(findings, facts, tally.digest.hexdigest(), page_images([tally]))


@contextmanager
def open_pair(
    artifact: Artifact,
    runnable: Runnable,
    options: VerifyOptions,
    meters: Mapping[str, Meter],
    reference_session: Session | None = None,
) -> Iterator[Pair]:
    """An artifact and the PyTorch model that it is compared with, both opened.

    Raises: as `verify` does.
    """
    opening = nullcontext(reference_session) if reference_session else reference(artifact, options)
    session_options = runnable.options(options.device, options.threads)
    with opening as original, runnable.runtime.open(runnable.artifact, session_options) as candidate:
        yield Pair(artifact, original, candidate, meters, windows_of(artifact.sidecar, options), options.reference)


def findings_of(tally: Tally, source: str, windows: Windows | None, others: Sequence[Finding] = ()) -> list[Finding]:
    """The findings of all checks, others, and those of the images that were read and skipped.

    Raises: BadRequest where no image could be read.
    """
    if not tally.count:
        raise BadRequest(f"{source}: none of its {len(tally.skipped)} images can be read ({tally.skipped[0]})")
    findings = [finding for meter in tally.meters.values() for finding in meter.findings()]
    return [*findings, *others, *_data_findings(tally.skipped, tally.count, source, windows)]


def _compare_blocks(
    artifact: Artifact, runnable: Runnable, layers: list[Layer], options: VerifyOptions, images: Array
) -> list[Finding]:
    step("comparing block by block")
    assert eager.RUNTIME.blocks is not None
    assert runnable.runtime.blocks is not None
    with (
        eager.RUNTIME.blocks(artifact, _eager_options(options)) as expected,
        runnable.runtime.blocks(runnable.artifact, runnable.options(options.device, options.threads)) as measured,
    ):
        return block_errors(expected, measured, layers, images, artifact.sidecar.batch)


@dataclass(frozen=True)
class Runnable:
    """The artifact that is run to measure accuracy, its runtime, and a finding if it replaces another artifact."""

    artifact: Artifact
    runtime: Runtime[Options]
    findings: tuple[Finding, ...] = ()

    @property
    def is_simulated(self) -> bool:
        """Whether it replaces an artifact that cannot run here."""
        return bool(self.findings)

    def options(self, device: str | None, threads: int | None) -> Options:
        """The options of its sessions. A replacement runs on the default device of its own runtime."""
        if device is None or self.is_simulated:
            device = next(iter(self.runtime.devices))
        return self.runtime.options(device=device.lower(), threads=threads)


@contextmanager
def open_runnable(artifact: Artifact, runtime: Runtime[Options]) -> Iterator[Runnable]:
    """The artifact, or, if it cannot run here, the ONNX graph that it was built from, with every result rounded to its
    precision.

    Raises: Unavailable when the artifact cannot run and its ONNX graph is missing.
    """
    reason = runtime.unable()
    if not reason:
        yield Runnable(artifact, runtime)
        return
    parents = parents_of(artifact)
    if not parents:
        raise Unavailable(f"{artifact.path}: {reason}, and the ONNX graph that it was built from is missing")
    parent = artifacts.load(parents[0])
    stand_in = backends.runtime_of(parent)
    target = backends.target(stand_in.name)
    if parent.sidecar.quantization is None and parent.sidecar.precision not in target.precisions:
        raise Unavailable(
            f"{artifact.path}: {reason}, and {stand_in.name} cannot run its graph in {parent.sidecar.precision}"
        )
    detail = f"{parent.path.name}, which it was built from, ran on {stand_in.name}: {reason}"
    if parent.sidecar.precision != "fp32":
        detail += "; every fp16 result was rounded"
    elif artifact.sidecar.target.get("tf32"):
        detail += "; products were not rounded to TF32"
    step(f"simulated, not run: {detail}")
    with tempfile.TemporaryDirectory(prefix="convnext-export-") as folder:
        path = Path(folder) / parent.path.name
        _write_rounding(parent.path, path)
        finding = Finding(check="data", metric="simulated", value=1.0, detail=detail)
        yield Runnable(Artifact(path, parent.sidecar), stand_in, (finding,))


def graphs_of(artifact: Artifact) -> list[Artifact]:
    """The ONNX graphs that run in place of an artifact that cannot run here."""
    graphs = []
    for path in parents_of(artifact) if backends.runtime_of(artifact).unable() else []:
        with suppress(BadRequest):
            graphs.append(artifacts.load(path))
    return graphs


def parents_of(artifact: Artifact) -> list[Path]:
    """The ONNX graphs beside an artifact that it was built from. Files of other versions or of other tools that are
    named like a sidecar are none."""
    parents = []
    for path in sorted(artifact.path.parent.glob("*.onnx.json")):
        with suppress(BadRequest):
            graph = path.with_suffix("")
            if artifacts.read_sidecar(graph).sha256 in artifact.sidecar.parents:
                parents.append(graph)
    return parents


def _write_rounding(graph: Path, path: Path) -> None:
    import onnx_ir as ir

    model = ir.load(graph)
    half.round_results(model)
    files.save(model, path, {})


def _data_findings(skipped: Sequence[str], seen: int, source: str, windows: Windows | None) -> list[Finding]:
    """The number of images that were measured, and the unreadable ones by name; too many unreadable images fail."""
    detail = f"{seen} of {source}" + (f", in {windows.text}" if windows else "")
    if is_synthetic(source):
        detail += " images (dead leaves): parity is measured, accuracy needs --data"
    findings = [Finding(check="data", metric="images", value=seen, unit="images", detail=detail)]
    if skipped:
        shown = "; ".join(skipped[:20]) + (f"; and {len(skipped) - 20} more" if len(skipped) > 20 else "")
        share = 100 * len(skipped) / (seen + len(skipped))
        unreadable = Finding(
            check="data", metric="unreadable", value=share, unit="%", detail=f"{len(skipped)}: {shown}"
        )
        findings.append(judged(unreadable, MAX_UNREADABLE_PCT, "low"))
    return findings


def record_quality(artifact: Artifact, report: Report) -> None:
    """Write the accuracy from a report to the artifact's sidecar; none of a metric that was measured on several kinds
    of processors."""
    times = Counter(finding.metric for finding in report.findings)
    values = {metric: report.value(metric) for metric in QUALITY if times[metric] == 1}
    known = {metric: float(value) for metric, value in values.items() if value is not None}
    data = str(report.recipe["verify"]["data"])
    others = {"windows": "yes"} if report.recipe["verify"].get("slide") else {}
    if reference := report.recipe["verify"].get("reference"):
        others["reference"] = str(reference)
    artifacts.update_quality(artifact, {"data": data, "passed": "yes" if report.passed else "no", **others, **known})
