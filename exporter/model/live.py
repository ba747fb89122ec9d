"""Reads what a live module is: settings that its weights do not show, from the module itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from exporter.errors import BadRequest
from exporter.model.fit import Fitted, fit
from exporter.model.layouts import Choices
from exporter.model.structure import is_response_norm

if TYPE_CHECKING:
    from torch import Tensor, nn

CLOSE = 1e-5  # fp32 rounding of an activation near 1


def read(module: nn.Module, prefix: str = "", head: str = "", head_act: str = "") -> Fitted:
    """The weights and architecture of a module whose state dict has one of the layouts.

    Args:
        module: in eval mode.
        prefix, head: as in `Choices`.
        head_act: as in `Choices`, where the module's forward calls a function in place of an activation module.

    Raises: BadRequest for a module that is no ConvNeXt, or does what this tool does not know.
    """
    import torch

    tensors = {
        key: tensor.detach().float()
        for key, tensor in module.state_dict().items()
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
    }
    modules = dict(module.named_modules())
    norms = [
        part for name, part in modules.items() if name.endswith("norm") and getattr(part, "weight", None) is not None
    ]
    norm = next((kind for part in norms if (kind := _kind_of_norm(part)) in ("rms", "simple")), "")
    choices = Choices(prefix=prefix, head=head, head_act=head_act or partial(_between, modules), norm=norm)
    fitted = fit(tensors, {"pool": _pooling(module)} | _pool_scales(module), choices)
    parts = {ours: modules[name] for ours, name in fitted.modules.items() if name in modules}
    return fit(tensors, _settings(module, fitted, parts), choices)


def _settings(module: nn.Module, fitted: Fitted, parts: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Settings by the names of `Architecture`."""
    blocks = {name.rpartition(".")[0] for name in parts if name.endswith(".dwconv")}
    settings: dict[str, Any] = {"pool": _pooling(module)}
    names = dict(module.named_modules())
    acts = {
        _activation(_leaves(names[_common(fitted.modules[f"{b}.dwconv"], fitted.modules[f"{b}.pwconv2"])]))
        for b in blocks
    }
    if len(acts) > 1:
        raise BadRequest(f"the blocks have several activations ({', '.join(sorted(acts))}); one is supported")
    settings["act"] = acts.pop() or "gelu"
    eps = {name: value for name, part in parts.items() if not is_response_norm(name) and (value := _eps(part))}
    inner = {value for name, value in eps.items() if not name.startswith(("norm", "stage_norms", "head"))}
    if len(inner) > 1:
        raise BadRequest(f"the norms have several eps ({', '.join(map(str, sorted(inner)))}); one is supported")
    settings |= {"norm_eps": inner.pop()} if inner else {}
    last = next((eps[name] for name in ("norm", "norm_pre") if name in eps), None)
    settings |= {"head_eps": last} if last is not None else {}
    stages = {value for name, value in eps.items() if name.startswith("stage_norms")}
    settings |= {"stage_eps": stages.pop()} if len(stages) == 1 else {}
    return {**settings, **_pool_scales(module), "output_stride": _output_stride(fitted, parts)}


def _common(a: str, b: str) -> str:
    """The name of the module that holds two modules."""
    parts: list[str] = []
    for left, right in zip(a.split("."), b.split("."), strict=False):
        if left != right:
            break
        parts.append(left)
    return ".".join(parts)


def _between(modules: Mapping[str, nn.Module], name: str, behind: str) -> str:
    """The activation that is defined between two modules, "" for none."""
    names = list(modules)
    inner = (modules[one] for one in names[names.index(name) + 1 : names.index(behind)])
    return _activation(part for part in inner if not list(part.children()) and not list(part.parameters()))


def _leaves(module: nn.Module) -> Iterable[nn.Module]:
    return (part for part in module.modules() if not list(part.children()) and not list(part.parameters()))


def _activation(leaves: Iterable[nn.Module]) -> str:
    """The first activation among modules without weights, by what it computes; "" where there is none.

    Raises: BadRequest for an activation that is not known.
    """
    import torch

    from exporter.model.convnext import ACTIVATIONS

    known = {**ACTIVATIONS, "tanh": torch.tanh}
    x = torch.linspace(-6, 6, 97)
    for leaf in leaves:
        try:
            with torch.inference_mode():
                y = leaf.eval()(x.clone())
        except Exception:  # noqa: BLE001, S112  (a module for images: no activation)
            continue
        if not isinstance(y, torch.Tensor) or y.shape != x.shape or torch.equal(y, x):
            continue
        for name, function in known.items():
            if (function(x) - y).abs().max() < CLOSE:
                return name
        raise BadRequest(f"the activation {type(leaf).__name__} is not supported; expected one of {', '.join(known)}")
    return ""


