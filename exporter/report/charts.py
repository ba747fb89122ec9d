"""Charts as SVG without scripts. They take the text colour of their page, light or dark."""

from __future__ import annotations

import html
import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from exporter.precision import PRECISIONS
from exporter.report import Finding, Report
from exporter.report.history import Series, Step
from exporter.report.tables import name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Distinguishable with colour blindness, on white and on black (Okabe and Ito, 2008).
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c8c00", "#7f7f7f")
INK, FAINT = "#123456", "#654321"  # placeholders, replaced by colours of the page


MOST_DRAWN = 4000
ACCURACIES = (
    "top1", "map", "miou", "top1_agreement", "label_agreement", "neighbour_agreement", "pixel_agreement", "cosine",
    "r2",
)  # fmt: skip
"""The metrics of accuracy, the most telling first."""


class Drawing:
    """Holds the SVG after the `with` block of `drawn` has ended."""

    def __init__(self) -> None:
        self.svg = ""


@contextmanager
def drawn(title: str, height: float) -> Iterator[tuple[Axes, Drawing]]:
    """Axes to draw on, 9.5 inches wide, `height` inches high; the drawing has the SVG after the `with` block."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # File names may contain signs that matplotlib would parse as a formula.
    style: dict[str, Any] = {"svg.fonttype": "none", "svg.hashsalt": title, "text.parse_math": False, "font.size": 10}
    ink = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), INK)
    drawing = Drawing()
    with mpl.rc_context({**style, **ink, "grid.color": FAINT, "axes.axisbelow": True}):
        figure = Figure(figsize=(9.5, height), layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, linewidth=0.5)
        yield axes, drawing
        out = io.StringIO()
        with warnings.catch_warnings():  # the page renders the text, so glyphs missing here do not matter
            warnings.simplefilter("ignore", UserWarning)
            figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace(FAINT, "var(--faint)")
    drawing.svg = svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1)


def _colors(reports: Sequence[Report]) -> dict[str, str]:
    """The colour of each artifact, the same in every chart of a page."""
    names = dict.fromkeys(name(report) for report in reports)
    return {one: COLORS[index % len(COLORS)] for index, one in enumerate(names)}


def accuracy_against_latency(reports: Sequence[Report]) -> str:
    """A point for each artifact and for eager: median latency at the smallest batch, and accuracy."""
    known = [(r, r.find("p50_ms"), _accuracy(r)) for r in reports]
    points = [(r, p50.value, found) for r, p50, found in known if p50 and p50.value and found]
    if not points:
        return ""
    words = {
        "top1": "top-1, %",
        "top1_agreement": "agreement with eager, %",
        "map": "mAP, %",
        "label_agreement": "agreement with eager, % of decisions",
        "neighbour_agreement": "nearest neighbours as by eager, %",
        "miou": "mIoU, %",
        "pixel_agreement": "agreement with eager, % of pixels",
        "cosine": "cosine to eager",
        "r2": "R² to eager",
    }
    with drawn("Accuracy by latency", 3.6) as (axes, drawing):
        for report, p50, found in points:
            ends = [abs(end - found.value) for end in found.interval or (found.value, found.value)]
            style: dict[str, Any] = {"color": _colors(reports)[name(report)], "label": name(report)}
            axes.errorbar(p50, found.value, yerr=[[end] for end in ends], fmt="o", markersize=8, capsize=3, **style)
        first, _, shown = points[0]
        eager = first.find("eager_p50_ms")
        exact = first.find("top1_eager") or first.find("map_eager") or first.find("miou_eager")
        best = exact.value if exact else 100.0 if shown.metric.endswith("_agreement") else 1.0
        if eager and eager.value and best is not None:
            axes.plot(eager.value, best, "s", color=INK, markersize=8, label="eager PyTorch")
        axes.margins(x=0.1, y=0.15)
        axes.set_xlim(left=0)
        axes.set_xlabel("median latency, ms (left is better)")
        axes.set_ylabel(words[shown.metric])
        axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
        axes.ticklabel_format(axis="y", useOffset=False)
    return drawing.svg


class Point(NamedTuple):
    """An artifact in a chart of accuracy by latency: its median milliseconds, its accuracy with the ends of the 95 %
    interval, whether it was chosen, and whether no other one is both faster and more accurate."""

    label: str
    ms: float
    value: float
    low: float
    high: float
    chosen: bool = False
    on_front: bool = False


def front(points: Sequence[Point], metric: str, eager: tuple[float, float] | None) -> str:
    """Accuracy by latency, the front joined by a line and the chosen artifact ringed.

    Args:
        points: the artifacts.
        metric: the name of the accuracy.
        eager: median milliseconds and accuracy of eager PyTorch.
    """
    with drawn("Accuracy by latency", 3.8) as (axes, drawing):
        line = sorted((point.ms, point.value) for point in points if point.on_front)
        if len(line) > 1:
            axes.plot(*zip(*line, strict=True), color=FAINT, linewidth=2, zorder=1, label="front")
        for index, point in enumerate(sorted(points, key=lambda point: point.ms)):
            color, ends = COLORS[index % len(COLORS)], [[point.value - point.low], [point.high - point.value]]
            label = f"{point.label}{', chosen' if point.chosen else ''}"
            axes.errorbar(point.ms, point.value, yerr=ends, fmt="o", color=color, markersize=8, capsize=3, label=label)
            if point.chosen:
                axes.plot(point.ms, point.value, "o", markersize=16, markerfacecolor="none", markeredgecolor=INK)
        if eager is not None:
            axes.plot(*eager, "s", color=INK, markersize=8, label="eager PyTorch")
        axes.margins(x=0.1, y=0.15)
        axes.set_xlim(left=0)
        axes.set_xlabel("median latency, ms (left is better)")
        axes.set_ylabel(metric)
        axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
        axes.ticklabel_format(axis="y", useOffset=False)
    return drawing.svg


def network(columns: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    """The network from left to right, a cell for each layer, coloured by its precision.

    Args:
        columns: operator and precision of each layer, by part of the network, in order.
    """
    with drawn("Layers by precision", 4.5) as (axes, drawing):
        for x, cells in enumerate(columns.values()):
            for y, (operator, precision) in enumerate(cells):
                known = PRECISIONS.get(precision.removeprefix("u"))  # uint8 is int8 of another range
                color, label = (known.color, precision) if known else (COLORS[7], "other")
                axes.bar(x, 0.9, 0.9, bottom=y, color=color, label=label)
                axes.annotate(operator[:9], (x, y + 0.45), ha="center", va="center", fontsize=4, color="black")
        axes.grid(False)
        axes.set_xticks(range(len(columns)), list(columns), rotation=90, fontsize=8)
        axes.set_ylabel("layers, in the order they run")
        handles, labels = axes.get_legend_handles_labels()
        legend = dict(zip(labels, handles, strict=True))
        axes.legend(legend.values(), legend, ncols=len(legend), loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    return drawing.svg


def tried(report: Report) -> str:
    """A point for each candidate of the INT8 search: accuracy loss and latency, by the number of parts kept."""
    known = [f for f in report.findings if f.value is not None]
    losses = {f.case: float(f.value or 0) for f in known if f.metric == "tried_loss"}
    times = {f.case: float(f.value or 0) for f in known if f.metric == "tried_ms"}
    points = [(times[case], loss, case) for case, loss in losses.items() if case in times]
    if len(points) < 2:
        return ""
    limit = report.value("budget")
    with drawn("Accuracy loss of int8 by latency", 3.2) as (axes, drawing):
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], "o-", color=COLORS[0], markersize=8)
        for x, y, case in points:
            axes.annotate(case, (x, y), xytext=(6, 6), textcoords="offset points", fontsize=9)
        if limit is not None:
            axes.axhline(limit, color=COLORS[5], linewidth=1)
            axes.annotate("budget", (points[0][0], limit), xytext=(0, 3), textcoords="offset points", fontsize=9)
        axes.margins(x=0.2, y=0.2)
        axes.set_xlabel("median latency, ms (left is better)")
        axes.set_ylabel("accuracy loss, points (lower is better)")
    return drawing.svg


def _accuracy(report: Report) -> Any:
    findings = (report.find(metric) for metric in ACCURACIES)
    return next((finding for finding in findings if finding and finding.value is not None), None)


def distributions(reports: Sequence[Report], case: str) -> str:
    """The distribution of each model's latencies, with the median and the 90th and 99th percentile."""
    eager = next((f for r in reports if (f := r.find("eager_p50_ms", case)) and f.samples), None)
    rows = [("eager PyTorch", eager, INK)] if eager else []
    shades = _colors(reports)
    rows += [(name(r), f, shades[name(r)]) for r in reports if (f := r.find("p50_ms", case)) and f.samples]
    if not rows:
        return ""
    with drawn(f"Latency, {case}", 0.9 + 0.55 * len(rows)) as (axes, drawing):
        for index, (_, found, shade) in enumerate(rows):
            _violin(axes, np.asarray(found.samples), index, shade)
        axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.15 * max(float(np.quantile(found.samples, 0.99)) for _, found, _ in rows))
        axes.set_xlabel("ms; dots are the median, the 90th and the 99th percentile")
    return drawing.svg


