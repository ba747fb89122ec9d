"""The table of a search: what was measured of each candidate, and which one is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from statistics import median
from typing import TYPE_CHECKING

from msgspec.structs import replace

from exporter import backends
from exporter.bench import flat, latency
from exporter.optimize import race
from exporter.optimize.candidates import Candidate
from exporter.optimize.race import EAGER, Runner
from exporter.optimize.result import Accuracy, Result, Row, State, front
from exporter.report import Finding, Report
from exporter.stats import center

if TYPE_CHECKING:
    from exporter.optimize.search import Contest, Run, Search

METRICS = {
    "top1": "top1_eager",
    "map": "map_eager",
    "miou": "miou_eager",
    "top1_agreement": "",
    "label_agreement": "",
    "neighbour_agreement": "",
    "pixel_agreement": "",
    "r2": "",
    "cosine": "",
}
"""The metrics of accuracy, the most telling first, each with the one of PyTorch."""


class Rows:
    """The rows of a search, from its two comparisons."""

    def __init__(self, search: Search, forms: Contest, settings: Contest) -> None:
        self.search, self.forms, self.settings = search, forms, settings

    def result(self) -> Result:
        """All rows, the best of the last comparison chosen."""
        last = [self._row(self.settings, run) for run in self.settings.runs.values()]
        finalists = {run.candidate for run in self.settings.runs.values()}
        order = self._ordered(last)
        best, passed = order[0], self._problem(last[order[0]]) == ""
        last = [self._judged(row, index, order) for index, row in enumerate(last)]
        first = [self._row(self.forms, run) for run in self.forms.runs.values() if run.candidate not in finalists]
        others = [self._unraced(one) for one in self.search.builds if one not in finalists and one not in self._raced()]
        skipped = [Row(backend=one.backend, precision=one.precision, reason=one.reason) for one in self.search.skipped]
        rows = [*last, *map(self._left_out, first), *others, *skipped]
        rows = [
            replace(row, on_front=on)
            for row, on in zip(rows, front(rows, self.search.request.options.goal), strict=True)
        ]
        eager = race.times_ms(self.settings.runner.timing, EAGER)
        return Result(
            passed=passed,
            rows=tuple(rows),
            chosen=best,
            certainty=self._certainty(order),
            options=self.search.request.options,
            environment=backends.environment(),
            eager_p50_ms=median(eager) if eager else None,
        )

    def _raced(self) -> set[Candidate]:
        return {run.candidate for run in self.forms.runs.values()}

    def _row(self, contest: Contest, run: Run) -> Row:
        """What was measured of a candidate with one setting."""
        runner, candidate = contest.runner, run.candidate
        built, report = self.search.builds[candidate], self.search.reports.get(candidate)
        row = Row(
            backend=candidate.backend, precision=candidate.precision, form=candidate.form, scope=candidate.scope,
            threads=run.threads, hint=run.hint, bytes=built.bytes, kept=built.kept,
            accuracy=accuracy(report) if report is not None else None, state="not chosen",
            unsure=tuple(one.metric for one in report.findings if one.unsure) if report is not None else (),
        )  # fmt: skip
        times = race.times_ms(runner.timing, run.name)
        if run.name in runner.timing.failures or not times:
            return replace(row, state="failed", reason=runner.timing.failures.get(run.name, "was never timed"))
        streams = next(one.streams[run.name] for one in runner.timing.launches if run.name in one.blocks)
        p50_ms = median(times)
        row = replace(row, p50_ms=p50_ms, images_s=1e3 * self.search.request.options.batch * streams / p50_ms)
        if ratios := latency.speedups(runner.timing, run.name, EAGER):
            over = center(ratios)
            noise = latency.noise_of(runner.timing, over if len(ratios) >= race.LEAST else None)
            row = replace(row, speedup=(exp(over.value), exp(over.low), exp(over.high)), noise=noise)
        return row

    def _problem(self, row: Row) -> str:
        """Why a row of the last comparison may not be chosen, or ""."""
        options = self.search.request.options
        if row.state == "failed":
            return row.reason
        if reason := self.search.reasons.get(_candidate(row)):
            return reason
        if options.latency_limit_ms is not None and (row.p50_ms or 0) > options.latency_limit_ms:
            return f"{row.p50_ms:.4g} ms, limit {options.latency_limit_ms:g} ms"
        if options.goal == "size":
            return ""
        if row.speedup is None:
            return "eager PyTorch could not be timed"
        if row.speedup[0] <= 1:
            return f"no faster than eager PyTorch ({row.speedup[0]:.2f} ×)"
        return ""

    def _ordered(self, rows: Sequence[Row]) -> list[int]:
        """The rows by their number, the best one first; those beyond a budget come after the others."""
        return sorted(range(len(rows)), key=lambda index: (*self._rank(rows[index]), index))

    def _rank(self, row: Row) -> tuple[float, ...]:
        speed = row.speedup[0] if row.speedup else 0.0
        goal = (float(row.bytes or 0), -speed) if self.search.request.options.goal == "size" else (-speed,)
        inaccurate = self.search.reasons.get(_candidate(row)) is not None
        # The speed-up of a dropped model is that of its first processes, in which eager may have been slower.
        is_dropped = self._name(row) in self.settings.runner.dropped
        return (row.state == "failed", inaccurate, self._problem(row) != "", is_dropped, *goal)

    def _name(self, row: Row) -> str:
        """The name of a row of the last comparison."""
        key = (_candidate(row), row.threads, row.hint)
        return next(name for name, run in self.settings.runs.items() if (run.candidate, run.threads, run.hint) == key)

    def _judged(self, row: Row, index: int, order: Sequence[int]) -> Row:
        """The row with what became of it."""
        if index == order[0]:
            return replace(row, state="chosen", reason=self._problem(row))
        if problem := self._problem(row):
            return replace(row, state="failed" if row.state == "failed" else "beyond the budget", reason=problem)
        name = list(self.settings.runs)[index]
        if reason := self.settings.runner.dropped.get(name):
            return replace(row, state="dropped", reason=reason)
        return replace(row, reason=self._behind(name, list(self.settings.runs)[order[0]], row))

    def _behind(self, name: str, best: str, row: Row) -> str:
        """How far a row is behind the chosen one."""
        chosen = self.settings.runs[best].candidate
        if self.search.request.options.goal == "size" and _candidate(row) != chosen:
            return f"{((row.bytes or 0) - self.search.builds[chosen].bytes) / 1e6:.3g} MB larger than {chosen}"
        over = self.settings.runner.over(best, name)
        return f"{race.text(over)} slower than {best}" if over is not None else f"slower than {best}"

    def _left_out(self, row: Row) -> Row:
        """A row of the comparison of forms that was not in the last one."""
        candidate = _candidate(row)
        if row.state == "failed":
            return row
        name = next(name for name, run in self.forms.runs.items() if run.candidate == candidate)
        if reason := self.search.reasons.get(candidate):
            return replace(row, state=self._left_state(candidate), reason=reason)
        if reason := self.forms.runner.dropped.get(name):
            return replace(row, state="dropped", reason=reason)
        winner = self.forms.runner.standing(candidate.group)[0]
        over = self.forms.runner.over(winner, name)
        ahead = f"{race.text(over)} slower than {winner}" if over is not None else f"slower than {winner}"
        return replace(row, state="dropped", reason=ahead)

    def _unraced(self, candidate: Candidate) -> Row:
        """A candidate that was never timed."""
        built = self.search.builds[candidate]
        reason = built.failure or self.search.reasons.get(candidate, "")
        return Row(
            backend=candidate.backend, precision=candidate.precision, form=candidate.form, scope=candidate.scope,
            bytes=built.bytes or None, kept=built.kept, reason=reason,
            state="failed" if built.failure else self._left_state(candidate),
        )  # fmt: skip

    def _left_state(self, candidate: Candidate) -> State:
        """What became of a candidate that was not in the last comparison."""
        return "beyond the budget" if candidate in self.search.beyond else "dropped"

    def _certainty(self, order: Sequence[int]) -> str:
        """How far the chosen one is ahead of the next that is within the budgets, with its interval."""
        names, runner = list(self.settings.runs), self.settings.runner
        rows = [self._row(self.settings, run) for run in self.settings.runs.values()]
        eligible = [index for index in order[1:] if not self._problem(rows[index])]
        best, goal = order[0], self.search.request.options.goal
        if goal == "size":  # another number of threads is the same file
            eligible = [index for index in eligible if _candidate(rows[index]) != _candidate(rows[best])]
        if not eligible:
            return "no other one is within the budgets" if len(rows) > 1 else "nothing else was compared"
        other = eligible[0]
        label = names[other]
        if goal == "size":
            return f"{((rows[other].bytes or 0) - (rows[best].bytes or 0)) / 1e6:.3g} MB smaller than the next, {label}"
        differences = _differences(runner, names[best], names[other], goal, self.search.request.options.batch)
        if len(differences) < race.LEAST:
            return f"the next, {label}, was dropped: {runner.dropped.get(label, 'too few processes timed both')}"
        ahead, unit = center(differences), "ms" if goal == "latency" else "images/s"
        interval = (
            f"95 % {ahead.low:.2g}–{ahead.high:.2g}" if ahead.low > 0 else f"95 % {ahead.low:.2g} to {ahead.high:.2g}"
        )
        if ahead.low > 0:
            return f"{ahead.value:.2g} {unit} better than the next, {label} ({interval})"
        return f"no difference measurable to {label}: {ahead.value:.2g} {unit} ({interval})"


def _differences(runner: Runner, best: str, other: str, goal: str, batch: int) -> list[float]:
    """How far the best is ahead in each process: milliseconds less, or images a second more."""
    ahead = []
    for launch in runner.timing.launches:
        if best in launch.blocks and other in launch.blocks:
            first, second = (median(flat(launch.blocks[name])) for name in (best, other))
            if goal == "latency":
                ahead.append(second - first)
            else:
                rates = [1e3 * batch * launch.streams[n] / ms for n, ms in ((best, first), (other, second))]
                ahead.append(rates[0] - rates[1])
    return ahead


def _candidate(row: Row) -> Candidate:
    return Candidate(backend=row.backend, precision=row.precision, form=row.form, scope=row.scope)


def accuracy(report: Report) -> Accuracy | None:
    """The most telling metric of a verification."""
    for metric, exact in METRICS.items():
        measured = report.find(metric)
        if measured is None or measured.value is None:
            continue
        low, high = measured.interval or (measured.value, measured.value)
        best = _exact(report.find(exact)) if exact else 100.0 if metric.endswith("agreement") else 1.0
        return Accuracy(metric=metric, value=measured.value, low=low, high=high, exact=best)
    return None


def _exact(finding: Finding | None) -> float:
    return finding.value if finding is not None and finding.value is not None else float("nan")
