"""What stands behind the pooling: a classifier of one or more layers, or the projection of a CLIP tower."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, permutations
from typing import TYPE_CHECKING

from exporter.errors import BadRequest, nearest, some

if TYPE_CHECKING:
    from torch import Tensor

CLASSIFIERS = ("head", "classifier", "fc")
"""Names that libraries give to a classifier."""
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "tanh", "none")
BATCH_NORM_EPS = 1e-5  # PyTorch's default
MOST_NAMED = 6  # modules whose order is looked for
_LEAVE_OUT = "--head none leaves it out"

Act = str | Callable[[str, str], str]


class NoClassifier(BadRequest):
    """The tensors of a module are not those of a classifier: convolutions, or a head of self-supervised training."""


@dataclass(frozen=True)
class Head:
    """Layers in front of the last linear one, several heads (see `Architecture`), and the tensors, by our names.

    `modules` are the names of the modules in the file, below the head's own, by ours; `doubts` are sentences
    about what the weights do not show.
    """

    layers: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    projection: bool = False
    state: dict[str, Tensor] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    doubts: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Layer:
    """One module of a head: its path below the head, `linear`, `layer` (LayerNorm) or `affine` (BatchNorm), and whether
    it is linear as a 1×1 convolution."""

    path: str
    kind: str
    weight: Tensor
    bias: Tensor
    is_convolution: bool = False


def classifier(
    tensors: Mapping[str, Tensor], act: Act, has_norm: bool, ordered: bool = True, shown: Callable[[str], str] = str
) -> Head:
    """The classifier that these tensors are, named as below its module (`weight`, `1.bias`, `pre_logits.fc.weight`).

    Args:
        tensors: all of one module.
        act: the activation between linear layers, "" if it is not known; `none,relu` for several places; or a function
            that looks it up between two modules.
        has_norm: the last norm stands in front already; without it, a LayerNorm that the head begins with is the last
            norm.
        ordered: the tensors are in the order in which the modules were defined.
        shown: the name of a module in messages.

    Raises: NoClassifier for a module that is none; BadRequest for layers other than linear ones, LayerNorm and
        BatchNorm, for an unknown order, and where `act` is needed, or has no place.
    """
    modules = _sorted([_layer(path, leaves) for path, leaves in _modules(tensors).items()], ordered)
    if not modules:
        raise BadRequest("the head has no weights; --head names a module with a linear layer")
    _check(modules)
    between = _activations(modules, act, shown)
    state: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    layers: list[str] = []
    for layer, behind in zip(modules, [*between, ""], strict=True):
        if layer is modules[0] and layer.kind == "layer" and not has_norm and not behind:
            name = "norm"
        elif layer is modules[-1]:
            name = "head"
        else:
            name = f"head_layers.{len(layers)}"
            layers += [f"{layer.kind}:{layer.weight.shape[0]}", *([behind] if behind else [])]
        state |= {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias}
        names[name] = layer.path
    return Head(tuple(layers), state=state, modules=names, doubts=_doubts(modules, between) if act == "" else ())


def _check(modules: Sequence[_Layer]) -> None:
    """Raises: BadRequest for layers that do not fit one behind the other, or that may run in front of the pooling."""
    if not _fits(modules):
        shapes = [f"{layer.path} {tuple(layer.weight.shape)}" for layer in modules]
        raise BadRequest(
            f"the layers of the head do not fit one behind the other ({some(shapes, MOST_NAMED)}); if they are several "
            "heads, name them: --head A,B"
        )
    for layer in modules[:-1]:
        if layer.is_convolution and not layer.path.startswith("pre_logits"):
            raise BadRequest(
                f"the head has a convolution in front of other layers ({layer.path}), perhaps before the pooling: not "
                f"supported; {_LEAVE_OUT}"
            )


def _doubts(modules: Sequence[_Layer], between: Sequence[str]) -> tuple[str, ...]:
    """Gaps behind batch norms, where dropout usually stands and an activation might; and linear layers without a gap,
    which may be heads of their own."""
    doubts = []
    for (layer, behind), act in zip(pairwise(modules), between, strict=True):
        adjacent, places = _adjacent(layer.path, behind.path), f"{layer.path} and {behind.path}"
        if layer.kind == "affine" and not act and not adjacent:
            doubts.append(
                f"between {places} of the classifier no activation is assumed, as the weights do not show one; "
                "--head-act relu puts one there"
            )
        if layer.kind == behind.kind == "linear" and adjacent:
            doubts.append(
                f"{places} of the classifier are read as one layer behind the other; if they are heads of their own, "
                "name both: --head A,B"
            )
    return tuple(doubts)


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
    head = classifier(tensors, "", has_norm=True)
    return replace(head, projection=True)


def _modules(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each module by its path, in their order."""
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path, _, leaf = key.replace("parametrizations.weight.", "").rpartition(".")
        modules.setdefault(path, {})[leaf] = tensor
    return modules


