"""The images of the page whose answers differ most, with a thumbnail of each that artifacts share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from exporter.report import MOST_DIFFERENCES, Difference, Prediction, Report
from exporter.report.summary import Chip
from exporter.report.tables import name

MOST_CHARACTERS = 800_000  # of all thumbnails, so that a page of twenty artifacts stays within 2 MB
JPEG_BASE64 = re.compile("/9j/[A-Za-z0-9+/]*={0,2}")  # base64 of its first three bytes, FF D8 FF, and on


@dataclass(frozen=True)
class Card:
    """An image: the id of its thumbnail or "", its name, whether its class changed, and lines of a title and a text."""

    thumbnail: str
    image: str
    chips: tuple[Chip, ...]
    lines: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Gallery:
    """The thumbnails by id; for each artifact its name, a summary and its cards; the artifacts without an image that
    differs; and the number of images that are shown by name only."""

    thumbnails: dict[str, str]
    groups: tuple[tuple[str, str, tuple[Card, ...]], ...]
    equal: tuple[str, ...]
    unseen: int


def gallery(reports: Sequence[Report]) -> Gallery | None:
    """The images of all reports that compared answers; None where there are none."""
    known = [
        (name(report), report.differences[:MOST_DIFFERENCES]) for report in reports if report.differences is not None
    ]
    if not known:
        return None
    shown = _within_budget([differences for _, differences in known])
    ids = {thumbnail: f"image-{number}" for number, thumbnail in enumerate(shown)}
    groups = tuple(
        (artifact, _summary(differences), tuple(_card(one, ids.get(one.thumbnail, "")) for one in differences))
        for artifact, differences in known
        if differences
    )
    return Gallery(
        thumbnails={key: thumbnail for thumbnail, key in ids.items()},
        groups=groups,
        equal=tuple(artifact for artifact, differences in known if not differences),
        unseen=sum(not card.thumbnail for *_, cards in groups for card in cards),
    )


def first_changed(reports: Sequence[Report]) -> list[str]:
    """A sentence for each artifact with another answer than the reference: its first image whose class or label
    changed."""
    known = [(name(report), next((d for d in report.differences or () if d.changed), None)) for report in reports]
    return [_sentence(artifact, one) for artifact, one in known if one is not None]


def _sentence(artifact: str, one: Difference) -> str:
    if one.reference.index == one.artifact.index:  # of a multi-label head
        shares = " and ".join(_percent(answer.probability) or "no number" for answer in (one.artifact, one.reference))
        return f"{artifact} and the reference disagree on label {_named(one.reference)} for {one.image}: {shares}."
    taken, expected = (
        _named(answer) + (f" ({percent})" if (percent := _percent(answer.probability)) else "")
        for answer in (one.artifact, one.reference)
    )
    return f"{artifact} answers {taken} for {one.image}; the reference answers {expected}."


def _within_budget(lists: Sequence[Sequence[Difference]]) -> list[str]:
    """The thumbnails, each once, that fit on the page: the first image of each artifact, then the second, and on."""
    places = range(max(map(len, lists)))
    ordered = [differences[place].thumbnail for place in places for differences in lists if place < len(differences)]
    shown, free = [], MOST_CHARACTERS
    for thumbnail in dict.fromkeys(ordered):
        if len(thumbnail) <= free and JPEG_BASE64.fullmatch(thumbnail):
            shown.append(thumbnail)
            free -= len(thumbnail)
    return shown


def _summary(differences: Sequence[Difference]) -> str:
    changed = sum(one.changed for one in differences)
    return f"{len(differences)} image{'s' if len(differences) > 1 else ''}, {changed} with another class or label"


def _card(one: Difference, thumbnail: str) -> Card:
    lines = [("reference", prediction(one.reference)), ("artifact", prediction(one.artifact))]
    if one.labels is not None:
        lines.append(("label", ", ".join(map(prediction, one.labels)) or "none"))
    return Card(thumbnail, one.image, _chips(one), tuple(lines))


def _chips(one: Difference) -> tuple[Chip, ...]:
    """Whether the class or label changed, and of an image with true classes, whether the right one was lost or won."""
    if not one.changed:
        return ()
    if one.labels is not None and one.reference.index != one.artifact.index:
        right = {label.index for label in one.labels}
        if one.reference.index in right:
            return (Chip("lost", "bad"),)
        if one.artifact.index in right:
            return (Chip("won", "good"),)
    return (Chip("changed", "changed"),)


def prediction(one: Prediction) -> str:
    """The class by name or number, with its probability in percent."""
    return ", ".join(filter(None, (_named(one), _percent(one.probability))))


def _named(one: Prediction) -> str:
    return one.name or f"class {one.index}"


def _percent(probability: float | None) -> str:
    return "" if probability is None else f"{100 * probability:.1f} %"
