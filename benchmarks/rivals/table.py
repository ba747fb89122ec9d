"""Markdown tables of the measurements."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import racing
from benchmarks.rivals import NETWORKS, Network, Race, Row, Samples
from benchmarks.rivals.sizes import Sizes

HEAD = (
    "| network | GMAC | top-1, % | runtime | precision | way | ms a batch | images/s | of peak | memory, MB | "
    "× plain fp32 | A100, images/s |\n|---|--:|--:|---|---|---|--:|--:|--:|--:|--:|--:|"
)
LABELS = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
AGREED = 20.0  # percent


def races(race: Race) -> str:
    """Both tables of a batch size: the default export of each network, and the fastest one."""
    best = [row for row in race.rows if not row.failure and row is fastest(race, row)]
    plain = [row for row in race.rows if not row.failure and row.plain]
    parts = [f"### Batch {race.batch}: the default export of each network", rows(race, plain)]
    parts += [f"### Batch {race.batch}: the fastest export of each network", rows(race, best)]
    return "\n\n".join([*parts, *filter(None, [failures(race)])]) + "\n"


def failures(race: Race) -> str:
    """Markdown: the ways that could not be timed, with the reason and its networks; without this tool's, which is for
    ConvNeXt."""
    reasons: dict[str, list[str]] = {}
    for row in race.rows:
        if row.failure and row.way != "ours":
            way = f"* {row.way}, {LABELS[row.runtime]} {row.precision}: {row.failure}"
            reasons.setdefault(way, []).append(row.network)
    return "\n".join(f"{way} ({', '.join(networks)})" for way, networks in reasons.items())


def fastest(race: Race, row: Row) -> Row:
    """The fastest row of the same network, runtime and precision."""
    same = [
        one
        for one in race.rows
        if (one.network, one.runtime, one.precision) == (row.network, row.runtime, row.precision) and not one.failure
    ]
    return min(same, key=lambda one: racing.typical(one.milliseconds))


def rows(race: Race, chosen: Sequence[Row]) -> str:
    """Markdown: a row for each network, runtime and precision."""
    lines = [HEAD]
    for row in sorted(chosen, key=lambda row: (row.runtime, row.precision, _place(row))):
        network, ms = _network(row), racing.typical(row.milliseconds)
        cells = [
            row.network,
            f"{race.gmacs[row.network]:.2f}",
            f"{network.top1:.1f}",
            LABELS[row.runtime],
            row.precision,
            row.way,
            f"{ms:.4g}",
            f"{1e3 * race.batch / ms:.4g}",
            "" if row.peak_pct is None else f"{row.peak_pct:.0f} %",
            "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}",
            "" if row.over_plain is None else racing.words(row.over_plain),
            "" if network.a100 is None else f"{network.a100:g}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _network(row: Row) -> Network:
    return next(network for network in NETWORKS if network.name == row.network)


def _place(row: Row) -> int:
    return NETWORKS.index(_network(row))


def control(race: Race, base: str = "ConvNeXt-T") -> str:
    """Markdown: the time of each network over that of one of them, in PyTorch here, and in timm's results on another
    CPU. All are of one image."""
    measured = {way: samples for way, samples in (("eager", race.eager), ("torch.compile", race.compiled)) if samples}
    columns = "".join(f" here, {way} | apart |" for way in measured)
    lines = [f"| networks | timm's, i9-10940X, inductor |{columns}", f"|---|--:|{'--:|--:|' * len(measured)}"]
    known = {network.name: network for network in NETWORKS if network.name in race.eager}
    for name, network in known.items() if base in known else ():
        if name == base:
            continue
        theirs = network.timm_ms / known[base].timm_ms
        cells = "".join(_control_cells(samples, name, base, theirs) for samples in measured.values())
        lines.append(f"| {name} / {base} | {theirs:.2f} |{cells}")
    return "\n".join(lines) + "\n"


def _control_cells(samples: dict[str, Samples], name: str, base: str, theirs: float) -> str:
    """A ratio of times, and how far it is from that of timm; no numbers for a network that could not be timed."""
    if not all(any(samples.get(one, ())) for one in (name, base)):
        return " – | |"
    ratio = racing.typical(samples[name]) / racing.typical(samples[base])
    apart = 100 * (ratio / theirs - 1)
    bold = "**" if abs(apart) > AGREED else ""
    return f" {ratio:.2f} | {bold}{apart:+.0f} %{bold} |"


def by_size(result: Sizes) -> str:
    """Markdown: milliseconds and memory of each network at each size, and the exponents in the number of pixels."""
    sizes = sorted({size for curve in result.curves for size in curve.sizes})
    lines = ["| network | runtime | " + " | ".join(map(str, sizes)) + " | time ∝ pixels to the | memory ∝ |"]
    lines.append("|---|---|" + "--:|" * (len(sizes) + 2))
    for curve in result.curves:
        known = dict(zip(curve.sizes, zip(curve.milliseconds, curve.peak_bytes, strict=True), strict=True))
        cells = []
        for size in sizes:
            samples, peak = known.get(size, ((), None))
            cells.append(f"{racing.typical(samples):.4g} ms, {(peak or 0) / 1e6:.0f} MB" if samples else "")
        exponent = racing.words(curve.time_exponent)
        cells += [exponent, f"{curve.memory_exponent:.2f}"]
        lines.append(f"| {curve.network} | {LABELS[curve.runtime]} | {' | '.join(cells)} |")
    failed = [f"* {name} pixels: {reason}" for name, reason in result.failures.items()]
    return "\n".join([*lines, *(["", *failed] if failed else [])]) + "\n"
