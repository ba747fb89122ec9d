"""The answer of several reports: which artifact to ship, and why none of the others; of `compare`, what regressed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from exporter.errors import some
from exporter.report import Finding, Report, images_of, of_one_machine
from exporter.report.tables import MEASURES, changes, failed_metrics, is_comparison, name, noise_of, setting

LOSSES = {"top1_drop": "points of top-1", "map_drop": "points of mAP", "miou_drop": "points of mIoU"}
AGREEMENTS = {
    "top1_agreement": "of the images get PyTorch's class",
    "pixel_agreement": "of the pixels get PyTorch's class",
    "label_agreement": "of the decisions are PyTorch's",
    "neighbour_agreement": "of the nearest neighbours are PyTorch's",
}


@dataclass(frozen=True)
class Answer:
    """A sentence that names the artifact to ship, whether there is one, and a line for each of the others. `passes` is
    None for a history, which is not judged."""

    sentence: str
    passes: bool | None
    others: tuple[str, ...]


def answer(reports: Sequence[Report]) -> Answer | None:
    """Of reports of `compare`, what regressed; of the others the fastest artifact that passes its checks, by the median
    latency of the first case that all were timed in.

    None where nothing was compared or timed. Artifacts timed on different machines are not ranked.
    """
    compared = [report for report in reports if is_comparison(report)]
    changed = _of_changes(compared) if compared else None
    shipped = _of_artifacts([report for report in reports if not is_comparison(report)])
    if changed is None or shipped is None:
        return changed or shipped
    sentence = f"{changed.sentence} {shipped.sentence}"
    return Answer(sentence, bool(changed.passes and shipped.passes), changed.others + shipped.others)


DIFFERENT_SETTINGS = "No artifact is recommended: they were timed with different threads or hints."


def caveats(reports: Sequence[Report]) -> list[str]:
    """Why no artifact is recommended, and whether accuracies are of different images; nothing of `compare`."""
    own = [report for report in reports if not is_comparison(report)]
    if not any(report.find("images") for report in own):
        return [DIFFERENT_SETTINGS] if own and (case := _case(own)) and _settings_differ(own, case) else []
    names: dict[str, list[str]] = {}
    for report in own:
        if images_of(report) and any(report.find(metric) for metric in MEASURES):
            names.setdefault(images_of(report), []).append(name(report))
    groups = "; ".join(map(", ".join, names.values()))
    different = f"Accuracies are of different images: compare them only within a group ({groups})."
    return list(filter(None, (_unranked(own), different if len(names) > 1 else "")))


def _unranked(reports: Sequence[Report]) -> str:
    """Why `_of_artifacts` has no answer, or ""."""
    timed = [f for report in reports for f in report.findings if f.metric == "p50_ms"]
    if not timed:
        return "No artifact is recommended: time them with convnext-export bench."
    if all(finding.value is None for finding in timed):
        return "No artifact is recommended: none could be timed."
    if not of_one_machine(reports):
        return "No artifact is recommended: they were measured on different machines."
    if (case := _case(reports)) is None:
        return "No artifact is recommended: no batch size was timed for all of them."
    if _settings_differ(reports, case):
        return DIFFERENT_SETTINGS
    return ""


def _of_artifacts(reports: Sequence[Report]) -> Answer | None:
    case = _case(reports)
    if case is None or not of_one_machine(reports):
        return None
    if _settings_differ(reports, case):
        return None
    timed = sorted(
        (report for report in reports if _latency(report, case) is not None), key=lambda one: _latency(one, case) or 0.0
    )
    good = [report for report in timed if report.passed]
    if not good:
        why = "every artifact fails a check" if len(reports) > 1 else "the artifact fails a check"
        return Answer(f"Ship none of these: {why}.", False, tuple(_failure(report) for report in reports))
    chosen = good[0]
    untimed = [report for report in reports if report not in timed]
    rest = [report for report in (*timed, *untimed) if report is not chosen]
    others = [_reason(report, chosen, case) for report in sorted(rest, key=lambda one: not one.passed)]
    unknown = "" if chosen.find("images") else "; its accuracy was not verified"
    alike = [name(one) for one in good[1:] if _overlap(*(each.find("speedup", case) for each in (chosen, one)))]
    equal = f" By these intervals it may be no faster than {some(alike)}." if alike else ""
    sentence = f"Ship {name(chosen)}: {_speed(chosen, case)}{_accuracy(chosen) or unknown}.{equal}"
    return Answer(sentence, True, tuple(others))


def _of_changes(reports: Sequence[Report]) -> Answer:
    """How many changes regressed and the worst of these, then the others and those that are unsure."""
    changed = [change for _, change in changes(reports)]
    bad = [change for change in changed if not change.passed]
    unsure = [f"unsure: {_change(change)}" for change in changed if change.passed and change.unsure]
    count = f"{len(changed)} change{'s' if len(changed) > 1 else ''}"
    if not bad and (failed := [name(report) for report in reports if not report.passed]):
        return Answer(f"No regression in {count}, but {', '.join(failed)} failed.", False, tuple(unsure))
    if not bad:
        return Answer(f"No regression in {count}.", True, tuple(unsure))
    return Answer(f"{len(bad)} of {count} regressed: {_change(bad[0])}.", False, (*map(_change, bad[1:]), *unsure))


def _change(change: Finding) -> str:
    unit = f" {change.unit}" if change.unit else ""
    value = "not measured" if change.value is None else f"{change.value:+.2f}{unit}"
    interval = "95 % {:+.2f} to {:+.2f}, ".format(*change.interval) if change.interval else ""
    limit = "no limit" if change.limit is None else f"limit {change.limit:g}{unit}"
    return f"{f'{change.metric} {change.case}'.strip()} {value} ({interval}{limit})"


def _case(reports: Sequence[Report]) -> str | None:
    """The first case ("batch 1") that every timed report has."""
    known = [[f.case for f in report.findings if f.metric == "p50_ms" and f.value is not None] for report in reports]
    timed = [cases for cases in known if cases]
    return next((case for case in timed[0] if all(case in cases for cases in timed)), None) if timed else None


def _latency(report: Report, case: str) -> float | None:
    """The milliseconds of a batch: the median latency; with `--hint throughput` the batch size divided by the
    throughput, because a run computes several batches at once."""
    finding, rate = report.find("p50_ms", case), report.find("throughput_ips", case)
    batch = case.removeprefix("batch ")
    if finding and setting(report, finding).endswith("throughput") and rate and rate.value and batch.isdecimal():
        return 1e3 * int(batch) / rate.value
    return finding.value if finding and finding.value and finding.value > 0 else None


def _settings_differ(reports: Sequence[Report], case: str) -> bool:
    """Whether artifacts were timed with different hints, or on one device with different threads."""
    known = [setting(report, finding).split(", ") for report in reports if (finding := report.find("p50_ms", case))]
    devices = {words[0] for words in known}
    return len({words[-1] for words in known}) > 1 or len({tuple(words) for words in known}) > len(devices)


def _speed(report: Report, case: str) -> str:
    speedup, p50 = report.find("speedup", case), report.find("p50_ms", case)
    assert p50 is not None
    latency, rate = f"{p50.value:.4g} ms for {case}", report.find("throughput_ips", case)
    if rate and rate.value and setting(report, p50).endswith("throughput"):
        latency = f"{rate.value:.4g} images/s for {case}"
    if speedup is None or speedup.value is None:
        return latency
    interval = " (95 % {:.2f} to {:.2f})".format(*speedup.interval) if speedup.interval else ""
    noise = " (noisy)" if noise_of(speedup) else ""
    return f"{speedup.value:.2f} × as fast as PyTorch{interval}, {latency}{noise}"


def _accuracy(report: Report) -> str:
    """The loss of accuracy, else the agreement, after a semicolon; nothing where neither was measured."""
    for metric, unit in LOSSES.items():
        if (loss := report.find(metric)) is not None and loss.value is not None:
            interval = " (95 % {:.2f} to {:.2f})".format(*loss.interval) if loss.interval else ""
            if not round(loss.value, 2):
                return f"; no loss of {unit.rpartition(' ')[2]}{interval}"
            return f"; it {'gains' if loss.value < 0 else 'loses'} {abs(loss.value):.2f} {unit}{interval}"
    for metric, words in AGREEMENTS.items():
        if (share := report.find(metric)) is not None and share.value is not None:
            return f"; {share.value:.4g} % {words}"
    return ""


def _failure(report: Report) -> str:
    return f"{name(report)} fails {', '.join(failed_metrics(report.findings))}".strip()


def _reason(report: Report, chosen: Report, case: str) -> str:
    """Why an artifact is not the one to ship."""
    if not report.passed:
        return _failure(report)
    own, best = _latency(report, case), _latency(chosen, case)
    if own is None or best is None:
        return f"{name(report)} was not timed"
    accuracy = _accuracy(report) if _accuracy(report) != _accuracy(chosen) else ""
    line = f"{name(report)} takes {own / best:.2f} × as long{accuracy}"
    speedups = [one.find("speedup", case) for one in (report, chosen)]
    return f"{line}; the intervals of their speed-ups overlap" if _overlap(*speedups) else line


def _overlap(a: Finding | None, b: Finding | None) -> bool:
    if a is None or b is None or a.interval is None or b.interval is None:
        return False
    return a.interval[0] <= b.interval[1] and b.interval[0] <= a.interval[1]
