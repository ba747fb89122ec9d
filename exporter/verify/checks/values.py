"""Values: how near those of a regression are to eager's. They have no top-1, and the cosine of one value is a sign."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from exporter.backends import Array
from exporter.precision import ValueLimits
from exporter.recipe import Checks
from exporter.report import Finding, judged, number
from exporter.verify.checks import Check, Rows, Seen, Subject
from exporter.verify.outputs import kinds

EQUAL = "PyTorch's outputs for these images are nearly equal; give other images with --data"
LEAST_IMAGES = 3  # two have only two orders
ROUNDING = 2  # the spread that R² and ranks need, in units of the relative error that passes


@dataclass(frozen=True)
class Value:
    """One value of one output: its name, and eager's and the artifact's for every image (N,)."""

    name: str
    eager: NDArray[np.float64]
    got: NDArray[np.float64]

    @property
    def error(self) -> float:
        """The mean error as a share of the mean size of eager's value."""
        return float(np.abs(self.got - self.eager).mean()) / (float(np.abs(self.eager).mean()) or 1.0)

    @property
    def r2(self) -> float:
        """1 − Σ(error²) / Σ((eager − its mean)²)."""
        spread = float(((self.eager - self.eager.mean()) ** 2).sum())
        return 1 - float(((self.got - self.eager) ** 2).sum()) / spread

    @property
    def rank(self) -> float:
        """Spearman's rank correlation; 0 where all of the artifact's values are equal."""
        from scipy.stats import rankdata

        a, b = (rankdata(x) - (len(x) + 1) / 2 for x in (self.eager, self.got))
        return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())) if b.any() else 0.0

    def varies(self, share: float) -> bool:
        """Whether the standard deviation of eager's values over the images is more than this share of their size.
        Where they lie closer together than errors move them, their order is chance. Where the artifact's values vary
        less than half as much as eager's, errors do not explain that, and a quarter of the share is enough."""
        size, spread = float(np.sqrt((self.eager**2).mean())), float(self.eager.std())
        if float(self.got.std()) < spread / 2:
            share /= 4
        return len(self.eager) >= LEAST_IMAGES and spread > share * size


class Values:
    """Keeps every value of every image: 8 bytes for each."""

    def __init__(self, options: Checks, subject: Subject) -> None:
        sidecar = subject.artifact.sidecar
        own = subject.precision.limits.values
        self.least_spread = ROUNDING * own.relative_error / 100
        given = (options.max_relative_error, options.min_r2, options.min_spearman)
        self.limits = ValueLimits(*(b if a is None else a for a, b in zip(given, astuple(own), strict=True)))
        self.is_set = any(limit is not None for limit in given[1:])
        self.names = [tensor.name for tensor in sidecar.outputs]
        self.places = [i for i, kind in enumerate(kinds(sidecar, options.outputs)) if kind == "values"]
        self.eager: list[list[Array]] = [[] for _ in self.places]
        self.got: list[list[Array]] = [[] for _ in self.places]

    def measure(self, seen: Seen) -> Rows:
        """The values of one batch."""
        return {
            f"{name}{index}": outputs[place].reshape(len(seen.labels), -1).copy()
            for index, place in enumerate(self.places)
            for name, outputs in (("eager", seen.eager), ("got", seen.outputs))
        }

    def add(self, rows: Rows, names: Sequence[str]) -> None:
        """Accumulate one batch."""
        for index in range(len(self.places)):
            self.eager[index].append(rows[f"eager{index}"])
            self.got[index].append(rows[f"got{index}"])

    def findings(self) -> list[Finding]:
        """relative_error, r2 and spearman, each of the value that is worst in it; none where no output is a value."""
        values = [value for index in range(len(self.places)) for value in self._values(index)]
        if not values:
            return []
        with np.errstate(all="ignore"):
            error = _worst("relative_error", [(100 * value.error, value) for value in values], "low", "%")
            varying = [value for value in values if value.varies(self.least_spread)]
            few = len(values[0].eager) < LEAST_IMAGES
            reason = f"{len(values[0].eager)} images are too few" if few else EQUAL
            r2 = _worst("r2", [(value.r2, value) for value in varying], "high", reason=reason)
            rank = _worst("spearman", [(value.rank, value) for value in varying], "high", reason=reason)
        found = [judged(error, self.limits.relative_error, "low")]
        if not varying and not self.is_set:
            return [*found, r2, rank]
        return [*found, judged(r2, self.limits.r2, "high"), judged(rank, self.limits.spearman, "high")]

    def _values(self, index: int) -> list[Value]:
        eager, got = (np.concatenate(both[index]).astype(np.float64) for both in (self.eager, self.got))
        name = self.names[self.places[index]]
        names = [name] if eager.shape[1] == 1 else [f"{name}[{column}]" for column in range(eager.shape[1])]
        return [Value(name, eager[:, column], got[:, column]) for column, name in enumerate(names)]


def _worst(
    metric: str,
    numbers: Sequence[tuple[float, Value]],
    better: Literal["low", "high"],
    unit: str = "",
    reason: str = "",
) -> Finding:
    """A finding for the worst of the numbers, where NaN is worse than all; with the reason where there are none."""
    if not numbers:
        return Finding(check="values", metric=metric, value=None, detail=f"not measured: {reason}")
    sign = 1 if better == "low" else -1
    worst, value = max(numbers, key=lambda pair: sign * pair[0] if np.isfinite(pair[0]) else np.inf)
    detail = f"{value.name}, {len(value.eager)} images"
    return Finding(check="values", metric=metric, value=number(worst), unit=unit, detail=detail)


CHECK = Check(Values)
