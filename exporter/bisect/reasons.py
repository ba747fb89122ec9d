"""Why a part of an artifact differs from the network: each possible mistake is made in the network on purpose, and the
one whose output is nearest to the artifact's is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import permutations
from typing import TYPE_CHECKING, Any

import numpy as np

from exporter.backends import Array
from exporter.bisect.network import Chain
from exporter.errors import some

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

EXPLAINS = 1 / 4  # of the error is left when a mistake explains it
FP16_LARGEST = 65504
SHARES = np.geomspace(0.02, 0.98, 24)  # of the largest activation, at which a range may end
EPSILONS = (1e-3, 1e-5, 1e-6, 1e-8, 1e-12)


def rms(x: Array) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def of(chain: Chain, name: str, x: Array, y: Array, expected: Array, precision: str) -> str:
    """Why a part gives `y` for `x` in place of `expected`, its largest activations and weights, in words.

    Args:
        chain: the network.
        name: of the part.
        x, y, expected: (N, C, H, W), or (N, C) behind the head.
        precision: of the artifact.
    """
    if name not in chain.parts:
        return "its outputs differ; the norm, the pooling or the head is another"
    facts = _facts(chain, name, x)
    if reason := _overflow(chain, name, x, y, precision):
        return f"{reason}; {facts}"
    left: dict[str, float] = {}
    for text, guess in _guesses(chain, name, x, y, expected):
        left[text] = min(left.get(text, np.inf), rms(y - guess))
    best = min(left, key=lambda text: left[text], default="")
    if best and left[best] < EXPLAINS * rms(y - expected):
        return f"{best} ({100 * (1 - left[best] / rms(y - expected)):.0f} % of the error); {facts}"
    narrow = precision in ("int8", "fp8")
    reason = f"its values do not fit {precision}" if narrow else "its weights or its operators are others"
    return f"no single cause was recognized; {reason}; {facts}"


def _facts(chain: Chain, name: str, x: Array) -> str:
    """The largest activation and weight of a part, each with its module."""
    inner = chain.inner(name, x)
    sizes = {module: float(np.abs(values).max()) for module, values in inner.items()}
    weights = {key: float(value.detach().abs().max()) for key, value in chain.parts[name].named_parameters()}
    most, heaviest = max(sizes, key=lambda key: sizes[key]), max(weights, key=lambda key: weights[key])
    return (
        f"largest activation {sizes[most]:.4g} in {most}, largest weight {weights[heaviest]:.4g} in {name}.{heaviest}"
    )


def _overflow(chain: Chain, name: str, x: Array, y: Array, precision: str) -> str:
    """The module whose values, or whose variance, fp16 cannot hold; or that outputs are not finite."""
    if precision == "fp16":
        for module, values in chain.inner(name, x).items():
            if (largest := float(np.abs(values).max())) > FP16_LARGEST:
                return f"fp16 overflow: {module} reaches {largest:,.0f}, and fp16 holds {FP16_LARGEST:,}"
        for module, variance in _variances(chain, name, x).items():
            if variance > FP16_LARGEST:
                return (
                    f"fp16 overflow: the variance in {module} reaches {variance:,.0f}, and fp16 holds {FP16_LARGEST:,}"
                )
    return "" if np.isfinite(y).all() else "its outputs are not finite, and those of the network are"


def _variances(chain: Chain, name: str, x: Array) -> dict[str, float]:
    """The largest mean square over the channels of what each norm of a part is given."""
    from exporter.model.convnext import Norm, Norm2d

    seen: dict[str, float] = {}

    def keep(inner: str, module: Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        values = inputs[0].double()
        axis = 1 if values.ndim == 4 and isinstance(module, Norm2d) else -1
        seen[f"{name}.{inner}"] = float((values - values.mean(axis, keepdim=True)).square().mean(axis).max())

    norms = [(inner, module) for inner, module in chain.parts[name].named_modules() if isinstance(module, Norm)]
    handles = [module.register_forward_hook(partial(keep, inner)) for inner, module in norms]
    try:
        chain.run(name, x)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _guesses(chain: Chain, name: str, x: Array, y: Array, expected: Array) -> Iterator[tuple[str, Array]]:
    """Possible mistakes, each with the output of the part that makes it."""
    yield from _other_scales(x if chain.is_block(name) else np.zeros_like(expected), y, expected)
    yield from _other_channels(chain, name, x, y, expected)
    yield from _other_operators(chain, name, x)
    yield from _cut_ranges(chain, name, x)


def _other_scales(x: Array, y: Array, expected: Array) -> Iterator[tuple[str, Array]]:
    """A factor or shift of what a part adds to its input, for all channels or for some."""
    adds, found = expected - x, y - x
    factor = float((adds * found).sum() / max(float((adds * adds).sum()), 1e-30))
    yield f"what it adds is {factor:.4g} times that of the network: a scale is another", x + factor * adds
    axes = tuple(axis for axis in range(y.ndim) if axis != 1)
    factors = (adds * found).sum(axes, keepdims=True) / np.maximum((adds * adds).sum(axes, keepdims=True), 1e-30)
    others = np.flatnonzero(np.abs(factors.ravel() - 1) > 0.01)
    if 0 < len(others) < y.shape[1]:
        yield f"the scale of channels {some(map(str, others))} is another", x + factors * adds
    shifts = (y - expected).mean(axes, keepdims=True)
    largest = int(np.abs(shifts).argmax())
    yield (
        f"a bias is another: channel {largest} is shifted by {float(shifts.ravel()[largest]):.4g}",
        (expected + shifts).astype(np.float32),
    )


def _other_channels(chain: Chain, name: str, x: Array, y: Array, expected: Array) -> Iterator[tuple[str, Array]]:
    """Channels of the input, or of what a part adds, in another order."""
    if x.shape[1] <= 4:
        for order in list(permutations(range(x.shape[1])))[1:]:
            bgr = " (BGR in place of RGB)" if order == (2, 1, 0) else ""
            text = f"it takes the channels of its input in the order {', '.join(map(str, order))}{bgr}"
            yield text, chain.run(name, np.ascontiguousarray(x[:, list(order)]))
    before = x if chain.is_block(name) else np.zeros_like(expected)
    rows = [
        np.moveaxis(values, 1, 0).reshape(values.shape[1], -1).astype(np.float64)
        for values in (y - before, expected - before)
    ]
    units = [values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-30) for values in rows]
    order_found = (units[0] @ units[1].T).argmax(1)
    moved = np.flatnonzero(order_found != np.arange(len(order_found)))
    if len(moved) and len(set(order_found.tolist())) == len(order_found):
        text = f"channels {some(map(str, moved))} of its output are in another order"
        yield text, before + (expected - before)[:, order_found]


def _other_operators(chain: Chain, name: str, x: Array) -> Iterator[tuple[str, Array]]:
    """Another activation, or another eps of a norm."""
    from exporter.model.convnext import ACTIVATIONS, Norm

    part: Any = chain.parts[name]
    if hasattr(part, "act"):
        own = part.act
        for kind, function in ACTIVATIONS.items():
            if function is not own:
                with _with(part, "act", function):
                    yield f"its activation is {kind} in place of {_name_of(own)}", chain.run(name, x)
    for inner, module in part.named_modules():
        for eps in EPSILONS if isinstance(module, Norm) else ():
            if eps != module.eps:
                with _with(module, "eps", eps):
                    text = f"eps of {name}.{inner} is {eps:g} in place of {module.eps:g}"
                    yield text.replace(f"place of {eps:g}", "place of the network's"), chain.run(name, x)


def _name_of(function: Callable[[Any], Any]) -> str:
    from exporter.model.convnext import ACTIVATIONS

    return next(kind for kind, other in ACTIVATIONS.items() if other is function)


@contextmanager
def _with(module: Any, attribute: str, value: object) -> Iterator[None]:
    own = getattr(module, attribute)
    setattr(module, attribute, value)
    try:
        yield
    finally:
        setattr(module, attribute, own)


def _cut_ranges(chain: Chain, name: str, x: Array) -> Iterator[tuple[str, Array]]:
    """The input of a layer, cut off at an end of a range that is too narrow for it."""
    from torch import nn

    for inner, layer in chain.parts[name].named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        ends: list[float] = []
        with _before(layer, partial(_note_ends, ends)):
            chain.run(name, x)
        low, high = min(ends), max(ends)
        for share in SHARES:
            for least, most in ((low, share * high), (-share * max(-low, high), share * max(-low, high))):
                with _before(layer, partial(_cut, least, most)):
                    text = f"{least:.3g} to {most:.3g}, and its values from {low:.3g} to {high:.3g}"
                    yield f"the input of {name}.{inner} has a range of about {text}", chain.run(name, x)


def _note_ends(ends: list[float], values: Tensor) -> None:
    ends += [float(values.min()), float(values.max())]


def _cut(least: float, most: float, values: Tensor) -> Tensor:
    return values.clamp(least, most)


@contextmanager
def _before(layer: Module, change: Callable[[Tensor], Any]) -> Iterator[None]:
    """Change the input of a layer inside the `with` block; None leaves it."""

    def hook(module: Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        changed = change(inputs[0])
        return None if changed is None else (changed,)

    handle = layer.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
