"""Finds the feature pyramid of a detector beside a network, as mmdet names it, with what its configuration says.

facebookresearch trained with mmdet, so its checkpoints have the same neck. The other parts of a detector, which propose
and classify boxes, are left out by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from exporter.errors import BadRequest, first_line, some
from exporter.model import openmmlab
from exporter.model.levels import Pyramid
from exporter.model.shapes import numbered

if TYPE_CHECKING:
    from torch import Tensor

    from exporter.model.layouts import Converted
    from exporter.model.variants import Architecture

NECK = "neck."
USUAL = (4, 5)  # stages and maps of Mask R-CNN and Cascade Mask R-CNN
_MODULES = ("lateral_convs", "fpn_convs")
_CONV = re.compile(r"(?P<layer>(lateral_convs|fpn_convs)\.\d+)(\.conv)?\.(?P<leaf>weight|bias)")
_EXTRA = {False: "pool", True: "input", "on_input": "input", "on_lateral": "lateral", "on_output": "output"}
_USUAL: dict[str, tuple[object, ...]] = {
    "type": ("FPN", "mmdet.FPN"), "conv_cfg": (None,), "norm_cfg": (None,), "act_cfg": (None,),
    "upsample_cfg": (None, {"mode": "nearest"}),
}  # fmt: skip
"""Settings of mmdet's FPN, with the values that this tool follows."""
_READ = ("num_outs", "add_extra_convs", "extra_convs_on_inputs", "relu_before_extra_convs", "start_level",
         "in_channels")  # fmt: skip
_SHOWN = ("out_channels", "end_level", "no_norm_on_lateral", "init_cfg")  # the weights show them, or no norm has them
_LEAVE_OUT = "--head none leaves the pyramid out"


def take(converted: Converted, rest: dict[str, Tensor]) -> None:
    """Move the convolutions of a feature pyramid from the rest into the network, and leave out the heads of the
    detector, with a note.

    Args:
        converted: the network; its state, modules and notes are changed.
        rest: the tensors that are not the network's, by the names of the file; those of the detector are removed.

    Raises: BadRequest for a feature pyramid with other layers than convolutions.
    """
    parts = converted.prefix.split(".")[:-1]
    outer = ["".join(f"{part}." for part in parts[:count]) for count in range(len(parts), -1, -1)]
    place = next((f for f in outer if any(key.startswith(f"{f}{NECK}{_MODULES[0]}.") for key in rest)), None)
    if place is None:
        return
    tensors = {key.removeprefix(place + NECK): rest[key] for key in rest if key.startswith(place + NECK)}
    if others := sorted({key.split(".")[0] for key in tensors} - set(_MODULES)):
        converted.notes.append(
            f"the neck has {some(others)}, which an FPN does not have: it is left out, and the maps of the backbone "
            "are exported"
        )
        return
    if unknown := [f"{NECK}{key}" for key in tensors if not _CONV.fullmatch(key)]:
        raise BadRequest(f"{some(unknown)}: an FPN with other layers than convolutions is not supported; {_LEAVE_OUT}")
    for key, tensor in tensors.items():
        match = _CONV.fullmatch(key)
        assert match is not None
        converted.state[f"{NECK}{match['layer']}.{match['leaf']}"] = tensor
        converted.modules[f"{NECK}{match['layer']}"] = f"{place}{NECK}{key.removesuffix('.' + match['leaf'])}"
        del rest[place + NECK + key]
    _leave_out_heads(converted, rest, place)


def _leave_out_heads(converted: Converted, rest: dict[str, Tensor], place: str) -> None:
    """Drop `rpn_head`, `roi_head` and the like, with a note."""
    names = [key.removeprefix(place).split(".")[0] for key in rest if key.startswith(place)]
    heads = {name: names.count(name) for name in sorted(names) if name.endswith("head")}
    for key in [key for key in rest if key.startswith(place) and key.removeprefix(place).split(".")[0] in heads]:
        del rest[key]
    if heads:
        counted = " and ".join(f"{name} ({count} tensors)" for name, count in heads.items())
        converted.notes.append(f"left out {counted}: what follows the feature pyramid")


