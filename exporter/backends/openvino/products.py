"""Models of products alone, to measure OpenVINO's peak (`_peak`)."""

from __future__ import annotations

from typing import Any

import numpy as np

from exporter.backends._peak import PeakProduct
from exporter.quantize.rounding import round_weights


def peak_model(product: PeakProduct, precision: str) -> Any:
    """A model of products in a row; in int8 their inputs and weights are quantized."""
    import openvino as ov
    from openvino import opset13 as ops

    output = parameter = ops.parameter(product.input().shape, np.float32)
    largest = np.abs(product.input()).max()
    matrix = _quantized_weights(product) if precision == "int8" else ops.constant(product.matrix())
    for _ in range(product.count):
        factors = [_quantized_input(output, 2 * largest / 255) if precision == "int8" else output, matrix]
        if product.convolution:
            output = ops.convolution(*factors, [1, 1], [0, 0], [0, 0], [1, 1])
        else:
            output = ops.matmul(*factors, False, False)
    return ov.Model([output], [parameter], "peak")


def _quantized_input(value: Any, step: np.float32) -> Any:
    from openvino import opset13 as ops

    return ops.fake_quantize(value, *[ops.constant(np.float32(step * end)) for end in (-128, 127)] * 2, 256)


def _quantized_weights(product: PeakProduct) -> Any:
    from openvino import opset13 as ops

    whole, scales = round_weights(product.matrix(), axis=0 if product.convolution else 1, exact_pairs=True)
    scale = scales.reshape(-1, 1, 1, 1) if product.convolution else scales
    ends = [ops.constant(end * scale) for end in (-127, 127)]
    return ops.fake_quantize(ops.constant(whole * scale), *ends * 2, 255)
