"""Layers that lie beside a classifier, and whether its outputs may depend on them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from exporter.errors import BadRequest, some
from exporter.model import head as heads
from exporter.model.shapes import block_counts

if TYPE_CHECKING:
    from torch import Tensor

    from exporter.model.layouts import Converted

# Names of layers that may stand between the network and its classifier, and of what is only used in training. The
# latter are matched at the beginning of a word, so that `semantic` does not count as `ema`, nor `mean_pool` as `mean`.
_BETWEEN = re.compile(
    r"neck|pool|gem|att(n|ention)|adapter|prompt|pos_?emb|temperature|scale|^(se|eca|cbam|sam?|cam?)\d*$|"
    r"(^|_)(norm|bn)\d*$|(batch|layer)_?norm",
    re.I,
)
_TRAINING = re.compile(
    r"(?<![a-z])(loss|criterion|metric|acc|teacher|momentum|swa|average|distill|ema(?![a-z]))|(class|pos|neg|sample|label)_?weights?$",
    re.I,
)
_SIDE = re.compile(r"(?<![a-z])(aux|dec|mask(?![a-z]))", re.I)  # outputs of their own, unless they fit exactly
_COLORS = re.compile(r"(?<![a-z])(mean|std)$", re.I)
_MOST_COLORS = 4
_GATES = (3, 4)  # a GRU and an LSTM have the weights of so many gates in one matrix


class _Head(NamedTuple):
    """The name of a classifier; channels of the image; widths of the last stage, of its input and of its outputs."""

    name: str
    channels: int
    before: int
    takes: int
    outputs: int


def refuse(converted: Converted, place: str, modules: Mapping[str, Sequence[Tensor]]) -> None:
    """Refuse a classifier that is found by its name where layers lie beside it on which the outputs may depend: by
    their names, or by their widths.

    Args:
        converted: with the head.
        place: what the names of the classifier begin with.
        modules: the tensors beside it, by the names of the outermost modules.

    Raises: BadRequest.
    """
    head = _head(converted, place.rstrip("."))
    if head is None:
        return
    used = {name: tensors for name, tensors in modules.items() if not _is_for_training(name, tensors)}
    if behind := [name for name in used if _takes_outputs(used[name], head)]:
        raise BadRequest(
            f"{behind[0]!r} takes the outputs of the classifier {head.name!r}; give --head {head.name}+{behind[0]} for "
            f"both, or --head {head.name} to leave {behind[0]!r} out"
        )
    inside = converted.prefix != "" and place.startswith(converted.prefix)
    if others := [name for name in used if _is_classifier(name, used[name], head, inside)]:
        names = " or ".join([head.name, *others])
        raise BadRequest(f"several classifiers lie in these weights; choose one: --head {names}")
    beside = [name for name in used if _fits(name, used[name], head)]
    beside += [name for name in _pairs(used, head) if name not in beside]
    if beside:
        raise BadRequest(
            f"{some(beside)} lies beside the classifier {head.name!r}, and the outputs may depend on it; give --head "
            f"{head.name} to leave it out, or compare with your model: --reference module:callable"
        )


def _head(converted: Converted, name: str) -> _Head | None:
    layers = [tensor for tensor in converted.head.state.values() if tensor.ndim == 2]
    last = converted.state.get(f"stages.{len(block_counts(converted.state)) - 1}.0.dwconv.weight")
    first = converted.state.get("downsample_layers.0.0.weight")
    if not layers or last is None or first is None:
        return None
    return _Head(name, int(first.shape[1]), len(last), int(layers[0].shape[1]), len(layers[-1]))


def _takes_outputs(tensors: Sequence[Tensor], head: _Head) -> bool:
    """Whether a module with these tensors fits behind a classifier: a linear layer, or a factor for each class."""
    if head.outputs in (1, head.before, head.takes):
        return False
    shapes = [tuple(tensor.shape) for tensor in tensors]
    per_class = all(shape in ((head.outputs,), (head.outputs, head.outputs)) for shape in shapes)
    return per_class or any(len(shape) == 2 and shape[1] == head.outputs != shape[0] for shape in shapes)


def _is_for_training(module: str, tensors: Sequence[Tensor]) -> bool:
    name = module.rpartition(".")[2]
    colors = _COLORS.search(name) is not None and all(tensor.numel() <= _MOST_COLORS for tensor in tensors)
    return colors or _TRAINING.search(name) is not None


def _is_classifier(module: str, tensors: Sequence[Tensor], head: _Head, inside: bool) -> bool:
    """Whether a module is another classifier: by its name, by the shape of the first, or, where that is the backbone's
    own, any layer behind the backbone."""
    name = module.rpartition(".")[2]
    if name in heads.CLASSIFIERS:
        return True
    if _SIDE.search(name) or _BETWEEN.search(name):
        return False
    layers = [tensor for tensor in tensors if tensor.ndim == 2]
    same = any(tuple(tensor.shape) == (head.outputs, head.before) for tensor in layers) and head.outputs != head.before
    return same or (inside and bool(layers) and layers[0].shape[1] == head.before != len(layers[0]))


def _fits(module: str, tensors: Sequence[Tensor], head: _Head) -> bool:
    """Whether a module's name or its tensors fit between the last stage and the classifier, or in front of the
    network."""
    name = module.rpartition(".")[2]
    shapes = [tuple(tensor.shape) for tensor in tensors]
    layers = [shape for shape in shapes if sum(side > 1 for side in shape) > 1]
    direct = any(shape[1] == head.before for shape in layers) and any(_gives(shape, head.takes) for shape in layers)
    if _SIDE.search(name) or direct:
        return direct
    if _BETWEEN.search(name):
        return True
    if not layers:  # factors and shifts of channels
        return all(max(shape, default=1) in (head.before, head.takes) for shape in shapes)
    depthwise = any(shape[0] == head.before and shape[1] == 1 for shape in layers if len(shape) > 2)
    over_pixels = any(shape[:2] in ((1, 1), (1, 2)) for shape in layers if len(shape) > 2)
    in_front = any(shape[0] == head.channels >= shape[1] for shape in layers if len(shape) == 4)
    return depthwise or over_pixels or in_front


def _gives(shape: tuple[int, ...], width: int) -> bool:
    return shape[0] == width or (len(shape) == 2 and shape[0] in [gates * width for gates in _GATES])


def _pairs(modules: Mapping[str, Sequence[Tensor]], head: _Head) -> list[str]:
    """Modules that fit between the last stage and the classifier one behind the other, as `down` and `up`."""
    linear = {
        name: [tensor.shape for tensor in tensors if tensor.ndim == 2]
        for name, tensors in modules.items()
        if not _SIDE.search(name.rpartition(".")[2])
    }
    down = {name: shapes[-1][0] for name, shapes in linear.items() if shapes and shapes[0][1] == head.before}
    up = {name: shapes[0][1] for name, shapes in linear.items() if shapes and shapes[-1][0] == head.takes}
    fitting = {(first, last) for first, width in down.items() for last in up if first != last and up[last] == width}
    return list(dict.fromkeys(name for pair in sorted(fitting) for name in pair))