def _violin(axes: Axes, samples: Any, row: int, shade: str) -> None:
    shown = samples[samples <= np.quantile(samples, 0.995)]
    shown = shown[:: math.ceil(len(shown) / MOST_DRAWN)]  # a density of more takes seconds, and looks the same
    if len(shown) > 1 and float(np.ptp(shown)) > 0:
        drawn: Any = axes.violinplot(shown, [row], orientation="horizontal", widths=0.8, showextrema=False)
        for body in drawn["bodies"]:
            body.set(facecolor=shade, alpha=0.35)
    marks = np.quantile(samples, [0.5, 0.9, 0.99])
    axes.scatter(marks, [row] * 3, s=[36, 20, 12], color=shade, zorder=3)


def changes(findings: Sequence[Finding]) -> str:
    """Each change measured by `compare`, with its interval and its limit."""
    shown = [f for f in findings if f.check == "regression" and f.value is not None and f.interval]
    if not shown:
        return ""
    with drawn("Change from the base", 0.9 + 0.45 * len(shown)) as (axes, drawing):
        for row, f in enumerate(shown):
            shade = COLORS[2] if f.passed else COLORS[5]
            axes.plot(f.interval or (0, 0), [row, row], color=shade, linewidth=3, solid_capstyle="round")
            axes.plot([f.value or 0], [row], "o", color=shade, markersize=8)
            axes.plot([f.limit or 0] * 2, [row - 0.35, row + 0.35], color=INK, linestyle="--")
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(shown)), [f"{f.metric} {f.case}".strip() for f in shown])
        axes.invert_yaxis()
        axes.set_xlabel(
            "change and its 95 % interval, % (points for top1_drop, map_drop, miou_drop); dashed: the limit"
        )
    return drawing.svg


