"""What stands behind the pooling: a classifier of one or more layers, or the projection of a CLIP tower."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from exporter.errors import BadRequest, some

if TYPE_CHECKING:
    from torch import Tensor

CLASSIFIERS = ("head", "classifier", "fc")
"""Names that libraries give to a classifier."""
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "tanh", "none")
BATCH_NORM_EPS = 1e-5  # PyTorch's default


class NoClassifier(BadRequest):
    """The tensors of a module are not those of a classifier: convolutions, or layers with normalized weights."""


@dataclass(frozen=True)
class Head:
    """Layers in front of the last linear one, several heads (see `Architecture`), and the tensors, by our names.

    `modules` are the names of the modules in the file, below the head's own, by ours.
    """

    layers: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    projection: bool = False
    state: dict[str, Tensor] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Layer:
    """One module of a head: its path below the head, `linear`, `layer` (LayerNorm) or `affine` (BatchNorm)."""

    path: str
    kind: str
    weight: Tensor
    bias: Tensor


def classifier(tensors: Mapping[str, Tensor], act: str, has_norm: bool) -> Head:
    """The classifier that these tensors are, named as below its module (`weight`, `1.bias`, `pre_logits.fc.weight`).

    Args:
        tensors: all of one module.
        act: activation between two linear layers, or "".
        has_norm: the last norm stands in front already; without it, a LayerNorm that the head begins with is the last
            norm.

    Raises: NoClassifier for a module that ends in no linear layer, or has parts of other kinds; BadRequest for a vector
        that is neither LayerNorm nor BatchNorm, and where `act` is needed.
    """
    modules = [_layer(path, leaves) for path, leaves in _modules(tensors).items()]
    state: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    if len(modules) > 1 and modules[0].kind == "layer" and not has_norm:
        first = modules.pop(0)
        state |= {"norm.weight": first.weight, "norm.bias": first.bias}
        names["norm"] = first.path
    if not modules:
        raise BadRequest("the head has no weights; --head names a module with a linear layer")
    *inner, last = modules
    if last.kind != "linear":
        raise NoClassifier(
            f"the head ({some(sorted(tensors))}) does not end in a linear layer; name the classifier with --head"
        )
    layers: list[str] = []
    open_linear = False  # a linear layer that no activation follows yet
    for layer, behind in zip(inner, modules[1:], strict=True):
        open_linear = open_linear or layer.kind == "linear"
        name = f"head_layers.{len(layers)}"
        state |= {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias}
        names[name] = layer.path
        layers.append(f"{layer.kind}:{layer.weight.shape[0]}")
        if open_linear and not _adjacent(layer.path, behind.path):
            if (between := _activation(layer, modules, act)) != "none":
                layers.append(between)
            open_linear = False
    names["head"] = last.path
    state |= {"head.weight": last.weight, "head.bias": last.bias}
    return Head(tuple(layers), state=state, modules=names)


def several(heads: Mapping[str, Head]) -> Head:
    """Several classifiers behind the same pooled features, by name.

    Raises: BadRequest for one of more than one layer.
    """
    both: dict[str, Tensor] = {}
    names = []
    for name, head in heads.items():
        if head.layers or len(head.state) != 2:
            raise BadRequest(f"--head: {name} has several layers; of several heads each is one linear layer")
        both |= {f"heads.{name}.{leaf}": head.state[f"head.{leaf}"] for leaf in ("weight", "bias")}
        names.append(f"{name}:{len(head.state['head.weight'])}")
    return Head(heads=tuple(names), state=both)


def projection(tensors: Mapping[str, Tensor]) -> Head:
    """The projection of an OpenCLIP tower: `proj`, or `mlp` with GELU (open_clip's `TimmModel`)."""
    head = classifier(tensors, "gelu", has_norm=True)
    return replace(head, projection=True)


def _modules(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each module by its path, in the order in which a Sequential runs them."""
    modules: dict[str, dict[str, Tensor]] = {}
    for key in sorted(tensors, key=_natural):
        path, _, leaf = key.rpartition(".")
        modules.setdefault(path, {})[leaf] = tensors[key]
    return modules


def _natural(key: str) -> list[tuple[int, int, str]]:
    """Numbers by value; timm's `pre_logits` runs before `fc`."""
    parts = key.split(".")[:-1]
    return [(0, int(part), "") if part.isdecimal() else (1, part != "pre_logits", part) for part in parts]


def _layer(path: str, leaves: Mapping[str, Tensor]) -> _Layer:
    """Raises: NoClassifier, or BadRequest for a vector, where a module is no linear layer, LayerNorm or BatchNorm."""
    weight, names = leaves.get("weight"), set(leaves)
    if {"running_mean", "running_var"} <= names <= {"weight", "bias", "running_mean", "running_var"}:
        scale = 1 / (leaves["running_var"] + BATCH_NORM_EPS).sqrt()
        scale = scale if weight is None else scale * weight
        shift = -leaves["running_mean"] * scale
        return _Layer(path, "affine", scale, shift + leaves["bias"] if "bias" in leaves else shift)
    if weight is None or not names <= {"weight", "bias"}:
        raise NoClassifier(
            f"the head has a layer of tensors {some(sorted(names))} at {path or 'its top'!r}: not supported"
        )
    if weight.ndim == 4 and weight.shape[2:] == (1, 1):
        weight = weight[:, :, 0, 0]
    if weight.ndim == 1 and ("bias" not in leaves or len(weight) == 1):
        raise BadRequest(f"the head has a vector without bias at {path!r} (PReLU, RMSNorm?): not supported")
    if weight.ndim not in (1, 2):
        raise NoClassifier(f"the head has a weight of shape {tuple(weight.shape)} at {path!r}: expected a linear layer")
    bias = leaves["bias"] if "bias" in leaves else weight.new_zeros(weight.shape[0])
    return _Layer(path, "linear" if weight.ndim == 2 else "layer", weight, bias)


def _activation(layer: _Layer, modules: list[_Layer], act: str) -> str:
    """The activation in the gap behind an inner layer.

    Raises: BadRequest where it cannot be known: a Sequential's file does not hold it.
    """
    if "pre_logits" in layer.path or layer.path.startswith("mlp."):
        return "gelu"
    if not act:
        names = " and ".join(module.path for module in modules if module.kind == "linear")
        raise BadRequest(
            f"the head has several linear layers ({names}), and weights do not show what is between them; "
            f"give --head-act {'|'.join(ACTIVATIONS)}"
        )
    return act


def _adjacent(path: str, behind: str) -> bool:
    """Whether no module has room between two of a Sequential."""
    (a, _, i), (b, _, j) = path.rpartition("."), behind.rpartition(".")
    return a == b and i.isdecimal() and j.isdecimal() and int(j) == int(i) + 1
