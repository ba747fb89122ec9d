"""Segmentation: the classes of pixels, compared with those of eager PyTorch, and both with masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from exporter.backends import Array
from exporter.data.masks import IGNORED
from exporter.progress import note
from exporter.recipe import Checks
from exporter.report import Finding, judged
from exporter.stats import mean_half_width
from exporter.verify import budgets
from exporter.verify.checks import Check, Rows, Seen, Subject
from exporter.verify.outputs import PIXELS, has_one_class_of_pixels, kinds
from exporter.verify.pictures import Worst, compared

MOST_NAMED = 3  # classes in a finding's detail
BAND = 3  # pixels on both sides of a border between classes
RARE = 1e-4  # of all pixels: the IoU of a class with fewer is that of a few pixels

Counts = NDArray[np.int64]


class Segmentation:
    """Counts pixels by two classes: what one side has, and what the other has (a confusion matrix)."""

    def __init__(self, options: Checks, subject: Subject) -> None:
        sidecar = subject.artifact.sidecar
        self.options, self.limits = options, subject.precision.limits.pixels
        limit = options.max_drop
        unsure = budgets.when_unsure(options.when_unsure, limit is not None)
        self.budget = budgets.Budget(subject.precision.max_drop_points if limit is None else limit, "low", unsure)
        every = kinds(sidecar, options.outputs)
        self.active = any(kind in PIXELS and not has_one_class_of_pixels(sidecar, kind) for kind in every)
        self.classes, self.labels = sidecar.weights.num_classes, sidecar.labels
        self.to_eager: Counts = np.zeros((self.classes, self.classes), np.int64)
        self.to_masks: dict[str, list[Counts]] = {"eager": [], "artifact": []}
        self.agree: list[float] = []
        self.worst = Worst()
        self.in_band = self.agree_in_band = 0
        self.has_masks = False

    def measure(self, seen: Seen) -> Rows:
        """Counts of pixels and thinned masks of one batch; pixels without a class in the mask are not counted with
        masks."""
        if not self.active:
            return {}
        eager, got = classes_of(seen.eager[0]), classes_of(seen.outputs[0])
        band, has_masks = near_borders(eager), seen.labels.ndim == 3
        rows: Rows = {
            "agree": (eager == got).mean((1, 2)),
            "band": np.array([band.sum(), (eager == got)[band].sum()]),
            "to_eager": self._count(eager, got),
            "has_masks": np.array(has_masks),
            **compared(seen.labels if has_masks else eager, got),
        }
        if has_masks:
            rows["eager"], rows["artifact"] = (self._areas(seen.labels, classes) for classes in (eager, got))
        return rows

    def add(self, rows: Rows, names: Sequence[str]) -> None:
        """Accumulate one batch."""
        self.agree += rows["agree"].tolist()
        self.in_band += int(rows["band"][0])
        self.agree_in_band += int(rows["band"][1])
        self.has_masks |= bool(rows["has_masks"])
        pairs, pixels = rows["to_eager"]
        self.to_eager.flat[pairs] += pixels
        for side, areas in self.to_masks.items():
            areas += list(rows.get(side, ()))
        self.worst.add(names, rows, "masks" if rows["has_masks"] else "eager PyTorch")

    def _count(self, expected: Counts, got: Counts) -> Counts:
        """The pairs of classes that occur, as numbers expected · C + got, and their pixels: (2, pairs)."""
        pixels = np.bincount((expected * self.classes + got).ravel())
        pairs = np.flatnonzero(pixels)
        return np.stack([pairs, pixels[pairs]])

    def _areas(self, masks: Counts, classes: Counts) -> Counts:
        """The pixels of the intersection, of the union and of the mask of each class in each image, (N, 3, C)."""
        areas = np.zeros((len(masks), 3, self.classes), np.int64)
        for index, (mask, got) in enumerate(zip(masks, classes, strict=True)):
            known = mask >= 0
            both, first, second = (
                np.bincount(one, minlength=self.classes)
                for one in (mask[known & (mask == got)], mask[known], got[known])
            )
            areas[index] = both, first + second - both, first
        return areas

    def findings(self) -> list[Finding]:
        """pixel_agreement, boundary_agreement and miou_to_eager; with masks miou_eager, miou and miou_drop; iou of each
        class."""
        if not self.agree:
            return []
        areas_to_eager = areas_of(self.to_eager)
        shares = shares_of(areas_to_eager)
        common = np.where(areas_to_eager[1] >= RARE * self.to_eager.sum(), shares, np.nan)
        to_eager = [
            self._agreement(),
            *self._boundary(),
            judged(self._mean("miou_to_eager", common), self.limits.miou_pct, "high"),
        ]
        areas = {side: np.array(listed) for side, listed in self.to_masks.items() if listed}
        if areas and areas["eager"][:, 2].any():
            return [*to_eager, *self._with_masks(areas["eager"], areas["artifact"])]
        return [*to_eager, *self._without_classes(), *self._of_classes("iou_to_eager", shares)]

    def _with_masks(self, eager: Counts, artifact: Counts) -> list[Finding]:
        """miou_eager, miou, miou_drop and the iou of each class, from the areas of all images (N, 3, C)."""
        of_masks = np.flatnonzero(eager[:, 2].any(0))
        if len(of_masks) == 1 < eager.shape[2]:
            note(
                f"the masks have class {of_masks[0]} alone; {IGNORED} is no class, so masks of 0 and {IGNORED} need "
                f"1 in place of {IGNORED}"
            )
        parts = [100 * parts_of_images(areas) for areas in (eager, artifact)]
        shares = [shares_of_masks(areas) for areas in (eager, artifact)]
        means = [
            replace(self._mean(metric, share), samples=tuple(part.round(4).tolist()))
            for metric, share, part in zip(("miou_eager", "miou"), shares, parts, strict=True)
        ]
        return [*means, self._drop(parts[0] - parts[1]), *self._of_classes("iou", shares[1])]

    def _without_classes(self) -> list[Finding]:
        """A failure where there are masks, as none of their pixels has a class."""
        if not self.has_masks:
            return []
        detail = f"no pixel of the masks has a class ({IGNORED} is none); give masks with classes"
        return [Finding(check="segmentation", metric="miou", value=None, passed=False, detail=detail)]

    def _drop(self, differences: NDArray[np.float64]) -> Finding:
        """miou_drop with Student's interval over images; of fewer than three images it is judged without."""
        drop, parts = float(differences.mean()), differences.tolist()
        finding = Finding(check="segmentation", metric="miou_drop", value=drop, unit="points")
        if mean_half_width(parts) is None:
            return judged(finding, self.budget.limit, "low")

        def interval(images: int) -> tuple[float, float]:
            half = mean_half_width(parts, images) or 0.0
            return drop - half, drop + half

        low, high = interval(len(parts))
        return budgets.judged(replace(finding, low=low, high=high), self.budget, len(parts), interval)

    def _agreement(self) -> Finding:
        worst = min(self.agree)
        finding = Finding(
            check="segmentation",
            metric="pixel_agreement",
            value=100 * float(np.mean(self.agree)),
            unit="%",
            detail=f"mean over {len(self.agree)} images, worst {100 * worst:.3f} %",
            samples=tuple(self.agree),
        )
        limit = self.options.min_agreement
        return judged(finding, self.limits.agreement_pct if limit is None else limit, "high")

    def _boundary(self) -> list[Finding]:
        """The agreement near borders, where classes change first; none where eager sees one class in each image."""
        if not self.in_band:
            return []
        value = 100 * self.agree_in_band / self.in_band
        share = 100 * self.in_band / self.to_eager.sum()
        detail = f"{share:.1f} % of the pixels lie within {BAND} pixels of a border between classes of eager PyTorch"
        return [Finding(check="segmentation", metric="boundary_agreement", value=value, unit="%", detail=detail)]

    def _mean(self, metric: str, shares: NDArray[np.float64]) -> Finding:
        order = [index for index in np.argsort(shares) if np.isfinite(shares[index])]
        worst = ", ".join(f"{self._name(index)} {100 * shares[index]:.1f}" for index in order[:MOST_NAMED])
        return Finding(
            check="segmentation",
            metric=metric,
            value=100 * float(np.nanmean(shares)),
            unit="%",
            detail=f"mean over {len(order)} of {self.classes} classes, smallest: {worst}",
        )

    def _of_classes(self, metric: str, shares: NDArray[np.float64]) -> list[Finding]:
        """The share of each class that occurs."""
        return [
            Finding(check="segmentation", metric=metric, value=100 * float(share), unit="%", case=self._name(index))
            for index, share in enumerate(shares)
            if np.isfinite(share)
        ]

    def _name(self, index: int) -> str:
        return self.labels[index] if self.labels else f"class {index}"


