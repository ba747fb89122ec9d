"""How applications and servers run an ONNX graph."""

from __future__ import annotations

from exporter.backends import Serving, TritonModel

CODE = '''import onnxruntime


def load():
    """Open the model."""
    return onnxruntime.InferenceSession(MODEL, providers=["CPUExecutionProvider"])


def run(model, batch):
    """The outputs for a batch of inputs."""
    return model.run(None, {model.get_inputs()[0].name: batch})
'''

SERVING = Serving(
    title="ONNX Runtime",
    requirement="onnxruntime>=1.22",
    code=lambda _: CODE,
    triton=lambda _: TritonModel("onnxruntime", devices=("cpu", "gpu")),
    model_server=lambda _: {"INFERENCE_PRECISION_HINT": "f32"},  # OpenVINO reads ONNX too
)
