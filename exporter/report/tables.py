"""Tables of reports, with cells as text. The terminal, Markdown and HTML show the same tables."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from msgspec.structs import replace

from exporter.machine import TOOLS
from exporter.report import OF_A_VERIFICATION, Finding, Report, gpu_of

Doubt = Literal["unsure", "noisy"]


@dataclass(frozen=True)
class Table:
    """A table with cells as text. The columns in `right` hold numbers and are aligned right."""

    title: str
    columns: tuple[str, ...]
    right: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def tables(reports: Sequence[Report]) -> list[Table]:
    """All tables with at least one row, regressions first."""
    every = (regressions, bisections, accuracy, int8, sensitivity, latency)
    return [table for table in (create(reports) for create in every) if table.rows]


def name(report: Report) -> str:
    """The displayed name of a report's artifact: its file name, or the label from `disambiguated`."""
    return str(report.artifact.get("label") or Path(str(report.artifact.get("path", "?"))).name)


NO_VERDICT = "no verdict, the timing was disturbed"
"""How the detail of a speed-up begins if its timing was disturbed."""
METRICS = {
    "gain": "speed-up",
    "int8_speedup": "speed-up over eager PyTorch",
    "part_error": "error",
    "kept_error": "error if kept in higher precision",
    "kept_output_error": "error of the outputs if kept",
    "kept_back": "kept in higher precision",
    "tried_loss": "loss",
    "tried_ms": "latency",
}
"""Displayed names of metrics whose name in stored reports is another one."""


def metric(finding: Finding) -> str:
    """The displayed name of a finding's metric."""
    return METRICS.get(finding.metric, finding.metric)


def title(finding: Finding) -> str:
    """The displayed name of a finding's metric, and its case."""
    word = " over" if finding.metric == "gain" and finding.case else ""
    return f"{metric(finding)}{word} {finding.case}".strip()


def disambiguated(reports: Sequence[Report]) -> list[Report]:
    """The reports; artifacts that share a file name get their whole path as label."""
    paths = dict.fromkeys(str(report.artifact.get("path", "?")) for report in reports)
    times = Counter(Path(path).name for path in paths)
    clash = {path for path in paths if times[Path(path).name] > 1}
    return [
        replace(report, artifact={**report.artifact, "label": path}) if path in clash else report
        for report in reports
        if (path := str(report.artifact.get("path", "?")))
    ]


def runs_on(report: Report) -> str:
    """Backend and precision, and the arithmetic if it differs from the precision."""
    where = f"{report.artifact.get('backend', '?')} {report.artifact.get('precision', '?')}"
    if report.find("simulated"):
        return f"{where}, simulated"
    session = report.environment.get("session", {})
    arithmetic = session.get("arithmetic") if isinstance(session, dict) else None
    return f"{where}, computed in {arithmetic}" if arithmetic not in (None, report.artifact.get("precision")) else where


def verdict(report: Report, checks: Collection[str]) -> str:
    """'passes', with the metrics of these checks that are unsure; or those that failed."""
    judged = [finding for finding in report.findings if finding.check in checks]
    if bad := failed_metrics(judged):
        return f"**fails** {', '.join(bad)}"
    unsure = dict.fromkeys(finding.metric for finding in judged if finding.unsure)
    return f"passes, unsure of {', '.join(unsure)}" if unsure else "passes"


def failed_metrics(findings: Sequence[Finding]) -> list[str]:
    """The displayed names of the metrics that failed, each once. Findings that only hold a sentence, which `sentences`
    returns, are left out."""
    failed = (f for f in findings if not f.passed and f.check != "report" and f.metric != "reason")
    return list(dict.fromkeys(map(metric, failed)))


def doubts(findings: Sequence[Finding]) -> list[Doubt]:
    """The words `unsure` (a finding passes with a warning) and `noisy` (a timing was disturbed) that apply."""
    unsure = any(finding.passed and finding.unsure for finding in findings)
    known: dict[Doubt, bool] = {"unsure": unsure, "noisy": any(map(noise_of, findings))}
    return [word for word, holds in known.items() if holds]


def is_comparison(report: Report) -> bool:
    """Whether `compare` wrote the report."""
    return any(finding.check == "regression" for finding in report.findings)


