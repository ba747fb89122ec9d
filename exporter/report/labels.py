"""Labels of points in a chart, placed so that they cover neither each other nor a point."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LONGEST = 40  # characters of a label
FONT = 9  # points
RADIUS, GAP, STEP = 5.0, 10.0, 16.0  # points: half a marker, marker to label, between the places that are tried


class Box(NamedTuple):
    """A rectangle, in points."""

    left: float
    bottom: float
    right: float
    top: float

    def meets(self, other: Box) -> bool:
        """Whether both have an area in common."""
        across = self.left < other.right and other.left < self.right
        return across and self.bottom < other.top and other.bottom < self.top

    def distance(self, x: float, y: float) -> float:
        """From a point to the nearest edge."""
        across, up = max(self.left - x, x - self.right, 0), max(self.bottom - y, y - self.top, 0)
        return float((across**2 + up**2) ** 0.5)


def short(text: str, longest: int = LONGEST) -> str:
    """The text, or an ellipsis and its last characters."""
    return text if len(text) <= longest else f"…{text[1 - longest :]}"


def place(axes: Axes, points: Sequence[tuple[float, float, str]], line: float | None = None) -> None:
    """Write the label of each point at the nearest free place inside the axes, joined by a line if that is not next to
    the point. A label without a free place is left out.

    Args:
        axes: of a figure of 72 dpi, with its limits; nothing may move it afterwards.
        points: x, y and text of each; one without text gets no label, and none covers it.
        line: the height of a horizontal line, which no label covers.
    """
    figure: Any = axes.figure
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    extent = axes.get_window_extent()
    frame = Box(extent.x0, extent.y0, extent.x1, extent.y1)
    spots = [tuple(map(float, axes.transData.transform((x, y)))) for x, y, _ in points]
    taken = [Box(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for x, y in spots]
    if line is not None:
        _, height = axes.transData.transform((0, line))
        taken.append(Box(frame.left, height - 1, frame.right, height + 1))
    aligned: dict[str, Any] = {"textcoords": "offset points", "fontsize": FONT, "va": "bottom", "ha": "center"}
    labelled = sorted(pair for pair in zip(spots, points, strict=True) if pair[1][2])
    for (x, y), (at_x, at_y, text) in labelled:
        note = axes.annotate(short(text), (at_x, at_y), xytext=(0, 0), **aligned)
        measured = note.get_window_extent()
        candidates = _places(x, y, measured.width, measured.height, frame)
        box = next((one for one in candidates if not any(map(one.meets, taken))), None)
        if box is None:
            note.remove()
            continue
        note.set_position(((box.left + box.right) / 2 - x, box.bottom - y))
        taken.append(box)
        if round(box.distance(x, y), 3) != GAP:
            end = (min(max(x, box.left), box.right) - x, min(max(y, box.bottom), box.top) - y)
            style = {
                "arrowstyle": "-",
                "linewidth": 0.6,
                "color": note.get_color(),
                "alpha": 0.8,
                "shrinkA": 1,
                "shrinkB": 3,
            }
            axes.annotate("", (at_x, at_y), xytext=end, textcoords="offset points", arrowprops=style)


def _places(x: float, y: float, width: float, height: float, frame: Box) -> Iterator[Box]:
    """Where a label of this size may be: right, left, above and below, then anywhere, the nearest first."""
    corners = [
        (x + GAP, y - height / 2), (x - GAP - width, y - height / 2), (x - width / 2, y + GAP),
        (x - width / 2, y - GAP - height),
    ]  # fmt: skip
    columns, rows = int((frame.right - frame.left - width) // STEP), int((frame.top - frame.bottom) // height)
    grid = [
        (frame.left + STEP * column, frame.bottom + height * row) for column in range(columns) for row in range(rows)
    ]
    boxes = [Box(left, bottom, left + width, bottom + height) for left, bottom in (*corners, *grid)]
    inside = [
        box
        for box in boxes
        if frame.left <= box.left and box.right <= frame.right and frame.bottom <= box.bottom and box.top <= frame.top
    ]
    yield from (box for box in inside if box in boxes[:4])
    yield from sorted(inside, key=lambda box: (box.distance(x, y), abs((box.left + box.right) / 2 - x)))
