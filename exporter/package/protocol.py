"""Names of the Open Inference Protocol (V2), which Triton, OpenVINO Model Server and KServe speak."""

from __future__ import annotations

DATATYPES = {
    "float32": "FP32",
    "float16": "FP16",
    "uint8": "UINT8",
    "int8": "INT8",
    "int32": "INT32",
    "int64": "INT64",
    "bool": "BOOL",
}
"""By the element type of a tensor."""
