"""The search for the fewest parts that stay in higher precision so that the artifact keeps its accuracy."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import msgspec

from exporter import verify
from exporter.artifact import Artifact
from exporter.artifact.outputs import WITH_LABELS
from exporter.backends import Array, Bound, Options, Outputs, Runtime, Session, eager
from exporter.build import budget
from exporter.build.int8.work import Work
from exporter.build.int8.workers import Workers
from exporter.build.resolve import Job
from exporter.data.samples import Samples
from exporter.errors import BadRequest, some
from exporter.model.structure import is_in
from exporter.progress import note, step
from exporter.recipe import SEARCHED, Quantization
from exporter.report import Finding, Report
from exporter.verify import VerifyOptions, budgets, outputs

JUDGED = ("accuracy", "multilabel", "neighbours", "parity", "segmentation", "values", "sanity")
"""The checks that keeping parts in higher precision can help."""
DROPS = ("top1_drop", "map_drop", "miou_drop")
AGREEMENTS = ("top1_agreement", "label_agreement", "neighbour_agreement", "pixel_agreement")


@dataclass(frozen=True)
class Candidate:
    """An artifact that was tried: the parts kept in higher precision, and its report."""

    kept: tuple[str, ...]
    artifact: Artifact
    report: Report

    @property
    def passed(self) -> bool:
        """Whether all checks of outputs pass; other failures cannot be helped by keeping parts."""
        return all(f.passed for f in self.report.findings if f.check in JUDGED)

    @property
    def loss(self) -> float:
        """Percentage points of top-1, mAP or mIoU lost; else of agreement with PyTorch; else 100 × (1 − cosine), or of
        values their relative error in percent."""
        drop, agreement = (_first(self.report, metrics) for metrics in (DROPS, AGREEMENTS))
        if drop is not None and drop.value is not None:
            return drop.value
        if agreement is not None and agreement.value is not None:
            return 100 - agreement.value
        if error := self.report.find("relative_error"):
            return inf if error.value is None else error.value
        return 100 * (1 - (self.report.value("cosine") or -1.0))


def _first(report: Report, metrics: Sequence[str]) -> Finding | None:
    """The finding of the first of the metrics that was measured."""
    return next((finding for metric in metrics if (finding := report.find(metric))), None)


class CachedReference:
    """A reference session that runs once over the images and repeats its outputs afterwards."""

    def __init__(self, session: Session) -> None:
        self.session, self.facts, self.streams = session, session.facts, 1
        self.outputs: list[Outputs] = []
        self.position = 0

    def __call__(self, images: Array) -> Outputs:
        """Outputs (N, …) for images (N, C, H, W), computed or from the cache by the number of the call."""
        if self.position == len(self.outputs):
            self.outputs.append(self.session(images))
        self.position += 1
        return self.outputs[self.position - 1]

    def bind(self, batches: Sequence[Array]) -> Bound:
        """As the session does, without the cache."""
        return self.session.bind(batches)

    def rewind(self) -> None:
        """Start again with the first batch."""
        self.position = 0


Judge = Callable[[Work, tuple[str, ...]], Candidate]


def open_data(job: Job) -> Samples | None:
    """The images that the loss is measured on; None for the calibration images.

    Raises: BadRequest for data that cannot be used.
    """
    quantization, sidecar = job.recipe.quantization, job.sidecar
    outputs.check(sidecar, job.recipe.checks)
    if quantization is None:
        return None
    kind = outputs.first(sidecar, job.recipe.checks.outputs)
    if quantization.max_drop is not None and not outputs.has_agreement(kind):
        raise BadRequest(f"--max-drop {quantization.max_drop:g}: the outputs are {kind}, without a top-1; leave it out")
    if quantization.data is None:
        return None
    data = verify.open_data(sidecar, _options(job, quantization.data))
    refuse_few(job, data)
    return data


def _options(job: Job, source: str) -> VerifyOptions:
    """How candidates are verified, before the budget."""
    checks = job.recipe.checks
    judged_by: dict[str, Any] = {name: getattr(checks, name) for name in SEARCHED}
    return VerifyOptions(data=source, weights=job.recipe.model.weights, **judged_by)


def refuse_few(job: Job, data: Samples) -> None:
    """Refuse images on which no candidate could pass, because there are too few of them.

    Raises: BadRequest where the user set a budget, and it fails where the images are too few.
    """
    quantization = job.recipe.quantization
    points = quantization.max_drop if quantization is not None else None
    if points is None or budgets.when_unsure(job.recipe.checks.when_unsure) != "fail":
        return
    if data.labelled and not outputs.has_classes(job.sidecar, job.recipe.checks.outputs):
        return  # of mAP the positive images of each label decide
    if outputs.first(job.sidecar, job.recipe.checks.outputs) in outputs.PIXELS:
        return  # an image has many
    enough = budgets.fewest_images(points, data.labelled)
    if enough is None or data.total < enough:
        needed = f"about {enough:,} are needed" if enough else "no number is enough"
        raise BadRequest(
            f"--max-drop {points:g}: cannot tell with {data.total} images of {data.source} even if nothing is lost, "
            f"{needed}; give more with --data, or --when-unsure warn"
        )


def budgeted(job: Job, samples: Samples) -> VerifyOptions:
    """How artifacts of a job are verified on these images, with the loss that they may have."""
    recipe, sidecar = job.recipe, job.sidecar
    options, quantization = _options(job, samples.source), recipe.quantization or Quantization()
    if quantization.max_drop is None:  # the default budget
        options = msgspec.structs.replace(options, when_unsure=budgets.when_unsure(options.when_unsure, is_set=False))
    points = budget.points(quantization, "int8", samples.source, recipe.model.weights)
    kind = outputs.first(sidecar, options.outputs)
    one_class = outputs.has_one_class_of_pixels(sidecar, kind)
    if one_class and quantization.max_drop is not None:
        raise BadRequest("--max-drop: the network has one class, which every pixel has; leave it out")
    if not outputs.has_agreement(kind) or one_class or (kind == "embedding" and quantization.max_drop is None):
        return options  # the limits of the precision hold
    if points is None:
        note("no loss of accuracy can be measured on these images or weights; cosine and agreement are checked")
        return options
    if samples.labelled:
        return msgspec.structs.replace(options, max_drop=points)
    return msgspec.structs.replace(options, min_agreement=100 - points)


@contextmanager
def judging(work: Work, folder: Path, data: Samples | None, workers: Workers | None = None) -> Iterator[Judge]:
    """A function that builds a candidate in a folder and compares it with PyTorch. PyTorch runs once in this process,
    and on workers once for each candidate unless its outputs are cached there.

    Args:
        work: the calibrated network.
        folder: for the candidates.
        data: the images to compare on; None for the calibration images.
        workers: processes that compare on `data`; by default, and where the job has a reference, this one does.
    """
    samples = data or work.images.to_compare
    refuse_few(work.job, samples)
    options = budgeted(work.job, samples)
    if workers is not None and data is not None and work.job.reference is None:
        yield judge_of(folder, partial(workers.verify, options=options))
        return
    with open_reference(work.job, options, folder) as reference:
        runtime = work.job.runtime
        yield judge_of(folder, lambda artifact: compare(artifact, options, samples, reference, runtime))


def judge_of(folder: Path, compared: Callable[[Artifact], Report]) -> Judge:
    """A function that builds a candidate in a folder and compares it.

    Args:
        folder: for the candidates.
        compared: the report of an artifact.
    """

    def judge(work: Work, kept: tuple[str, ...]) -> Candidate:
        artifact = work.make(kept, Path(tempfile.mkdtemp(dir=folder)))
        return Candidate(kept, artifact, compared(artifact))

    return judge


def compare(
    artifact: Artifact, options: VerifyOptions, samples: Samples, reference: Session, runtime: Runtime[Options]
) -> Report:
    """Compare one of several artifacts with the reference on the same images."""
    if isinstance(reference, CachedReference):
        reference.rewind()
    samples.skipped.clear()
    return verify.verify(artifact, options, samples, reference, runtime)


@contextmanager
def open_reference(job: Job, options: VerifyOptions, folder: Path) -> Iterator[Session]:
    """The job's reference, or else this tool's own network. Its outputs are kept, but for those of a backbone and
    logits of pixels, which are too large."""
    opening: AbstractContextManager[Session]
    if job.reference is not None:
        opening = nullcontext(
            eager.EagerSession(job.reference.with_outputs(job.sidecar.spec), "cpu", recipe=job.sidecar.preprocessing)
        )
    else:
        opening = verify.reference(Artifact(folder / "reference", job.sidecar), options)
    with opening as session:
        spec = job.sidecar.spec
        large = {"tokens", "features"} & set(spec.tasks) or ("segment" in spec.tasks and spec.answer not in WITH_LABELS)
        yield session if large else CachedReference(session)


def sensitivities(work: Work) -> dict[str, float]:
    """The sensitivity of each part (`simulation.sensitivities`)."""
    from exporter.quantize import simulation

    return simulation.sensitivities(work.network.model, work.plan, work.images)


@dataclass(frozen=True)
class Search:
    """The candidates, the best one last, and the sensitivity of each part where it was measured."""

    tried: tuple[Candidate, ...]
    sensitivities: dict[str, float]

    @property
    def limit(self) -> float | None:
        """The budget, in the points of `Candidate.loss`; None where the cosine is judged."""
        drop, agreement = (_first(self.best.report, metrics) for metrics in (DROPS, AGREEMENTS))
        if drop:
            return drop.limit
        return None if agreement is None or agreement.limit is None else 100 - agreement.limit

    @property
    def precision(self) -> str:
        """int8 or fp8."""
        return self.best.artifact.sidecar.precision

    @property
    def best(self) -> Candidate:
        """The candidate to build."""
        return self.tried[-1]


def search(
    work: Work, judge: Judge, sensitivities: Callable[[], dict[str, float]], keep: tuple[str, ...] = ()
) -> Search:
    """Keep as few parts as possible in higher precision, the most sensitive first.

    The first candidate quantizes everything but the parts of `keep`, which no candidate quantizes. If it fails, 1, 2,
    4 … more parts are kept until one passes, and the fewest that pass are found by bisection. If none passes, the best
    is the one that loses least.
    """
    first = judge(work, keep)
    if first.passed:
        return Search((first,), {})
    note(f"{f'with {some(keep)} kept' if keep else 'fully quantized'}, it fails: {first.report.failures}")
    measured = sensitivities()
    order = [part for part in measured if not is_in(part, keep)]
    tried = {0: first}

    def passes(count: int) -> bool:
        if count not in tried:
            step(f"keeping {', '.join(order[:count][:4])}{' …' if count > 4 else ''} in higher precision")
            tried[count] = judge(work, (*keep, *order[:count]))
        return tried[count].passed

    enough = _fewest(passes, len(order) - 1)
    if enough is None:
        enough = min(tried, key=lambda count: (tried[count].loss, count))
    others = [tried[count] for count in sorted(tried) if count != enough]
    return Search((*others, tried[enough]), measured)


def _fewest(passes: Callable[[int], bool], most: int) -> int | None:
    """The smallest count that passes, found by doubling and bisection; None when not even `most` does."""
    low, high = 0, 1
    while high < most and not passes(high):
        low, high = high, high * 2
    high = min(high, most)
    if high < 1 or not passes(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return high
