"""Compares two reports of separate runs.

If both timed eager PyTorch with the artifact, each launch is compared with eager in that launch, so a machine that was
slower in one run causes no regression. Nothing can be measured again here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from math import comb

import msgspec
import numpy as np

from exporter import backends
from exporter.compare import LEAST_LAUNCHES, METRICS, Change, Limit, compare_answers, compare_exact, judge
from exporter.errors import BadRequest, some
from exporter.report import Finding, Report, gpu_of, images_of, machine_of
from exporter.report.tables import name
from exporter.stats import center, p_larger, shift

Pair = tuple[Report, Report]


def compare_reports(pairs: Sequence[Pair], limits: Sequence[Limit], across: Sequence[str]) -> list[Finding]:
    """A finding for every pair, limit and case; of several pairs, the case begins with the artifact's name.

    Raises: BadRequest for reports of two machines or models, unless `across` allows it, and for reports without the
        metric of a limit.
    """
    for base, head in pairs:
        check_same(base, head, across)
    times = [limit for limit in limits if METRICS[limit.metric].kind == "time"]
    changes = [
        replace(change, case=_case(pair, pairs, change.case))
        for pair in pairs
        for limit in times
        for change in _changes(*pair, limit)
    ]
    findings = judge(changes, confirmed=True)
    for pair in pairs:
        others = _compare_others(*pair, limits)
        findings += [msgspec.structs.replace(one, case=_case(pair, pairs, one.case)) for one in others]
    return findings


def pairs_of(bases: Sequence[Report], heads: Sequence[Report]) -> list[Pair]:
    """One report with one, or the reports of two lists by the file names of their artifacts.

    Raises: BadRequest for lists of other artifacts.
    """
    if len(bases) == len(heads) == 1:
        return [(bases[0], heads[0])]
    names = [[name(report) for report in reports] for reports in (bases, heads)]
    if sorted(names[0]) != sorted(names[1]) or len(set(names[0])) < len(names[0]):
        raise BadRequest(
            f"base has reports of {some(names[0])}, head of {some(names[1])}; give the same artifacts, each once"
        )
    return [(bases[names[0].index(name(head))], head) for head in heads]


def _case(pair: Pair, pairs: Sequence[Pair], case: str) -> str:
    return f"{name(pair[1])} {case}".strip() if len(pairs) > 1 else case


def _compare_others(base: Report, head: Report, limits: Sequence[Limit]) -> list[Finding]:
    """A finding for every limit that is not on a time."""
    findings = []
    for limit in limits:
        if METRICS[limit.metric].kind == "exact":
            findings.append(compare_exact(limit, _number(base, limit, "base"), _number(head, limit, "head")))
        elif METRICS[limit.metric].kind == "answers":
            check_images(base, head, limit)
            findings.append(compare_answers(limit, _answers(base, limit, "base"), _answers(head, limit, "head")))
    return findings


def check_same(base: Report, head: Report, across: Sequence[str]) -> None:
    """Refuse reports of two machines or models, unless `across` allows it.

    Raises: BadRequest.
    """
    first, second = machine_of(base), machine_of(head)
    if gpu_of(base) and gpu_of(head):
        first, second = (*first, gpu_of(base)), (*second, gpu_of(head))
    if first != second and "machine" not in across:
        differ = next((a, b) for a, b in zip(first, second, strict=True) if a != b)
        raise BadRequest(f"two machines: {differ[0]} and {differ[1]}; measure both on one, or add --across machine")
    models = [_model(one) for one in (base, head)]
    if models[0] != models[1] and "model" not in across:
        raise BadRequest(
            f"two models: {_words(models[0])} and {_words(models[1])}; add --across model to compare them anyway"
        )


def _model(report: Report) -> tuple[object, ...]:
    """The model and the size of its input, which decide how long eager PyTorch takes."""
    preprocessing = report.artifact.get("preprocessing")
    size = preprocessing.get("size") if isinstance(preprocessing, dict) else None
    at = (f"at {size} pixels",) if size is not None else ()
    return report.artifact.get("variant"), report.artifact.get("task"), *at


def check_images(base: Report, head: Report, limit: Limit) -> None:
    """Refuse reports whose answers are not to the same images in the same order.

    Raises: BadRequest.
    """
    digests = {side: images_of(report) for side, report in (("base", base), ("head", head))}
    for side, digest in digests.items():
        if not digest:
            raise BadRequest(f"--fail-on {limit}: the {side} report does not say on which images; `verify` it again")
    if len(set(digests.values())) > 1:
        raise BadRequest(
            f"--fail-on {limit}: base and head were verified on different images, or with other classes "
            f"({digests['base'][:12]}… and {digests['head'][:12]}…); `verify` both on the same --data"
        )


def _words(model: Sequence[object]) -> str:
    return " ".join(map(str, model))


def _timing_options(report: Report, side: str) -> list[str]:
    """The timing options of a report that change the meaning of its numbers.

    Raises: BadRequest for a report without latencies.
    """
    if report.find("p50_ms") is None:
        raise BadRequest(f"the {side} report of {report.artifact.get('path')} has no latency; run `bench` first")
    options = report.recipe.get("bench")
    options = options if isinstance(options, dict) else {}
    backend = str(report.artifact.get("backend"))
    default = next(iter(backends.runtime(backend).devices)) if backend in backends.runtimes() else "cpu"
    words = [f"device {options.get('device') or default}", f"threads {options.get('threads') or 'by default'}"]
    return [*words, f"hint {options.get('hint') or 'latency'}"]


def _number(report: Report, limit: Limit, side: str) -> float:
    value = report.value(limit.metric)
    if value is None:
        raise BadRequest(f"--fail-on {limit}: the {side} report has no {limit.metric}; `verify` measures it")
    return value


def _answers(report: Report, limit: Limit, side: str) -> Finding:
    metric = METRICS[limit.metric].answers
    if len([one for one in report.findings if one.metric == metric and one.check != "regression"]) > 1:
        raise BadRequest(
            f"--fail-on {limit}: the {side} report has a separate {metric} for each kind of processor; verify on "
            "machines of one kind"
        )
    answers = report.find(metric)
    if answers is None or not answers.samples or answers.value is None:
        multilabel = " --outputs multilabel" if metric == "map" else ""
        raise BadRequest(
            f"--fail-on {limit}: the {side} report has no {metric}; `verify --data`{multilabel} "
            "with labels measures it, mAP where an image has one, mIoU of masks"
        )
    return answers


def _changes(base: Report, head: Report, limit: Limit) -> list[Change]:
    ways = [_timing_options(base, "base"), _timing_options(head, "head")]
    if ways[0] != ways[1]:
        raise BadRequest(
            f"timed with different options: {_words(ways[0])} and {_words(ways[1])}; `bench` both with the same options"
        )
    cases = [f.case for f in head.findings if f.metric == "p50_ms" and base.find("p50_ms", f.case) is not None]
    if not cases:
        raise BadRequest(f"--fail-on {limit}: no batch size in common; `bench` both with the same --batch")
    if missing := [f.case for f in base.findings if f.metric == "p50_ms" and f.case not in cases]:
        raise BadRequest(
            f"--fail-on {limit}: base was timed with {', '.join(missing)} too, and head was not; `bench` both with the "
            "same --batch"
        )
    return [_change(base, head, limit, case) for case in cases]


def _change(base: Report, head: Report, limit: Limit, case: str) -> Change:
    before, after = _launches(base, "p50_ms", case, "base"), _launches(head, "p50_ms", case, "head")
    timed = [found for report in (base, head) if (found := report.find("p50_ms", case))]
    of = METRICS[limit.metric].of
    is_rate = METRICS[limit.metric].higher_is_better
    batches = [_streams(report, case) if is_rate else 1 for report in (base, head)]
    logs = [
        np.log([of([launch]) / count for launch in launches])
        for launches, count in zip((before, after), batches, strict=True)
    ]
    eager = [_eager(report, case, len(launches)) for report, launches in ((base, before), (head, after))]
    if eager[0] is not None and eager[1] is not None and _eager_model(base) == _eager_model(head):
        logs = [ours - theirs for ours, theirs in zip(logs, eager, strict=True)]
    spread = [center(list(one)).half_width for one in logs]
    values = [report.find(limit.metric, case) for report in (base, head)]
    known = [found.value if found and found.value is not None else float("nan") for found in values]
    return Change(
        limit=limit,
        case=case,
        found=shift(list(logs[0]), list(logs[1])),
        effects=[float(one - np.median(logs[0])) for one in logs[1]],
        chance=p_larger(list(logs[0]), list(logs[1])),
        floor=max(spread),
        base=known[0],
        head=known[1],
        least_chance=1 / comb(len(before) + len(after), len(after)),
        noise=next((one.noise for one in timed if one.noise), ""),
        setting=timed[1].setting,
    )


def _streams(report: Report, case: str) -> int:
    """The batches that a run computes at once, by the throughput and the mean time of a run."""
    rate, p50 = report.find("throughput_ips", case), report.find("p50_ms", case)
    batch = case.removeprefix("batch ")
    if rate is None or rate.value is None or p50 is None or not p50.samples or not batch.isdecimal():
        return 1
    return max(1, round(rate.value * float(np.mean(p50.samples)) / (1e3 * int(batch))))


def _launches(report: Report, metric: str, case: str, side: str) -> list[tuple[float, ...]]:
    found = report.find(metric, case)
    if found is None or not found.samples:
        raise BadRequest(f"the {side} report has no samples of {metric} ({case}); `bench` it again")
    if sum(found.launches) != len(found.samples) or min(found.launches, default=0) < 1 or min(found.samples) <= 0:
        raise BadRequest(f"the {side} report's samples of {metric} ({case}) are damaged; `bench` it again")
    if len(found.launches) < LEAST_LAUNCHES:
        raise BadRequest(
            f"the {side} report has {len(found.launches)} launches of {case}, and a rank test needs at least "
            f"{LEAST_LAUNCHES}; `bench` it again"
        )
    ends = [0, *accumulate(found.launches)]
    return [found.samples[a:b] for a, b in pairwise(ends)]


def _eager_model(report: Report) -> tuple[object, ...]:
    """What eager PyTorch ran: another version, reference or model takes another time."""
    versions, bench = report.environment.get("versions"), report.recipe.get("bench")
    torch = versions.get("torch") if isinstance(versions, dict) else None
    reference = bench.get("reference") if isinstance(bench, dict) else None
    return torch, reference, _model(report)


def _eager(report: Report, case: str, count: int) -> np.ndarray | None:
    """The logarithm of eager's median for each launch, or None if eager was not timed in every launch."""
    found = report.find("eager_p50_ms", case)
    if found is None or len(found.launches) != count or not found.samples:
        return None
    return np.log([float(np.median(launch)) for launch in _launches(report, "eager_p50_ms", case, "eager's")])
