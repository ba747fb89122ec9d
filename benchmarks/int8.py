"""What int8 loses and gains on photographs: whole commands, with what they report, their time and their memory.

`python -m benchmarks.int8 --weights A.safetensors … --calib FOLDER --data FOLDER -o FILE` quantizes every checkpoint
for both runtimes with 256 of the photographs, the first two with synthetic images too, and judges each on all of the
data. Then it tries other settings, fewer and more images to see what memory depends on, and ConvNeXt-T. `--parts`
chooses among them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.provenance import commit, environment
from exporter.artifact.disk import write_file
from exporter.artifact.sidecar import Record

COMMAND = Path(sys.executable).with_name("convnext-export")
VERBS = ("onnx", "openvino")
FEW, MANY = 64, 512
PARTS = ("accuracy", "settings", "memory", "tiny")
SETTINGS = (
    (), ("--calib-method", "mse"), ("--calib-method", "percentile"), ("--calib-method", "entropy"),
    ("--smoothing", "0"), ("--bias-correction", "none"), ("--bias-correction", "full"),
)  # fmt: skip


class Row(Record, frozen=True):
    """One command: what was quantized for what, what its report found (values with their intervals), and what it took
    from nothing remembered."""

    model: str
    verb: str
    calib: str
    images: int
    found: dict[str, tuple[float, float | None, float | None]]
    kept: tuple[str, ...]
    seconds: float
    peak_bytes: int


class Result(Record, frozen=True):
    """All rows, the machine they ran on, and the commit (empty in results from before November 2026)."""

    environment: dict[str, Any]
    rows: tuple[Row, ...]
    settings: dict[str, tuple[Row, ...]]
    memory: tuple[Row, ...]
    commit: str = ""
    schema: int = 1


def quantize(weights: Path, verb: str, calib: str, size: int, *words: str) -> Row:
    """Run the command in a process of its own, with a cache of its own."""
    folder = Path(tempfile.mkdtemp())
    command = [verb, "--int8", "--weights", str(weights), "--calib", calib, "--calib-size", str(size)]
    command += ["--json", "--even-if-slower"]
    print("$ convnext-export", *command, *words, file=sys.stderr, flush=True)
    begin = time.monotonic()
    with (folder / "out.json").open("w") as out:
        pid = os.posix_spawn(
            COMMAND, [str(COMMAND), *command, *words, "-o", str(folder / "out")],
            {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")},
            file_actions=[(os.POSIX_SPAWN_DUP2, out.fileno(), 1)],
        )  # fmt: skip
        _, status, usage = os.wait4(pid, 0)
    seconds = time.monotonic() - begin
    if os.waitstatus_to_exitcode(status) not in (0, 5):
        sys.exit(1)
    made = json.loads((folder / "out.json").read_text())
    shutil.rmtree(folder)
    findings = {f["metric"]: f for f in made["report"]["findings"] if f["value"] is not None}
    return Row(
        model=weights.stem,
        verb=verb,
        calib=Path(calib).name,
        images=size,
        found={metric: (f["value"], f["low"], f["high"]) for metric, f in findings.items()},
        kept=tuple(made["artifact"]["quantization"]["kept"]),
        seconds=seconds,
        peak_bytes=usage.ru_maxrss * 1024,
    )


def accuracy_table(result: Result) -> str:
    """A row for each command."""
    head = (
        "| model | runtime | calibrated on | top-1 of eager | lost, points | agreement | cosine | MACs in int8 "
        "| speed-up | kept in higher precision |\n|---|---|---|--:|--:|--:|--:|--:|--:|---|"
    )
    return "\n".join([head, *(_accuracy(row) for row in result.rows)]) + "\n"


def _accuracy(row: Row) -> str:
    value = {metric: found[0] for metric, found in row.found.items()}
    _, low, high = row.found["top1_drop"]
    cells = (
        *_case(row),
        f"{value['top1_eager']:.2f} %",
        f"{value['top1_drop']:+.2f} ({low:+.2f} … {high:+.2f})",
        f"{value['top1_agreement']:.2f} %",
        f"{value['cosine']:.6f}",
        f"{value['quantized_macs_pct']:.1f} %",
        f"{value['gain']:.2f} ×" if "gain" in value else "–",
        ", ".join(row.kept) or "nothing",
    )
    return f"| {' | '.join(cells)} |"


def cpu_table(vnni: Result, without: Result) -> str:
    """Agreement with eager (%) and top-1 drop (points) with and without VNNI, a row for each of the first's cases."""
    head = (
        "| model | runtime | calibrated on | agreement, VNNI | without VNNI | top-1 drop, VNNI | without VNNI |\n"
        "|---|---|---|--:|--:|--:|--:|"
    )
    others = {(row.model, row.verb, row.calib): row for row in without.rows}
    lines = [head]
    for row in vnni.rows:
        both = (row.found, others[row.model, row.verb, row.calib].found)
        agreement = [f"{found['top1_agreement'][0]:.2f} %" for found in both]
        lost = [f"{found['top1_drop'][0]:+.2f}" for found in both]
        lines.append(f"| {' | '.join((*_case(row), *agreement, *lost))} |")
    return "\n".join(lines) + "\n"


