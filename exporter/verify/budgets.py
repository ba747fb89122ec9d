"""Budgets of accuracy: one rule, whether they are measured with labels or without.

A budget fails when the 95 % interval lies beyond it and passes when the interval lies within it. In between, these
images are too few, and the choice `--when-unsure` decides.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from msgspec.structs import replace

from exporter.progress import note
from exporter.recipe import WhenUnsure
from exporter.report import Finding
from exporter.stats import drop_interval, proportion

CI_SERVICES = ("TF_BUILD", "JENKINS_URL", "TEAMCITY_VERSION", "CODEBUILD_BUILD_ID")  # that do not set CI
MOST_IMAGES = 10**8  # a budget that needs more is at the measured value

Interval = tuple[float, float]


@dataclass(frozen=True)
class Budget:
    """A limit of a share of images. If `better` is "low", values above it are beyond it, if "high" values below."""

    limit: float
    better: Literal["low", "high"]
    when_unsure: WhenUnsure

    def is_kept(self, interval: Interval) -> bool:
        """Whether an interval lies within the budget."""
        return interval[1] <= self.limit if self.better == "low" else interval[0] >= self.limit

    def is_exceeded(self, interval: Interval) -> bool:
        """Whether an interval lies beyond the budget."""
        return interval[0] > self.limit if self.better == "low" else interval[1] < self.limit


def when_unsure(wanted: WhenUnsure | None, is_set: bool = True) -> WhenUnsure:
    """What happens in between: the user's choice; else a budget that was set fails in CI and warns elsewhere, and a
    precision's own limit warns.

    Args:
        wanted: `--when-unsure`.
        is_set: whether the user set the budget.
    """
    return wanted or ("fail" if is_set and in_ci() else "warn")


def in_ci() -> bool:
    """Whether a continuous integration runs this: most set CI=true, and some have a variable of their own."""
    return os.environ.get("CI", "").lower() in ("true", "1", "yes") or any(os.environ.get(name) for name in CI_SERVICES)


def judged(
    finding: Finding, budget: Budget, images: int, interval_of: Callable[[int], Interval], why_passes: str = ""
) -> Finding:
    """The finding with its verdict.

    Args:
        finding: with its interval.
        budget: the limit.
        images: how many were measured.
        interval_of: the interval if so many images had given the same shares.
        why_passes: why it passes in between, in place of the number of images that would decide it.
    """
    assert finding.interval is not None
    if budget.is_exceeded(finding.interval) or budget.is_kept(finding.interval):
        return replace(finding, limit=budget.limit, passed=budget.is_kept(finding.interval))
    enough = fewest(images, lambda count: _is_decided(budget, interval_of(count)))
    more = f"about {enough:,} are needed" if enough else "no number of images is enough, as the value is at the limit"
    text = {
        "pass": why_passes or f"{images:,} images are too few to judge by, {more}",
        "warn": f"cannot tell with {images:,} images, {more}",
        "fail": f"cannot tell with {images:,} images, {more}; --when-unsure warn lets it pass",
    }[budget.when_unsure]
    if budget.when_unsure != "pass":
        note(f"{finding.metric} {finding.value:.4g} {finding.unit}, limit {budget.limit:g}: {text}")
    passed, warns = budget.when_unsure != "fail", budget.when_unsure == "warn"
    return replace(finding, limit=budget.limit, passed=passed, unsure=warns, detail=f"{finding.detail}; {text}")


def _is_decided(budget: Budget, interval: Interval) -> bool:
    return budget.is_kept(interval) or budget.is_exceeded(interval)


def fewest(count: int, is_enough: Callable[[int], bool]) -> int | None:
    """About the smallest number of images from `count` on that is enough, rounded up to two digits; None where even
    `MOST_IMAGES` are not."""
    high = count
    while not is_enough(high):
        high *= 2
        if high > MOST_IMAGES:
            return None
    low = high // 2
    while high - low > max(1, high // 200):
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    step: int = 10 ** max(0, len(str(high)) - 2)
    return -(-high // step) * step


def fewest_images(points: float, labelled: bool) -> int | None:
    """About the smallest number of images on which a loss of so many points can be excluded if not one is lost."""
    if labelled:
        return fewest(1, lambda count: drop_interval(0, 0, count)[1] <= points)
    return fewest(1, lambda count: proportion(count, count).low >= 100 - points)
