"""Finds the classifier among the tensors that lie beside a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from exporter.errors import BadRequest, nearest
from exporter.model import beside, fastai
from exporter.model import head as heads
from exporter.model.shapes import block_counts

if TYPE_CHECKING:
    from torch import Tensor

    from exporter.model.layouts import Choices, Converted


def take(converted: Converted, rest: dict[str, Tensor], choices: Choices, ordered: bool) -> None:
    """Move the classifier's tensors from the rest into the head.

    Args:
        converted: the network; its head, state and notes are changed.
        rest: the tensors that are not the network's, by the names of the file; those that were taken or left out on
            purpose are removed.
        choices: what the user says.
        ordered: the tensors are in the order in which the modules were defined.

    Raises: BadRequest for a head that cannot be understood, a name that is none, and other layers beside it that the
        outputs may depend on.
    """
    names = [name.strip() for name in choices.head.split(",") if name.strip()]
    if names == ["none"]:
        _leave_out(converted, rest)
    elif names in ([], [fastai.place(converted.prefix).rstrip(".")]) and _take_fastai(converted, rest, choices):
        return
    elif len(names) > 1:
        _take_several(converted, rest, names, choices)
    else:
        _take_one(converted, rest, choices, ordered)
    if names:
        _leave_out(converted, rest)


def _take_fastai(converted: Converted, rest: dict[str, Tensor], choices: Choices) -> bool:
    act, width = choices.head_act, _last_width(converted.state)
    return width is not None and fastai.take(converted, rest, act if isinstance(act, str) else "", width)


def _take_several(converted: Converted, rest: dict[str, Tensor], names: list[str], choices: Choices) -> None:
    if isinstance(choices.head_act, str) and choices.head_act:
        raise BadRequest(f"--head-act {choices.head_act}: of several heads each is one linear layer; leave it out")
    places = {name.replace(".", "_"): _place(rest, converted.prefix, name) or "" for name in names}
    taken = {name: _taken(rest, place) for name, place in places.items()}
    converted.head = heads.several({name: heads.classifier(one, "", True) for name, one in taken.items()})
    converted.state |= converted.head.state


def _take_one(converted: Converted, rest: dict[str, Tensor], choices: Choices, ordered: bool) -> None:
    places = [_place(rest, converted.prefix, name) for name in choices.head.split("+")]
    place = places[0]
    if place is None:
        if isinstance(choices.head_act, str) and choices.head_act:
            raise BadRequest(f"--head-act {choices.head_act}: no classifier in these weights; --head names one")
        converted.notes += _candidates(converted, rest)
        return
    if len(places) > 1:
        tensors, in_file = _chain(rest, list(filter(None, places)))
    else:
        tensors, in_file = _taken(rest, place), lambda path: f"{place}{path}".rstrip(".")
    look_up = choices.head_act
    act = look_up if isinstance(look_up, str) else lambda path, behind: look_up(in_file(path), in_file(behind))
    has_norm = bool({"norm.weight", "norm_pre.weight"} & converted.state.keys())
    try:
        if converted.layout == "timm" and place.endswith("visual.head."):
            converted.head = heads.projection(tensors)
        else:
            shown = in_file if len(places) > 1 else str
            converted.head = heads.classifier(tensors, act, has_norm, ordered, shown)
    except heads.NoClassifier as error:
        if choices.head:
            raise BadRequest(f"--head {choices.head}: {error}; expected linear layers") from None
        converted.notes += [f"{len(tensors)} tensors of {place.rstrip('.')!r} are left out: {error}"]
        converted.notes += _candidates(converted, rest)
        return
    if choices.head:
        outputs = [len(tensor) for tensor in converted.head.state.values() if tensor.ndim == 2][-1]
        converted.notes += [
            f"{module!r} takes the outputs of {choices.head!r}, and is left out; --head {choices.head}+{module} takes "
            "both"
            for module in (key.rpartition(".")[0] for key, tensor in rest.items() if tensor.shape[1:] == (outputs,))
        ]
    elif not converted.head.projection:
        _check_alone(converted, place, rest)
    converted.state |= converted.head.state
    converted.modules |= {ours: in_file(path) for ours, path in converted.head.modules.items()}
    converted.notes += _notes(converted, place.rstrip("."), tensors)


def _notes(converted: Converted, name: str, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """What the user may not expect of the head of this name, of which these are the tensors."""
    if converted.head.projection:
        return
    last = converted.head.modules.get("head", "")
    if f"{last}.bias".lstrip(".") not in tensors:
        yield (
            f"the classifier {name!r} has no bias, as in ArcFace and CosFace; it is read as a linear layer: where the "
            "model divides features and weights by their norms, give --head none for the features"
        )
    yield from converted.head.doubts
    if converted.layout == "timm" and "norm.weight" in converted.state and not name.startswith(converted.prefix):
        yield (
            f"the norm of {converted.prefix}head is read as behind the pooling, as in timm; if your model pools the "
            "maps by itself, compare with it: --reference module:callable"
        )
    usual = "classifier" if converted.layout in ("torchvision", "huggingface") else "head"
    if name.rpartition(".")[2] != usual:
        yield f"the classifier is {name!r}"


def _chain(rest: dict[str, Tensor], places: list[str]) -> tuple[dict[str, Tensor], Callable[[str], str]]:
    """The tensors of modules that run one after the other, numbered as in a Sequential with a place for an activation
    between two of them; and the name in the file of a numbered one."""
    tensors = {
        f"{2 * number}.{key}": tensor
        for number, place in enumerate(places)
        for key, tensor in _taken(rest, place).items()
    }

    def in_file(path: str) -> str:
        number, _, inner = path.partition(".")
        return f"{places[int(number) // 2]}{inner}".rstrip(".")

    return tensors, in_file


def _check_alone(converted: Converted, place: str, rest: Mapping[str, Tensor]) -> None:
    """Refuse a head that is found by its name where other layers lie beside it: by their names, or by their widths.

    Raises: BadRequest.
    """
    modules: dict[str, list[Tensor]] = {}
    for key, tensor in rest.items():
        module = _module(key, converted.prefix)
        parent = module.rpartition(".")[0]
        inside = converted.prefix != "" and key.startswith(converted.prefix)
        has_other = any(other.startswith(f"{module}.") for other in converted.others)
        if not inside and not has_other and (f"{parent}." if parent else "") not in converted.others:
            modules.setdefault(module, []).append(tensor)
    beside.refuse(converted, place, modules)


def _leave_out(converted: Converted, rest: dict[str, Tensor]) -> None:
    """Drop the classifiers that were not chosen, with a note: a backbone may keep its own."""
    for parent in _parents(converted.prefix):
        for name in heads.CLASSIFIERS:
            if dropped := _taken(rest, f"{parent}{name}."):
                converted.notes.append(f"{len(dropped)} tensors of {parent}{name} are left out, as --head says")


def _taken(rest: dict[str, Tensor], place: str) -> dict[str, Tensor]:
    """The tensors of one module, taken out of the rest, by their names below it."""
    return {key.removeprefix(place): rest.pop(key) for key in [key for key in rest if key.startswith(place)]}


def _last_width(state: Mapping[str, Tensor]) -> int | None:
    """Channels of the last stage."""
    last = state.get(f"stages.{len(block_counts(state)) - 1}.0.dwconv.weight")
    return None if last is None else len(last)


def _candidates(converted: Converted, rest: Mapping[str, Tensor]) -> list[str]:
    """A note about modules with a linear layer that fits behind the last stage, if there are any. Layers of another
    segmenter's head are none."""
    width = _last_width(converted.state)
    fits = [key for key, tensor in rest.items() if tensor.ndim == 2 and tensor.shape[1] == width]
    if not fits or converted.other_head not in ("", "unknown"):
        return []
    names = dict.fromkeys(_with_followers(_module(key, converted.prefix), rest, converted.prefix) for key in fits)
    return [f"no classifier of a usual name; --head {' or '.join([*names][:4])} takes one"]


