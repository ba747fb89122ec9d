"""Parity: differences between the outputs of the artifact and of eager PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from exporter.errors import as_utf8
from exporter.recipe import Checks
from exporter.report import Finding, judged, number
from exporter.verify.checks import Check, Moments, Rows, Seen, Subject, agreement, moments, share
from exporter.verify.outputs import Kind, has_cosine, is_centred, kinds

# Of an output's scale: where a sum of pixels is near half a level, the artifact may round it otherwise than Pillow.
PICTURE_SHARE = 0.02


@dataclass
class Output:
    """Running sums over one output of the model, and what it holds. `centred`: its scale is the standard deviation;
    else the root mean square, as a few values of a regression, or all probabilities, may be alike."""

    kind: Kind
    centred: bool
    eager: Moments = field(default_factory=Moments)
    error_squares: float = 0.0
    error_total: float = 0.0
    max_abs: float = 0.0

    @property
    def scale(self) -> float:
        """What errors are compared with, in the unit of the output."""
        return self.eager.scale(self.centred)


class Parity:
    """Accumulates sums and one number per image."""

    def __init__(self, options: Checks, subject: Subject) -> None:
        self.options = options
        self.limits = subject.precision.limits
        self.takes_pictures = subject.artifact.sidecar.preprocessing.input == "image"
        every = subject.artifact.sidecar.outputs
        self.outputs = {
            tensor.name: Output(kind, is_centred(tensor.holds, kind))
            for tensor, kind in zip(every, kinds(subject.artifact.sidecar, options.outputs), strict=True)
        }
        self.chooses = any(output.kind in ("classes", "top") for output in self.outputs.values())
        self.images: list[str] = []
        self.cosines: list[float] = []
        self.agree: list[bool] = []
        self.labelled = False

    def measure(self, seen: Seen) -> Rows:
        """Sums and the largest error of each output of one batch; of each image the smallest cosine of an output, and
        whether all outputs choose eager's class."""
        rows: Rows = {"labelled": np.array(bool((seen.labels >= 0).any()))}
        cosines, agree = [], []
        for (name, output), eager, got in zip(self.outputs.items(), seen.eager, seen.outputs, strict=True):
            a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (eager, got))
            if output.kind == "top":  # numbers of classes have no distance
                agree.append(a[:, 0] == b[:, 0])
            if output.kind in ("top", "pixel_classes"):
                continue
            error = np.abs(a - b)
            rows[f"sums {name}"] = np.array([*moments(a), (error * error).sum(), error.sum(), error.max()])
            if has_cosine(output.kind, a.shape[1]):
                with np.errstate(invalid="ignore", divide="ignore"):
                    cosines.append((a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1)))
            if output.kind == "classes":
                agree.append(a.argmax(1) == b.argmax(1))
        rows |= {"cosines": np.min(cosines, axis=0)} if cosines else {}
        rows |= {"agree": np.all(agree, axis=0)} if agree else {}
        return rows

    def add(self, rows: Rows, names: Sequence[str]) -> None:
        """Accumulate one batch."""
        for name, output in self.measured.items():
            sums = rows[f"sums {name}"]
            output.eager.add(sums[:3])
            output.error_squares += float(sums[3])
            output.error_total += float(sums[4])
            output.max_abs = float(np.maximum(output.max_abs, sums[5]))  # keeps a NaN
        self.cosines += rows["cosines"].tolist() if "cosines" in rows else []
        self.agree += rows["agree"].tolist() if "agree" in rows else []
        self.images += names
        self.labelled |= bool(rows["labelled"])

    def findings(self) -> list[Finding]:
        """max_abs, mean_abs, sqnr_db, cosine where an output has one, and top1_agreement where one has classes."""
        if not self.measured:
            return []
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
            detail=f"mean over {len(samples)} images, worst {min(samples):.6f}{self._worst(samples)}",
            samples=samples,
        )
        limit = self.options.min_cosine
        return judged(finding, self.limits.cosine if limit is None else limit, "high")

    def _worst(self, cosines: Sequence[float]) -> str:
        """The name of the image with the smallest cosine, where names are known."""
        return f" ({as_utf8(self.images[int(np.argmin(cosines))])})" if len(self.images) == len(cosines) else ""

    @property
    def measured(self) -> dict[str, Output]:
        """The outputs whose errors have a size."""
        return {name: output for name, output in self.outputs.items() if output.kind not in ("top", "pixel_classes")}

    def _max_abs(self) -> Finding:
        shares = {name: output.max_abs / output.scale for name, output in self.measured.items()}
        errors = {name: output.max_abs for name, output in self.measured.items()}
        ranked = shares if self.options.atol is None else errors  # --atol is a limit of every output
        name = max(ranked, key=lambda name: ranked[name] if np.isfinite(ranked[name]) else np.inf)
        output = self.outputs[name]
        scale = "standard deviation" if output.centred else "root mean square"
        finding = Finding(
            check="parity",
            metric="max_abs",
            value=number(output.max_abs),
            detail=f"{shares[name]:.2g} of the {scale} of {name} ({output.scale:.4g})",
        )
        share = max(self.limits.share, PICTURE_SHARE) if self.takes_pictures else self.limits.share
        limit = self.options.atol if self.options.atol is not None else share * output.scale
        return judged(finding, limit, "low")

    def _mean_abs(self) -> Finding:
        every = self.measured.values()
        value = sum(output.error_total for output in every) / sum(output.eager.count for output in every)
        return Finding(check="parity", metric="mean_abs", value=number(value))

    def _sqnr(self) -> Finding:
        """Signal to quantization noise, 10·log10(Σ eager² / Σ error²); 200 dB stands for no error at all."""
        every = self.measured.values()
        noise = max(sum(output.error_squares for output in every), 1e-300)
        with np.errstate(divide="ignore"):
            value = 10 * np.log10(sum(output.eager.squares for output in every) / noise)
        return Finding(check="parity", metric="sqnr_db", value=number(min(float(value), 200.0)), unit="dB")


CHECK = Check(Parity)
