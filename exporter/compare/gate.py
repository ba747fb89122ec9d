"""The CI gate: compares two artifacts, two reports or two revisions, and returns one report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import msgspec

from exporter import artifact as artifacts
from exporter import backends, report
from exporter.artifact import Artifact
from exporter.artifact.sidecar import Record
from exporter.compare import METRICS, Limit, compare_exact, parse_limits
from exporter.compare.artifacts import CompareOptions, Pair, check_pair, compare_times
from exporter.compare.reports import compare_reports, pairs_of
from exporter.compare.revisions import build, built_at
from exporter.errors import BadRequest, some
from exporter.progress import note
from exporter.recipe import OutputKind, ReduceZeroLabel
from exporter.recipe.fields import about
from exporter.report import Finding, Report
from exporter.report.tables import name
from exporter.verify import VerifyOptions, verify

TIMED = ("batch", "threads", "hint", "duration", "seed")


class GateOptions(CompareOptions, frozen=True):
    """Options of `compare`."""

    fail_on: Annotated[
        tuple[str, ...],
        about(
            "A limit, as in p50_ms:5% (the default), p99_ms:10%, throughput_ips:5%, bytes:1%, nodes:0, top1_drop:0.3 "
            "or, of multi-label heads, map_drop:0.3, of segmentation miou_drop:0.3.",
            metavar="METRIC:LIMIT",
        ),
    ] = ()
    base_rev: Annotated[str | None, about("Build the base from this git revision, with --build.", metavar="REV")] = None
    build: Annotated[
        str | None, about("The shell command that builds HEAD, here and at --base-rev.", metavar="CMD")
    ] = None
    data: Annotated[
        str | None, about("Images with labels or masks, needed for top1_drop, map_drop and miou_drop.", metavar="SRC")
    ] = None
    reduce_zero_label: ReduceZeroLabel = False


def compare(sides: Sequence[Path], options: GateOptions) -> Report:
    """Compare the last side with the first: two artifacts, two reports, or one artifact and `base_rev`.

    Raises: BadRequest for sides that cannot be compared, and the errors of building and measuring.
    """
    limits = parse_limits(options.fail_on)
    wanted = 1 if options.base_rev else 2
    if len(sides) != wanted:
        expected = "HEAD alone, with --base-rev" if options.base_rev else "BASE and HEAD, or HEAD and --base-rev"
        raise BadRequest(f"compare: {len(sides)} given; expected {expected}")
    if (options.base_rev is None) != (options.build is None):
        raise BadRequest("--base-rev REV and --build CMD go together: the command builds HEAD at both revisions")
    for side in sides:
        artifacts.refuse_sidecar(side)
    are_reports = [_is_report(side) for side in sides]
    if any(are_reports) and (not all(are_reports) or options.base_rev):
        raise BadRequest("compare: a report and an artifact; give two reports or two artifacts")
    if all(are_reports):
        if ignored := _changed(options, ("data", "reduce_zero_label", "device", *TIMED)):
            option = ignored[0].replace("_", "-")
            raise BadRequest(f"--{option}: two reports are compared as they are; leave it out")
        return _compare_reports(report.load_all(sides[0]), report.load_all(sides[1]), limits, options)
    with ExitStack() as stack:
        if options.base_rev and options.build:
            base = stack.enter_context(built_at(options.base_rev, options.build, sides[0]))
            head = build(options.build, Path(), sides[0], "head")
        else:
            base, head = (artifacts.load(side) for side in sides)
        return _compare_artifacts(Pair(base, head), limits, options)


def _changed(options: GateOptions, names: Sequence[str]) -> list[str]:
    """The options of `names` whose value is not the default."""
    return [option for option in names if getattr(options, option) != getattr(GateOptions(), option)]


def _note_ignored(options: GateOptions, names: Sequence[str], limit: str) -> None:
    if ignored := _changed(options, names):
        words = some(f"--{option.replace('_', '-')}" for option in ignored)
        note(f"{words}: no effect without {limit}")


def _is_report(path: Path) -> bool:
    return path.suffix == ".json"


def _compare_reports(
    bases: Sequence[Report], heads: Sequence[Report], limits: Sequence[Limit], options: GateOptions
) -> Report:
    pairs = pairs_of(bases, heads)
    findings = compare_reports(pairs, limits, options.across)
    for base, head in pairs:
        _note_accuracy(base.artifact, head.artifact, limits, "after `verify` of both on labelled images")
    base, head = pairs[0]
    if len(pairs) == 1:
        return _report(findings, base.artifact, head.artifact, limits, options, head.environment)
    both = {"path": ", ".join(name(one) for _, one in pairs)}
    return _report(findings, both, both, limits, options, head.environment)


def _compare_artifacts(pair: Pair, limits: Sequence[Limit], options: GateOptions) -> Report:
    by_kind = {
        kind: [one for one in limits if METRICS[one.metric].kind == kind] for kind in ("time", "exact", "answers")
    }
    if by_kind["answers"] and options.data is None:
        raise BadRequest(f"--fail-on {by_kind['answers'][0]}: give labelled images with --data")
    if not by_kind["answers"]:
        _note_ignored(options, ("data", "reduce_zero_label"), "a limit on accuracy, as --fail-on top1_drop:0.3")
    if not by_kind["time"]:
        _note_ignored(options, TIMED, "a limit on a time")
    if len(by_kind["answers"]) > 1:
        raise BadRequest(
            "--fail-on: give one of top1_drop (classes), map_drop (several labels) and miou_drop (segmentation)"
        )
    check_pair(pair, options)
    _note_accuracy(pair.base.to_dict(), pair.head.to_dict(), limits, "and --data with labelled images")
    findings = compare_times(pair, by_kind["time"], options)
    for limit in by_kind["exact"]:
        findings.append(compare_exact(limit, _exact(pair.base, limit.metric), _exact(pair.head, limit.metric)))
    if options.data is not None and by_kind["answers"]:
        device = backends.device_of(pair.base, options.device)
        outputs: OutputKind | None = "multilabel" if by_kind["answers"][0].metric == "map_drop" else None
        verify_options = VerifyOptions(
            data=options.data,
            device=device,
            when_unsure="pass",
            outputs=outputs,
            reduce_zero_label=options.reduce_zero_label,
        )
        both = [verify(artifact, verify_options) for artifact in (pair.base, pair.head)]
        findings += compare_reports([(both[0], both[1])], by_kind["answers"], ("model",))
    return _report(findings, pair.base.to_dict(), pair.head.to_dict(), limits, options, backends.environment())


def _note_accuracy(base: dict[str, Any], head: dict[str, Any], limits: Sequence[Limit], images: str) -> None:
    """Say that accuracy is not compared, where it may differ, and how it is.

    Args:
        base, head: the facts of both artifacts.
        limits: of the comparison.
        images: the words that say how labelled images are given.
    """
    differing = [name for name, fact in FACTS.items() if fact(base) != fact(head)]
    if not differing or any(METRICS[limit.metric].kind == "answers" for limit in limits):
        return
    unlike = f"accuracy is not compared, and base and head differ in {', '.join(differing)}"
    if metric := _loss_of(head):
        options = " ".join(f"--fail-on {limit}" for limit in (*limits, f"{metric}:0.3"))
        note(f"{unlike}; to compare it too, give {options} {images}")
    else:
        note(f"{unlike}; `verify` compares each with PyTorch")


def _loss_of(artifact: dict[str, Any]) -> str:
    """The metric of `--fail-on` for the accuracy of an artifact, by its first output; "" where labels say nothing of
    it."""
    task = str(artifact.get("task") or "classify").partition(",")[0]
    if task == "classify":
        return "map_drop" if artifact.get("recipe", {}).get("export", {}).get("output") == "sigmoid" else "top1_drop"
    return "miou_drop" if task == "segment" else ""


def _quantization(artifact: dict[str, Any]) -> object:
    """How an artifact was quantized, whatever the path of its images."""
    facts = artifact.get("quantization")
    return {name: fact for name, fact in facts.items() if name != "calib"} if isinstance(facts, dict) else None


def _digest(artifact: dict[str, Any]) -> object:
    weights = artifact.get("weights")
    return weights.get("digest") if isinstance(weights, dict) else None


FACTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "weights": _digest,
    "precision": lambda artifact: artifact.get("precision"),
    "quantization": _quantization,
    "preprocessing": lambda artifact: artifact.get("preprocessing"),
}
"""What accuracy depends on."""


def _exact(artifact: Artifact, metric: str) -> float:
    if metric == "bytes":
        return artifact.sidecar.bytes
    runtime = backends.runtime_of(artifact)
    if runtime.layers is None:
        raise BadRequest(f"--fail-on {metric}: {runtime.name} does not show the layers of {artifact.path}")
    return len(runtime.layers(artifact, runtime.options()))


def _report(
    findings: Sequence[Finding],
    base: dict[str, Any],
    head: dict[str, Any],
    limits: Sequence[Limit],
    options: Record,
    environment: dict[str, Any],
) -> Report:
    recipe = {"base": base, "limits": [str(limit) for limit in limits], "options": msgspec.to_builtins(options)}
    return Report(
        passed=all(finding.passed for finding in findings),
        recipe={"compare": recipe},
        artifact=head,
        environment=environment,
        findings=tuple(findings),
    )
