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
from exporter.report import Report
from exporter.report.drawable import bounded
from exporter.report.history import Series, Step
from exporter.report.labels import place, short
from exporter.report.tables import changes as ordered
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
    """Holds the SVG after the `with` block of `drawn` has ended. `text` is what the chart shows, in words."""

    def __init__(self) -> None:
        self.svg = self.text = ""


@contextmanager
def drawn(title: str, height: float) -> Iterator[tuple[Axes, Drawing]]:
    """Axes to draw on, 9.5 inches wide, `height` inches high; the drawing has the SVG after the `with` block."""
    with panels(title, height, 1, 1) as (grid, drawing):
        yield grid[0], drawing


@contextmanager
def panels(title: str, height: float, rows: int, columns: int) -> Iterator[tuple[list[Axes], Drawing]]:
    """Axes in rows and columns, which share their limits, as `drawn` has one."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # File names may contain signs that matplotlib would parse as a formula.
    style: dict[str, Any] = {"svg.fonttype": "none", "svg.hashsalt": title, "text.parse_math": False, "font.size": 10}
    ink = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), INK)
    drawing = Drawing()
    with mpl.rc_context({**style, **ink, "grid.color": FAINT, "axes.axisbelow": True}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # letters that this machine has no font for; the reader's has
        figure = Figure(figsize=(9.5, height), dpi=72, layout="constrained")
        grid = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
        for axes in grid:
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(True, linewidth=0.5)
        yield grid, drawing
        out = io.StringIO()
        with warnings.catch_warnings():  # the page renders the text, so glyphs missing here do not matter
            warnings.simplefilter("ignore", UserWarning)
            figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace(FAINT, "var(--faint)")
    words = html.escape(f"{title}: {drawing.text}" if drawing.text else title)
    drawing.svg = svg.replace("<svg ", f'<svg role="img" aria-label="{words}" ', 1)


MARKERS = "os^Dv"


def _color(report: Report) -> str:
    """The colour of the artifact's precision, the same in every chart."""
    known = PRECISIONS.get(str(report.artifact.get("precision")))
    return known.color if known else COLORS[7]


def _markers(reports: Sequence[Report]) -> dict[str, str]:
    """The marker of each runtime."""
    runtimes = sorted({str(report.artifact.get("backend")) for report in reports})
    return {runtime: MARKERS[index % len(MARKERS)] for index, runtime in enumerate(runtimes)}


def _legend(axes: Axes, reports: Sequence[Report]) -> None:
    """Name the colours and the markers above the axes, with the lines that have a label."""
    colors = {str(report.artifact.get("precision")): _color(report) for report in reports}
    for precision in sorted(colors):
        axes.plot([], [], "o", color=colors[precision], label=short(precision, 12))
    for runtime, marker in _markers(reports).items():
        axes.plot([], [], marker, color=INK, markerfacecolor="none", label=short(runtime, 12))
    axes.legend(frameon=False, fontsize=9, ncols=6, loc="lower left", bbox_to_anchor=(0, 1))


def _zoom(points: Sequence[tuple[float, float, float]], also: float | None) -> tuple[float, float]:
    """Limits of an axis from values with the ends of their intervals: all values, and half of the widest interval."""
    values = [value for value, _, _ in points] + ([] if also is None else [also])
    half = max((high - low) / 2 for _, low, high in points)
    low, high = min(values), max(values)
    room = max(0.2 * (high - low), half / 2, 1e-6 * abs(high), 1e-9)
    return low - room, high + room


WORDS = {
    "top1": "top-1, %",
    "top1_agreement": "agreement with PyTorch, %",
    "map": "mAP, %",
    "label_agreement": "agreement with PyTorch, % of decisions",
    "neighbour_agreement": "nearest neighbours as by PyTorch, %",
    "miou": "mIoU, %",
    "pixel_agreement": "agreement with PyTorch, % of pixels",
    "cosine": "cosine to PyTorch",
    "r2": "R² to PyTorch",
}


