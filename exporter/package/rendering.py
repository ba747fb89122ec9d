"""Files of packages from templates."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter import __version__
from exporter.artifact.sidecar import COLORS, Preprocessing, sides, size_text
from exporter.data.images import MAX_PIXELS
from exporter.errors import printable
from exporter.package.contents import Contents
from exporter.package.protocol import DATATYPES
from exporter.verify.outputs import THRESHOLD

TEMPLATES = Path(__file__).with_name("templates")
MEANINGS = {
    ("classes", "logits"): "scores of classes (logits)",
    ("classes", "softmax"): "probabilities of classes",
    ("multilabel", "logits"): "scores of labels (logits)",
    ("multilabel", "sigmoid"): "probabilities of labels",
    ("top", "classes"): "numbers of the most probable classes",
    ("probabilities", "top5"): "their probabilities",
    ("values", "logits"): "values",
    ("embedding", "embedding"): "a feature vector",
    ("features", "tokens"): "tokens: the feature vector, then one for each position of the last map",
    ("features", "map"): "a feature map",
    ("pixels", "pixel_logits"): "logits of each pixel",
    ("pixel_classes", "labels"): "the class of each pixel",
    ("features", "pixel_scores"): "its probability",
}
"""What outputs hold, by their kind and content."""


def render(template: str, contents: Contents, **more: Any) -> str:
    """The text of a template of `templates/`.

    Args:
        template: its name without `.j2`; a template may include others.
        contents: what the package is written from, as `contents` in the template; its preprocessing is `pre`.
        more: other variables.

    In templates `|py` writes a text as a literal of Python, and `|plain` on one line.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES, encoding="utf-8"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"py": json.dumps, "plain": lambda text: printable(str(text))}
    text: str = environment.get_template(f"{template}.j2").render(**(_facts(contents) | more))
    if template.endswith(".py"):
        text = re.sub(r"\n+(?=def |if __name__)", "\n\n\n", text)
    return f"{text.rstrip()}\n"


def _facts(contents: Contents) -> dict[str, Any]:
    """The variables of every template."""
    preprocessing = contents.preprocessing
    fill = tuple(round(255 * mean) for mean in preprocessing.mean)
    return {
        "contents": contents,
        "pre": preprocessing,
        "resize": sides(preprocessing.resize),
        "mode": COLORS.get(preprocessing.channels, ""),
        "pads": _pads(preprocessing),
        "fill": fill if len(fill) > 1 else fill[0],
        "steps": _steps(preprocessing),
        "verified": verified(contents.artifact.sidecar.quality),
        "max_pixels": MAX_PIXELS,
        "threshold": THRESHOLD if contents.checks.threshold is None else contents.checks.threshold,
        "meanings": MEANINGS,
        "datatypes": DATATYPES,
        "sidecar": contents.artifact.sidecar,
        "version": __version__,
    }


def verified(quality: Mapping[str, float | str]) -> str:
    """What the last verification of an artifact says, in words."""
    if not quality:
        return "not yet"
    where = f" on {quality['data']}" if "data" in quality else ""
    compared = f", compared with {quality['reference']}" if "reference" in quality else ""
    top1 = f", top-1 {quality['top1']:.2f} %" if "top1" in quality else ""
    return f"{'failed' if quality.get('passed') == 'no' else 'passed'}{where}{compared}{top1}"


def _pads(preprocessing: Preprocessing) -> bool:
    """Whether images may be smaller than the crop, and are filled up."""
    height, width = sides(preprocessing.resize)
    return preprocessing.crop == "border" or height < preprocessing.height or width < preprocessing.width


def _steps(preprocessing: Preprocessing) -> str:
    """The preprocessing in words."""
    resized = {
        "center": f"the short side resized to {size_text(preprocessing.resize)}",
        "squash": f"both sides resized to {size_text(preprocessing.resize)}",
        "border": f"the long side resized to {size_text(preprocessing.resize)} and filled up",
    }[preprocessing.crop]
    last = {
        "normalized": f"(x / 255 − {list(preprocessing.mean)}) / {list(preprocessing.std)}",
        "float01": "x / 255",
        "uint8": "bytes",
    }[preprocessing.input]
    return f"{resized} ({preprocessing.interpolation}), the centre of {size_text(preprocessing.size)}, {last}"