def _kind_of_norm(norm: nn.Module) -> str:
    """`rms` or `simple` by what a norm without bias computes, "" for any other module."""
    import torch

    from exporter.model.convnext import Norm

    weight = getattr(norm, "weight", None)
    if getattr(norm, "bias", None) is not None or not isinstance(weight, torch.Tensor) or weight.ndim != 1:
        return ""
    x = torch.randn(1, 2, 2, len(weight), generator=torch.Generator().manual_seed(0)) + 0.5
    for kind in ("rms", "simple"):
        ours = Norm(len(weight), kind, _eps(norm) or 1e-6)
        ours.weight.data = weight.detach().float().cpu()
        expected = ours(x)
        for axis in (-1, 1):
            with torch.inference_mode():
                try:
                    got = norm(x.movedim(-1, axis).to(weight)).float().cpu().movedim(axis, -1)
                except RuntimeError:  # the other order of axes
                    continue
            if got.shape == expected.shape and (got - expected).abs().max() < 1e-4:
                return kind
    return ""


def _eps(norm: nn.Module) -> float | None:
    values: list[Any] = [getattr(norm, name, None) for name in ("eps", "variance_epsilon")]
    return next((value for value in values if isinstance(value, float)), None)


def _pooling(module: nn.Module) -> str:
    """The pooling module of timm says what it does; the other libraries take the mean."""
    kinds: list[Any] = [getattr(part, "pool_type", None) for part in module.modules()]
    named = [kind for kind in kinds if isinstance(kind, str)]
    return (named[0].removeprefix("fast") or ("avg" if named[0] else "none")) if named else "avg"


def _pool_scales(module: nn.Module) -> dict[str, Any]:
    """The grids of UPerNet's pooled maps, where a module says them."""
    scales: list[Any] = [part.pool_scales for part in module.modules() if hasattr(part, "pool_scales")]
    return {"pool_scales": tuple(scales[0])} if scales else {}


def _output_stride(fitted: Fitted, parts: Mapping[str, nn.Module]) -> int | None:
    """The output stride that gives the strides and dilations of a module's convolutions.

    Raises: BadRequest for others.
    """
    from msgspec.structs import replace

    arch = fitted.variant.architecture
    measured: list[tuple[Any, ...]] = []
    for stage in range(1, len(arch.depths)):
        conv: Any = parts.get(f"downsample_layers.{stage}.1")
        block: Any = parts.get(f"stages.{stage}.0.dwconv")
        measured.append((conv.stride[0], conv.dilation[0], block.dilation[0]))
    for limit in (None, 32, 16, 8):
        steps = replace(arch, output_stride=limit).steps[1:]
        if [(step.stride, step.dilation, step.block_dilation) for step in steps] == measured:
            return limit
    raise BadRequest(f"strides and dilations of the stages {measured} are not those of an output stride of 8, 16 or 32")


def outputs_of(module: Any, images: Tensor, task: str) -> Any:
    """What a model returns for a task: of a classifier of a library, `embed` is what its last layer takes."""
    package = type(module).__module__.partition(".")[0]
    if task == "embed" and package == "timm" and hasattr(module, "forward_head"):
        return module.forward_head(module.forward_features(images), pre_logits=True)
    if task == "embed" and package == "torchvision" and hasattr(module, "classifier"):
        return module.classifier[:-1](module.avgpool(module.features(images)))
    if task in ("embed", "tokens") and package == "transformers" and hasattr(module, "base_model"):
        return module.base_model(images)
    return module(images)


def tensors_of(outputs: Any, task: str) -> tuple[Tensor, ...]:
    """The outputs of a model as a tuple: of a transformers model those of the task.

    Raises: BadRequest for outputs that hold no tensors of the task.
    """
    import torch

    names = {
        "classify": ("logits",),
        "embed": ("image_embeds", "pooler_output"),
        "tokens": ("last_hidden_state",),
        "features": ("feature_maps",),
        "segment": ("logits",),
        "pyramid": ("feature_maps",),
    }[task]
    for name in names:
        value = outputs.get(name) if isinstance(outputs, dict) else getattr(outputs, name, None)
        if value is not None:
            outputs = value
            break
    tensors = tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)
    if not all(isinstance(value, torch.Tensor) for value in tensors):
        raise BadRequest(f"the reference returns {type(outputs).__name__}: expected {' or '.join(names)}, or tensors")
    return tensors
