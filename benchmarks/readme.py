"""The generated parts of README: three commands with what they printed, and five claims with their figures.

    python -m benchmarks.readme --weights W.safetensors --data photos/val -o benchmarks/results/MACHINE/readme.json

Types the commands in an empty folder that has the weights with a `config.json` and the photographs, and records what
each prints. `commands` renders the record. A line is left out only by `LEFT_OUT`, and "…" stands in its place.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks import gate, optimize, plans, quantizers
from benchmarks.peers import Case
from benchmarks.peers.table import best_other
from benchmarks.provenance import environment
from exporter.artifact.disk import write_file
from exporter.artifact.sidecar import Record
from exporter.report import Finding, Report

PROGRAM = Path(sys.executable).with_name("convnext-export")
LINES = (
    "convnext-export openvino --weights my_convnext.safetensors --fp16",
    "convnext-export verify build/atto_fp16.xml --data photos/val",
    "convnext-export package build/atto_fp16.xml --for python -o build/package",
)
# Progress, and findings that the text beside the commands does not need.
LEFT_OUT = ("^· ", "^note: onnxsim", " top5", " mean_abs", " sqnr_db", "^sanity", "^structure", "^data ")
WIDTH = 100


class Typed(Record, frozen=True):
    """One command with what it printed, errors and progress included, and its exit code."""

    line: str
    printed: str
    exit_code: int


class Result(Record, frozen=True):
    """The commands of README as they were typed."""

    environment: dict[str, Any]
    model: str
    commands: tuple[Typed, ...]
    schema: int = 1


def commands(result: Result) -> str:
    """Each command with the lines that it printed."""
    return "\n".join(
        f"```console\n{one.line}\n```\n\n```text\n{shortened(one.printed)}\n```\n" for one in result.commands
    )


def shortened(printed: str, left_out: Sequence[str] = LEFT_OUT) -> str:
    """What was printed, with "…" for lines that match a pattern of `left_out`."""
    lines: list[str] = []
    for line in printed.rstrip().splitlines():
        if any(re.search(pattern, line) for pattern in left_out):
            lines += ["…"] if lines[-1:] != ["…"] else []
        else:
            lines.append(re.sub("─+", "─" * WIDTH, line.rstrip()))
    return "\n".join(lines)


def claims(
    peers: Iterable[Case],
    quantized: quantizers.Result,
    searched: optimize.Result,
    gated: gate.Experiment,
    engines: plans.Result,
) -> str:
    """What is different about this tool, each point with its figure and a link."""
    points = (faster(peers), same_answers(quantized), best_choice(searched), quiet_gate(gated), without_gpu(engines))
    return "".join(f"* {point}\n" for point in points)


def faster(peers: Iterable[Case]) -> str:
    """ConvNeXt-T in int8 compared with the fastest alternative and with eager PyTorch."""
    name = "ours, OpenVINO int8"
    case = next(one for one in peers if (one.variant, one.batch) == ("tiny", 1))
    row = next(one for one in case.rows if one.name == name)
    best = best_other(case, name)
    assert best is not None
    assert row.over_eager is not None
    return (
        f"**Graphs written for ConvNeXt.** ConvNeXt-T in int8 on OpenVINO is {best[1]:.2f} × as fast as {best[0]}, and "
        f"{row.over_eager[0]:.2f} × as fast as eager PyTorch ([comparison](docs/peers.md))."
    )


def same_answers(quantized: quantizers.Result) -> str:
    """The agreement of int8 with eager PyTorch, compared with the best of NNCF's settings."""
    case = quantized.cases[0]
    ours = next(row.agreement for row in case.rows if row.name.startswith(f"{quantizers.OURS}, OpenVINO"))
    others = [row.agreement for row in case.rows if row.name.startswith("NNCF") and row.agreement is not None]
    assert ours is not None
    return (
        f"**int8 that keeps the answers.** A ConvNeXt-atto with ten classes gives {ours[0]:.2f} % of {case.images:,} "
        "photographs the class that PyTorch gives, on a CPU without VNNI. NNCF with its best setting for such CPUs "
        f"gives {max(others)[0]:.2f} % ([int8](docs/int8.md#results))."
    )


def best_choice(searched: optimize.Result) -> str:
    """How often `optimize` chose the best."""
    good = sum(choice.slower <= optimize.WITHIN for choice in searched.choices)
    return (
        "**A search with an answer.** `optimize` searches for the fastest artifact of a ConvNeXt-atto in minutes. "
        f"Its choice was repeated {len(searched.choices)} times with new timings, and was within 3 % of the fastest "
        f"artifact {good} times ([optimize](docs/optimize.md))."
    )


def quiet_gate(gated: gate.Experiment) -> str:
    """False alarms and found regressions of the gate, compared with a plain threshold."""
    calm = [kind for kind in gated.kinds if not kind.slower_pct]
    slow = next(kind for kind in gated.kinds if kind.slower_pct == 5)
    names = {kind.name for kind in calm}
    alarms = [trial.alarm for trial in gated.trials if trial.kind in names]
    plain = [alarm for kind in calm for alarm in gate.plain_alarms(gated, kind)]
    hits = [trial.alarm for trial in gated.trials if trial.kind == slow.name]
    return (
        f"**A gate that ignores noise.** {sum(alarms)} of {len(alarms)} comparisons of an artifact with itself were "
        f"false alarms (a plain threshold: {sum(plain)} of {len(plain)}), and {sum(hits)} of {len(hits)} slow-downs "
        f"of {slow.slower_pct:g} % were found ([CI gate](docs/gate.md))."
    )