def accuracy_against_latency(reports: Sequence[Report]) -> str:
    """A labelled point for each artifact, median latency and accuracy with its interval; a line for PyTorch."""
    known = [(r, r.find("p50_ms"), _accuracy(r)) for r in reports]
    points = [(r, p50.value, shown) for r, p50, shown in known if p50 and p50.value and shown]
    if not points:
        return ""
    first, _, shown = points[0]
    points = [point for point in points if point[2].metric == shown.metric]
    exact = first.find("top1_eager") or first.find("map_eager") or first.find("miou_eager")
    best = exact.value if exact else 100.0 if shown.metric.endswith("_agreement") else 1.0
    with drawn("Accuracy by latency", 3.6 + 0.06 * len(points)) as (axes, drawing):
        ends = [one.interval or (one.value, one.value) for _, _, one in points]
        markers = _markers(reports)
        for (report, ms, one), (low, high) in zip(points, ends, strict=True):
            axes.plot([ms, ms], [low, high], color=_color(report), linewidth=1, alpha=0.45)
            axes.plot(ms, one.value, markers[str(report.artifact.get("backend"))], color=_color(report), markersize=8)
        if best is not None:
            axes.axhline(best, color=INK, linewidth=1, linestyle="--", zorder=1, label=_eager(first, best))
        _legend(axes, [report for report, _, _ in points])
        axes.margins(x=0.12)
        axes.set_ylim(_zoom([(one.value, *end) for (_, _, one), end in zip(points, ends, strict=True)], best))
        axes.set_xlabel("median latency, ms (left is better)")
        axes.set_ylabel(WORDS[shown.metric])
        axes.ticklabel_format(useOffset=False)
        place(axes, [(ms, one.value, name(report)) for report, ms, one in points], best)
        drawing.text = "; ".join(f"{name(report)} {ms:.4g} ms, {one.value:.6g}" for report, ms, one in points)
    return drawing.svg


def _eager(report: Report, accuracy: float) -> str:
    p50 = report.find("eager_p50_ms")
    return f"PyTorch: {accuracy:.6g}" + (f", {p50.value:.4g} ms" if p50 and p50.value else "")


class Point(NamedTuple):
    """An artifact in a chart of accuracy by latency: its median milliseconds, its accuracy with the ends of the 95 %
    interval, whether it was chosen, whether no other one is both faster and more accurate, and its precision."""

    label: str
    ms: float
    value: float
    low: float
    high: float
    chosen: bool = False
    on_front: bool = False
    precision: str = ""


def front(points: Sequence[Point], metric: str, eager: tuple[float, float] | None) -> str:
    """Accuracy by latency, the front joined by a line and the chosen artifact ringed.

    Args:
        points: the artifacts.
        metric: the name of the accuracy.
        eager: median milliseconds and accuracy of eager PyTorch.
    """
    with drawn("Accuracy by latency", 3.8 + 0.06 * len(points)) as (axes, drawing):
        line = sorted((point.ms, point.value) for point in points if point.on_front)
        if len(line) > 1:
            axes.plot(*zip(*line, strict=True), color=FAINT, linewidth=2, zorder=1, label="front")
        for point in points:
            color = PRECISIONS[point.precision].color if point.precision in PRECISIONS else COLORS[7]
            axes.plot([point.ms] * 2, [point.low, point.high], color=color, linewidth=1, alpha=0.45)
            axes.plot(point.ms, point.value, "o", color=color, markersize=8)
            if point.chosen:
                axes.plot(point.ms, point.value, "o", markersize=16, markerfacecolor="none", markeredgecolor=INK)
        if eager is not None:
            label = f"PyTorch: {eager[1]:.6g}, {eager[0]:.4g} ms"
            axes.axhline(eager[1], color=INK, linewidth=1, linestyle="--", zorder=1, label=label)
            axes.legend(frameon=False, fontsize=9, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
        axes.margins(x=0.12)
        axes.set_ylim(_zoom([(one.value, one.low, one.high) for one in points], eager[1] if eager else None))
        axes.set_xlabel("median latency, ms (left is better)")
        axes.set_ylabel(metric)
        axes.ticklabel_format(useOffset=False)
        labels = [f"{one.label}{', chosen' if one.chosen else ''}" for one in points]
        place(
            axes,
            [(one.ms, one.value, label) for one, label in zip(points, labels, strict=True)],
            eager[1] if eager else None,
        )
        shown = zip(points, labels, strict=True)
        drawing.text = "; ".join(f"{label} {one.ms:.4g} ms, {one.value:.6g}" for one, label in shown)
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
        if limit is not None:
            axes.axhline(limit, color=COLORS[5], linewidth=1, label=f"budget: {limit:g}")
            axes.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1))
        axes.margins(x=0.2, y=0.2)
        axes.set_xlabel("median latency, ms (left is better)")
        axes.set_ylabel("accuracy loss, points (lower is better)")
        place(axes, points, limit)
        drawing.text = "; ".join(f"{case} {ms:.4g} ms, {loss:.4g} points" for ms, loss, case in points)
    return drawing.svg


