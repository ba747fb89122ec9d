"""Parity: differences between the outputs of the artifact and of eager PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from msgspec.structs import replace

from exporter import precision
from exporter.recipe import Checks
from exporter.report import Finding, judged, number
from exporter.verify.checks import Check, Seen, Subject, share


@dataclass
class Output:
    """Running sums over one output of the model."""

    squares: float = 0.0
    total: float = 0.0
    count: int = 0
    error_squares: float = 0.0
    error_total: float = 0.0
    max_abs: float = 0.0

    @property
    def spread(self) -> float:
        """Standard deviation of eager's output."""
        mean = self.total / self.count
        return float(np.sqrt(max(self.squares / self.count - mean**2, 0.0))) or 1.0


class Parity:
    """Accumulates sums and one number per image."""

    def __init__(self, options: Checks, subject: Subject) -> None:
        self.options = options
        self.limits = precision.get(subject.artifact.sidecar.precision).limits
        self.names = [tensor.name for tensor in subject.artifact.sidecar.outputs]
        self.classify = subject.artifact.sidecar.task == "classify"
        self.outputs = [Output() for _ in self.names]
        self.cosines: list[float] = []
        self.agree: list[bool] = []

    def see(self, seen: Seen) -> None:
        """Accumulate one batch."""
        cosines = []
        for output, eager, got in zip(self.outputs, seen.eager, seen.outputs, strict=True):
            a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (eager, got))
            error = np.abs(a - b)
            output.squares += float((a * a).sum())
            output.total += float(a.sum())
            output.count += a.size
            output.error_squares += float((error * error).sum())
            output.error_total += float(error.sum())
            output.max_abs = float(np.maximum(output.max_abs, error.max()))  # keeps a NaN
            with np.errstate(invalid="ignore", divide="ignore"):
                cosines.append((a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1)))
        self.cosines += np.mean(cosines, axis=0).tolist()
        if self.classify:
            pairs = zip(seen.eager, seen.outputs, strict=True)
            self.agree += np.all([a.argmax(1) == b.argmax(1) for a, b in pairs], axis=0).tolist()

    def findings(self) -> list[Finding]:
        """cosine, max_abs, mean_abs, sqnr_db and, of a classifier, top1_agreement."""
        found = [self._cosine(), self._max_abs(), self._mean_abs(), self._sqnr()]
        return [*found, self._agreement()] if self.classify else found

    def _cosine(self) -> Finding:
        samples = tuple(value if np.isfinite(value) else 0.0 for value in self.cosines)
        finding = Finding(
            check="parity",
            metric="cosine",
            value=number(float(np.mean(self.cosines))),
            detail=f"mean over {len(samples)} images, worst {min(samples):.6f}",
            samples=samples,
        )
        limit = self.options.min_cosine
        return judged(finding, self.limits.cosine if limit is None else limit, "high")

    def _max_abs(self) -> Finding:
        shares = [output.max_abs / output.spread for output in self.outputs]
        worst = int(np.argmax(shares))
        name, output = self.names[worst], self.outputs[worst]
        finding = Finding(
            check="parity",
            metric="max_abs",
            value=number(output.max_abs),
            detail=f"{shares[worst]:.2g} of the standard deviation of {name} ({output.spread:.4g})",
        )
        limit = self.options.atol if self.options.atol is not None else self.limits.share * output.spread
        return judged(finding, limit, "low")

    def _mean_abs(self) -> Finding:
        value = sum(output.error_total for output in self.outputs) / sum(output.count for output in self.outputs)
        return Finding(check="parity", metric="mean_abs", value=number(value))

    def _sqnr(self) -> Finding:
        """Signal to quantization noise, 10·log10(Σ eager² / Σ error²); 200 dB stands for no error at all."""
        noise = max(sum(output.error_squares for output in self.outputs), 1e-300)
        with np.errstate(divide="ignore"):
            value = 10 * np.log10(sum(output.squares for output in self.outputs) / noise)
        return Finding(check="parity", metric="sqnr_db", value=number(min(float(value), 200.0)), unit="dB")

    def _agreement(self) -> Finding:
        # Few images say little (one of 16 is already 6 points), so the end of the interval is judged.
        found, limit = share("parity", "top1_agreement", self.agree), self.options.min_agreement
        limit = self.limits.agreement_pct if limit is None else limit
        passed = judged(replace(found, value=found.high), limit, "high").passed
        detail = f"{found.detail}; fails only if the upper end of the 95 % interval is below the limit"
        return replace(found, limit=limit, passed=passed, detail=detail)


CHECK = Check(Parity)
