"""convnext-export: ConvNeXt from PyTorch to what runs in production, compared with the original model.

After training, one line builds an artifact and compares it with the live model:

    from exporter import Recipe, export

    export(model, "build", Recipe(backend="openvino", precision="fp16"))

The rest of the Python API is what the commands call:

    from exporter.build import build
    from exporter.recipe import Model, Quantization, Recipe
    from exporter.verify import VerifyOptions, verify

    model = Model(weights="my_convnext.pth")
    artifact = build(Recipe(backend="openvino", precision="fp16", model=model), Path("build")).artifact
    report = verify(artifact, VerifyOptions(data="photos/val"))

    quantization = Quantization(calib="photos/train", data="photos/val", max_drop=0.3)
    recipe = Recipe(backend="openvino", precision="int8", model=model, quantization=quantization)
    built = build(recipe, Path("build"))
    assert built.report.passed
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exporter.artifact import Artifact as Artifact
    from exporter.artifact import load as load
    from exporter.build.live import export as export
    from exporter.recipe import Recipe as Recipe
    from exporter.report import Report as Report

__version__ = "0.1.0"

_HOMES = {
    "Artifact": "artifact",
    "export": "build.live",
    "load": "artifact",
    "Recipe": "recipe",
    "Report": "report",
}


def __getattr__(name: str) -> object:
    """The names of the API, imported on first use."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'exporter' has no attribute {name!r}")
    return getattr(importlib.import_module(f"exporter.{_HOMES[name]}"), name)
