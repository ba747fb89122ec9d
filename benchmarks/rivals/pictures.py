"""The pictures: accuracy by latency of the fastest exports, and latency by input size."""

from __future__ import annotations

from statistics import geometric_mean
from typing import Any

from benchmarks import racing
from benchmarks.optimize import on_white
from benchmarks.rivals import NETWORKS, Race, Row
from benchmarks.rivals.sizes import Sizes
from benchmarks.rivals.table import LABELS, fastest
from exporter.report import charts

COLORS = {"ConvNeXt": "#0072b2", "Swin": "#d55e00", "ViT": "#009e73", "ResNet": "#767676"}
MARKERS = {"onnxruntime": "o", "openvino": "s"}
LINES = {"onnxruntime": "-", "openvino": "--"}


def _color(name: str) -> str:
    return next(color for family, color in COLORS.items() if name.startswith(family))


def accuracy(race: Race, precision: str = "fp32") -> str:
    """Published top-1 by the median latency of one batch, the fastest export of each network, with the front of each
    runtime: no other network there is both faster and more accurate."""
    places: dict[str, list[float]] = {}
    top1 = {network.name: network.top1 for network in NETWORKS}
    with charts.drawn("Accuracy by latency", 5) as (axes, drawing):
        for runtime, marker in MARKERS.items():
            rows = [row for row in race.rows if _is_best(race, row, runtime, precision)]
            points = {row.network: (racing.typical(row.milliseconds), top1[row.network]) for row in rows}
            front = sorted(point for point in points.values() if not any(_beats(one, point) for one in points.values()))
            axes.plot(*zip(*front, strict=True), color="#b0b4b9", linewidth=2, linestyle=LINES[runtime], zorder=1)
            for name, (ms, percent) in points.items():
                axes.plot(ms, percent, marker, color=_color(name), markersize=8)
                places.setdefault(name, []).append(ms)
            axes.plot([], [], marker, linestyle=LINES[runtime], color="#767676", label=LABELS[runtime])
        for name, each in places.items():  # one label for the points of both runtimes, between them
            middle = (geometric_mean(each), top1[name])
            axes.annotate(name, middle, xytext=(0, 7), textcoords="offset points", fontsize=8, ha="center")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")  # powers of ten would be formulas, which a chart does not draw
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.set_xlabel(f"median latency of a batch of {race.batch}, ms (left is better)")
        axes.set_ylabel("published top-1, %, trained on ImageNet-1k")
        axes.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    return on_white(drawing.svg)


def _is_best(race: Race, row: Row, runtime: str, precision: str) -> bool:
    same = (row.runtime, row.precision) == (runtime, precision) and not row.failure
    return same and row is fastest(race, row)


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether a point (ms, top-1) is as fast and as accurate as another, and better in one of the two."""
    return one != other and one[0] <= other[0] and one[1] >= other[1]


def latency_by_size(result: Sizes) -> str:
    """Median latency by input size on logarithmic axes, with the exponent of each line."""
    with charts.drawn("Latency by input size", 5) as (axes, drawing):
        for curve in result.curves:
            medians = [racing.typical(samples) for samples in curve.milliseconds]
            label = f"{curve.network}, {LABELS[curve.runtime]}: pixels to the {curve.time_exponent[0]:.2f}"
            style: dict[str, Any] = {"color": _color(curve.network), "marker": MARKERS[curve.runtime], "label": label}
            axes.plot(curve.sizes, medians, linestyle=LINES[curve.runtime], **style)
        axes.set_xscale("log")
        axes.set_yscale("log")
        ticks = sorted({size for curve in result.curves for size in curve.sizes})
        axes.set_xticks(ticks, [str(size) for size in ticks])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("height and width of the image, pixels")
        axes.set_ylabel("median latency of one image, ms")
        axes.legend(frameon=False, fontsize=8)
    return on_white(drawing.svg)