def trend(one: Series, steps: Sequence[Step]) -> str:
    """A series by commit, with its steps."""
    with drawn(f"{one.artifact} {one.metric}", 2.6) as (axes, drawing):
        axes.plot(one.values, "o-", color=COLORS[0], markersize=4, linewidth=1)
        commits = [entry.commit for entry in one.entries]
        for step in steps:
            axes.axvline(commits.index(step.commit) - 0.5, color=COLORS[5], linestyle="--")
            axes.annotate(
                f"{step.commit[:7]} {step.change_pct:+.1f} %",
                (commits.index(step.commit), step.after),
                xytext=(4, 10),
                textcoords="offset points",
            )
        every = math.ceil(len(commits) / 20)
        axes.set_xticks(range(0, len(commits), every), [commit[:7] for commit in commits[::every]], rotation=60)
        axes.set_ylabel(one.metric)
        axes.margins(y=0.25)
    return drawing.svg


def blocks(reports: Sequence[Report]) -> str:
    """The error of each ConvNeXt block's output, from the stem to the last."""
    known = [(r, [f for f in r.findings if f.metric == "block_error"]) for r in reports]
    known = [(r, found) for r, found in known if found]
    if not known:
        return ""
    with drawn("Error of each block", 3.4) as (axes, drawing):
        for report, found in known:
            errors = [max(f.value, 1e-9) if f.value is not None else math.nan for f in found]
            axes.semilogy(errors, marker="o", markersize=4, color=_colors(reports)[name(report)], label=name(report))
        axes.set_xticks(range(len(known[0][1])), [f.case for f in known[0][1]], rotation=60, ha="right", fontsize=8)
        axes.set_ylabel("error ÷ eager's spread")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
        axes.yaxis.set_minor_formatter(lambda value, _: "")
        low, high = (
            10.0 ** rounded(np.log10(end)) for rounded, end in zip((np.floor, np.ceil), axes.get_ylim(), strict=True)
        )
        axes.set_ylim(low, high)  # whole decades, so that at least two have their labels
        axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return drawing.svg
