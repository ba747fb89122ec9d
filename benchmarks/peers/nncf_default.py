"""Run by a peer's own Python: NNCF's post-training quantisation of an ONNX graph, with its defaults.

`python nncf_default.py graph.onnx images.npy OUT.xml [OVERFLOW_FIX [MODEL_TYPE]]`
"""

from __future__ import annotations

import sys

import numpy as np


def main(graph: str, images: str, out: str, overflow_fix: str = "", model_type: str = "") -> None:
    """Quantise and write the IR."""
    import nncf
    import openvino as ov

    batches = list(np.load(images))
    options = {}
    if overflow_fix:
        fix = nncf.OverflowFix(overflow_fix)
        options["advanced_parameters"] = nncf.AdvancedQuantizationParameters(overflow_fix=fix)
    if model_type:
        options["model_type"] = nncf.ModelType(model_type)
    model = ov.Core().read_model(graph)
    quantised = nncf.quantize(model, nncf.Dataset(batches), subset_size=len(batches), **options)
    ov.save_model(quantised, out, compress_to_fp16=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
