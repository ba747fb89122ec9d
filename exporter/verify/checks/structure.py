"""Structure: size of the artifact, share of multiply-accumulates in int8, int8 saturation, assumed preprocessing."""

from __future__ import annotations

from collections.abc import Sequence

from exporter import machine
from exporter.artifact.sidecar import Quantization
from exporter.backends import NARROW, Layer
from exporter.data.samples import is_synthetic
from exporter.errors import some
from exporter.quantize.cpus import unlike
from exporter.quantize.rounding import MAX_SUM
from exporter.recipe import Checks
from exporter.report import Finding
from exporter.verify.blocks import PRODUCTS
from exporter.verify.checks import Check, Rows, Seen, Subject


class Structure:
    """Checks of the artifact itself, not of its outputs."""

    def __init__(self, options: Checks, subject: Subject) -> None:
        self.subject = subject
        self.data = options.data

    def measure(self, seen: Seen) -> Rows:
        """Nothing: these checks need no images."""
        del seen
        return {}

    def add(self, rows: Rows, names: Sequence[str]) -> None:
        """Do nothing."""

    def findings(self) -> list[Finding]:
        """Size in bytes; if the runtime lists layers, also their number, saturation, and the multiply-accumulates
        computed in int8 or fp8, in percent."""
        sidecar, layers = self.subject.artifact.sidecar, self.subject.layers
        files = ", ".join(file.name for file in sidecar.files)
        return [
            *self._quantized(),
            *self._assumed(),
            *saturation(layers),
            *([Finding(check="structure", metric="nodes", value=len(layers))] if layers else []),
            Finding(check="structure", metric="bytes", value=sidecar.bytes, unit="bytes", detail=files),
        ]

    def _quantized(self) -> list[Finding]:
        sidecar = self.subject.artifact.sidecar
        if sidecar.quantization is None or not sidecar.macs or not self.subject.layers:
            return []
        narrow = {layer.module for layer in self.subject.layers if layer.precision in NARROW}
        macs = sidecar.quantization.layers
        not_so = [module for module in macs if module not in narrow]
        value = 100 * sum(count for module, count in macs.items() if module in narrow) / sidecar.macs
        detail = f"{len(macs) - len(not_so)} of {len(macs)} quantized layers are computed in {sidecar.precision}"
        if sidecar.quantization.scope == "weights":
            detail = f"only the weights of {len(macs)} layers are in {sidecar.precision}"
        elif not_so:
            detail += f"; not {some(not_so)}"
        return [Finding(check="structure", metric="quantized_macs_pct", value=value, unit="%", detail=detail)]

    def _assumed(self) -> list[Finding]:
        """The preprocessing, where nothing says that it is the one of training. Both models get the same images, so
        it lowers the accuracy of both and changes no comparison."""
        assumed = self.subject.artifact.sidecar.assumed_preprocessing
        if not assumed or is_synthetic(self.data) or self.data.endswith(".npz"):  # which holds inputs of the network
            return []
        detail = (
            f"images are {assumed}; the weights do not state the preprocessing, and a different one lowers accuracy"
        )
        return [Finding(check="data", metric="assumed_preprocessing", value=1, detail=detail)]


def other_cpu(quantization: Quantization | None) -> list[Finding]:
    """A finding where this CPU computes int8 differently from the class that the artifact was built for. It is measured
    where the artifact runs, as another machine may write the report."""
    reason = unlike(quantization.cpu) if quantization is not None else ""
    return [Finding(check="structure", metric="other_cpu", value=1, detail=reason)] if reason else []


def saturation(layers: Sequence[Layer]) -> list[Finding]:
    """Count the layers whose int8 sums can saturate on x86 CPUs without VNNI, which add two products in 16 bits.

    Args:
        layers: with the largest sum that any input can reach (`pair_sum`).

    Returns: one finding; none where no layer has such a sum (no int8, no constant int8 weights, or TensorRT, which adds
        in 32 bits).
    """
    sums = [(layer.pair_sum, layer.module or layer.name) for layer in layers if layer.pair_sum is not None]
    if not sums:
        return []
    unknown = [layer.module or layer.name for layer in layers if _is_int8_product(layer) and layer.pair_sum is None]
    saturating = [name for value, name in sums if value > MAX_SUM]
    largest, name = max(sums)
    detail = f"largest sum of two int8 products: {largest} in {name} (16 bits hold {MAX_SUM}); "
    if saturating:
        detail += f"{len(saturating)} of {len(sums)} layers can saturate on x86 CPUs without VNNI: {some(saturating)}"
        detail += "; this CPU has no VNNI" if machine.saturates() else ""
    else:
        detail += f"none of {len(sums)} layers can saturate"
    if unknown:
        detail += f"; unknown for {some(unknown)}: weights are not int8 constants"
    return [Finding(check="structure", metric="saturation", value=len(saturating), unit="layers", detail=detail)]


def _is_int8_product(layer: Layer) -> bool:
    return layer.precision in ("int8", "uint8") and layer.operator in PRODUCTS


CHECK = Check(Structure)