def _accuracy(report: Report) -> Any:
    findings = (report.find(metric) for metric in ACCURACIES)
    return next((finding for finding in findings if finding and finding.value is not None), None)


def distributions(reports: Sequence[Report], case: str) -> str:
    """The distribution of each model's latencies, with the median and the 90th and 99th percentile."""
    eager = next((f for r in reports if (f := r.find("eager_p50_ms", case)) and f.samples), None)
    timed = [(r, f) for r in reports if (f := r.find("p50_ms", case)) and f.samples]
    rows = [("eager PyTorch", eager, INK)] if eager else []
    rows += [(name(r), f, _color(r)) for r, f in sorted(timed, key=lambda pair: -np.median(pair[1].samples))]
    if not rows:
        return ""
    with drawn(f"Latency, {case}", 0.9 + 0.36 * len(rows)) as (axes, drawing):
        for index, (_, shown, shade) in enumerate(rows):
            _violin(axes, np.asarray(shown.samples), index, shade)
        axes.set_yticks(range(len(rows)), [short(label) for label, _, _ in rows])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        ends = [np.quantile(shown.samples, (0.005, 0.995)) for _, shown, _ in rows]
        _ms_axis(axes, min(float(low) for low, _ in ends), max(float(high) for _, high in ends))
        axes.set_xlabel("ms, logarithmic; marks are the median, the 90th and the 99th percentile")
        texts = ((label, *np.quantile(shown.samples, (0.5, 0.9, 0.99))) for label, shown, _ in reversed(rows))
        drawing.text = "; ".join(f"{label} {p50:.4g}, {p90:.4g}, {p99:.4g} ms" for label, p50, p90, p99 in texts)
    return drawing.svg


def _ms_axis(axes: Axes, low: float, high: float) -> None:
    """A logarithmic axis of milliseconds with plain numbers, from the fastest run to the slowest."""
    if not 0 < low < high:
        return
    axes.set_xscale("log")
    axes.set_xlim(low / 1.05, high * 1.05)
    steps = (1, 2, 5) if high > 8 * low else (1, 1.5, 2, 3, 4, 5, 6, 8) if high > 2 * low else np.arange(1, 10, 0.2)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    axes.set_xticks([tick for tick in ticks if low / 1.05 <= tick <= high * 1.05])
    axes.xaxis.set_major_formatter("{x:.4g}")
    axes.minorticks_off()


def _violin(axes: Axes, samples: Any, row: int, shade: str) -> None:
    shown = samples[samples <= np.quantile(samples, 0.995)]
    shown = shown[:: math.ceil(len(shown) / MOST_DRAWN)]  # a density of more takes seconds, and looks the same
    if len(shown) > 1 and float(np.ptp(shown)) > 0:
        drawn: Any = axes.violinplot(shown, [row], orientation="horizontal", widths=0.8, showextrema=False)
        for body in drawn["bodies"]:
            body.set(facecolor=shade, alpha=0.35)
    marks = np.quantile(samples, [0.5, 0.9, 0.99])
    axes.scatter(marks, [row] * 3, s=[36, 20, 12], color=shade, zorder=3)


def changes(reports: Sequence[Report]) -> str:
    """Each change measured by `compare`, with its interval and its limit, in the order of the table."""
    shown = [f for _, f in ordered(reports) if f.value is not None and f.interval]
    if not shown:
        return ""
    with drawn("Change from the base", 1.1 + 0.36 * len(shown)) as (axes, drawing):
        for row, f in enumerate(shown):
            shade, marker = (COLORS[2], "o") if f.passed else (COLORS[5], "X")
            axes.plot(f.interval or (0, 0), [row, row], color=shade, linewidth=3, solid_capstyle="round")
            axes.plot([f.value or 0], [row], marker, color=shade, markersize=9)
            axes.plot([f.limit or 0] * 2, [row - 0.35, row + 0.35], color=INK, linestyle="--")
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(shown)), [short(f"{f.metric} {f.case}".strip()) for f in shown])
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlabel("change and its 95 % interval, % (of top-1, mAP, mIoU: points); dashed: the limit")
        drawing.text = "; ".join(f"{f.metric} {f.case} {f.value:+.2f}" for f in shown)
    return drawing.svg


