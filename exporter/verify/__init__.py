"""An artifact held against eager PyTorch on the same images."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from exporter import artifact as artifacts
from exporter import backends, machine
from exporter.artifact import Artifact
from exporter.backends import Array, Layer, Outputs, Session
from exporter.data.samples import Samples, is_synthetic, open_samples
from exporter.errors import BadRequest, Unavailable
from exporter.graph import files, half
from exporter.progress import step, track
from exporter.report import Finding, Report, judged
from exporter.verify import checks
from exporter.verify.blocks import block_errors

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
    backend = backends.get(sidecar.backend)
    samples = samples or open_samples(
        options.data, sidecar.preprocessing, sidecar.labels, sidecar.weights.num_classes, options.most
    )
    if options.max_drop is not None and not (samples.labelled and sidecar.task == "classify"):
        raise BadRequest(f"--max-drop: {options.data} has no labels to measure a drop on; give labelled --data")
    layers = backend.layers(artifact, backend.options(device=options.device, threads=options.threads))
    with _runnable(artifact, backend) as runs:
        findings, facts = _findings(artifact, runs, layers, options, samples, reference)
    return Report(
        passed=all(finding.passed for finding in findings),
        recipe={**sidecar.recipe, "verify": msgspec.to_builtins(options)},
        artifact=artifact.to_dict(),
        environment={**machine.environment(), "session": facts},
        findings=tuple(findings),
    )


def _findings(
    artifact: Artifact,
    runs: Runnable,
    layers: list[Layer],
    options: VerifyOptions,
    samples: Samples,
    reference: Session | None,
) -> tuple[list[Finding], dict[str, str]]:
    """What the checks found, and the facts of the session that they looked at."""
    eager = backends.get("eager")
    told = runs.backend.options(device=options.device, threads=options.threads)
    eager_told = eager.options(threads=options.threads, weights=options.weights)  # type: ignore[call-arg]
    meters = checks.start_all(options, checks.Subject(artifact, layers))
    step(f"verifying {artifact.path.name} on {samples.total} images of {options.data}")
    held = nullcontext(reference) if reference else eager.session(artifact, eager_told)
    fixed = artifact.sidecar.inputs[0].shape[0]
    seen = 0
    with held as original, runs.backend.session(runs.artifact, told) as candidate:
        size = fixed if isinstance(fixed, int) else BATCH
        for batch in track(samples.batches(size), samples.total, "images", lambda batch: len(batch.names)):
            seen += len(batch.names)
            both = [run_batch(session, batch.images, fixed) for session in (original, candidate)]
            for meter in meters:
                meter.see(checks.Seen(batch.labels, *both))
        facts = candidate.facts
    if not seen:
        raise BadRequest(f"{options.data}: none of its {samples.total} images can be read ({samples.skipped[0]})")
    findings = [finding for meter in meters for finding in meter.findings()]
    findings += [*runs.simulated, *_data_findings(samples.skipped, seen, options.data)]
    if options.blocks:
        step("comparing block by block")
        images_seen = next(iter(samples.batches(fixed if isinstance(fixed, int) else 2))).images
        with eager.blocks(artifact, eager_told) as expected, runs.backend.blocks(runs.artifact, told) as given:
            findings += block_errors(expected, given, layers, images_seen)
    return findings, facts


@dataclass(frozen=True)
class Runnable:
    """What shows the accuracy of an artifact here, and the finding that says so when it is not the artifact itself."""

    artifact: Artifact
    backend: backends.Backend[backends.Options]
    simulated: tuple[Finding, ...] = ()


@contextmanager
def _runnable(artifact: Artifact, backend: backends.Backend[backends.Options]) -> Iterator[Runnable]:
    """An artifact itself; or, where it cannot run, the very graph that it was built from, with every result rounded to
    its precision.

    Raises: Unavailable when it cannot run and that graph is not beside it.
    """
    why = backend.unable()
    if not why:
        yield Runnable(artifact, backend)
        return
    beside = [path.with_suffix("") for path in sorted(artifact.path.parent.glob("*.onnx.json"))]
    parents = [path for path in beside if artifacts.read_sidecar(path).sha256 in artifact.sidecar.parents]
    if not parents:
        raise Unavailable(f"{artifact.path}: {why}, and the graph that it was built from is not beside it")
    parent = artifacts.load(parents[0])
    runtime = backends.get(parent.sidecar.backend)
    if parent.sidecar.quantization is None and parent.sidecar.precision not in runtime.precisions:
        raise Unavailable(
            f"{artifact.path}: {why}, and {runtime.name} cannot run its graph in {parent.sidecar.precision}"
        )
    detail = f"{parent.path.name}, which it was built from, ran on {runtime.name}: {why}"
    if parent.sidecar.precision != "fp32":
        detail += "; every fp16 result was rounded"
    step(f"not run, but simulated: {detail}")
    with tempfile.TemporaryDirectory(prefix="convnext-export-") as folder:
        path = Path(folder) / parent.path.name
        _write_rounding(parent.path, path)
        finding = Finding(check="data", metric="simulated", value=1, detail=detail)
        yield Runnable(Artifact(path, parent.sidecar), runtime, (finding,))


def _write_rounding(graph: Path, path: Path) -> None:
    import onnx_ir as ir

    model = ir.load(graph)
    half.round_results(model)
    files.save(model, path, {})


def run_batch(session: Session, pixels: Array, fixed: int | str) -> Outputs:
    """One batch; for an artifact of a fixed batch the last one is filled up and cut again."""
    count = len(pixels)
    if isinstance(fixed, int) and count < fixed:
        pixels = np.concatenate([pixels, np.repeat(pixels[-1:], fixed - count, axis=0)])
    return tuple(output[:count] for output in session(pixels))


def _data_findings(skipped: list[str], seen: int, source: str) -> list[Finding]:
    """How many images were measured, and how many could not be read, by name; too many of these is a failure."""
    detail = f"{seen} of {source}"
    if is_synthetic(source):
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
