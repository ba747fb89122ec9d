#!/usr/bin/env bash
# A Python with tritonserver and the runtimes of the stand-ins, in the folder $1, for test_tritonserver.py.
set -euo pipefail
"${PYTHON:-python3}" -m venv "$1"
"$1/bin/python" -m pip install --quiet nvidia-pytriton "numpy<2" Pillow onnxruntime openvino
