"""Fits tensors of a checkpoint to a network: names, architecture, and what a config says about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from exporter.errors import BadRequest, first_line, some
from exporter.model.decoder import decoder_of
from exporter.model.layouts import Choices, Converted, to_ours
from exporter.model.neck import pyramid_of
from exporter.model.shapes import architecture, block_counts
from exporter.model.variants import Architecture, Variant, head_layer, named

if TYPE_CHECKING:
    from torch import Tensor

    from exporter.model.convnext import ConvNeXt

_SETTINGS = ("act", "norm_eps", "head_eps", "stage_eps", "pool", "output_stride")
"""What weights do not show; everything else that a config says is compared with them."""


@dataclass(frozen=True)
class Fitted:
    """fp32 weights in the layout of this tool that fit a variant; `num_classes` is 0 for a backbone, `modules` are the
    names of the modules in the file by ours, `other_head` is the segmenter whose head is left out."""

    state: dict[str, Tensor]
    variant: Variant
    layout: str
    num_classes: int
    modules: dict[str, str]
    notes: tuple[str, ...] = ()
    other_head: str = ""


def fit(
    tensors: Mapping[str, Tensor],
    stated: Mapping[str, Any],
    choices: Choices,
    known: Architecture | None = None,
    ordered: bool = True,
) -> Fitted:
    """Convert the tensors of a checkpoint, and check every name, shape and value.

    Args:
        tensors: by the names of the file.
        stated: what a config says about the network, by the names of `Architecture`, and `num_classes`.
        choices: what the user says.
        known: the whole architecture, where the file says it.
        ordered: the tensors are in the order in which the modules were defined.

    Raises: BadRequest for weights that are no ConvNeXt, or that differ from what is stated.
    """
    import torch

    converted = to_ours(tensors, choices, ordered)
    stated = {**_defaults(converted), **stated}
    state = {key: tensor.to(torch.float32) for key, tensor in converted.state.items()}
    _fill_biases(state)
    if known:
        _check_known(known, state)
    arch = known or configured(architecture(state, converted.head, choices.norm or stated.get("norm", "")), stated)
    if known is None:
        decoder = decoder_of(state, arch, stated)
        if decoder is not None:
            decoder = replace(decoder, windows=stated.get("windows", ()))
        arch = replace(arch, decoder=decoder, pyramid=pyramid_of(state, arch, stated))
    if choices.norm and arch.norm != choices.norm:
        raise BadRequest(f"--norm {choices.norm}: the norms of these weights are of the kind {arch.norm}; leave it out")
    _check_keys(state, arch)
    if bad := [key for key in sorted(state) if not state[key].isfinite().all()]:
        raise BadRequest(f"NaN or infinity in {len(bad)} tensors ({some(bad)}); give a sound checkpoint")
    head = state.get("head.weight")
    classes = 0 if head is None or arch.projection else int(head.shape[0])
    if arch.heads:
        classes = head_layer(arch.heads[0])[1]
    classes = arch.decoder.classes if arch.decoder else classes
    notes = list(converted.notes)
    if classes and stated.get("num_classes", classes) != classes:
        notes.append(f"the config says {stated['num_classes']} classes, the weights have {classes}")
    return Fitted(state, named(arch), converted.layout, classes, converted.modules, tuple(notes), converted.other_head)


def _defaults(converted: Converted) -> dict[str, Any]:
    """Settings of a library where nothing is stated."""
    settings: dict[str, Any] = {}
    if converted.layout == "timm":  # beyond stride 32 its networks are dilated
        settings["output_stride"] = 32
    is_of_stage = "norm_pre.weight" in converted.state  # the norm in front of the head, with the eps of stages
    if converted.layout == "huggingface" and not is_of_stage:  # `layer_norm_eps` of ConvNextConfig
        settings["head_eps"] = 1e-12
    if "norm" in converted.head.modules and converted.layout != "torchvision":  # nn.LayerNorm in the user's head
        settings["head_eps"] = 1e-5
    if converted.pool:
        settings["pool"] = converted.pool
    return settings


def configured(arch: Architecture, stated: Mapping[str, Any]) -> Architecture:
    """An architecture with the settings that a config states.

    Raises: BadRequest where the config and the weights differ.
    """
    shown = {name: getattr(arch, name) for name in arch.__struct_fields__ if name not in _SETTINGS}
    widths = [width for kind, width in map(head_layer, arch.head_layers) if kind == "linear"]
    shown |= {"head_hidden": widths[0] if widths else None, "kernels": arch.kernel_sizes}
    for name, value in stated.items():
        value = tuple(value) if isinstance(value, list) else value
        same_widths = {value, shown.get(name)} == {"overlap", "overlap_tiered"}  # of a stem with few channels
        if name in shown and shown[name] != value and not same_widths:
            raise BadRequest(f"the config says {name} {value}, but the weights have {shown[name]}; correct one of them")
    settings = {name: stated[name] for name in _SETTINGS if name in stated}
    if settings.get("head_eps") == settings.get("norm_eps", arch.norm_eps):
        settings["head_eps"] = None
    changed: Architecture = replace(arch, **settings)
    if changed.output_stride is not None and changed.output_stride >= replace(changed, output_stride=None).stride:
        changed = replace(changed, output_stride=None)
    return changed


def _check_known(arch: Architecture, state: Mapping[str, Tensor]) -> None:
    """Check that the architecture in a file's metadata is that of a network with these stages.

    Raises: BadRequest.
    """
    depths = block_counts(state)
    widths = tuple(
        int(state[f"stages.{stage}.0.dwconv.weight"].shape[0])
        for stage in range(len(depths))
        if f"stages.{stage}.0.dwconv.weight" in state
    )
    if (arch.depths, arch.dims) != (depths, widths):
        raise BadRequest(
            f"the metadata says stages of {arch.depths} blocks and {arch.dims} channels, but the weights have {depths} "
            f"and {widths}; write the weights again"
        )
    eps = (arch.norm_eps, arch.head_eps, arch.stage_eps)
    if not all(value is None or 0 <= value < 1 for value in eps) or arch.output_stride not in (None, 8, 16, 32):
        raise BadRequest(
            f"the metadata says eps {eps} and output_stride {arch.output_stride}; expected eps from 0 to 1, and 8, 16 "
            "or 32; write the weights again"
        )
    try:
        empty(arch, 1)
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise BadRequest(f"the metadata describes no network ({first_line(error)}); write the weights again") from None


def empty(arch: Architecture, classes: int) -> ConvNeXt:
    """The network with parameters on the meta device, without memory."""
    import torch

    from exporter.model.convnext import ConvNeXt
    from exporter.model.fpn import PyramidNetwork
    from exporter.model.upernet import UPerNet

    with torch.device("meta"):
        if arch.decoder is not None:
            return UPerNet(arch)
        return ConvNeXt(arch, classes) if arch.pyramid is None else PyramidNetwork(arch)


def _fill_biases(state: dict[str, Tensor]) -> None:
    """Convolutions without bias (timm's `conv_bias=False`) get one of zeros."""
    if "downsample_layers.0.0.bias" not in state:
        for key in [key for key, tensor in state.items() if tensor.ndim == 4 and key.endswith(".weight")]:
            state.setdefault(f"{key.removesuffix('weight')}bias", state[key].new_zeros(state[key].shape[0]))


def _check_keys(state: Mapping[str, Tensor], arch: Architecture) -> None:
    """Check every name and shape.

    Raises: BadRequest.
    """
    head = state.get("head.weight")
    expected = {key: tensor.shape for key, tensor in empty(arch, 1 if head is None else len(head)).state_dict().items()}
    if head is None:  # a backbone
        expected = {key: shape for key, shape in expected.items() if not key.startswith("head.") or key in state}
    problems = []
    if missing := sorted(expected.keys() - state.keys()):
        problems.append(f"{len(missing)} missing keys ({some(missing)})")
    if unexpected := sorted(state.keys() - expected.keys()):
        problems.append(f"{len(unexpected)} unexpected keys ({some(unexpected)})")
    wrong = [key for key in sorted(expected.keys() & state.keys()) if state[key].shape != expected[key]]
    if wrong:
        shapes = f"{wrong[0]} is {tuple(state[wrong[0]].shape)}, expected {tuple(expected[wrong[0]])}"
        problems.append(f"{len(wrong)} wrong shapes ({shapes})")
    if problems:
        raise BadRequest(f"not the weights of {named(arch).name}: {'; '.join(problems)}")