def trend(one: Series, steps: Sequence[Step]) -> str:
    """A series by commit; each step has its commit and change, and the axis the first commit and the last."""
    with drawn(f"{one.artifact} {one.title}", 2.2) as (axes, drawing):
        values = list(map(bounded, one.values))
        axes.plot(values, "o-", color=COLORS[0], markersize=4, linewidth=1)
        commits = [entry.commit for entry in one.entries]
        places = [commits.index(step.commit) for step in steps]
        for x in places:
            axes.axvline(x - 0.5, color=COLORS[5], linestyle="--", linewidth=1)
        ends = (0, len(commits) - 1)
        axes.set_xticks(ends, [f"{commits[end][:7]}\n{one.entries[end].time[:10]}" for end in ends])
        axes.set_ylabel(short(one.metric, 24))
        axes.margins(y=0.35)
        low, high = min(values), max(values)
        if high - low < 1e-3 * abs(high):  # a constant fills no axis
            axes.set_ylim(low - 0.01 * abs(low) - 1e-9, high + 0.01 * abs(high) + 1e-9)
        axes.ticklabel_format(axis="y", useOffset=False, style="plain")
        texts = [f"{step.commit[:7]} {step.change_pct:+.1f} %" for step in steps]
        dots = [(x, value, "") for x, value in enumerate(values)][:: math.ceil(len(commits) / 200)]
        marked = [(x, values[x], text) for x, text in zip(places, texts, strict=True)]
        place(axes, [*dots, *marked])
        drawing.text = "; ".join([f"{low:.4g} to {high:.4g}", *texts])
    return drawing.svg


def blocks(reports: Sequence[Report]) -> str:
    """The error of each ConvNeXt block's output, a panel for each artifact, with the range of all as a band."""
    known = [(r, [f for f in r.findings if f.metric == "block_error"]) for r in reports]
    known = [(r, errors) for r, errors in known if errors]
    if not known:
        return ""
    cases = list(dict.fromkeys(f.case for _, errors in known for f in errors))
    series = [(r, {f.case: max(f.value, 1e-9) for f in errors if f.value is not None}) for r, errors in known]
    lines = [[values.get(case, math.nan) for case in cases] for _, values in series]
    every = [[line[index] for line in lines if line[index] > 0] or [math.nan] for index in range(len(cases))]
    columns = min(3, len(known))
    rows = math.ceil(len(known) / columns)
    with panels("Error of each block", 1.1 + 1.25 * rows, rows, columns) as (grid, drawing):
        for axes, (report, _), line in zip(grid, series, lines, strict=False):
            axes.fill_between(range(len(cases)), list(map(min, every)), list(map(max, every)), color=FAINT, alpha=0.5)
            axes.semilogy(line, marker="o", markersize=3, linewidth=1.2, color=_color(report))
            axes.set_title(short(name(report), 32), fontsize=9, loc="left")
            axes.minorticks_off()
        for axes in grid[len(known) :]:
            axes.set_visible(False)
        for axes in grid[max(len(known) - columns, 0) : len(known)]:
            axes.tick_params(labelbottom=True)
        _block_axes(grid[0], cases)
        worst = [max(values.items(), key=lambda item: item[1], default=("", math.nan)) for _, values in series]
        ends = zip(series, worst, strict=True)
        drawing.text = "; ".join(f"{name(r)} at most {error:.2g} in {case}" for (r, _), (case, error) in ends)
    return drawing.svg


def _block_axes(axes: Axes, cases: Sequence[str]) -> None:
    """The first block of each stage on the x axis; whole decades on the y axis, so that at least two have a label."""
    parts = [case.rpartition(".") for case in cases]  # ("stages.1", ".", "0")
    starts = {index: stage[-1] for index, (stage, _, block) in enumerate(parts) if block == "0" and "." in stage}
    axes.set_xticks(list(starts), list(starts.values()))
    low, high = (
        10.0 ** rounded(np.log10(end)) for rounded, end in zip((np.floor, np.ceil), axes.get_ylim(), strict=True)
    )
    axes.set_ylim(low, high)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
    axes.figure.supylabel("error ÷ PyTorch's spread", fontsize=10)
    axes.figure.supxlabel("stage, at its first block; grey: the range of all artifacts", fontsize=10)
