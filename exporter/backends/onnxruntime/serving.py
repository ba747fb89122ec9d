"""How applications and servers run an ONNX graph."""

from __future__ import annotations

from exporter.artifact.sidecar import Sidecar
from exporter.backends import Serving, TritonModel, WebRuntime

CODE = '''import onnxruntime


def load():
    """Open the model."""
    return onnxruntime.InferenceSession(MODEL, providers=["CPUExecutionProvider"])


def run(model, batch):
    """The outputs for a batch of inputs."""
    return model.run(None, {model.get_inputs()[0].name: batch})
'''

# The WebAssembly for a CPU and the one for WebGPU, each with the script that loads it.
WEB = WebRuntime(
    package="onnxruntime-web",
    version="1.30.0",
    files={
        "ort.wasm.min.mjs": "219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b",
        "ort-wasm-simd-threaded.mjs": "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
        "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
        "ort.webgpu.min.mjs": "3dffff71811bc13a3a3d9591c57ca5ee5735b8f5f3eaf789510b02bb040ae3a0",
        "ort-wasm-simd-threaded.asyncify.mjs": "3d1c85995364bb643302fc6fd877a0c3ba5ae72401815e0f24828a53d9191e28",
        "ort-wasm-simd-threaded.asyncify.wasm": "39f9f0894d478800487ed9f7dbe92618498db320cf55c8e3d89adff8dce658da",
    },
    precisions=("fp32", "fp16"),  # WebGPU has no int8 operators, and WebAssembly rounds int8 in another way
)

_TF32 = """On a GPU, ONNX Runtime computes fp32 products in TF32 by default. Start the server with
`NVIDIA_TF32_OVERRIDE=0` in its environment (with Docker, `-e NVIDIA_TF32_OVERRIDE=0`), so that its answers are those of
the artifact."""


def triton(sidecar: Sidecar) -> TritonModel:
    """The settings in Triton."""
    on_gpu = _TF32 if sidecar.precision != "fp16" else ""
    return TritonModel("onnxruntime", devices=("cpu", "gpu"), on_gpu=on_gpu)


SERVING = Serving(
    title="ONNX Runtime",
    requirement="onnxruntime>=1.22",
    code=lambda _: CODE,
    triton=triton,
    model_server=lambda _: {"INFERENCE_PRECISION_HINT": "f32"},  # OpenVINO reads ONNX too
    web=WEB,
)
