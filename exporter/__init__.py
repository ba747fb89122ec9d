"""convnext-export: ConvNeXt from PyTorch to what runs in production, proven to be still the same model.

The Python API is what the words of the command line call:

    from exporter.build.pipeline import build
    from exporter.recipe import Recipe
    from exporter.verify import VerifyOptions, verify
    artifact = build(Recipe(weights="my_convnext.pth", backend="openvino", precision="fp16"), Path("build"))
    report = verify(artifact, VerifyOptions(data="photos/val"))

    from exporter.build import int8
    recipe = Recipe(weights="my_convnext.pth", backend="openvino", precision="int8", calib="photos/train")
    artifact, report = int8.build(recipe, Path("build"), int8.Budget(max_drop=0.3, data="photos/val"))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exporter.artifact import Artifact as Artifact
    from exporter.artifact import load as load
    from exporter.recipe import Recipe as Recipe
    from exporter.report import Report as Report

__version__ = "0.1.0"

_HOMES = {
    "Artifact": "artifact",
    "load": "artifact",
    "Recipe": "recipe",
    "Report": "report",
}


def __getattr__(name: str) -> object:
    """The names of the API, imported when they are asked for."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'exporter' has no attribute {name!r}")
    return getattr(importlib.import_module(f"exporter.{_HOMES[name]}"), name)
