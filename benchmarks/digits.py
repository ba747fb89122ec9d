"""A real model to measure on that needs no download: a small ConvNeXt trained on scikit-learn's handwritten digits.

1,797 scans of 8 × 8 pixels (Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI 1998) ship inside
scikit-learn. The last 500 are held out as PNG files in a folder per class; the model is written as a user's own
checkpoint would be, `model.safetensors` with `config.json`.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from exporter.artifact.sidecar import Preprocessing
from exporter.data.generators import digits
from exporter.data.images import preprocess
from exporter.model.convnext import ConvNeXt, Norm
from exporter.model.variants import Architecture

HELD_OUT = 500
PIXELS = 64
ARCHITECTURE = Architecture(depths=(1, 1, 2, 1), dims=(24, 48, 96, 192))
RECIPE = Preprocessing(
    size=PIXELS, resize=PIXELS, interpolation="bilinear", mean=(0.3, 0.3, 0.3), std=(0.35, 0.35, 0.35)
)


def load() -> tuple[list[Image.Image], NDArray[np.int64]]:
    """The digits as grey images, shuffled by a fixed seed, and their classes."""
    scans, labels = digits()
    return [Image.fromarray(scans[row]) for row in order()], labels[order()]


def order() -> NDArray[np.int64]:
    """The rows of scikit-learn's table, shuffled; the last `HELD_OUT` are held out."""
    return np.random.default_rng(0).permutation(len(digits()[0]))


def write_images(folder: Path, held_out: bool) -> None:
    """The held-out digits, or those that are trained with, as `folder/<class>/<number>.png`."""
    images, labels = load()
    known = len(images) - HELD_OUT
    for index in range(known, len(images)) if held_out else range(known):
        path = folder / str(labels[index]) / f"{index:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        images[index].save(path)


def _initialise(model: ConvNeXt) -> None:
    """As the paper does (appendix A.1), but for a layer scale that a net this shallow can start from."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name == "gamma":
                nn.init.constant_(parameter, 0.1)
            elif name == "bias":
                nn.init.zeros_(parameter)
            elif isinstance(module, Norm):
                nn.init.ones_(parameter)
            else:
                nn.init.trunc_normal_(parameter, std=0.02)


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each batch moved by up to four pixels: the only augmentation it takes."""
    rows, columns = (int(torch.randint(-4, 5, (1,), generator=generator)) for _ in range(2))
    return torch.roll(images, (rows, columns), dims=(2, 3))


def train(epochs: int = 15, seed: int = 0) -> ConvNeXt:
    """AdamW with a cosine schedule and label smoothing; says on stderr how it goes."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    scans, labels = load()
    inputs = torch.from_numpy(np.stack([preprocess(scan.convert("RGB"), RECIPE) for scan in scans[:-HELD_OUT]]))
    targets = torch.from_numpy(labels[:-HELD_OUT])
    model = ConvNeXt(ARCHITECTURE, 10)
    _initialise(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        total = 0.0
        for part in torch.split(torch.randperm(len(inputs), generator=generator), 64):
            loss = F.cross_entropy(model(_shifted(inputs[part], generator)), targets[part], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.item() * len(part)
        schedule.step()
        print(f"\r  epoch {epoch + 1}/{epochs}, loss {total / len(inputs):.3f}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return model.eval()


def write_model(model: ConvNeXt, folder: Path) -> None:
    """`model.safetensors` and `config.json`, as Hugging Face and timm lay them out."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architecture": "convnext",
        "label_names": [str(digit) for digit in range(10)],
        "pretrained_cfg": {
            "input_size": [3, PIXELS, PIXELS],
            "crop_pct": 1.0,
            "interpolation": RECIPE.interpolation,
            "mean": RECIPE.mean,
            "std": RECIPE.std,
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    partial = folder / "model.partial"
    save_file(model.state_dict(), partial)
    partial.replace(folder / "model.safetensors")


def prepare(folder: Path, epochs: int = 15) -> None:
    """The model in `folder/model`, the digits it is trained with in `folder/train` and the held-out ones in
    `folder/val`, made once."""
    for name in ("train", "val"):
        if not (folder / name).is_dir():
            shutil.rmtree(folder / f"{name}.partial", ignore_errors=True)
            write_images(folder / f"{name}.partial", held_out=name == "val")
            (folder / f"{name}.partial").rename(folder / name)
    if not (folder / "model" / "model.safetensors").is_file():
        print("· training a small ConvNeXt on handwritten digits", file=sys.stderr)
        write_model(train(epochs), folder / "model")
