"""From a live PyTorch module to an artifact that is compared with this module."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import replace

from exporter.artifact.sidecar import Preprocessing
from exporter.backends import ONNX, eager
from exporter.build import Built, build
from exporter.model import live, reference, written
from exporter.recipe import Recipe
from exporter.verify import VerifyOptions, record_quality, verify

if TYPE_CHECKING:
    from torch import nn

FP32 = Recipe(backend=ONNX, precision="fp32")


def export(
    module: nn.Module,
    out: str | Path = "build",
    recipe: Recipe = FP32,
    *,
    labels: Sequence[str] = (),
    preprocessing: Preprocessing | None = None,
) -> Built:
    """Build an artifact from a live model, and compare it with this model.

    The weights are also written to OUT/NAME.weights, from where `verify` and `bench` read them later. The module is
    unchanged afterwards; on a GPU or in half precision a copy of it is compared.

    Args:
        module: a ConvNeXt of timm, torchvision, transformers or facebookresearch, or a module around one (a
            LightningModule) whose forward returns the outputs.
        out: the folder to write to.
        recipe: backend, precision and everything else; `recipe.model.weights` is not read.
        labels: names of the classes; by default those that the module's config has.
        preprocessing: how its images are made; by default as the module's config says, else the published one.

    Returns: the artifact, with the report of its comparison with the module on the recipe's images.

    Raises: BadRequest for a module that is no ConvNeXt; CheckFailed when the network, or the artifact's graph, differs
        from the module, with nothing left but the weights.
    """
    out = Path(out)
    with _evaluated(module) as original:
        fitted = live.read(original, recipe.model.prefix or "", recipe.model.head or "")
        folder = out / f"{fitted.variant.name}.weights"
        written.write(folder, fitted, preprocessing, _config(original, labels))
        model = replace(recipe.model, weights=str(folder), labels=None, variant=None, reference=None)
        model = replace(model, prefix=None, head=None, head_act=None, norm=None)
        opened = reference.of_module(original)
        built = build(replace(recipe, model=model), out, reference=opened)
        if built.report is not None:
            return built
        session = eager.EagerSession(opened.for_task(built.artifact.sidecar.task), "cpu")
        options = VerifyOptions(weights=str(folder), **msgspec.structs.asdict(recipe.checks))
        report = verify(built.artifact, options, reference_session=session)
    record_quality(built.artifact, report)
    return Built(built.artifact, report)


@contextmanager
def _evaluated(module: nn.Module) -> Iterator[nn.Module]:
    """The module in eval mode, on the CPU and in fp32: a copy where it is not; its modes are restored afterwards."""
    import torch

    tensors = [*module.parameters(), *module.buffers()]
    placed = all(t.device.type == "cpu" and t.dtype in (torch.float32, torch.int64) for t in tensors)
    if not placed:
        module = copy.deepcopy(module).cpu().float()
    training = [part for part in module.modules() if part.training]
    try:
        yield module.eval()
    finally:
        for part in training:
            part.training = True


def _config(module: nn.Module, labels: Sequence[str]) -> dict[str, Any]:
    """The content of `config.json`: labels and preprocessing from the module's own config, and the given labels."""
    config: dict[str, Any] = {}
    for part in module.modules():
        if "pretrained_cfg" not in config and isinstance(cfg := getattr(part, "pretrained_cfg", None), dict):
            config["pretrained_cfg"] = {key: value for key, value in cfg.items() if value is not None}
        names = getattr(getattr(part, "config", None), "id2label", None)
        if "id2label" not in config and isinstance(names, dict):
            config["id2label"] = {str(index): name for index, name in names.items()}
    if labels:
        config.pop("id2label", None)
        config["label_names"] = list(labels)
    return config
