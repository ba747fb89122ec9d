"""The images on the page of a report: masks, and the images whose answers differ most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from exporter.report import MOST_DIFFERENCES, Difference, Picture
from exporter.verify.batches import Tally
from exporter.verify.checks.differences import Differences
from exporter.verify.checks.segmentation import Segmentation


@dataclass(frozen=True)
class PageImages:
    """Pictures of masks, and the images whose answers differ most; None where the outputs have no answers."""

    pictures: tuple[Picture, ...] = ()
    differences: tuple[Difference, ...] | None = None


def page_images(tallies: Sequence[Tally]) -> PageImages:
    """The masks and the most different images of all tallies; no image is in two of them."""
    meters = [meter for tally in tallies for meter in tally.meters.values()]
    pictures = [picture for one in meters if isinstance(one, Segmentation) for picture in one.worst.pictures()]
    answers = [one for one in meters if isinstance(one, Differences) and one.active]
    if not answers:
        return PageImages(tuple(pictures))
    entries = sorted((entry for one in answers for entry in one.entries), key=lambda entry: -entry.rank)
    return PageImages(tuple(pictures), tuple(entry.difference for entry in entries[:MOST_DIFFERENCES]))
