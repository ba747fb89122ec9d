"""Small networks of other libraries with random weights, with which the tool's own networks are compared."""

from __future__ import annotations

import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch

DEPTHS, DIMS, CLASSES = (1, 1, 2, 1), (8, 16, 32, 64), 10


def library(name: str) -> Any:
    """Import timm, transformers or torchvision.

    The compiled part of torchvision does not load beside a CPU build of PyTorch from another index; its models are
    Python. Their operators (nms, …) are not used here.

    Raises: ImportError.
    """
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
    return importlib.import_module(name)


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights in which every layer matters: layer scale and GRN far from their initial values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "grn" not in name and "layer_scale" not in name:
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
            else:
                offset = 0.5 if name.endswith(("gamma", "layer_scale", "layer_scale_parameter")) else 0.0
                offset = 1.0 if name.endswith("norm.weight") or ("norm" in name and name.endswith("weight")) else offset
                parameter.normal_(std=0.2, generator=generator).add_(offset)
    return model.eval()


def images(channels: int = 3, size: int = 64) -> torch.Tensor:
    """Two images (2, C, size, size), normalized."""
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(7))


def timm_model(**settings: Any) -> torch.nn.Module:
    """A small timm ConvNeXt."""
    convnext = library("timm").models.convnext
    return randomize(convnext.ConvNeXt(**{"depths": DEPTHS, "dims": DIMS, "num_classes": CLASSES, **settings}))


def huggingface_model(kind: str = "ConvNextForImageClassification", **settings: Any) -> torch.nn.Module:
    """A small transformers ConvNeXt of a class by name."""
    transformers = library("transformers")
    model_class: Any = getattr(transformers, kind)
    settings = {"hidden_sizes": list(DIMS), "depths": list(DEPTHS), "num_labels": CLASSES, **settings}
    return randomize(model_class(model_class.config_class(**settings)))


def torchvision_model(**settings: Any) -> torch.nn.Module:
    """A small torchvision ConvNeXt."""
    convnext = library("torchvision").models.convnext
    blocks = [
        convnext.CNBlockConfig(dim, after, depth)
        for dim, after, depth in zip(DIMS, [*DIMS[1:], None], DEPTHS, strict=True)
    ]
    return randomize(convnext.ConvNeXt(blocks, num_classes=CLASSES, **settings))


def outputs(model: torch.nn.Module, pixels: torch.Tensor) -> list[torch.Tensor]:
    """The outputs of a model as a list of tensors; of a transformers model logits, maps, or the pooled output."""
    with torch.inference_mode():
        answer = model(pixels)
    for name in ("logits", "feature_maps", "pooler_output"):
        if (value := getattr(answer, name, None)) is not None:
            answer = value
            break
    return list(answer) if isinstance(answer, tuple | list) else [answer]


def largest_difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Largest absolute difference as a share of the spread of the other library's output."""
    assert len(ours) == len(theirs)
    shares = [((a - b).abs().max() / b.std()).item() for a, b in zip(ours, theirs, strict=True)]
    return max(shares)


def save(folder: Path, model: torch.nn.Module, config: dict[str, Any] | None = None) -> Path:
    """A folder with `model.safetensors` and, if there is one, `config.json`."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder
