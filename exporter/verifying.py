"""An artifact held against eager PyTorch on the same images."""

from __future__ import annotations

from contextlib import nullcontext

import msgspec
import numpy as np

from exporter import artifact as artifacts
from exporter import backends, checks
from exporter.artifact import Artifact
from exporter.backends import Array, Outputs, Session
from exporter.checks._blocks import block_errors
from exporter.data.samples import Samples, open_samples
from exporter.errors import BadRequest, Unavailable
from exporter.measure import machine
from exporter.progress import step, track
from exporter.report import Finding, Report, judged

BATCH = 16
MAX_UNREADABLE_PCT = 10


class VerifyOptions(checks.Options, frozen=True):
    """What `verify` can be told. `data` as in `open_samples`; `weights` says where the checkpoint lies now; `blocks`
    compares the output of every block too, on the first batch."""

    data: str = "synthetic"
    most: int | None = None
    weights: str | None = None
    device: str = "cpu"
    threads: int | None = None
    blocks: bool = False


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
    runs, backend, simulated = _runnable(artifact, backend)
    meters = checks.start_all(options, checks.Subject(artifact, layers))
    step(f"verifying {artifact.path.name} on {samples.total} images of {options.data}")
    eager_told = eager.options(threads=options.threads, weights=options.weights)  # type: ignore[call-arg]
    held = nullcontext(reference) if reference else eager.session(artifact, eager_told)
    with held as original, backend.session(runs, told) as candidate:
        fixed = sidecar.inputs[0].shape[0]
        size = fixed if isinstance(fixed, int) else BATCH
        seen = 0
        for batch in track(samples.batches(size), samples.total, "images", lambda batch: len(batch.names)):
            seen += len(batch.names)
            both = [run_batch(session, batch.images, fixed) for session in (original, candidate)]
            for meter in meters:
                meter.see(checks.Seen(batch.labels, *both))
        facts = candidate.facts
    if not seen:
        raise BadRequest(f"{options.data}: none of its {samples.total} images can be read ({samples.skipped[0]})")
    findings = [finding for meter in meters for finding in meter.findings()]
    findings += [*simulated, *_data_findings(samples.skipped, seen, options.data)]
    if options.blocks:
        step("comparing block by block")
        images_seen = next(iter(samples.batches(fixed if isinstance(fixed, int) else 2))).images
        with eager.blocks(artifact, eager_told) as expected, backend.blocks(runs, told) as given:
            findings += block_errors(expected, given, layers, images_seen)
    return Report(
        passed=all(finding.passed for finding in findings),
        recipe={**sidecar.recipe, "verify": msgspec.to_builtins(options)},
        artifact=artifact.to_dict(),
        environment={**machine.environment(), "session": facts},
        findings=tuple(findings),
    )


def _runnable(
    artifact: Artifact, backend: backends.Backend[backends.Options]
) -> tuple[Artifact, backends.Backend[backends.Options], list[Finding]]:
    """What shows the accuracy of an artifact here: itself; or, where it cannot run, the very graph that it was built
    from, which a report then says.

    Raises: Unavailable when it cannot run and that graph is not beside it.
    """
    why = backend.unable()
    if not why:
        return artifact, backend, []
    beside = [path.with_suffix("") for path in sorted(artifact.path.parent.glob("*.onnx.json"))]
    parents = [path for path in beside if artifacts.read_sidecar(path).sha256 in artifact.sidecar.parents]
    if not parents:
        raise Unavailable(f"{artifact.path}: {why}, and the graph that it was built from is not beside it")
    parent = artifacts.load(parents[0])
    runtime = backends.get(parent.sidecar.backend)
    if parent.sidecar.precision not in runtime.precisions:
        raise Unavailable(
            f"{artifact.path}: {why}, and {runtime.name} cannot run its graph in {parent.sidecar.precision}"
        )
    detail = f"{parent.path.name}, which it was built from, ran on {parent.sidecar.backend}: {why}"
    step(f"not run, but simulated: {detail}")
    return parent, runtime, [Finding(check="data", metric="simulated", value=1, detail=detail)]


def run_batch(session: Session, pixels: Array, fixed: int | str) -> Outputs:
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
