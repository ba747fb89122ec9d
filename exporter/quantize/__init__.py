"""Eight bits for ConvNeXt: what is measured on images, which ranges follow, what is folded first, what it costs.

`statistics` watches the network's layers, `ranges` chooses what eight bits stand for, `smoothing` moves scale from
activations into weights, `simulation` runs the network as it will be rounded. Where Q and DQ go is a backend's
`Placement`, and `graph.quantize` puts them there. All numbers here are of one network in one of the folded forms.
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
    bias_correction: what biases make up for: nothing, the weights' mean error, or the whole mean error.
    """

    grid: Grid
    inputs: bool
    half: bool
    exact_pairs: bool
    method: CalibMethod
    bias_correction: BiasCorrection
