"""Parity: differences between the outputs of the artifact and of eager PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from exporter import precision
from exporter.recipe import Checks
from exporter.report import Finding, judged, number
from exporter.verify.checks import Check, Moments, Seen, Subject, agreement, share
from exporter.verify.outputs import Kind, has_cosine, kinds

# Of an output's scale: where a sum of pixels is near half a level, the artifact may round it otherwise than Pillow.
PICTURE_SHARE = 0.02


@dataclass
class Output:
    """Running sums over one output of the model, and what it holds."""

    kind: Kind
    eager: Moments = field(default_factory=Moments)
    error_squares: float = 0.0
    error_total: float = 0.0
    max_abs: float = 0.0

    @property
    def scale(self) -> float:
        """What errors are compared with, in the unit of the output."""
        return self.eager.scale(self.kind)


class Parity:
    """Accumulates sums and one number per image."""

    def __init__(self, options: Checks, subject: Subject) -> None:
        self.options = options
        self.limits = precision.get(subject.artifact.sidecar.precision).limits
        self.takes_pictures = subject.artifact.sidecar.preprocessing.input == "image"
        self.names = [tensor.name for tensor in subject.artifact.sidecar.outputs]
        self.outputs = [Output(kind) for kind in kinds(subject.artifact.sidecar, options.outputs)]
        self.chooses = any(output.kind == "classes" for output in self.outputs)
        self.cosines: list[float] = []
        self.agree: list[bool] = []
        self.labelled = False

    def see(self, seen: Seen) -> None:
        """Accumulate one batch."""
        cosines, agree = [], []
        for output, eager, got in zip(self.outputs, seen.eager, seen.outputs, strict=True):
            a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (eager, got))
            error = np.abs(a - b)
            output.eager.see(a)
            output.error_squares += float((error * error).sum())
            output.error_total += float(error.sum())
            output.max_abs = float(np.maximum(output.max_abs, error.max()))  # keeps a NaN
            if has_cosine(output.kind, a.shape[1]):
                with np.errstate(invalid="ignore", divide="ignore"):
                    cosines.append((a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1)))
            if output.kind == "classes":
                agree.append(a.argmax(1) == b.argmax(1))
        self.cosines += np.mean(cosines, axis=0).tolist() if cosines else []
        self.agree += np.all(agree, axis=0).tolist() if agree else []
        self.labelled |= bool((seen.labels >= 0).any())

    def findings(self) -> list[Finding]:
        """max_abs, mean_abs, sqnr_db, cosine where an output has one, and top1_agreement where one has classes."""
        found = [self._max_abs(), self._mean_abs(), self._sqnr()]
        found = [self._cosine(), *found] if self.cosines else found
        if not self.chooses:
            return found
        agree = share("parity", "top1_agreement", self.agree)
        return [*found, agreement(agree, self.options, self.limits.agreement_pct, self.labelled)]

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
        shares = [output.max_abs / output.scale for output in self.outputs]
        worst = int(np.argmax(shares))
        name, output = self.names[worst], self.outputs[worst]
        scale = "root mean square" if output.kind == "values" else "standard deviation"
        finding = Finding(
            check="parity",
            metric="max_abs",
            value=number(output.max_abs),
            detail=f"{shares[worst]:.2g} of the {scale} of {name} ({output.scale:.4g})",
        )
        share = max(self.limits.share, PICTURE_SHARE) if self.takes_pictures else self.limits.share
        limit = self.options.atol if self.options.atol is not None else share * output.scale
        return judged(finding, limit, "low")

    def _mean_abs(self) -> Finding:
        value = sum(output.error_total for output in self.outputs) / sum(output.eager.count for output in self.outputs)
        return Finding(check="parity", metric="mean_abs", value=number(value))

    def _sqnr(self) -> Finding:
        """Signal to quantization noise, 10·log10(Σ eager² / Σ error²); 200 dB stands for no error at all."""
        noise = max(sum(output.error_squares for output in self.outputs), 1e-300)
        with np.errstate(divide="ignore"):
            value = 10 * np.log10(sum(output.eager.squares for output in self.outputs) / noise)
        return Finding(check="parity", metric="sqnr_db", value=number(min(float(value), 200.0)), unit="dB")


CHECK = Check(Parity)
