"""Quantization of ConvNeXt: statistics of activations, ranges, smoothing, simulation, and Q/DQ nodes.

`statistics` records the inputs of layers, `ranges` chooses the range of the quantized type, `smoothing` moves scale
from activations into weights, and `simulation` runs the quantized network in PyTorch. A backend's `Placement` names the
layers to quantize; `placement` inserts Q and DQ around them. The network is always in one of the folded forms.
"""

from __future__ import annotations

from exporter.artifact.sidecar import Record
from exporter.quantize.rounding import Grid
from exporter.recipe import BiasCorrection, CalibMethod


class QuantizeOptions(Record, frozen=True):
    """How a network is quantized.

    grid: the quantized type.
    inputs: whether activations are quantized too.
    half: whether scales have to be representable in fp16.
    exact_pairs: whether adjacent weights are bounded against saturation in 16 bits.
    method: how ranges are chosen.
    bias_correction: the error that biases correct: none, the mean error of the weights, or the whole mean error.
    """

    grid: Grid
    inputs: bool
    half: bool
    exact_pairs: bool
    method: CalibMethod
    bias_correction: BiasCorrection
