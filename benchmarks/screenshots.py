"""The pages of four cases in headless Chromium, and their pictures for the docs.

    python -m benchmarks.screenshots [-o docs/pictures]

The reports are those of `make demo`. The page of twenty artifacts and the failing gate have them with other names and
with times and accuracies times a factor, so their numbers were not measured.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from msgspec.structs import replace
from PIL import Image

from exporter import report
from exporter.artifact.disk import write_file
from exporter.compare import gate
from exporter.report import Finding, Report
from exporter.report.formats import html

DEMO = Path(__file__).parent / "results" / "epyc-genoa-2-cores" / "demo"
WIDTH, HEIGHT, COLORS = 1280, 1900, 256
TIMES = ("p50_ms", "p90_ms", "p99_ms")
LIMITS = ("p50_ms:5%", "bytes:1%", "top1_drop:0.3")


def demo() -> list[Report]:
    """The reports of the demo, those with a timing first."""
    reports = [report.load(path) for path in sorted(DEMO.glob("*.report.json"))]
    return sorted(reports, key=lambda one: one.find("p50_ms") is None)


def scaled(one: Report, name: str, factor: float, drop: float = 0.0) -> Report:
    """A report of the artifact `name`, which takes `factor` times as long and has `drop` points less of top-1."""
    findings = tuple(_scaled(finding, factor, drop) for finding in one.findings)
    return replace(one, artifact={**one.artifact, "path": f"build/{name}"}, findings=findings)


def _scaled(finding: Finding, factor: float, drop: float) -> Finding:
    value = finding.value or 0.0
    if finding.metric in TIMES:
        return replace(finding, value=value * factor, samples=tuple(sample * factor for sample in finding.samples))
    if finding.metric == "speedup" and finding.interval:
        low, high = finding.interval
        return replace(finding, value=value / factor, low=low / factor, high=high / factor)
    if finding.metric == "throughput_ips":
        return replace(finding, value=value / factor)
    if finding.metric == "block_error":
        return replace(finding, value=value * factor)
    if finding.metric in ("top1", "top1_drop") and finding.interval:
        more, (low, high) = drop if finding.metric == "top1_drop" else -drop, finding.interval
        return replace(finding, value=value + more, low=low + more, high=high + more)
    return finding


def many(count: int) -> list[Report]:
    """The timed reports in turn, each with another name, other times and another top-1."""
    rng, timed = np.random.default_rng(0), [one for one in demo() if one.find("p50_ms")]
    reports = []
    for index in range(count):
        one, factor, drop = timed[index % len(timed)], float(np.exp(rng.normal(0, 0.25))), float(rng.normal(0, 0.3))
        name = str(one.artifact["path"]).replace("build/demo/custom", ("conv", "linear", "fused", "plain")[index % 4])
        reports.append(scaled(one, f"tiny{index}_{name}", factor, drop))
    return reports


def failing_gate() -> Report:
    """Four artifacts compared with themselves, of which one became slower and one larger."""
    bases = demo()[:4]
    heads = [
        scaled(one, Path(str(one.artifact["path"])).name, 1.5 if index == 1 else 1.0) for index, one in enumerate(bases)
    ]
    grown = [replace(f, value=(f.value or 0) * 1.04) if f.metric == "bytes" else f for f in heads[2].findings]
    heads[2] = replace(heads[2], findings=tuple(grown))
    with tempfile.TemporaryDirectory() as folder:
        sides = [Path(folder) / f"{side}.json" for side in ("base", "head")]
        for path, reports in zip(sides, (bases, heads), strict=True):
            path.write_bytes(b"[" + b",".join(map(report.encode, reports)) + b"]")
        return gate.compare(sides, gate.GateOptions(fail_on=LIMITS))


def cases() -> dict[str, list[Report]]:
    """The reports of each page, by its name."""
    return {"report-2": demo()[:2], "report-8": demo()[:8], "report-20": many(20), "gate": [failing_gate()]}


def picture(page: str) -> bytes:
    """The top of a page as PNG with a palette.

    Raises: subprocess.CalledProcessError without Chromium.
    """
    with tempfile.TemporaryDirectory() as folder:
        path, taken = Path(folder) / "page.html", Path(folder) / "page.png"
        path.write_text(page)
        words = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        sizes = [f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={taken}", f"--user-data-dir={folder}/profile"]
        subprocess.run([*words, *sizes, path.as_uri()], check=True, capture_output=True)
        out = io.BytesIO()
        Image.open(taken).convert("RGB").quantize(COLORS, Image.Quantize.MAXCOVERAGE).save(out, "PNG", optimize=True)
        return out.getvalue()


def main(argv: Sequence[str]) -> None:
    """Write a picture of each page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--out", type=Path, default=Path("docs/pictures"))
    options = parser.parse_args(argv)
    for name, reports in cases().items():
        write_file(options.out / f"{name}.png", picture(html.render(reports)))


if __name__ == "__main__":
    main(sys.argv[1:])
