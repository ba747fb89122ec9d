"""What Triton runs as its backends for ONNX Runtime and OpenVINO in tests: the same runtimes, from Python.

The wheel of tritonserver has the Python backend alone, and Triton takes a backend that is written in Python.
"""

import json
from pathlib import Path

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"]) / args["model_version"]
        self.input = config["input"][0]["name"]
        self.outputs = [output["name"] for output in config["output"]]
        self.run = opened(folder / config["default_model_filename"], self.input, self.outputs)

    def execute(self, requests):
        batches = [pb_utils.get_input_tensor_by_name(request, self.input).as_numpy() for request in requests]
        return [pb_utils.InferenceResponse(list(map(pb_utils.Tensor, self.outputs, self.run(one)))) for one in batches]


def opened(path, name, outputs):
    """A function from a batch to the outputs."""
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda batch: session.run(outputs, {name: batch})
    import openvino

    model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda batch: [model(batch)[output].copy() for output in outputs]
