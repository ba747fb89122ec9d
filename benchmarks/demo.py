"""`make demo`: the product's own commands on a model trained on real images, and the table they come to."""

from __future__ import annotations

import io
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

import msgspec

from benchmarks import digits
from benchmarks.provenance import environment
from exporter.artifact.disk import write_file
from exporter.cli import main
from exporter.machine import has_bf16

ROOT = Path("build/demo")
SUFFIXES = {"onnx": "onnx", "openvino": "xml", "trt": "plan"}
UNSURE = ["--when-unsure", "warn"]  # 500 images cannot tell if one answer in a hundred changes
THREADS = ["--threads", "1"]  # in so small a network two threads wait for each other longer than they compute
WEIGHTS, DATA, CALIBRATION = ROOT / "model", ROOT / "val", "digits-256"


def builds() -> list[list[str]]:
    """The verbs that build, with their precisions: bf16 where this CPU can compute it."""
    rows = [["onnx"], ["onnx", "--fp16"], ["onnx", "--int8"], ["openvino"], ["openvino", "--fp16"]]
    rows += [["openvino", "--bf16"]] if has_bf16() else []
    return [*rows, ["openvino", "--int8"], ["trt", "--fp16"], ["trt", "--int8"]]


def artifact(words: list[str]) -> Path:
    """What a build verb writes."""
    precision = words[1].removeprefix("--") if len(words) > 1 else "fp32"
    return ROOT / f"custom_{precision}.{SUFFIXES[words[0]]}"


def run(*words: object, show: bool = False) -> None:
    """Run a command, print what it prints if `show`, and stop the demo if it fails."""
    print("$ convnext-export", *words, file=sys.stderr, flush=True)
    sys.argv = ["convnext-export", *map(str, words), "--quiet"]
    with nullcontext() if show else redirect_stdout(io.StringIO()):
        try:
            main()
        except SystemExit as stop:
            if stop.code:
                raise


def demo() -> None:
    """Train once, build, verify on 500 held-out digits, time, draw the page and print the table."""
    digits.prepare(ROOT)
    for words in builds():
        judged = ("--calib", CALIBRATION, "--data", DATA, "--even-if-slower", *UNSURE, *THREADS)
        run(*words, *(judged if "--int8" in words else ()), "--weights", WEIGHTS, "-o", ROOT)
    built = [artifact(words) for words in builds()]
    for path in built:
        run("verify", path, "--data", DATA, "--blocks", *UNSURE)
    timed = [path for path in built if path.suffix != ".plan"]  # a plan runs on a GPU
    run("bench", *timed, *THREADS, "--duration", 3)  # seconds: thousands of runs of so small a network
    write_file(ROOT / "session.json", msgspec.json.format(msgspec.json.encode(environment(threads=1))))
    reports = [f"{path}.report.json" for path in built]
    run("report", *reports, "--format", "html", "-o", ROOT / "report.html")
    print(file=sys.stderr)
    run("report", *reports, "--format", "text", show=True)
    print(f"the report is {ROOT / 'report.html'}")


if __name__ == "__main__":
    demo()
