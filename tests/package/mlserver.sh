#!/usr/bin/env bash
# Makes a virtual environment with MLServer and ONNX Runtime: tests/package/mlserver.sh FOLDER
# Nothing is installed outside the folder. Needs PyPI, and a Python from 3.9 to 3.12 (by default python3).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
"${PYTHON:-python3}" -m venv --clear "$1"
"$1/bin/python" -m pip install --quiet --no-compile --no-deps --requirement "$here/mlserver.txt"
