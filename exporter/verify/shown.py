"""What the page of a report shows of images: masks, and the images whose answers differ most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from exporter.report import Difference, Picture
from exporter.verify.batches import Tally
from exporter.verify.checks.differences import Differences
from exporter.verify.checks.segmentation import Segmentation
from exporter.verify.thumbnails import MOST


@dataclass(frozen=True)
class Shown:
    """Pictures of masks, and the images whose answers differ most; None where the outputs have no answers."""

    pictures: tuple[Picture, ...] = ()
    differences: tuple[Difference, ...] | None = None


def shown(tallies: Sequence[Tally]) -> Shown:
    """Collect them from the images of one tally, or of several, each with its own images."""
    meters = [meter for tally in tallies for meter in tally.meters.values()]
    pictures = [picture for one in meters if isinstance(one, Segmentation) for picture in one.worst.pictures()]
    answers = [one for one in meters if isinstance(one, Differences) and one.active]
    if not answers:
        return Shown(tuple(pictures))
    entries = sorted((entry for one in answers for entry in one.entries), key=lambda entry: -entry.rank)
    return Shown(tuple(pictures), tuple(entry.difference for entry in entries[:MOST]))