def _layer(path: str, leaves: Mapping[str, Tensor]) -> _Layer:
    """One module of a head, in fp32.

    Raises: NoClassifier for convolutions and the last layer of DINO; BadRequest for a module that is no linear layer,
        LayerNorm or BatchNorm.
    """
    where = f"{path or 'its top'!r}"
    leaves = {leaf: tensor.float() for leaf, tensor in leaves.items()}
    weight, names = leaves.get("weight"), set(leaves)
    if path.startswith("last_layer"):
        raise NoClassifier(f"it is a projection head of self-supervised training ({path})")
    if weight is not None and weight.ndim > 2 and weight[0, 0].numel() > 1:
        raise NoClassifier(f"it has convolutions ({path}: {tuple(weight.shape)})")
    if {"running_mean", "running_var"} <= names <= {"weight", "bias", "running_mean", "running_var"}:
        scale = 1 / (leaves["running_var"] + BATCH_NORM_EPS).sqrt()
        scale = scale if weight is None else scale * weight
        shift = -leaves["running_mean"] * scale
        return _Layer(path, "affine", scale, shift + leaves["bias"] if "bias" in leaves else shift)
    if weight is None or not names <= {"weight", "bias"}:
        raise BadRequest(
            f"the head has a layer of tensors {some(sorted(names))} at {where}: not supported; {_LEAVE_OUT}"
        )
    is_convolution = weight.ndim == 4
    if is_convolution:
        weight = weight[:, :, 0, 0]
    if weight.ndim == 1 and ("bias" not in leaves or len(weight) == 1):
        raise BadRequest(
            f"the head has a vector without bias at {where} (PReLU, RMSNorm?): not supported; {_LEAVE_OUT}"
        )
    if weight.ndim not in (1, 2):
        raise BadRequest(f"the head has a weight of shape {tuple(weight.shape)} at {where}: expected a linear layer")
    bias = leaves["bias"] if "bias" in leaves else weight.new_zeros(weight.shape[0])
    return _Layer(path, "linear" if weight.ndim == 2 else "layer", weight, bias, is_convolution)


def _sorted(modules: list[_Layer], ordered: bool) -> list[_Layer]:
    """The modules in the order in which they run.

    It is the order of the tensors where that is known. Files in alphabetical order show it only in the numbers of a
    Sequential, or in widths that fit one order alone.

    Raises: BadRequest where it is not known, or the last one is not linear.
    """
    if not ordered:
        modules = sorted(modules, key=lambda layer: _natural(layer.path))
        if not _is_numbered([layer.path for layer in modules]):
            fitting = [order for order in permutations(modules) if _fits(order)] if len(modules) <= MOST_NAMED else []
            if len(fitting) != 1:
                names = some([layer.path for layer in modules], MOST_NAMED)
                raise BadRequest(
                    f"the order of the layers of the head ({names}) is not known, as this file sorts them by name; "
                    "save the state dict with torch.save, which keeps their order"
                )
            modules = list(fitting[0])
    last = modules[-1] if modules else None
    if last is not None and last.path.startswith("pre_logits"):
        raise BadRequest(f"the head ends in a hidden layer ({last.path}), without a classifier behind it; {_LEAVE_OUT}")
    if last is not None and last.kind != "linear":
        raise BadRequest(
            f"the head ends in {last.path!r}, which is no linear layer; {_LEAVE_OUT}, or names another one"
        )
    return modules


