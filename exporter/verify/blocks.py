"""Which ConvNeXt block diverges from eager's, and in what precision it is computed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from exporter.backends import Array, Blocks, Layer
from exporter.report import Finding, number
from exporter.verify.batches import run_batch

PRODUCTS = ("MatMul", "FullyConnected", "Conv", "Convolution", "Gemm")


def block_errors(
    eager: Blocks, artifact: Blocks, layers: Sequence[Layer], images: Array, fixed: int | None = None
) -> list[Finding]:
    """Root mean square error of each common block, in execution order, as a share of the standard deviation of eager's
    output.

    Args:
        eager: the network with the outputs of its blocks.
        artifact: the artifact with the outputs of its blocks.
        layers: of the artifact, with their precisions.
        images: (N, C, H, W), a few.
        fixed: the batch size of the artifact, None for any.
    """
    expected = dict(zip(eager.names, eager.run(images), strict=True))
    measured = dict(zip(artifact.names, run_batch(artifact.run, images, fixed), strict=True))
    findings = []
    for name in (name for name in artifact.names if name in expected):
        a, b = expected[name].astype(np.float64), measured[name].astype(np.float64)
        error = float(np.sqrt(np.mean((a - b) ** 2)) / (a.std() or 1.0)) if a.shape == b.shape else float("nan")
        precisions = sorted({layer.precision for layer in layers if belongs(layer, name)})
        findings.append(
            Finding(
                check="blocks",
                metric="block_error",
                case=name,
                value=number(error),
                detail=" and ".join(precisions),
                passed=bool(np.isfinite(error)),
            )
        )
    return findings


def belongs(layer: Layer, block: str) -> bool:
    """Whether a layer computes a product of a block, downsampling layer or head."""
    return layer.operator in PRODUCTS and (layer.module == block or layer.module.startswith(f"{block}."))