def changes(reports: Sequence[Report]) -> list[tuple[Report, Finding]]:
    """The changes that `compare` measured: what regressed first, then what is nearest to its limit."""
    known = [(report, f) for report in reports for f in report.findings if f.check == "regression"]
    return sorted(known, key=lambda pair: (pair[1].passed, not pair[1].unsure, -_share_of_limit(pair[1])))


def _share_of_limit(change: Finding) -> float:
    """The change as a multiple of its limit; of a limit of 0, plus or minus infinity."""
    if change.value is None or not change.value:
        return 0.0
    return change.value / change.limit if change.limit else math.copysign(math.inf, change.value)


def regressions(reports: Sequence[Report]) -> Table:
    """A row for each limit that `compare` checked, in the order of `changes`."""
    columns = ("artifact", "metric", "case", "setting", "change", "95 % interval", "limit", "", "detail")
    rows = [_regression(report, change) for report, change in changes(reports)]
    return Table("Change from the base", columns, columns[4:7], rows)


def _regression(report: Report, f: Finding) -> tuple[str, ...]:
    unit = " %" if f.unit == "%" else f" {f.unit}" if f.unit else ""
    interval = "{:+.2f} … {:+.2f}".format(*f.interval) if f.interval else ""
    limit = "–" if f.limit is None else f"{f.limit:g}{unit}"
    word = ", ".join(["passes" if f.passed else "**regressed**", *doubts([f])])
    detail = "; ".join(filter(None, (f.detail, f.noise)))
    change = "–" if f.value is None else f"{f.value:+.2f}{unit}"
    return (name(report), f.metric, f.case, f.setting, change, interval, limit, word, detail)


MEASURES = {"top1": "top-1", "map": "mAP", "miou": "mIoU"}
"""Metrics of accuracy against labels; a report has one of them."""


def accuracy(reports: Sequence[Report]) -> Table:
    """A row for each artifact that was verified."""
    measured = {text: any(report.find(metric) for report in reports) for metric, text in MEASURES.items()}
    title = " or ".join(text for text, is_measured in measured.items() if is_measured) or MEASURES["top1"]
    columns = ("artifact", "runs on", "size", title, "eager", "agreement", "cosine", "max error", "")
    rows = [
        (
            name(report),
            runs_on(report),
            *accuracy_cells(report),
            verdict(report, OF_A_VERIFICATION),
        )
        for report in reports
        if any(map(report.find, ("cosine", "relative_error", "label_agreement", "pixel_agreement")))
    ]
    return Table("Accuracy against eager PyTorch", columns, columns[2:8], rows)


def accuracy_cells(report: Report) -> tuple[str, ...]:
    """Size, accuracy of the artifact and of eager PyTorch, agreement, cosine and largest error."""
    return (
        number(report.find("bytes"), "{:.2f} MB", 1e-6),
        _accuracy(report, ""),
        _accuracy(report, "_eager"),
        _agreement(report),
        number(report.find("cosine"), "{:.7f}"),
        number(report.find("max_abs"), "{:.2g}"),
    )


def _accuracy(report: Report, of: str) -> str:
    """Top-1; of a multi-label head mAP, and of segmentation mIoU."""
    for metric, text in MEASURES.items():
        if metric != "top1" and (finding := report.find(f"{metric}{of}")) is not None:
            return number(finding, f"{text} {{:.2f}} %")
    return number(report.find(f"top1{of}"), "{:.2f} %")


def _agreement(report: Report) -> str:
    """The share of images with the same top-1, of pixels with the same class, of equal decisions of a multi-label head,
    or of equal nearest neighbours of feature vectors; of a regression, R² of its values."""
    metrics = ("top1_agreement", "pixel_agreement", "label_agreement", "neighbour_agreement")
    agreement = next(filter(None, map(report.find, metrics)), None)
    if agreement is None and report.find("r2") is not None:
        return number(report.find("r2"), "R² {:.5f}")
    return number(agreement, "{:.2f} %")