def _with_followers(module: str, rest: Mapping[str, Tensor], prefix: str) -> str:
    """A module, and behind a `+` each that takes as many values as the one in front of it gives: `fc1+fc2`."""
    layers: dict[str, list[Tensor]] = {}
    for key, tensor in rest.items():
        if tensor.ndim == 2:
            layers.setdefault(_module(key, prefix), []).append(tensor)
    chain = [module]
    while behind := [
        name
        for name, tensors in layers.items()
        if name not in chain and tensors[0].shape[1] == len(layers[chain[-1]][-1]) != layers[module][0].shape[1]
    ]:
        chain.append(behind[0])
    return "+".join(chain)


def _module(key: str, prefix: str) -> str:
    """The outermost module of a tensor that does not contain the network too."""
    parent = next((parent for parent in _parents(prefix) if key.startswith(parent)), "")
    return f"{parent}{key.removeprefix(parent).split('.')[0]}"


def _parents(prefix: str) -> list[str]:
    """The prefix and what contains it, the innermost first: `a.b.`, `a.` and ""."""
    parts = prefix.split(".")[:-1]
    return ["".join(f"{part}." for part in parts[:count]) for count in range(len(parts), -1, -1)]


def _place(rest: Mapping[str, Tensor], prefix: str, wanted: str) -> str | None:
    """What the names of the classifier's tensors begin with, or None for a backbone.

    Raises: BadRequest for a name that is none.
    """
    for parent in _parents(prefix):
        for name in [wanted.rstrip(".")] if wanted else heads.CLASSIFIERS:
            if any(key.startswith(f"{parent}{name}.") for key in rest):
                return f"{parent}{name}."
    if wanted:
        known = sorted({key.rpartition(".")[0] for key, tensor in rest.items() if tensor.ndim == 2})
        raise BadRequest(f"--head {wanted}: no such module in these weights; {nearest(wanted, known)}")
    return None
