"""The budget: how much eight bits may lose, and which parts go back to higher precision until it loses no more."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from exporter import backends
from exporter.artifact import Artifact
from exporter.artifact.sidecar import Record
from exporter.backends import Array, Outputs, Session
from exporter.build import pipeline
from exporter.build.int8.work import Work
from exporter.data.samples import Samples, is_synthetic, open_samples
from exporter.errors import BadRequest
from exporter.progress import note, step
from exporter.report import Report

MAX_DROP = 0.5


class Budget(Record, frozen=True):
    """How much int8 may lose, in percentage points of top-1 on `data`; of agreement with eager where the images have
    no labels. Without `data` the calibration images are looked at, which the ranges were fitted to.

    None is `MAX_DROP`, but for synthetic images and random weights: what a network answers there is so near a tie that
    agreement says nothing, and only the limits of int8 itself are held."""

    max_drop: float | None = None
    data: str | None = None

    def on(self, source: str, weights: str) -> float | None:
        """The points for images and weights of these sources, or None where there is nothing to lose.

        Raises: BadRequest when points were asked for all the same.
        """
        synthetic = is_synthetic(source)
        if not synthetic and not weights.startswith("random"):
            return MAX_DROP if self.max_drop is None else self.max_drop
        if self.max_drop is not None:
            what = "the weights are random" if not synthetic else "there are only synthetic images"
            raise BadRequest(
                f"--max-drop {self.max_drop:g}: {what}, on which no loss can be seen; give real images with --data and "
                "trained weights, or leave --max-drop out"
            )
        return None


@dataclass(frozen=True)
class Choice:
    """What was tried: the parts that were kept back, the artifact, and how it was judged."""

    kept: tuple[str, ...]
    artifact: Artifact
    report: Report

    @property
    def holds(self) -> bool:
        """Whether it loses no more than it may, and gives sane answers; what else fails no search could mend."""
        return all(f.passed for f in self.report.findings if f.check in ("accuracy", "parity", "sanity"))

    @property
    def loss(self) -> float:
        """Percentage points of top-1 lost, or of answers other than eager's, or 100 × (1 − cosine)."""
        drop, agreement = self.report.value("top1_drop"), self.report.value("top1_agreement")
        if drop is not None:
            return drop
        if agreement is not None:
            return 100 - agreement
        return 100 * (1 - (self.report.value("cosine") or -1.0))


class Remembered:
    """Eager PyTorch that runs once over the images, and gives the same answers to who looks at these again."""

    def __init__(self, session: Session) -> None:
        self.session, self.facts = session, session.facts
        self.answers: list[Outputs] = []
        self.turn = 0

    def __call__(self, images: Array) -> Outputs:
        """Run, or remember: images (N, 3, H, W) to outputs (N, …)."""
        if self.turn == len(self.answers):
            self.answers.append(self.session(images))
        self.turn += 1
        return self.answers[self.turn - 1]

    def bind(self, batches: Sequence[Array]) -> backends.Bound:
        """As the session does: nothing is remembered."""
        return self.session.bind(batches)

    def again(self) -> None:
        """The first batch is next."""
        self.turn = 0


Judge = Callable[[Work, tuple[str, ...]], Choice]


@contextmanager
def judging(work: Work, budget: Budget, folder: Path) -> Iterator[Judge]:
    """A judge that makes artifacts in a folder and holds them against eager, which runs once.

    Raises: BadRequest for data that cannot be used.
    """
    sidecar = work.sidecar
    opened = _samples(work, budget)
    options = pipeline.VerifyOptions(data=opened.source, weights=work.recipe.weights)
    points = budget.on(opened.source, work.recipe.weights)
    if points is None:
        note(
            "nothing here can show a loss of accuracy; whether it is the same network still, cosine and agreement tell"
        )
    elif opened.labelled and sidecar.task == "classify":
        options = msgspec.structs.replace(options, max_drop=points)
    else:
        options = msgspec.structs.replace(options, min_agreement=100 - points)
    eager = backends.get("eager")
    told = eager.options(weights=work.recipe.weights)  # type: ignore[call-arg]
    subject = Artifact(folder / "eager", sidecar)
    with eager.session(subject, told) as session:
        # A backbone's answers are too large to be remembered.
        reference = Remembered(session) if sidecar.task == "classify" else session

        def judge(work: Work, kept: tuple[str, ...]) -> Choice:
            made = work.make(kept, Path(tempfile.mkdtemp(dir=folder)))
            if isinstance(reference, Remembered):
                reference.again()
            opened.skipped.clear()
            return Choice(kept, made, pipeline.verify(made, options, opened, reference))

        yield judge


def _samples(work: Work, budget: Budget) -> Samples:
    if budget.data is None:
        return work.images.samples
    sidecar = work.sidecar
    return open_samples(budget.data, sidecar.preprocessing, sidecar.labels, sidecar.weights.num_classes)


@dataclass(frozen=True)
class Search:
    """What was tried, the best of it last, and what rounding each part alone does to the outputs."""

    tried: tuple[Choice, ...]
    harms: dict[str, float]

    @property
    def limit(self) -> float | None:
        """The budget in the points that `Choice.loss` is in; None where the cosine is judged."""
        drop, agreement = (self.best.report.find(metric) for metric in ("top1_drop", "top1_agreement"))
        if drop:
            return drop.limit
        return None if agreement is None or agreement.limit is None else 100 - agreement.limit

    @property
    def precision(self) -> str:
        """int8 or fp8."""
        return self.best.artifact.sidecar.precision

    @property
    def best(self) -> Choice:
        """The choice to be built."""
        return self.tried[-1]


def search(work: Work, judge: Judge, harms: Callable[[], dict[str, float]]) -> Search:
    """Keep back as few parts as will do, the most harmful first.

    The first build rounds everything. If it does not hold, 1, 2, 4 … parts are kept back until one does, and the
    fewest that do are found by halving. If none does, the best is that which loses least.
    """
    first = judge(work, ())
    if first.holds:
        return Search((first,), {})
    note(f"eight bits throughout do not hold: {_why(first)}")
    found = harms()
    order = list(found)
    tried = {0: first}

    def holds(count: int) -> bool:
        if count not in tried:
            step(f"keeping back {', '.join(order[:count][:4])}{' …' if count > 4 else ''}")
            tried[count] = judge(work, tuple(order[:count]))
        return tried[count].holds

    enough = _fewest(holds, len(order) - 1)
    if enough is None:
        enough = min(tried, key=lambda count: (tried[count].loss, count))
    others = [tried[count] for count in sorted(tried) if count != enough]
    return Search((*others, tried[enough]), found)


def _fewest(holds: Callable[[int], bool], most: int) -> int | None:
    """The smallest count that holds, found by doubling and halving; None when not even `most` does."""
    high = 1
    while high < most and not holds(high):
        high *= 2
    high = min(high, most)
    if high < 1 or not holds(high):
        return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _why(choice: Choice) -> str:
    failed: Sequence[str] = [
        f"{f.metric} {f.value:.6g}, limit {f.limit:.6g}" if f.value is not None else f"{f.metric} is no number"
        for f in choice.report.findings
        if not f.passed and f.limit is not None
    ]
    return "; ".join(failed)
