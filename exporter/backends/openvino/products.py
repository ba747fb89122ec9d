"""Models of products alone, to measure OpenVINO's peak (`_peak`)."""

from __future__ import annotations

from typing import Any

import numpy as np

from exporter.backends._peak import PeakProduct
from exporter.quantize.rounding import round_weights


def model_of(weights: PeakProduct, precision: str) -> Any:
    """A model of products in a row; in int8 their inputs and weights are quantized."""
    import openvino as ov
    from openvino import opset13 as ops

    output = given = ops.parameter(weights.input().shape, np.float32)
    largest = np.abs(weights.input()).max()
    for _ in range(weights.count):
        if precision == "int8":
            factors = [_rounded_input(output, 2 * largest / 255), _rounded_weight(weights)]
        else:
            factors = [output, ops.constant(weights.matrix())]
        if weights.convolution:
            output = ops.convolution(*factors, [1, 1], [0, 0], [0, 0], [1, 1])
        else:
            output = ops.matmul(*factors, False, False)
    return ov.Model([output], [given], "peak")


def _rounded_input(value: Any, step: np.float32) -> Any:
    from openvino import opset13 as ops

    return ops.fake_quantize(value, *[ops.constant(np.float32(step * end)) for end in (-128, 127)] * 2, 256)


def _rounded_weight(weights: PeakProduct) -> Any:
    from openvino import opset13 as ops

    whole, scales = round_weights(weights.matrix(), axis=0 if weights.convolution else 1, exact_pairs=True)
    scale = scales.reshape(-1, 1, 1, 1) if weights.convolution else scales
    ends = [ops.constant(end * scale) for end in (-127, 127)]
    return ops.fake_quantize(ops.constant(whole * scale), *ends * 2, 255)
