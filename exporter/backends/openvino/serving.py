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
    requests together; and it has no setting for arithmetic but bf16."""
    is_bf16 = sidecar.precision == "bf16"
    remark = "" if is_bf16 else "On a CPU with bf16 arithmetic, Triton's backend for OpenVINO computes in bf16."
    hint = {"HINT_BF16": "YES"} if is_bf16 else {}
    parameters = {"PERFORMANCE_HINT": "LATENCY", **hint}
    return TritonModel("openvino", batches=False, parameters=parameters, remark=remark, exact=is_bf16)


SERVING = Serving(
    title="OpenVINO",
    requirement="openvino>=2025.2",
    code=lambda sidecar: CODE.replace("ARITHMETIC", _arithmetic(sidecar)),
    triton=triton,
    model_server=lambda sidecar: {"INFERENCE_PRECISION_HINT": _arithmetic(sidecar)},
)