def int8(reports: Sequence[Report]) -> Table:
    """A row for each quantized artifact."""
    columns = (
        *("artifact", "calibrated on", "in int8", "setting", "speed-up", "95 % interval"),
        *("baseline", "× eager", "kept in higher precision", ""),
    )
    rows = []
    for report in reports:
        calibration, gain = report.find("calibration"), report.find("gain")
        if calibration and gain:
            kept = [f.case for f in report.findings if f.metric == "kept_back"]
            eager = report.find("int8_speedup")
            noise = _more_noise(eager, gain)
            rows.append(
                (
                    name(report),
                    f"{number(calibration)} images {calibration.detail.partition(';')[0]}",
                    number(report.find("quantized_macs_pct"), "{:.1f} % of MACs"),
                    gain.setting,
                    number(gain, "{:.2f} ×"),
                    "{:.2f}–{:.2f}".format(*gain.interval) if gain.interval else "",
                    gain.case or "–",
                    number(eager, "{:.2f}"),
                    ", ".join(kept) or "nothing",
                    "; ".join(filter(None, (verdict(report, ("int8", "fp8")), gain.noise, noise))),
                )
            )
    return Table("INT8 compared with the next higher precision", columns, (columns[2], *columns[4:8]), rows)


def _more_noise(eager: Finding | None, gain: Finding) -> str:
    """The noise of the ratio to eager that the speed-up does not have too, or ""."""
    reasons, known = (one.noise.removeprefix("noisy: ").split(", ") if one else [] for one in (eager, gain))
    more = [reason for reason in reasons if reason and reason not in known]
    return f"× eager noisy: {', '.join(more)}" if more else ""


def sensitivity(reports: Sequence[Report]) -> Table:
    """A row for each part of the network with a measured sensitivity, the most sensitive first, with its precision."""
    columns = ("artifact", "part", "error", "precision", "cost")
    rows = []
    for report in reports:
        kept = {f.case: f for f in report.findings if f.metric == "kept_back"}
        for f in report.findings:
            if f.metric == "sensitivity":
                kept_back = kept.get(f.case)
                precision = "higher" if kept_back else f.check
                rows.append(
                    (name(report), f.case, number(f, "{:.2g}"), precision, kept_back.detail if kept_back else "")
                )
    return Table(
        "Sensitivity: error of the outputs when one part alone is int8, as a share of their variance",
        columns,
        ("error",),
        rows,
    )


def bisections(reports: Sequence[Report]) -> Table:
    """A row for each error that `bisect` measured, in the order of the parts."""
    columns = ("artifact", "metric", "part", "error", "limit", "", "detail")
    rows = [
        (name(report), metric(f), f.case, number(f, "{:.2g} %"), _limit(f), "" if f.passed else "**fails**", f.detail)
        for report in reports
        for f in report.findings
        if f.check == "bisect" and f.unit == "%"
    ]
    return Table("Errors measured by bisect", columns, columns[3:5], rows)


def _limit(finding: Finding) -> str:
    return "–" if finding.limit is None else f"{finding.limit:.2g} %"


def bisected(report: Report) -> list[str]:
    """The first part that differs and why, and how it is kept in higher precision; nothing for other reports."""
    if not any(finding.check == "bisect" for finding in report.findings):
        return []
    reason, few, advice = map(report.find, ("reason", "few_images", "keep"))
    first = f"{reason.case}: {reason.detail}" if reason else "every part is within its limit"
    kept = f"keep {advice.case} in higher precision: {advice.detail}" if advice else ""
    return [first, *filter(None, (few.detail if few else "", kept))]


def warnings(reports: Sequence[Report]) -> list[str]:
    """The lines above all tables: those of `sentences`; artifacts whose int8 layers are not faster than the baseline,
    or have no verdict."""
    gains = ((name(report), report.find("gain")) for report in reports)
    slow = [f"{artifact}: {gain.detail}" for artifact, gain in gains if gain and not_faster(gain)]
    return [*sentences(reports), *slow]


def sentences(reports: Sequence[Report]) -> list[str]:
    """A line for each report whose verdict contradicts its findings (`rendering.rendered` adds a finding to it), and
    those of `bisect`."""
    contradictions = [f"{name(one)}: {f.detail}" for one in reports for f in one.findings if f.check == "report"]
    return [*contradictions, *(f"{name(one)}: {line}" for one in reports for line in bisected(one))]


def not_faster(gain: Finding) -> bool:
    """Whether the 95 % interval of a speed-up is missing or reaches down to 1, or its timing was disturbed."""
    return gain.metric == "gain" and (gain.low is None or gain.low <= 1 or gain.detail.startswith(NO_VERDICT))


