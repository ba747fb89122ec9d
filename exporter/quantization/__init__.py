"""Eight bits for ConvNeXt: what is measured on images, which ranges follow, what is folded first, what it costs.

`statistics` watches the network's layers, `ranges` chooses what eight bits stand for, `smoothing` moves scale from
activations into weights, `simulation` runs the network as it will be rounded. Where Q and DQ go is a backend's
`Placement`, and `graph.quantize` puts them there. All numbers here are of one network in one of the folded forms.
"""

from __future__ import annotations

from typing import Literal

from exporter.graph.rounding import Grid
from exporter.sidecar import Record

Method = Literal["minmax", "entropy", "percentile", "mse"]
Correction = Literal["none", "fast", "full"]


class QuantizeOptions(Record, frozen=True):
    """What eight bits stand for, whether inputs are rounded too and scales held in fp16, whether adjacent weights are
    bounded for exact sums in 16 bits, how ranges are chosen, what share of the activations' spread goes into the
    weights (0 is none, 0.5 the usual), and whether biases make up for the mean error."""

    grid: Grid = "int8"
    inputs: bool = True
    half: bool = False
    exact_pairs: bool = False
    method: Method = "minmax"
    smoothing: float = 0.5
    bias_correction: Correction = "fast"