def classes_of(output: Array) -> NDArray[np.int64]:
    """The classes of pixels (N, H, W), from themselves or from scores (N, C, H, W); of equal scores the first."""
    chosen: NDArray[Any] = output if output.ndim == 3 else output.argmax(1)
    return chosen.astype(np.int64)


def near_borders(classes: Counts) -> NDArray[np.bool_]:
    """The pixels (N, H, W) with another class within `BAND` pixels: in the square of 7 × 7 around each."""
    from scipy.ndimage import maximum_filter1d, minimum_filter1d

    least = largest = classes
    for axis in (1, 2):
        least = minimum_filter1d(least, 2 * BAND + 1, axis, mode="nearest")
        largest = maximum_filter1d(largest, 2 * BAND + 1, axis, mode="nearest")
    return np.asarray(least != largest)


def areas_of(counts: Counts) -> Counts:
    """The pixels of the intersection and of the union of each class (2, C).

    Args:
        counts: (C, C) pixels by the expected class and the one that was computed.
    """
    both = np.diag(counts)
    return np.stack([both, counts.sum(0) + counts.sum(1) - both])


def shares_of(areas: Counts) -> NDArray[np.float64]:
    """Intersection over union of each class (Everingham et al., IJCV 2010, section 4.1.3: TP / (TP + FP + FN)), from 0
    to 1; NaN for a class that neither side has.

    Args:
        areas: (2, C) pixels of the intersection and of the union, over all images.
    """
    both, union = areas.astype(np.float64)
    shares: NDArray[np.float64] = np.divide(both, union, out=np.full(len(both), np.nan), where=union > 0)
    return shares


