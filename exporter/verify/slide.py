"""Sliding windows, as mmsegmentation evaluates: images keep their aspect ratio, and the logits of windows that
overlap are averaged."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from msgspec.structs import replace

from exporter.artifact.sidecar import Preprocessing, Sidecar, as_size, sides, size_text
from exporter.backends import Array, Outputs
from exporter.data import images
from exporter.errors import BadRequest
from exporter.recipe import Checks

USUAL = 512  # pixels
MOST_ASPECT_RATIO = 16  # the long side of an image divided by the short one
STEP = 2 / 3  # of a window: 341 of 512 and 426 of 640 in the published evaluations


class Windows(NamedTuple):
    """Height and width of the windows, and the steps between them, in pixels."""

    size: tuple[int, int]
    steps: tuple[int, int]

    @property
    def text(self) -> str:
        """In words."""
        size, steps = size_text(as_size(*self.size)), size_text(as_size(*self.steps))
        return f"windows of {size} pixels, stride {steps}, over images whose short side is that of a window"


def windows_of(sidecar: Sidecar, options: Checks) -> Windows | None:
    """The windows that options ask for, None without `slide`.

    Raises: BadRequest for an artifact without logits of each pixel, and for windows that do not fit it.
    """
    if not options.slide:
        if lost := next((name for name in ("window", "stride") if getattr(options, name) is not None), ""):
            raise BadRequest(f"--{lost}: only applies to sliding windows; add --slide, or leave it out")
        return None
    if sidecar.task != "segment":
        raise BadRequest(f"--slide: windows are for --task segment, and this is {sidecar.task}; leave it out")
    if sidecar.spec.answer != "logits":
        raise BadRequest(
            f"--slide: the logits of windows are averaged, and the artifact returns {sidecar.spec.answer}; build it "
            "with --output logits"
        )
    if sidecar.preprocessing.input == "image":
        raise BadRequest("--slide: the artifact resizes pictures to one size itself; build it without --input image")
    of_config = tuple((sidecar.architecture.get("decoder") or {}).get("windows", ()))
    is_fixed = isinstance(sidecar.outputs[0].shape[2], int)
    size = sides(sidecar.preprocessing.size) if is_fixed else of_config[:2] or (USUAL, USUAL)
    if options.window is not None:
        if is_fixed and set(size) != {options.window}:
            fixed = size_text(as_size(*size))
            raise BadRequest(
                f"--window {options.window}: the artifact takes {fixed} pixels; leave it out, or build it with --imgsz "
                "dynamic"
            )
        size = options.window, options.window
    if options.stride is not None:
        steps = options.stride, options.stride
    else:
        steps = of_config[2:] if of_config[:2] == size else (int(STEP * size[0]), int(STEP * size[1]))
    if any(step > side for step, side in zip(steps, size, strict=True)):
        raise BadRequest(
            f"--stride {steps[0]}: larger than the windows of {size_text(as_size(*size))}; give at most that"
        )
    return Windows((size[0], size[1]), (steps[0], steps[1]))


def starts(side: int, window: int, step: int) -> list[int]:
    """Where windows begin along a side of an image: every `step` pixels, the last one at the end."""
    return [*range(0, max(side - window, 0), step), max(side - window, 0)]


def whole(preprocessing: Preprocessing, windows: Windows, image: Path) -> Preprocessing:
    """The preprocessing of an image that keeps its aspect ratio: the smallest size that a window fits into.

    Raises: images.Unreadable for a file that is no image, or one side of which is more than `MOST_ASPECT_RATIO` times
        the other: the logits of all its windows would fill the memory.
    """
    width, height = images.size_of(image)
    if max(width, height) > MOST_ASPECT_RATIO * min(width, height):
        raise images.Unreadable(f"{width}×{height} pixels: one side is more than {MOST_ASPECT_RATIO} times the other")
    scale = max(windows.size[0] / height, windows.size[1] / width)
    size = as_size(
        *(max(round(side * scale), least) for side, least in zip((height, width), windows.size, strict=True))
    )
    return replace(preprocessing, size=size, resize=size, crop="squash", crop_pct=None)


def over(windows: Windows, run: Callable[[Array], Outputs], pixels: Array) -> Outputs:
    """The mean logits (1, classes, H, W) of the windows over one image (1, C, H, W)."""
    rows, columns = map(starts, pixels.shape[2:], windows.size, windows.steps)
    height, width = windows.size
    total: Array | None = None
    count = np.zeros(pixels.shape[2:], np.float32)
    for top in rows:
        for left in columns:
            place = (..., slice(top, top + height), slice(left, left + width))
            (logits,) = run(np.ascontiguousarray(pixels[place]))
            if total is None:
                total = np.zeros((1, logits.shape[1], *pixels.shape[2:]), np.float32)
            total[place] += logits
            count[place] += 1
    assert total is not None
    return (total / count,)


def sliding(windows: Windows | None, run: Callable[[Array], Outputs]) -> Callable[[Array], Outputs]:
    """A function that runs a session over windows, or as it is where there are none."""
    return run if windows is None else partial(over, windows, run)
