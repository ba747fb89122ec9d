"""What TensorRT-RTX builds without a GPU: every precision for every kind of GPU, and networks by size.

    python -m benchmarks.plans -o benchmarks/results/<machine>/plans.json

Whole commands are typed, each in a process of its own, and the table is what they wrote or why they refused.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.provenance import environment
from exporter import artifact
from exporter.artifact.disk import write_file
from exporter.backends.tensorrt import plan

COMMAND = Path(sys.executable).with_name("convnext-export")
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
TARGETS = ("7.5", "8.0", "8.6", "8.9", "9.0", "12.0", "12.1")
CALIBRATION = ("--calib-size", "16")
NETWORKS: dict[str, tuple[str, ...]] = {
    "tiny": (),
    "base": ("--variant", "base"),
    "large": ("--variant", "large"),
    "v2_tiny": ("--variant", "v2_tiny"),
    "v2_base": ("--variant", "v2_base"),
    "isotropic_small": ("--variant", "isotropic_small"),
    "tiny, features": ("--task", "features"),
    "tiny, any size": ("--imgsz", "dynamic"),
}


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One command: what was asked for, and the plan that came of it or why there is none."""

    network: str
    precision: str
    target: str
    seconds: float
    peak_bytes: int
    bytes: int = 0
    kernels: int = 0
    pointwise: str = ""
    refused: str = ""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """All that was built."""

    environment: dict[str, Any]
    targets: tuple[Plan, ...]
    networks: tuple[Plan, ...]


def typed(network: str, precision: str, target: str, words: tuple[str, ...], out: Path) -> Plan:
    """Type one command."""
    arguments = ["--precision", precision, "--weights", "random:0", "-o", str(out), "--json", *words]
    arguments += ["--compute-capability", target] if target else []
    arguments += CALIBRATION if precision in ("int8", "fp8") else ()
    print("trt", *arguments, file=sys.stderr, flush=True)
    start = time.monotonic()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([COMMAND, "trt", *arguments], stdout=subprocess.DEVNULL, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        last = said.read().decode().strip().splitlines()[-1:]
    about = Plan(
        network=network, precision=precision, target=target, seconds=time.monotonic() - start,
        peak_bytes=usage.ru_maxrss * 1024,
    )  # fmt: skip
    found = list(out.glob(f"*_{precision}.plan"))
    if process.returncode not in (0, 5) or not found:
        return msgspec.structs.replace(about, refused="".join(last).removeprefix("error: "))
    made = artifact.load(found[0])
    kernels = plan.read(made)
    pointwise = next((f.detail for f in plan.findings(kernels, precision) if f.metric == "pointwise"), "")
    return msgspec.structs.replace(about, bytes=made.sidecar.bytes, kernels=len(kernels), pointwise=pointwise)


def target_table(result: Result) -> str:
    """Precision by compute capability, and why what is refused is."""
    head = f"| | {' | '.join(TARGETS)} |\n|---|{'---|' * len(TARGETS)}"
    found = {(one.precision, one.target): one for one in result.targets}
    lines = []
    for precision in PRECISIONS:
        cells = ("refused" if found[precision, target].refused else "builds" for target in TARGETS)
        lines.append(f"| {precision} | {' | '.join(cells)} |")
    reasons = dict.fromkeys(f"* `{one.refused}`" for one in result.targets if one.refused)
    return "\n".join([head, *lines, "", *reasons]) + "\n"


def network_table(result: Result) -> str:
    """Networks by size: peak memory of the whole command, and the plan."""
    head = "| network | precision | peak memory | engine | kernels | pointwise layers |\n"
    head += "|---|---|--:|--:|--:|---|"
    lines = [
        f"| {one.network} | {one.precision} | {one.peak_bytes / 1e9:.1f} GB "
        f"| {one.bytes / 1e6:.0f} MB | {one.kernels} | {one.refused or one.pointwise} |"
        for one in result.networks
    ]
    return "\n".join([head, *lines]) + "\n"


def main() -> None:
    """Build everything and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        targets = [
            typed("atto", p, t, ("--variant", "atto"), root / p / t) for p in PRECISIONS for t in TARGETS
        ]  # fmt: skip
        networks = [
            typed(name, p, "", words, root / name / p) for name, words in NETWORKS.items() for p in ("fp16", "int8")
        ]
    result = Result(environment=environment(), targets=tuple(targets), networks=tuple(networks))
    write_file(arguments.output, msgspec.json.format(msgspec.json.encode(result)))
    print(target_table(result))
    print(network_table(result))


if __name__ == "__main__":
    main()
