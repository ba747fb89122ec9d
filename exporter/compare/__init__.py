"""Did it regress? Limits as a user gives them, and the only place that says yes.

A regression of time must be significant by a rank test over launches, corrected for the number of comparisons, and
larger than its limit by more than the noise floor: what the base differed by from itself in the same run. Whatever
looks like one is measured again, longer, and only the second measurement counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from exporter.artifact import Record
from exporter.bench import flat
from exporter.errors import BadRequest, nearest
from exporter.measure.stats import center, holm, is_above, log_change, percent
from exporter.report import Finding

ALPHA = 0.01
LEAST_LAUNCHES = 6  # with fewer no rank test can be significant
DEFAULT_LIMITS = ("p50_ms:5%",)

Blocks = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Metric:
    """How a metric is compared. For times, `of` is one number of a launch's blocks, in the unit where more is worse;
    `kind` says what else there is: exact numbers, and answers to the same images."""

    kind: Literal["time", "exact", "answers"]
    of: Callable[[Blocks], float] | None = None
    higher_is_better: bool = False


def _quantile(share: float) -> Callable[[Blocks], float]:
    return lambda blocks: float(np.quantile(flat(blocks), share))


METRICS = {
    "p50_ms": Metric("time", _quantile(0.5)),
    "p90_ms": Metric("time", _quantile(0.9)),
    "p99_ms": Metric("time", _quantile(0.99)),
    "throughput_ips": Metric("time", lambda blocks: float(np.mean(flat(blocks))), higher_is_better=True),
    "bytes": Metric("exact"),
    "nodes": Metric("exact"),
    "top1_drop": Metric("answers"),
}


class Limit(Record, frozen=True):
    """The most that a metric may get worse: in percent of the base, or in its own unit (points, bytes, nodes)."""

    metric: str
    most: float
    relative: bool

    def __str__(self) -> str:
        return f"{self.metric}:{self.most:g}{'%' if self.relative else ''}"


def parse_limit(word: str) -> Limit:
    """`METRIC:NUMBER` or `METRIC:NUMBER%`.

    Raises: BadRequest.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:\.\d+)?)(%?)", word.strip())
    if found is None:
        raise BadRequest(f"--fail-on {word}: expected METRIC:NUMBER or METRIC:NUMBER%, as in p50_ms:5% or top1_drop:0.3")
    name, most, sign = found.groups()
    if name not in METRICS:
        raise BadRequest(f"--fail-on {word}: unknown metric {name!r}; {nearest(name, METRICS)}")
    kind = METRICS[name].kind
    if (kind == "time" and not sign) or (kind == "answers" and sign):
        expected = f"{name}:5%" if kind == "time" else f"{name}:0.3 (points)"
        raise BadRequest(f"--fail-on {word}: {name} is compared in {'percent' if kind == 'time' else 'points'}: {expected}")
    if sign and float(most) >= 100 and METRICS[name].higher_is_better:
        raise BadRequest(f"--fail-on {word}: {name} cannot fall by {most} %; give less than 100")
    return Limit(metric=name, most=float(most), relative=bool(sign))


def parse_limits(words: Sequence[str]) -> tuple[Limit, ...]:
    """Every `--fail-on`, at most one for each metric.

    Raises: BadRequest.
    """
    limits = tuple(parse_limit(word) for word in words or DEFAULT_LIMITS)
    names = [limit.metric for limit in limits]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BadRequest(f"--fail-on: {twice[0]} is limited twice; give each metric once")
    return limits


@dataclass(frozen=True)
class Change:
    """One comparison of times: per launch, the logarithm of head ÷ base where more is worse, and of the base against
    itself (empty where it was not measured twice); the medians in ms that a reader knows."""

    limit: Limit
    case: str
    effects: Sequence[float]
    control: Sequence[float]
    base: float
    head: float

    @property
    def most(self) -> float:
        """The limit as a logarithm of a ratio where more is worse."""
        share = self.limit.most
        return -log_change(-share) if METRICS[self.limit.metric].higher_is_better else log_change(share)

    @property
    def floor(self) -> float:
        """The noise floor: the far end of the interval of the base against itself."""
        found = center(self.control)
        return max(abs(found.low), abs(found.high))

    @property
    def is_suspicious(self) -> bool:
        """Whether this has to be looked at again."""
        return center(self.effects).value > self.most

    def detectable(self) -> float:
        """The change that would have been found nine times in ten: beyond limit and floor by 1.28 standard errors."""
        error = center(self.effects).half_width / 1.96
        return self.most + self.floor + 1.2816 * error


def judge(changes: Sequence[Change], confirmed: bool) -> list[Finding]:
    """A finding for each change; `confirmed` says that these numbers are the second look."""
    chances = holm([is_above(change.effects) for change in changes])
    return [_finding(change, chance, confirmed) for change, chance in zip(changes, chances, strict=True)]


def _finding(change: Change, chance: float, confirmed: bool) -> Finding:
    found = center(change.effects)
    regressed = chance < ALPHA and found.value > change.most + change.floor
    flip = -1 if METRICS[change.limit.metric].higher_is_better else 1
    low, high = sorted(percent(flip * end) for end in (found.low, found.high))
    if regressed:
        verdict = "regressed"
    elif found.value > change.most:
        verdict = "above the limit, but not beyond the noise of this machine"
    elif found.high < 0:
        verdict = "better"
    else:
        verdict = "no regression"
    detail = (
        f"{verdict}: {change.base:.4g} → {change.head:.4g}, p {chance:.2g}, {len(change.effects)} launches"
        f"{', measured again' if confirmed else ''}; base against itself ±{percent(change.floor):.1f} %; "
        f"a change of {percent(change.detectable()):.1f} % would have been found"
    )
    return Finding(
        check="regression",
        metric=change.limit.metric,
        case=change.case,
        value=percent(flip * found.value),
        unit="%",
        limit=flip * change.limit.most,
        passed=not (regressed and confirmed),
        detail=detail,
        low=low,
        high=high,
        samples=tuple(round(percent(flip * effect), 4) for effect in change.effects),
    )
