"""Outputs of an ONNX artifact on this CPU: `python answers.py MODEL.onnx IMAGES.npy OUTPUTS.npy`.

A program of its own that needs NumPy and ONNX Runtime only, so that an emulator can run it.
"""

import sys

import numpy as np
import onnxruntime


def main(model: str, images: str, outputs: str) -> None:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    np.save(outputs, session.run(None, {name: np.load(images)})[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
