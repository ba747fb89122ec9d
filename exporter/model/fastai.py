"""The classifier of fastai's `vision_learner`: average and largest values of each channel, batch norms, linear layers.

fastai.vision.learner: `create_head` (pool, flatten, then for each layer batch norm, dropout, linear and ReLU) and
`TimmBody`, which runs `forward_features` of timm's network and none of its own head.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from exporter.model import head as heads

if TYPE_CHECKING:
    from torch import Tensor

    from exporter.model.layouts import Converted


def place(prefix: str) -> str:
    """What the names of the classifier begin with: the body is the first part of a Sequential, the classifier the
    second. "" for a network that is no first part."""
    body = prefix.removesuffix("model.")
    return f"{body.removesuffix('0.')}1." if re.search(r"(^|\.)0\.$", body) else ""


def take(converted: Converted, rest: dict[str, Tensor], act: str, width: int) -> bool:
    """Move fastai's classifier from the rest into the head. Return whether there is one.

    Args:
        converted: the network; its head, state, pool and notes are changed.
        rest: the tensors that are not the network's, by the names of the file.
        act: the activations that the user gives; "" for fastai's ReLU.
        width: channels of the last stage.
    """
    name = place(converted.prefix)
    if not name or f"{name}2.running_mean" not in rest:
        return False
    tensors = {key.removeprefix(name): rest.pop(key) for key in [key for key in rest if key.startswith(name)]}
    converted.pool = "avg"
    if len(tensors["2.running_mean"]) == 2 * width:
        converted.pool = "catavgmax"
        _put_average_first(tensors, width)

    def default_act(path: str, behind: str) -> str:
        return "relu" if tensors[f"{path}.weight"].ndim == 2 and int(behind) == int(path) + 2 else ""

    converted.head = heads.classifier(tensors, act or default_act, has_norm=True)
    for leaf in ("weight", "bias"):
        converted.state.pop(f"norm.{leaf}", None)
    converted.modules.pop("norm", None)
    converted.state |= converted.head.state
    converted.modules |= {ours: f"{name}{path}" for ours, path in converted.head.modules.items()}
    converted.notes.append(f"the classifier is {name.rstrip('.')!r}, in fastai's form; pooling: {converted.pool}")
    return True


def _put_average_first(tensors: dict[str, Tensor], width: int) -> None:
    """Where fastai concatenates the largest values and the averages, `catavgmax` has the averages first."""
    linear = min((key for key, tensor in tensors.items() if tensor.ndim == 2), key=lambda key: int(key.split(".")[0]))
    for key, tensor in tensors.items():
        if key == linear or (key.startswith("2.") and tensor.ndim == 1):
            tensors[key] = tensor.roll(width, -1)
