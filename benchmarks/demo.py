"""`make demo`: the product's own commands on a model trained on real images, and the table they come to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec

from benchmarks import digits
from benchmarks.provenance import environment
from exporter.artifact.disk import write_file
from exporter.machine import has_bf16

ROOT = Path("build/demo")
COMMAND = Path(sys.executable).with_name("convnext-export")
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


def run(*words: str) -> None:
    """Type a command, and stop the demo if it fails."""
    print(f"\n$ convnext-export {' '.join(words)}", file=sys.stderr, flush=True)
    done = subprocess.run([COMMAND, *words], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def main() -> None:
    """Train once, build, verify on 500 held-out digits, time, print the table and draw the page."""
    digits.prepare(ROOT)
    run("calibrate", CALIBRATION)
    for words in builds():
        judged = (
            ["--calib", CALIBRATION, "--data", str(DATA), "--even-if-slower", *UNSURE, *THREADS]
            if "--int8" in words
            else []
        )
        run(*words, *judged, "--weights", str(WEIGHTS), "-o", str(ROOT))
    made = [artifact(words) for words in builds()]
    for path in made:
        run("verify", str(path), "--data", str(DATA), "--blocks", *UNSURE)
    reports = [f"{path}.report.json" for path in made]
    run("bench", *(str(path) for path in made if path.suffix != ".plan"), *THREADS)  # a plan runs on a GPU
    run("report", *reports)
    run("report", *reports, "--format", "html", "-o", str(ROOT / "report.html"))
    write_file(ROOT / "session.json", msgspec.json.format(msgspec.json.encode(environment(threads=1))))


if __name__ == "__main__":
    main()
