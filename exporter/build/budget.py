"""The accuracy that quantization may lose."""

from __future__ import annotations

from exporter import precision
from exporter.data.samples import is_synthetic
from exporter.errors import BadRequest
from exporter.model.sources import is_random
from exporter.recipe import Quantization


def points(quantization: Quantization, precision_name: str, source: str, weights: str) -> float | None:
    """The largest loss in percentage points on these images, or None where no loss can be measured.

    On synthetic images and with random weights the largest logits are nearly equal, so agreement says nothing, and
    only the limits of the precision are checked.

    Args:
        quantization: its `max_drop` is None for the default of the precision.
        precision_name: int8 or fp8.
        source: the images, as in `--data`.
        weights: the weights, as in `--weights`.

    Raises: BadRequest where `max_drop` is given and no loss can be measured.
    """
    limit = quantization.max_drop
    synthetic = is_synthetic(source)
    if not synthetic and not is_random(weights):
        return precision.get(precision_name).max_drop_points if limit is None else limit
    if limit is not None:
        reason = "the weights are random" if not synthetic else "there are only synthetic images"
        raise BadRequest(
            f"--max-drop {limit:g}: {reason}, on which no loss can be measured; give real images with --data and "
            "trained weights, or leave --max-drop out"
        )
    return None
