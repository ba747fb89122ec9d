"""What users would pick instead, on identical weights, timed in turn with ours in one run.

`python -m benchmarks.peers -o FOLDER` makes each peer's artifact in an environment of its own (`build`), times them
all in one process (`timing`), and writes `FOLDER/VARIANT-bBATCH.json`; `table` renders those. What is already there is
left as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from exporter.artifact.sidecar import Record

ROOT = "build/peers"
VARIANTS, BATCHES = ("atto", "tiny", "base", "v2_tiny"), (1, 8)
Runtime = Literal["eager", "torch.compile", "onnxruntime", "openvino"]


@dataclass(frozen=True)
class Peer:
    """One way to run the model: what it is called, who makes it, on which runtime and at which precision, and the
    peer of ours that it is held against."""

    name: str
    maker: str
    runtime: Runtime
    precision: str
    ours: str = ""


OURS_ORT, OURS_OV, OURS_BF16 = "ours, ONNX Runtime fp32", "ours, OpenVINO fp32", "ours, OpenVINO bf16"
OURS_ORT_INT8, OURS_OV_INT8 = "ours, ONNX Runtime int8", "ours, OpenVINO int8"
PEERS = (
    Peer("eager", "torch", "eager", "fp32", OURS_OV),
    Peer("eager, channels_last", "torch channels_last", "eager", "fp32", OURS_OV),
    Peer("torch.compile", "torch", "torch.compile", "fp32", OURS_OV),
    Peer("plain export, ONNX Runtime fp32", "plain", "onnxruntime", "fp32", OURS_ORT),
    Peer("plain export + onnxsim, ONNX Runtime fp32", "onnxsim", "onnxruntime", "fp32", OURS_ORT),
    Peer("optimum-onnx, ONNX Runtime fp32", "optimum-onnx", "onnxruntime", "fp32", OURS_ORT),
    Peer(OURS_ORT, "ours", "onnxruntime", "fp32"),
    Peer("plain export, OpenVINO fp32", "plain", "openvino", "fp32", OURS_OV),
    Peer("plain export + onnxsim, OpenVINO fp32", "onnxsim", "openvino", "fp32", OURS_OV),
    Peer("optimum-intel, OpenVINO fp32", "optimum-intel", "openvino", "fp32", OURS_OV),
    Peer(OURS_OV, "ours", "openvino", "fp32"),
    Peer("plain export, OpenVINO bf16", "plain", "openvino", "bf16", OURS_BF16),
    Peer("plain export + onnxsim, OpenVINO bf16", "onnxsim", "openvino", "bf16", OURS_BF16),
    Peer("optimum-intel, OpenVINO bf16", "optimum-intel", "openvino", "bf16", OURS_BF16),
    Peer(OURS_BF16, "ours", "openvino", "bf16"),
    Peer("quantize_static on the plain export, ONNX Runtime int8", "ort-static", "onnxruntime", "int8", OURS_ORT_INT8),
    Peer(OURS_ORT_INT8, "ours", "onnxruntime", "int8"),
    Peer("NNCF default PTQ on the plain export, OpenVINO int8", "nncf", "openvino", "int8", OURS_OV_INT8),
    Peer(OURS_OV_INT8, "ours", "openvino", "int8"),
)


class Row(Record, frozen=True):
    """One peer as it was timed: milliseconds per launch, how many times as fast as eager and as ours it is (with 95 %
    intervals), the share of the runtime's peak, and the worst cosine to eager's answers; or why it is not there."""

    name: str
    launches: tuple[tuple[float, ...], ...] = ()
    over_eager: tuple[float, float, float] | None = None
    over_ours: tuple[float, float, float] | None = None
    peak_pct: float | None = None
    cosine: float | None = None
    failure: str = ""


class Case(Record, frozen=True):
    """A variant at a batch size on a machine, with the versions of the peers' own environments."""

    variant: str
    batch: int
    threads: int
    rows: tuple[Row, ...]
    environment: dict[str, object]
    peers: dict[str, dict[str, str]]
    peaks_gflops: dict[str, float]
    schema: int = 1
