"""The result of a search for people: a sentence, a table and a chart."""

from __future__ import annotations

from pathlib import Path

from exporter.optimize.options import Goal
from exporter.optimize.result import Accuracy, Result, Row
from exporter.report import charts
from exporter.report.charts import Point
from exporter.report.tables import Table

FRONT = "Front: no other verified artifact is both faster and more accurate."
WORDS = {
    "top1": "top-1, %",
    "map": "mAP, %",
    "miou": "mIoU, %",
    "top1_agreement": "agreement with PyTorch, %",
    "label_agreement": "agreement with PyTorch, % of decisions",
    "neighbour_agreement": "nearest neighbours as by PyTorch, %",
    "pixel_agreement": "agreement with PyTorch, % of pixels",
    "r2": "R² to PyTorch",
    "cosine": "cosine to PyTorch",
}


def sentence(result: Result) -> str:
    """The chosen artifact in one sentence, and how far it is ahead of the next."""
    row = result.winner
    name = Path(result.artifact).name or f"{row.backend} {row.precision}"
    threads = f"{row.threads} thread{'s' if row.threads != 1 else ''}"
    speed = f"{row.p50_ms:.3g} ms" if row.p50_ms else "not timed"
    if row.speedup:
        speed += f", {_speedup(row)} eager PyTorch"
    what = f"{name} on {row.backend} with {threads}: {speed}, {(row.bytes or 0) / 1e6:.3g} MB"
    if row.accuracy is not None:
        what += f", {_accuracy(row)}"
    if row.unsure:
        what += f" (too few images to be sure of {', '.join(row.unsure)})"
    if not result.passed and not row.reason:
        return f"a check of the chosen artifact failed, see its report: {what}"
    if not result.passed:
        faster = "" if result.options.goal == "size" else " and faster than eager PyTorch"
        return f"nothing is within the budgets{faster}; the nearest is {what} ({row.reason})"
    return "; ".join(filter(None, (what, result.certainty, row.noise)))


def tried(result: Result) -> Table:
    """Everything that was tried, the chosen one first, then by speed."""
    goal = result.options.goal
    order = sorted(
        range(len(result.rows)), key=lambda index: (index != result.chosen, *_place(result.rows[index], goal))
    )
    heading = next((WORDS[row.accuracy.metric] for row in result.rows if row.accuracy is not None), "accuracy")
    numbers = ("threads", "images/s" if goal == "throughput" else "p50 ms", "× eager", "MB", heading)
    rows = [_cells(result.rows[index], goal) for index in order]
    return Table(
        "Everything that was tried", ("runtime", "precision", "form", *numbers, "state", "reason"), numbers, rows
    )


def _place(row: Row, goal: Goal) -> tuple[float, ...]:
    """The place of a row: those that were timed to the end first, then by the goal."""
    speed = -row.speedup[0] if row.speedup else 0.0
    value = (float(row.bytes or 0), speed) if goal == "size" else (speed,)
    return (row.speedup is None, row.state not in ("not chosen", "beyond the budget"), *value)


def _cells(row: Row, goal: Goal) -> tuple[str, ...]:
    hint = f", {row.hint}" if row.hint == "throughput" else ""
    kept = f" ({len(row.kept)} parts kept)" if row.kept else ""
    speed = row.images_s if goal == "throughput" else row.p50_ms
    return (
        row.backend,
        f"{row.precision}{kept}",
        row.form or "–",
        f"{row.threads}{hint}" if row.threads else "–",
        f"{speed:.4g}" if speed else "–",
        _speedup(row).removesuffix(" ×"),
        f"{row.bytes / 1e6:.3g}" if row.bytes else "–",
        _number(row.accuracy) if row.accuracy else "–",
        f"{row.state}{', front' if row.on_front else ''}",
        "; ".join(filter(None, (row.reason, row.noise))),
    )


def _speedup(row: Row) -> str:
    if row.speedup is None:
        return "–"
    value, low, high = row.speedup
    return f"{value:.2f} ({low:.2f}–{high:.2f}) ×" if high > low else f"{value:.2f} ×"


def _accuracy(row: Row) -> str:
    assert row.accuracy is not None
    one = row.accuracy
    exact = f" ({one.exact:.6g} in PyTorch)" if one.metric in ("top1", "map", "miou") else ""
    return f"{WORDS[one.metric].replace(', %', '')} {_number(one)}{' %' if '%' in WORDS[one.metric] else ''}{exact}"


def _number(accuracy: Accuracy) -> str:
    return f"{accuracy.value:.7f}" if accuracy.metric in ("cosine", "r2") else f"{accuracy.value:.6g}"


def chart(result: Result) -> str:
    """Accuracy by latency of every candidate at its fastest setting, as SVG; "" where nothing was verified."""
    best: dict[tuple[str, ...], Row] = {}
    for index, row in enumerate(result.rows):
        key = (row.backend, row.precision, row.form, row.scope)
        known = best.get(key)
        if row.accuracy is None or row.p50_ms is None:
            continue
        if known is None or index == result.chosen or ((known.p50_ms or 0) > row.p50_ms and known is not result.winner):
            best[key] = row
    points = [
        Point(
            label=f"{row.backend} {row.precision}", ms=row.p50_ms or 0, value=row.accuracy.value, low=row.accuracy.low,
            high=row.accuracy.high, chosen=row is result.winner, precision=row.precision,
            on_front=row.on_front and result.options.goal != "throughput",  # whose front is not one of latency
        )
        for row in best.values()
        if row.accuracy is not None
    ]  # fmt: skip
    if not points:
        return ""
    shown = next(row.accuracy for row in best.values() if row.accuracy is not None)
    eager = (result.eager_p50_ms, shown.exact) if result.eager_p50_ms else None
    return charts.front(points, WORDS[shown.metric], eager)