def _case(row: Row) -> tuple[str, str, str]:
    runtime = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}[row.verb]
    return row.model, runtime, "synthetic" if row.calib == "synthetic" else f"{row.images} photographs"


def setting_table(result: Result) -> str:
    """A row for each setting, two columns for each model."""
    models = [row.model for row in next(iter(result.settings.values()))]
    head = ["setting", *(f"{model}: {what}" for model in models for what in ("lost, points", "agreement", "cosine"))]
    lines = [f"| {' | '.join(head)} |", f"|---|{'--:|' * 3 * len(models)}"]
    for setting, rows in result.settings.items():
        cells = [setting]
        for row in rows:
            value = {metric: found[0] for metric, found in row.found.items()}
            cells += [f"{value['top1_drop']:+.2f}", f"{value['top1_agreement']:.2f} %", f"{value['cosine']:.6f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def memory_table(result: Result) -> str:
    """Time and peak memory of whole commands, by the number of images."""
    head = (
        "| model | runtime | images | seconds | peak memory | speed-up over the next higher precision, 95 % "
        "| over eager, 95 % |\n|---|---|--:|--:|--:|--:|--:|"
    )
    lines = [
        f"| {row.model} | {row.verb} | {row.images} | {row.seconds:.0f} | {row.peak_bytes / 1e6:,.0f} MB "
        f"| {_ratio(row, 'gain')} | {_ratio(row, 'int8_speedup')} |"
        for row in result.memory
    ]
    return "\n".join([head, *lines]) + "\n"


def _ratio(row: Row, metric: str) -> str:
    value, low, high = row.found.get(metric, (None, None, None))
    return "–" if value is None else f"{value:.2f} × ({low:.2f}–{high:.2f})"


def main() -> None:
    """Run every case and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", nargs="+", type=Path, required=True)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--imgsz", default="112")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    common = ("--imgsz", arguments.imgsz)
    rows: list[Row] = []
    settings: dict[str, tuple[Row, ...]] = {}
    memory: list[Row] = []
    if "accuracy" in arguments.parts:
        photographs = [(weights, arguments.calib) for weights in arguments.weights]
        synthetic = [(weights, "synthetic") for weights in arguments.weights[:2]]
        rows = [
            quantize(weights, verb, calib, 256, "--data", arguments.data, *common)
            for (weights, calib), verb in itertools.product([*photographs, *synthetic], VERBS)
        ]
    if "settings" in arguments.parts:
        no_limit = ("--data", arguments.data, "--max-drop", "100", *common)
        settings = {
            " ".join(words) or "the default": tuple(
                quantize(weights, "openvino", arguments.calib, 256, *words, *no_limit)
                for weights in arguments.weights[:2]
            )
            for words in SETTINGS
        }
    if "memory" in arguments.parts:
        memory = [quantize(arguments.weights[0], "openvino", arguments.calib, size, *common) for size in (FEW, MANY)]
    if "tiny" in arguments.parts:
        tiny = [quantize(Path("random:0"), verb, arguments.calib, 256, "--variant", "tiny") for verb in VERBS]
        memory += [msgspec.structs.replace(row, model="tiny, random") for row in tiny]
    result = Result(
        environment=environment(),
        rows=tuple(rows),
        settings=settings,
        memory=tuple(memory),
        commit=commit(),
    )
    write_file(arguments.output, msgspec.json.format(msgspec.json.encode(result)))
    print(accuracy_table(result))
    print(setting_table(result) if settings else "")
    print(memory_table(result))


if __name__ == "__main__":
    main()