def pyramid_of(state: Mapping[str, Tensor], arch: Architecture, stated: Mapping[str, Any]) -> Pyramid | None:
    """The feature pyramid of weights in the layout of this tool, from their shapes and what a configuration states;
    None without one.

    Args:
        state: the weights.
        arch: the network in front of it.
        stated: `neck`, the settings of mmdet's FPN, or `configuration`, the text that has them, if there is one.

    Raises: BadRequest for one that does not fit the network, is not supported, or whose further levels are not known.
    """
    laterals, convs = (numbered(state, f"{NECK}{name}") for name in _MODULES)
    if not laterals:
        return None
    neck = _checked(stated.get("neck") or stated_neck(stated.get("configuration", "")))
    dims = [int(weight.shape[1]) for weight in laterals]
    starts = [start for start in range(len(arch.dims)) if [*arch.dims[start : start + len(dims)]] == dims]
    start = neck.get("start_level", 0)
    if "in_channels" in neck and [*neck["in_channels"]][start : start + len(dims)] != dims:
        raise _contradiction("in_channels", neck["in_channels"], f"{dims} channels", start)
    strides = [arch.strides[i] for first in starts for i in range(first, first + len(dims))]
    if len(starts) != 1 or any(after != 2 * before for before, after in pairwise(strides)):
        raise BadRequest(
            f"neck.lateral_convs take maps of {dims} channels, and the stages have {list(arch.dims)} at strides "
            f"{list(arch.strides)}; expected neighbours whose strides double; {_LEAVE_OUT}"
        )
    more = len(convs) - len(laterals)
    if not neck and (more or len(laterals) != USUAL[0]):
        raise BadRequest(
            f"an FPN of {len(laterals)} lateral_convs and {len(convs)} fpn_convs, whose further levels the weights do "
            f"not show, and no configuration in the checkpoint (meta) does; save it with its meta, or {_LEAVE_OUT}"
        )
    outputs, extra = neck.get("num_outs", USUAL[1]), _extra(neck)
    if outputs < len(laterals) or more != (0 if extra == "pool" else outputs - len(laterals)):
        extra_convs = neck.get("add_extra_convs", False)
        shown = f"{outputs} with add_extra_convs {extra_convs}"
        raise _contradiction("num_outs", shown, f"{len(laterals)} lateral_convs and {len(convs)} fpn_convs")
    stages = tuple(range(starts[0], starts[0] + len(dims)))
    relu = extra != "pool" and bool(neck.get("relu_before_extra_convs"))
    return Pyramid(width=len(laterals[0]), stages=stages, outputs=outputs, extra=extra, relu=relu)  # type: ignore[arg-type]


def _contradiction(key: str, value: object, shown: str, start: int = 0) -> BadRequest:
    from_level = f" from start_level {start} on" if start else ""
    return BadRequest(
        f"the configuration says {key} {value}{from_level} for the neck, and the weights have {shown}; correct one"
    )


def _extra(neck: Mapping[str, Any]) -> str:
    """What the levels beyond the stages are computed from, one of `Pyramid.extra`; in old versions of mmdet
    `extra_convs_on_inputs` said it."""
    added = neck.get("add_extra_convs", False)
    if added is True and neck.get("extra_convs_on_inputs", True) is False:
        return "output"
    return _EXTRA[added]


def _checked(neck: object) -> dict[str, Any]:
    """The settings of the FPN in a configuration, {} for none.

    Raises: BadRequest for a setting that is not followed.
    """
    if neck is None:
        return {}
    if not isinstance(neck, dict):
        raise BadRequest(f"the configuration says neck {neck}; expected one FPN; {_LEAVE_OUT}")
    for key, value in neck.items():
        known = key in (*_READ, *_SHOWN) or value in _USUAL.get(key, ())
        if key == "num_outs":
            known = type(value) is int and 1 <= value <= 8
        elif key == "start_level":
            known = type(value) is int and 0 <= value <= 8
        elif key == "add_extra_convs":
            known = isinstance(value, bool | str) and value in _EXTRA
        elif key == "in_channels":
            known = isinstance(value, list | tuple)
        if not known:
            expected = _USUAL.get(key, ())
            words = f"expected {expected[0]}" if expected else "not supported"
            raise BadRequest(f"the configuration says {key} {value!r} for the neck; {words}; {_LEAVE_OUT}")
    return neck


def stated_neck(text: str) -> object:
    """The settings of the neck in the text of a configuration of mmdet, None where it has none.

    Raises: BadRequest for a text that cannot be read, or that has several necks.
    """
    problem, necks = "", list[object]()
    try:
        necks = openmmlab.literals(text, "neck")
    except openmmlab.ERRORS as error:
        problem = first_line(error)
    if not problem and any(neck != necks[0] for neck in necks):
        problem = f"it has {len(necks)} different necks"
    if problem:
        raise BadRequest(f"the neck in the configuration of the checkpoint cannot be read ({problem}); {_LEAVE_OUT}")
    return necks[0] if necks else None
