"""A real segmenter to measure on that needs no download: a small UPerNet on ConvNeXt, trained on scenes drawn by rule.

A scene is a cut of one of the two photographs that ship inside scikit-learn (`china.jpg`, `flower.jpg`), with shapes
drawn over it: each mixes the photograph with the colour of its kind. The mask follows from the same rule. Scenes that
are held out are cut from the right quarter of the photographs, which training does not see. The network is
`UperNetForSemanticSegmentation` of transformers; it is written as a user's own would be.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from benchmarks import libraries
from exporter.artifact.sidecar import Preprocessing
from exporter.data.images import normalise

PIXELS = 96
HELD_OUT = 24
STEPS, BATCH = 300, 8
LABELS = ("photograph", "disc", "square", "triangle", "ring")
COLORS = ((0, 0, 0), (210, 60, 50), (60, 90, 210), (70, 190, 80), (220, 200, 60))
RECIPE = Preprocessing(size=PIXELS, resize=PIXELS, crop="squash", interpolation="bilinear", offset="floor")


@cache
def photographs() -> tuple[NDArray[np.uint8], ...]:
    """The two photographs, (427, 640, 3) each."""
    from sklearn.datasets import load_sample_images

    return tuple(np.asarray(image) for image in load_sample_images().images)


def scene(seed: int, held_out: bool = False, size: int = PIXELS) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The pixels (size, size, 3) of a scene and the class of each (size, size), of up to 160 pixels."""
    random = np.random.default_rng([seed, held_out])
    whole = photographs()[random.integers(2)]
    quarter = whole.shape[1] // 4
    part = whole[:, -quarter:] if held_out else whole[:, :-quarter]
    top, left = (int(random.integers(0, side - size + 1)) for side in part.shape[:2])
    pixels = part[top : top + size, left : left + size].astype(np.float64)
    mask = np.zeros((size, size), np.uint8)
    for _ in range(int(random.integers(3, 6)) * (size // PIXELS or 1)):
        kind = int(random.integers(1, len(LABELS)))
        inside = _inside(kind, random.uniform(0, size, 2), random.uniform(9, 24), size)
        color = np.asarray(COLORS[kind]) + random.normal(0, 20, 3)
        pixels[inside] = 0.4 * pixels[inside] + 0.6 * color
        mask[inside] = kind
    return pixels.clip(0, 255).astype(np.uint8), mask


def _inside(kind: int, center: NDArray[np.float64], radius: float, size: int) -> NDArray[np.bool_]:
    """The pixels of a shape."""
    rows, columns = (axis - at for axis, at in zip(np.mgrid[:size, :size], center, strict=True))
    distance = np.hypot(rows, columns)
    if kind == LABELS.index("square"):
        return np.asarray(np.maximum(np.abs(rows), np.abs(columns)) <= 0.8 * radius)
    if kind == LABELS.index("triangle"):
        return np.asarray((rows <= 0.6 * radius) & (np.abs(columns) <= 0.6 * (rows + radius)))
    return np.asarray((distance <= radius) & ((distance >= 0.5 * radius) | (kind == LABELS.index("disc"))))


def batch(seeds: range) -> tuple[Tensor, Tensor]:
    """Normalized scenes (N, 3, H, W) and their classes (N, H, W)."""
    pairs = [scene(seed) for seed in seeds]
    images = np.stack([normalise(pixels, RECIPE) for pixels, _ in pairs])
    return torch.from_numpy(images), torch.from_numpy(np.stack([mask for _, mask in pairs]).astype(np.int64))


def train(steps: int = STEPS, seed: int = 0) -> Any:
    """AdamW with one rise and fall of the learning rate; every step sees new scenes."""
    transformers = libraries.library("transformers")
    torch.manual_seed(seed)
    stages = [f"stage{number}" for number in range(1, 5)]
    backbone = transformers.ConvNextConfig(
        depths=[1, 1, 2, 1], hidden_sizes=[16, 24, 40, 64], out_features=stages, layer_scale_init_value=0.5
    )
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=32, id2label=dict(enumerate(LABELS)), use_auxiliary_head=False
    )
    model = transformers.UperNetForSemanticSegmentation(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps, pct_start=0.15)
    for step in range(steps):
        images, masks = batch(range(step * BATCH, (step + 1) * BATCH))
        loss = F.cross_entropy(model(images).logits, masks)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        print(f"\r  step {step + 1}/{steps}, loss {loss.item():.3f}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return model.eval()


def write_images(folder: Path, count: int = HELD_OUT, size: int = PIXELS) -> None:
    """Held-out scenes as `images/NAME.png`, their masks as `annotations/NAME.png`."""
    for name in ("images", "annotations"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        for name, array in zip(("images", "annotations"), scene(seed, held_out=True, size=size), strict=True):
            Image.fromarray(array).save(folder / name / f"{seed:02}.png")


def prepare(folder: Path, steps: int = STEPS) -> None:
    """The network in `folder/model`, and held-out scenes with masks in `folder/val`."""
    write_images(folder / "val")
    print("· training a small UPerNet on drawn scenes", file=sys.stderr)
    model = train(steps)
    config = json.loads(model.config.to_json_string()) | {"architectures": [type(model).__name__]}
    libraries.save(folder / "model", model, config)
    size = {"height": PIXELS, "width": PIXELS}
    processor = {"image_processor_type": "SegformerImageProcessor", "size": size, "resample": 2}
    (folder / "model" / "preprocessor_config.json").write_text(json.dumps(processor))
