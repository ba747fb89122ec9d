"""Decides whether a change is a regression, by the limits of `--fail-on`.

A regression of time must be significant by a rank test over launches, corrected for the number of comparisons, and
larger than its limit by more than the noise. For two artifacts the noise is the difference of the base from itself in
the same run, and a suspected regression is measured again, in more processes; only the second measurement counts. For
two reports the noise is the wider of their intervals.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import floor, log2
from typing import Literal

import numpy as np
from msgspec.structs import replace

from exporter.artifact.sidecar import Record
from exporter.bench import flat
from exporter.errors import BadRequest, nearest
from exporter.report import Finding, judged
from exporter.stats import Center, holm, log_change, mean_half_width, paired_drop, percent

ALPHA = 0.01
LEAST_LAUNCHES = 5  # with fewer on both sides no rank test can be significant
DEFAULT_LIMITS = ("p50_ms:5%",)

Blocks = Sequence[Sequence[float]]


def _none(blocks: Blocks) -> float:
    raise TypeError("this metric is not made of times")


@dataclass(frozen=True)
class Metric:
    """How a metric is compared. For times, `of` computes one number from the blocks of a launch, where more is worse.
    The other values of `kind` are exact numbers, and answers to the same images, which the finding `answers` has."""

    kind: Literal["time", "exact", "answers"]
    of: Callable[[Blocks], float] = _none
    higher_is_better: bool = False
    answers: str = ""


def _quantile(share: float) -> Callable[[Blocks], float]:
    return lambda blocks: float(np.quantile(flat(blocks), share))


METRICS = {
    "p50_ms": Metric("time", _quantile(0.5)),
    "p90_ms": Metric("time", _quantile(0.9)),
    "p99_ms": Metric("time", _quantile(0.99)),
    "throughput_ips": Metric("time", lambda blocks: float(np.mean(flat(blocks))), higher_is_better=True),
    "bytes": Metric("exact"),
    "nodes": Metric("exact"),
    "top1_drop": Metric("answers", answers="top1"),
    "map_drop": Metric("answers", answers="map"),
    "miou_drop": Metric("answers", answers="miou"),
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
    match = re.fullmatch(r"(\w+):(\d+(?:\.\d+)?)(%?)", word.strip())
    if match is None:
        raise BadRequest(
            f"--fail-on {word}: expected METRIC:NUMBER or METRIC:NUMBER%, as in p50_ms:5% or top1_drop:0.3"
        )
    name, most, sign = match.groups()
    if name not in METRICS:
        raise BadRequest(f"--fail-on {word}: unknown metric {name!r}; {nearest(name, METRICS)}")
    kind = METRICS[name].kind
    if (kind == "time" and not sign) or (kind == "answers" and sign):
        expected = f"{name}:5%" if kind == "time" else f"{name}:0.3 (points)"
        raise BadRequest(
            f"--fail-on {word}: {name} is compared in {'percent' if kind == 'time' else 'points'}: {expected}"
        )
    if sign and float(most) >= 100 and METRICS[name].higher_is_better:
        raise BadRequest(f"--fail-on {word}: {name} cannot decrease by {most} %; give less than 100")
    return Limit(metric=name, most=float(most), relative=bool(sign))


def parse_limits(words: Sequence[str]) -> tuple[Limit, ...]:
    """Parse every `--fail-on`, at most one for each metric.

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
    """One comparison of times. Except for the medians, values are logarithms of ratios in which more is worse.

    found: head compared with base, with its 95 % interval; effects: the same for each launch.
    chance: the p-value, if nothing had changed.
    floor: the noise, the largest difference that is expected of two timings of the same artifact.
    base, head: the metric itself, in its unit.
    least_chance: the smallest p-value that a test with this number of processes can give.
    noise, setting: as a finding has them.
    """

    limit: Limit
    case: str
    found: Center
    effects: Sequence[float]
    chance: float
    floor: float
    base: float
    head: float
    least_chance: float = 0.0
    noise: str = ""
    setting: str = ""

    @property
    def most(self) -> float:
        """The limit."""
        share = self.limit.most
        return -log_change(-share) if METRICS[self.limit.metric].higher_is_better else log_change(share)

    @property
    def is_suspicious(self) -> bool:
        """Whether the change has to be measured again."""
        return self.found.value > self.most

    @property
    def may_exceed(self) -> bool:
        """Whether the interval reaches beyond the limit."""
        return self.found.high > self.most

    def detectable(self) -> float:
        """The change that is detected with 90 % probability: above limit plus floor by 1.28 standard errors."""
        return self.most + self.floor + 1.2816 * self.found.half_width / 1.96


def judge(changes: Sequence[Change], confirmed: bool) -> list[Finding]:
    """A finding for each change; only numbers that are `confirmed`, by a second measurement, can fail."""
    chances = holm([change.chance for change in changes])
    return [_finding(change, chance, confirmed, len(changes)) for change, chance in zip(changes, chances, strict=True)]