def _is_numbered(paths: Sequence[str]) -> bool:
    """Whether names show the order at every level: by numbers, or as in timm, where `pre_logits` runs before `fc`."""
    below: dict[str, list[str]] = {}
    for path in paths:
        name, _, inner = path.partition(".")
        below.setdefault(name, []).append(inner)
    unnumbered = {name for name in below if not name.isdecimal()}
    if len(unnumbered) > 1 and unnumbered not in ({"pre_logits", "fc"}, {"fc1", "fc2"}, {"mlp", "fc"}):
        return False
    return all(_is_numbered(inner) for inner in below.values() if len(inner) > 1)


def _fits(order: Sequence[_Layer]) -> bool:
    """Whether each layer takes as many values as the one in front of it gives, and the last is linear."""
    widths = [layer.weight.shape[0] for layer in order]
    taken = [layer.weight.shape[-1] for layer in order]
    return order[-1].kind == "linear" and all(a == b for a, b in zip(widths, taken[1:], strict=False))


def _natural(path: str) -> list[tuple[int, int, str]]:
    """Numbers by value; timm's `pre_logits` runs before `fc`."""
    return [(0, int(part), "") if part.isdecimal() else (1, part != "pre_logits", part) for part in path.split(".")]


def _activations(modules: Sequence[_Layer], act: Act, shown: Callable[[str], str]) -> list[str]:
    """The activation behind each module but the last, "" for none.

    Raises: BadRequest where it cannot be known: a Sequential's file does not hold it.
    """
    pairs = list(pairwise(modules))
    if callable(act):
        return [act(layer.path, behind.path) for layer, behind in pairs]
    between = ["gelu" if "pre_logits" in layer.path or layer.path.startswith("mlp.") else "" for layer, _ in pairs]
    gaps = [i for i, (layer, behind) in enumerate(pairs) if not between[i] and not _adjacent(layer.path, behind.path)]
    linear = [i for i, layer in enumerate(modules) if layer.kind == "linear"]
    inner = [group for a, b in pairwise(linear) if (group := [gap for gap in gaps if a <= gap < b])]
    words = [word.strip() for word in act.split(",")] if act else []
    if unknown := [word for word in words if word not in ACTIVATIONS]:
        raise BadRequest(f"--head-act {act}: no activation {unknown[0]!r}; {nearest(unknown[0], ACTIVATIONS)}")
    if not words and not inner:
        return between
    if len(words) == 1 and all(len(group) == 1 for group in inner):
        places = [group[0] for group in inner] or gaps
        words *= len(places) if inner else 1
    else:
        places = gaps
    if not gaps:
        raise BadRequest(f"--head-act {act}: the head has no place for an activation; leave it out")
    if len(words) != len(places):
        where = [f"{shown(modules[i].path)} and {shown(modules[i + 1].path)}" for i in gaps]
        example = "relu" if len(inner) == len(gaps) else ",".join(["none"] * (len(gaps) - 1) + ["relu"])
        raise BadRequest(
            f"the head may have an activation between {', between '.join(where)}, and weights do not show it; give "
            f"--head-act {example} (of {', '.join(ACTIVATIONS)})"
        )
    for place, word in zip(places, words, strict=True):
        between[place] = "" if word == "none" else word
    return between


def _adjacent(path: str, behind: str) -> bool:
    """Whether no module has room between two of a Sequential."""
    (a, _, i), (b, _, j) = path.rpartition("."), behind.rpartition(".")
    return a == b and i.isdecimal() and j.isdecimal() and int(j) == int(i) + 1