def without_gpu(engines: plans.Result) -> str:
    """What is known of an int8 engine that was built without a GPU."""
    engine = next(one for one in engines.networks if (one.network, one.precision) == ("tiny", "int8"))
    pointwise = engine.pointwise.replace("in int8", "pointwise layers are in int8")
    return (
        f"**TensorRT engines without a GPU.** Engines are built and listed kernel by kernel, and the ONNX graph of "
        f"an fp32, fp16 or int8 engine is compared with PyTorch. In the int8 engine of ConvNeXt-T, {pointwise} "
        f"([TensorRT](docs/tensorrt.md))."
    )


def example(report: Report, gated: gate.Experiment) -> str:
    """The speed-up and the loss of top-1 of an artifact, and two trials of the gate, from figures to verdicts."""
    speedup, artifact, eager = (_finding(report, name) for name in ("speedup", "p50_ms", "eager_p50_ms"))
    drop, images = _finding(report, "top1_drop"), _finding(report, "images")
    assert (speedup.low or 0) > 1, "the text says so"
    assert (drop.high or 0) < (drop.limit or 0), "the text says so"
    is_wide, would_be = "is wider than ±5 %, so the row is marked", "is within ±5 %; a wider one would be marked"
    runs, their_runs = (one.detail.partition(" in ")[0] for one in (artifact, eager))
    return (
        f"* **Speed.** `{Path(report.artifact['path']).name}` and eager PyTorch took turns in {len(artifact.launches)} "
        f"processes ({runs} and {their_runs}). The medians are {artifact.value:.3g} ms and {eager.value:.3g} ms. Each "
        f"process gives a speed-up; over the processes it is {speedup.value:.2f} × (95 % {speedup.low:.2f}–"
        f"{speedup.high:.2f}). The whole interval is above 1, so the artifact is faster. It "
        f"{is_wide if speedup.noise else would_be} *noisy*.\n"
        f"* **Accuracy.** On {images.value:.0f} images: {drop.detail}. The loss of top-1 is {drop.value:.2f} points "
        f"(95 % {drop.low:.2f} to {drop.high:.2f}). The interval has a width although no answer changed, because other "
        f"images could show a loss. It ends below the limit of {drop.limit} points, so the check passes. With fewer "
        f"images it would reach the limit, and the report would say how many are needed.\n"
        f"{_gate_example(gated)}"
    )


def _gate_example(gated: gate.Experiment) -> str:
    """The first trial in which a slow-down of 5 % was found, and the first without one."""
    slow = next(kind for kind in gated.kinds if kind.slower_pct == 5)
    calm = next(kind for kind in gated.kinds if not kind.slower_pct)
    worse = next(one for one in gated.trials if one.kind == slow.name and one.alarm)
    same = next(one for one in gated.trials if one.kind == calm.name)
    noise, quiet = (float(re.findall(r"(?:by up to|noise is) ([\d.]+) %", one.detail)[0]) for one in (worse, same))
    assert worse.again, "the text says so"
    assert worse.change_pct > slow.limit_pct + noise, "the text says so"
    assert not same.alarm, "the text says so"
    return (
        f"* **Gate.** In one trial every run of the head took {slow.slower_pct:g} % longer, and the limit was "
        f"{slow.limit_pct:g} %. The gate measured {worse.change_pct:+.1f} % (95 % {worse.low_pct:.1f} to "
        f"{worse.high_pct:.1f}); the base differed from itself by ±{noise:g} %. The change exceeds the limit by more "
        f"than that, and a second measurement confirmed it: regressed. In another trial base and head were the same "
        f"file: {same.change_pct:+.1f} % ({same.low_pct:.1f} to {same.high_pct:.1f}), and the base ±{quiet:g} %: no "
        f"regression.\n"
    )


def _finding(report: Report, metric: str) -> Finding:
    finding = report.find(metric)
    assert finding is not None
    return finding


def prepare(folder: Path, weights: Path, data: Path) -> None:
    """The folder of a user: a checkpoint with its preprocessing, and photographs."""
    shutil.copy(weights, folder / "my_convnext.safetensors")
    pixels = {"input_size": [3, 112, 112], "crop_pct": 0.875, "interpolation": "bicubic"}
    (folder / "config.json").write_text(json.dumps({"architecture": "convnext_atto", "pretrained_cfg": pixels}))
    (folder / "photos").mkdir()
    (folder / "photos" / "val").symlink_to(data.resolve())


def typed(line: str, folder: Path) -> Typed:
    """Type a command in a folder, with a cache of its own, so that nothing is read that an earlier run computed."""
    print(line, file=sys.stderr, flush=True)
    done = subprocess.run(
        [PROGRAM, *shlex.split(line)[1:]],
        cwd=folder,
        env={**os.environ, "NO_COLOR": "1", "XDG_CACHE_HOME": str(folder / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return Typed(line=line, printed=done.stdout, exit_code=done.returncode)


def main() -> None:
    """Type the commands, and write what they printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder, arguments.weights, arguments.data)
        done = tuple(typed(line, folder) for line in LINES)
    result = Result(environment=environment(), model=arguments.weights.stem, commands=done)
    write_file(arguments.output, msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    print(commands(result))


if __name__ == "__main__":
    main()
