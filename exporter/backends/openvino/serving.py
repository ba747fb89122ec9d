"""How applications and servers run an OpenVINO IR."""

from __future__ import annotations

from exporter.artifact.sidecar import Sidecar
from exporter.backends import Serving, TritonModel
from exporter.backends.openvino.devices import computed_in

CODE = '''import openvino


def load():
    """Compile the model. Left to itself OpenVINO may compute in another precision."""
    return openvino.Core().compile_model(MODEL, "CPU", {"INFERENCE_PRECISION_HINT": "ARITHMETIC"})


def run(model, batch):
    """The outputs for a batch of inputs."""
    return list(model(batch).values())
'''


def _arithmetic(sidecar: Sidecar) -> str:
    return computed_in(sidecar.precision, ["CPU"])


def triton(sidecar: Sidecar) -> TritonModel:
    """The settings in Triton. Its backend for OpenVINO would pad every batch to the largest size, so Triton puts no
    requests together."""
    hint = {"HINT_BF16": "YES"} if sidecar.precision == "bf16" else {}
    return TritonModel("openvino", batches=False, parameters={"PERFORMANCE_HINT": "LATENCY", **hint})


SERVING = Serving(
    title="OpenVINO",
    requirement="openvino>=2025.2",
    code=lambda sidecar: CODE.replace("ARITHMETIC", _arithmetic(sidecar)),
    triton=triton,
    model_server=lambda sidecar: {"INFERENCE_PRECISION_HINT": _arithmetic(sidecar)},
)
