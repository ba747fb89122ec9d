"""Compares every layout of checkpoints with the library that writes it, and records the largest difference.

    python -m benchmarks.checkpoints -o benchmarks/results/MACHINE/checkpoints.json

Each network is small, with random weights; its state dict is saved and loaded by the tool, and both run on the same
images.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import libraries
from benchmarks.provenance import commit
from exporter.artifact.sidecar import OutputSpec
from exporter.model import layouts, weights

Build = Callable[[], torch.nn.Module]


def _timm(**settings: Any) -> Build:
    return lambda: libraries.timm_model(**settings)


def _huggingface(kind: str, **settings: Any) -> Build:
    return lambda: libraries.huggingface_model(kind, **settings)


def _features_only() -> torch.nn.Module:
    timm = libraries.library("timm")
    model = timm.create_model("convnext_atto", features_only=True, depths=libraries.DEPTHS, dims=libraries.DIMS)
    return libraries.randomize(model)


V2 = {"use_grn": True, "ls_init_value": None}
ROWS: Mapping[tuple[str, str], tuple[str, str, Build]] = {
    # (layout, variety): (library, task, network)
    ("timm", "V1"): ("timm", "classify", _timm()),
    ("timm", "V2"): ("timm", "classify", _timm(**V2)),
    ("timm", "1×1 convolutions, tanh GELU, eps 1e-5"): (
        "timm", "classify", _timm(conv_mlp=True, act_layer="gelu_tanh", norm_eps=1e-5)
    ),
    ("timm", "stride 8, max pooling"): ("timm", "classify", _timm(output_stride=8, global_pool="max")),
    ("timm", "patch 2, kernels 3 to 9"): ("timm", "classify", _timm(patch_size=2, kernel_sizes=(3, 5, 7, 9))),
    ("timm", "without classifier"): ("timm", "embed", _timm(num_classes=0)),
    ("timm", "features_only"): ("timm", "features", _features_only),
    ("torchvision", "V1"): ("torchvision", "classify", libraries.torchvision_model),
    ("transformers", "ConvNextForImageClassification"): (
        "transformers", "classify", _huggingface("ConvNextForImageClassification")
    ),
    ("transformers", "ConvNextV2ForImageClassification"): (
        "transformers", "classify", _huggingface("ConvNextV2ForImageClassification")
    ),
    ("transformers", "ConvNextBackbone"): (
        "transformers", "features", _huggingface("ConvNextBackbone", out_indices=[1, 2, 3, 4])
    ),
    ("transformers", "ConvNextV2Backbone"): (
        "transformers", "features", _huggingface("ConvNextV2Backbone", out_indices=[1, 2, 3, 4])
    ),
    ("transformers", "DINOv3ConvNextModel"): ("transformers", "embed", _huggingface("DINOv3ConvNextModel")),
    ("transformers", "DINOv3ConvNextBackbone"): (
        "transformers", "features", _huggingface("DINOv3ConvNextBackbone", out_indices=[1, 2, 3, 4])
    ),
}  # fmt: skip


def config_of(key: tuple[str, str], model: torch.nn.Module) -> dict[str, Any] | None:
    """The `config.json` that the library writes."""
    config: Any = getattr(model, "config", None)
    if config is not None:
        content: dict[str, Any] = json.loads(config.to_json_string())
        return content
    settings = {
        "1×1 convolutions, tanh GELU, eps 1e-5": {"act_layer": "gelu_tanh", "norm_eps": 1e-5},
        "stride 8, max pooling": {"output_stride": 8, "global_pool": "max"},
    }
    return {"model_args": settings[key[1]]} if key[1] in settings else None


def measure(key: tuple[str, str], folder: Path) -> dict[str, Any]:
    """One row: layout, library with its version, task, and the largest deviation as a share of the spread."""
    library, task, build = ROWS[key]
    tasks: Any = (task,)
    model = build()
    libraries.save(folder, model, config_of(key, model))
    checkpoint = weights.load(str(folder), choices=layouts.Choices())
    ours = libraries.outputs(checkpoint.model(OutputSpec(tasks=tasks)), libraries.images())
    deviation = libraries.largest_difference(ours, libraries.outputs(model, libraries.images()))
    version = libraries.library(library).__version__
    return {"layout": key[0], "network": key[1], "library": f"{library} {version}", "task": task,
            "deviation": deviation}  # fmt: skip


def table(result: Mapping[str, Any]) -> str:
    """A row for each network, and the machine."""
    lines = [
        "| layout | network | compared with | task | largest difference ÷ standard deviation of the output |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['layout']} | {row['network']} | {row['library']} | {row['task']} | {row['deviation']:.1e} |"
        for row in result["rows"]
    ]
    return "\n".join(lines) + f"\n\ntorch {result['torch']}, {result['machine']}; commit {result['commit']}.\n"


def main() -> None:
    """Measure every row and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("build/checkpoints.json"))
    path = parser.parse_args().output
    rows = []
    for number, key in enumerate(ROWS):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(key, Path(folder) / str(number)))
        print(f"{rows[-1]['deviation']:.1e}  {rows[-1]['library']}  {' '.join(key)}")
    facts = {
        "commit": commit(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**facts, "rows": rows}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
