"""Eight bits for ConvNeXt: what is measured on images, which ranges follow, what is folded first, what it costs.

`statistics` watches the network's layers, `ranges` chooses what eight bits stand for, `smoothing` moves scale from
activations into weights, `simulation` runs the network as it will be rounded. Where Q and DQ go is a backend's
`Placement`, and `graph.quantize` puts them there. All numbers here are of one network in one of the folded forms.
"""

from __future__ import annotations

from typing import Literal

from exporter.artifact.sidecar import Record
from exporter.quantize.rounding import Grid

Method = Literal["minmax", "entropy", "percentile", "mse"]
Correction = Literal["none", "fast", "full"]


class QuantizeOptions(Record, frozen=True):
    """How a network is quantized.

    grid: the quantized type.
    inputs: whether activations are quantized too.
    half: whether scales have to be representable in fp16.
    exact_pairs: whether adjacent weights are bounded against saturation in 16 bits.
    method: how ranges are chosen.
    smoothing: the share of the activations' spread that moves into the weights, from 0 (none) to 1.
    bias_correction: what biases make up for: nothing, the weights' mean error, or the whole mean error.
    """

    grid: Grid = "int8"
    inputs: bool = True
    half: bool = False
    exact_pairs: bool = False
    method: Method = "minmax"
    smoothing: float = 0.5
    bias_correction: Correction = "fast"