def latency(reports: Sequence[Report]) -> Table:
    """For each batch size, a row for eager PyTorch, then a row for each artifact."""
    columns = (
        *("model", "setting", "batch", "p50 ms", "p90 ms", "p99 ms", "images/s"),
        *("× eager", "95 % interval", "of peak", "load ms", ""),
    )
    cases = dict.fromkeys(f.case for r in reports for f in r.findings if f.check == "latency" and f.case)
    rows = [row for case in cases for row in _latency_rows(reports, case)]
    return Table("Latency, timed in turn with eager PyTorch", columns, columns[2:11], rows)


PYTORCH = {
    "eager_": "eager PyTorch",
    "compiled_": "torch.compile",
    "tf32_": "eager PyTorch, TF32",
    "eager_fp16_": "eager PyTorch, fp16",
    "eager_bf16_": "eager PyTorch, bf16",
}
"""The ways that PyTorch is timed, by the prefix of their metrics."""


def _latency_rows(reports: Sequence[Report], case: str) -> Iterator[tuple[str, ...]]:
    batch = case.removeprefix("batch ")
    for prefix, words in PYTORCH.items():
        p50 = next((f for r in reports if (f := r.find(f"{prefix}p50_ms", case))), None)
        if p50:
            yield (words, p50.setting, batch, number(p50), *[""] * 7, p50.detail if p50.value is None else "")
    for report in reports:
        if p50 := report.find("p50_ms", case):
            yield (name(report), setting(report, p50), batch, *latency_cells(report, case), _remark(report, case))


def latency_cells(report: Report, case: str) -> tuple[str, ...]:
    """Percentiles, images per second, the speed-up and its interval, share of peak, and time to load."""
    metrics = ("p50_ms", "p90_ms", "p99_ms", "throughput_ips")
    speed = report.find("speedup", case)
    return (
        *(number(report.find(metric, case)) for metric in metrics),
        number(speed, "{:.2f}"),
        "{:.2f}–{:.2f}".format(*speed.interval) if speed and speed.interval else "",
        number(report.find("peak_pct", case), "{:.0f} %"),
        number(report.find("load_ms")),
    )


def _remark(report: Report, case: str) -> str:
    """Failed findings of the timing, else its noise."""
    bad = [f.detail or f.metric for f in report.findings if f.check == "latency" and not f.passed]
    ratio = report.find("speedup", case) or report.find("p50_ms", case)
    return f"**fails** {'; '.join(bad)}" if bad else noise_of(ratio) if ratio else ""


def noise_of(ratio: Finding) -> str:
    """Why a ratio is uncertain; older reports have it in the detail."""
    last = ratio.detail.partition("; ")[2]
    return ratio.noise or (last if last.startswith("noisy") else "")


def setting(report: Report, p50: Finding) -> str:
    """Device, threads and hint of a timing; older reports have them in their recipe."""
    bench = report.recipe.get("bench")
    if p50.setting or not isinstance(bench, dict):
        return p50.setting
    threads = bench.get("threads")
    words = (
        bench.get("device"),
        f"{threads} thread{'s' if threads != 1 else ''}" if threads else "",
        bench.get("hint"),
    )
    return ", ".join(str(word) for word in words if word)


def number(finding: Finding | None, form: str = "{:.4g}", scale: float = 1.0) -> str:
    """The value of a finding times `scale`, or a dash if it was not measured."""
    return "–" if finding is None or finding.value is None else form.format(finding.value * scale)


def machine(report: Report) -> str:
    """The machine of a report, its GPU if that was used, and the versions of PyTorch and the runtimes."""
    versions = report.environment.get("versions")
    versions = versions if isinstance(versions, dict) else {}
    tools = [f"{tool} {versions[tool]}" for tool in versions if tool == "torch" or tool not in TOOLS]
    cores = report.environment.get("cores")
    cpu = str(report.environment.get("cpu", "?"))
    isa = report.environment.get("isa")
    if "AMD" in cpu and isinstance(isa, list) and "avx512f" in isa:
        cpu += " (PyTorch's MKL uses no AVX-512 on it, so × eager flatters)"
    return "; ".join(filter(None, [f"{cpu}, {cores} cores" if cores else cpu, gpu_of(report), ", ".join(tools)]))


def data(report: Report) -> str:
    """The images that an artifact was verified on."""
    images = report.find("images")
    return images.detail if images else ""