def shares_of_masks(areas: Counts) -> NDArray[np.float64]:
    """Intersection over union of each class of the masks (C,); NaN for a class that no mask has.

    A class that one artifact alone predicts would have a share of 0 there and none elsewhere, so that the means of two
    artifacts would be of different classes; its pixels count against the classes of the masks.

    Args:
        areas: (N, 3, C) pixels of the intersection, of the union and of the mask.
    """
    sums = areas.sum(0)
    return np.where(sums[2] > 0, shares_of(sums[:2]), np.nan)


def parts_of_images(areas: Counts) -> NDArray[np.float64]:
    """A number for each image with a mask whose mean is mIoU, and whose standard deviation is √N times the
    standard error of mIoU.

    A share is a ratio of sums over images, so these are the linearised values of a ratio (Cochran, "Sampling
    Techniques", 1977, section 2.11), averaged over classes. Those of two artifacts for the same images are paired. A
    class in one image alone adds nothing to the spread.

    Args:
        areas: (N, 3, C) pixels of the intersection, of the union and of the mask.
    """
    areas = areas[areas[:, 2].any(1)]
    shares, union = shares_of_masks(areas), areas[:, 1].sum(0)
    known = ~np.isnan(shares)
    residuals = (areas[:, 0, known] - shares[known] * areas[:, 1, known]) / union[known]
    values: NDArray[np.float64] = float(shares[known].mean()) + len(areas) * residuals.mean(1)
    return values


CHECK = Check(Segmentation)
