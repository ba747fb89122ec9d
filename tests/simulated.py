"""A pytest plugin, `-p tests.simulated`: the probes answer as on a machine with an NVIDIA GPU and an NPU.

Tests that are not marked `gpu` must be green there too. Like the real driver, the GPU is hidden by an empty
`CUDA_VISIBLE_DEVICES`.
"""

import os

import onnxruntime
import openvino
import torch

_providers = onnxruntime.get_available_providers
_Session = onnxruntime.InferenceSession


def _visible() -> bool:
    return os.environ.get("CUDA_VISIBLE_DEVICES") != ""


torch.cuda.is_available = _visible
torch.cuda.get_device_name = lambda *device: "NVIDIA Simulated"
torch.cuda.get_device_capability = lambda *device: (9, 0)
onnxruntime.get_available_providers = lambda: ["CUDAExecutionProvider", *_providers()]
openvino.Core.available_devices = ["CPU", "GPU", "NPU"]


class _FallingBack(_Session):
    """Like the GPU build of ONNX Runtime: without a GPU nothing but the CPU is left."""

    def __init__(self, path, sess_options=None, providers=(), **more):
        falls_back = providers and "CPUExecutionProvider" not in providers
        super().__init__(path, sess_options, providers=[] if falls_back else providers or None, **more)


onnxruntime.InferenceSession = _FallingBack
