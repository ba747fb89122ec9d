"""Run by a peer's own Python: NNCF's post-training quantisation with its defaults, of an ONNX graph.

`python nncf_default.py graph.onnx images.npy OUT.xml`
"""

from __future__ import annotations

import sys

import numpy as np


def main(graph: str, images: str, out: str) -> None:
    """Quantise and write the IR."""
    import nncf
    import openvino as ov

    batches = list(np.load(images))
    quantised = nncf.quantize(ov.Core().read_model(graph), nncf.Dataset(batches), subset_size=len(batches))
    ov.save_model(quantised, out, compress_to_fp16=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