def processes_needed(comparisons: int) -> int:
    """The fewest processes in which one of so many comparisons can be significant.

    The smallest p-value of the signed ranks of n processes is 2⁻ⁿ. Holm's correction multiplies the smallest of m
    p-values by m, so m · 2⁻ⁿ < α, that is n > log₂(m / α).
    """
    return floor(log2(comparisons / ALPHA)) + 1


def _finding(change: Change, chance: float, confirmed: bool, comparisons: int) -> Finding:
    regressed = chance < ALPHA and change.found.value > change.most + change.floor
    too_few = confirmed and change.is_suspicious and comparisons * change.least_chance >= ALPHA
    flip = -1 if METRICS[change.limit.metric].higher_is_better else 1
    low, high = sorted(percent(flip * end) for end in (change.found.low, change.found.high))
    detail = (
        f"{_verdict(change, regressed, too_few)}: {change.base:.4g} → {change.head:.4g}; p {chance:.2g} over "
        f"{len(change.effects)} processes; the noise is {percent(change.floor):.1f} %; "
        f"a change of {percent(change.detectable()):.1f} % would have been detected"
    )
    return Finding(
        check="regression",
        metric=change.limit.metric,
        case=change.case,
        value=percent(flip * change.found.value),
        unit="%",
        limit=flip * change.limit.most,
        passed=not (regressed and confirmed),
        detail=detail,
        low=low,
        high=high,
        samples=tuple(round(percent(flip * effect), 4) for effect in change.effects),
        noise=change.noise,
        setting=change.setting,
        unsure=not regressed and change.may_exceed,
    )


def _verdict(change: Change, regressed: bool, too_few: bool) -> str:
    if regressed:
        return "regressed"
    if too_few:
        return "above the limit, but too few processes for so many comparisons: compare fewer at once"
    if change.is_suspicious:
        return "above the limit, but not beyond the noise of this machine"
    if change.may_exceed:
        return (
            "no regression, but the interval reaches beyond the limit (timing for longer, with --duration, narrows it)"
        )
    return "better" if change.found.high < 0 else "no regression"


def compare_exact(limit: Limit, base: float, head: float) -> Finding:
    """A finding for a number without noise."""
    grown = head - base
    value = 100 * grown / max(base, 1.0) if limit.relative else grown
    return judged(
        Finding(
            check="regression",
            metric=limit.metric,
            value=value,
            unit="%" if limit.relative else "",
            detail=f"{base:,.0f} → {head:,.0f}",
        ),
        limit.most,
        "low",
    )


def compare_answers(limit: Limit, base: Finding, head: Finding) -> Finding:
    """The loss of top-1, mAP or mIoU of head compared with base on the same images, in points; a loss within its
    interval passes. A mean of fewer than three images has no interval, and is judged without.

    Args:
        limit: of a metric of answers.
        base, head: with a sample for each image: for top-1 whether it is right, else its part in mAP or mIoU.

    Raises: BadRequest when the images differ.
    """
    count = len(base.samples)
    if count != len(head.samples) or not count:
        raise BadRequest(
            f"{limit.metric}: base answered {count} images and head {len(head.samples)}; verify both on the same --data"
        )
    drop = _top1_drop(base, head) if limit.metric == "top1_drop" else _mean_drop(limit.metric, base, head)
    significant = drop.low is None or drop.low > 0
    within = drop.value is None or drop.value <= limit.most
    may_exceed = drop.high is not None and drop.high > limit.most
    detail = drop.detail
    if not within and not significant:
        detail += "; above the limit, but within the noise of few images"
    elif within and may_exceed:
        detail += "; the interval reaches beyond the limit (more images narrow it)"
    result = judged(replace(drop, metric=limit.metric, detail=detail), limit.most, "low")
    passed = result.passed or not significant
    return replace(result, passed=passed, unsure=passed and may_exceed)


def _mean_drop(metric: str, base: Finding, head: Finding) -> Finding:
    """The difference of two mAPs or mIoUs, with Student's interval of the paired differences of the images' parts."""
    value = (base.value or 0.0) - (head.value or 0.0)
    half = mean_half_width(np.subtract(base.samples, head.samples).tolist())
    return Finding(
        check="regression",
        metric=metric,
        value=value,
        unit="points",
        low=None if half is None else value - half,
        high=None if half is None else value + half,
        detail=f"{base.value:.2f} → {head.value:.2f} % on {len(base.samples)} images",
    )


def _top1_drop(base: Finding, head: Finding) -> Finding:
    drop = paired_drop([one > 0 for one in base.samples], [one > 0 for one in head.samples])
    return Finding(
        check="regression",
        metric="top1_drop",
        value=drop.value,
        unit="points",
        low=drop.low,
        high=drop.high,
        detail=f"{drop.lost} images lost and {drop.won} won of {len(base.samples)}",
    )
