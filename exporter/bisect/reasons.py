"""The likely cause of a part's error: each possible mistake is made in the reference model on purpose, and the one
whose output is nearest to the artifact's is named."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from exporter.artifact.outputs import PROBABILITIES
from exporter.backends import NARROW, Array
from exporter.bisect import fitting
from exporter.bisect.network import Chain, changed_input
from exporter.bisect.parts import Part, rms
from exporter.errors import some

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

EXPLAINS = 1 / 4  # of the error is left when a mistake explains it
FP16_LARGEST = 65504
SHARES = np.geomspace(0.02, 0.98, 24)  # of the largest activation, at which a range may end
EPSILONS = (1e-3, 1e-5, 1e-6, 1e-8, 1e-12)
POOLINGS = ("avg", "max", "avgmax")  # of the same width
ROW = 0.05  # of the largest error of a class: a class below it is right


@dataclass(frozen=True)
class Reason:
    """Why a part exceeds its limit: a sentence, and `missing`, the kind of precision by whose lack it does: `overflow`
    of fp16, `range` of 8-bit integers or floats, or "" where more precision does not help."""

    text: str
    missing: Literal["overflow", "range", ""] = ""


def of(chain: Chain, part: Part) -> Reason:
    """The likely cause of a part's error, with its largest activation and weight.

    Args:
        chain: the reference model.
        part: one that exceeds its limit.
    """
    if " … " in part.name:
        return Reason("the artifact shows no output between these parts")
    if part.name not in chain.parts and not chain.is_tail(part.place):
        return Reason("the norm of this feature map differs")
    inside = _Inside(chain, part)
    facts, overflow = inside.facts(), inside.overflow()
    if not np.isfinite(part.y).all():
        if overflow:
            return Reason(f"{overflow}; {facts}", "overflow")
        return Reason(f"its outputs are not finite, and those of the reference model are; {facts}")
    cause, left, missing = _best_guess(chain, part)
    if left < EXPLAINS:
        return Reason(f"{cause} ({100 * (1 - left):.0f} % of the error); {facts}", missing)
    if overflow:
        return Reason(f"{overflow}; {facts}", "overflow")
    if part.precisions & NARROW:
        cause = "the range of an activation or weight may be too narrow"
        return Reason(f"no single cause was recognized; {cause}; {facts}", "range")
    if weights := _other_weights(chain, part):
        return Reason(f"{weights}; {facts}")
    return Reason(f"no single cause was recognized; weights or operators differ; {facts}")


def _best_guess(chain: Chain, part: Part) -> tuple[str, float, Literal["range", ""]]:
    """The possible mistake whose output is nearest to the artifact's, the share of the error that it leaves, and what
    is missing then."""
    error, missing = rms(part.y - part.expected), "range" if part.precisions & NARROW else ""
    best: tuple[str, float, Literal["range", ""]] = ("", np.inf, "")
    for guesses, lack in ((_mistakes(chain, part), ""), (_narrow_ranges(chain, part), missing)):
        for cause, guess in guesses:
            left = rms(part.y - guess) / error
            if left < best[1]:
                best = (cause, left, "range" if lack else "")
    return best


def _other_weights(chain: Chain, part: Part) -> str:
    """The one weight or bias that explains the error, else the outputs that differ if others do not, or ""."""
    tensors = {
        f"{inner}.{key}" if inner else key: tensor
        for inner, module in chain.modules(part.name).items()
        for key, tensor in module.named_parameters(recurse=False)
    }
    before = f"{part.name}." if part.name in chain.parts else ""
    run = partial(chain.run_with, part.name, part.place)
    for text, left in fitting.other_weights(tensors, run, part.x, part.y):
        return f"{before}{text} ({100 * (1 - left):.0f} % of the error)"
    if part.name in chain.parts:
        return ""
    if not chain.is_logits(part.place):
        return ""
    errors = np.sqrt(np.mean(np.square(part.y - part.expected, dtype=np.float64), 0))
    rows = np.flatnonzero(errors > ROW * errors.max())
    return f"the weights of classes {some(map(str, rows))} of the head differ" if 2 * len(rows) < len(errors) else ""


class _Inside:
    """What the modules within a part of the reference model compute for its input."""

    def __init__(self, chain: Chain, part: Part) -> None:
        self.part, self.modules = part, chain.modules(part.name)
        self.before = f"{part.name}." if part.name in chain.parts else ""
        self.largest: dict[str, float] = {}
        """The largest |activation| of each module."""
        self.variances: dict[str, float] = {}
        """The largest variance over the channels of the input of each norm."""
        chain.record(part.name, part.x, self._see)

    def _see(self, name: str, module: Module, x: Tensor, y: Tensor) -> None:
        from exporter.model.convnext import Norm, Norm2d

        self.largest[name] = float(y.abs().max())
        if isinstance(module, Norm):
            axis, values = 1 if isinstance(module, Norm2d) else -1, x.double()
            self.variances[name] = float((values - values.mean(axis, keepdim=True)).square().mean(axis).max())

    def facts(self) -> str:
        """The largest activation and weight, each with its module."""
        weights = {
            f"{inner}.{key}" if inner else key: float(value.detach().abs().max())
            for inner, module in self.modules.items()
            for key, value in module.named_parameters(recurse=False)
        }
        if not weights:
            return "no weights in it"
        most, heaviest = (max(sizes, key=lambda key: sizes[key]) for sizes in (self.largest, weights))
        weight = f"{weights[heaviest]:.4g} in {self.before}{heaviest}"
        return f"largest activation {self.largest[most]:.4g} in {most}, largest weight {weight}"

    def overflow(self) -> str:
        """The module whose values, or whose variance, fp16 cannot hold, if products are computed in it; else ""."""
        if "fp16" not in self.part.precisions:
            return ""
        reached = [
            *((f"{module} reaches", largest) for module, largest in self.largest.items()),
            *((f"the variance in {module} reaches", variance) for module, variance in self.variances.items()),
        ]
        beyond = ((what, value) for what, value in reached if value > FP16_LARGEST)
        what, value = next(beyond, ("", 0.0))
        return f"fp16 overflow: {what} {value:,.0f}, and fp16 holds {FP16_LARGEST:,}" if what else ""


def _mistakes(chain: Chain, part: Part) -> Iterator[tuple[str, Array]]:
    """Possible mistakes, each with the output (N, C, H, W) of a part that makes it."""
    before = part.x if chain.is_block(part.name) else np.zeros_like(part.expected)
    if part.name in chain.parts or chain.contents()[part.place] not in PROBABILITIES:  # no factor passes a softmax
        yield from _other_scales(part, before)
        yield from _other_channels(chain, part, before)
    yield from _other_operators(chain, part)


def _other_scales(part: Part, before: Array) -> Iterator[tuple[str, Array]]:
    """A factor or shift of the update, for all channels or for some."""
    update, own = part.expected - before, part.y - before
    factor = float((update * own).sum() / max(float((update * update).sum()), 1e-30))
    yield f"the update is {factor:.6g} × that of the reference model: a scale differs", before + factor * update
    if own.size == own.shape[1]:
        return  # one value a channel, which any factor or shift of the channels explains
    axes = tuple(axis for axis in range(own.ndim) if axis != 1)
    factors = (update * own).sum(axes, keepdims=True) / np.maximum((update * update).sum(axes, keepdims=True), 1e-30)
    others = np.flatnonzero(np.abs(factors.ravel() - 1) > 0.01)
    if 0 < len(others) < own.shape[1]:
        yield f"the scale of channels {some(map(str, others))} differs", before + factors * update
    shifts = (part.y - part.expected).mean(axes, keepdims=True)
    yield _shift_text(shifts.ravel()), (part.expected + shifts).astype(np.float32)


def _shift_text(shifts: Array) -> str:
    """A change of the biases (C,) in words, with the channels if they are fewer than half."""
    most = int(np.abs(shifts).argmax())
    size = f"{float(shifts[most]):.4g}"
    changed = np.flatnonzero(np.abs(shifts) > fitting.SHOWN * abs(shifts[most]))
    if len(changed) == 1:
        return f"a bias differs: channel {most} is shifted by {size}"
    which = f"channels {some(map(str, changed))}" if 2 * len(changed) < len(shifts) else "most channels"
    return f"a bias differs: {which} are shifted, channel {most} the most, by {size}"


def _other_channels(chain: Chain, part: Part, before: Array) -> Iterator[tuple[str, Array]]:
    """Channels of the input, or of the update, in another order."""
    if part.x.shape[1] <= 4 and part.name in chain.parts:
        for order in list(permutations(range(part.x.shape[1])))[1:]:
            bgr = " (BGR in place of RGB)" if order == (2, 1, 0) else ""
            cause = f"the channels of its input are in the order {', '.join(map(str, order))}{bgr}"
            yield cause, chain.run(part.name, part.x[:, list(order)])
    rows = [_channel_rows(values - before) for values in (part.y, part.expected)]
    best_match = (rows[0] @ rows[1].T).argmax(1)
    moved = np.flatnonzero(best_match != np.arange(len(best_match)))
    if len(moved) and len(set(best_match.tolist())) == len(best_match):
        cause = f"channels {some(map(str, moved))} of its output are in another order"
        yield cause, before + (part.expected - before)[:, best_match]


def _channel_rows(values: Array) -> Any:
    """(N, C, H, W) to a row of unit length for each channel, (C, N · H · W) in fp64."""
    rows = np.moveaxis(values, 1, 0).reshape(values.shape[1], -1).astype(np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)


def _other_operators(chain: Chain, part: Part) -> Iterator[tuple[str, Array]]:
    """Another activation, another eps of a norm, no norm, or another pooling."""
    from exporter.model.convnext import ACTIVATIONS, Norm

    modules: dict[str, Any] = dict(chain.modules(part.name))
    before = f"{part.name}." if part.name in chain.parts else ""
    rerun = partial(chain.run_part, part.name, part.place, part.x)
    block = modules.get("")
    own = getattr(block, "act", None)
    for kind, function in ACTIVATIONS.items() if own is not None else ():
        if function is not own:
            with _with(block, "act", function):
                name = next(name for name, other in ACTIVATIONS.items() if other is own)
                yield f"its activation is {kind} in place of {name}", rerun()
    for inner, norm in modules.items():
        if isinstance(norm, Norm):
            yield from _other_norms(f"{before}{inner}", norm, rerun)
    if part.name not in chain.parts:
        yield from _other_poolings(chain, rerun)


def _other_norms(name: str, norm: Any, rerun: Callable[[], Array]) -> Iterator[tuple[str, Array]]:
    """Another eps of a norm, or no norm."""
    own = norm.eps
    for eps in EPSILONS:
        if not math.isclose(eps, own, rel_tol=1e-3):
            with _with(norm, "eps", eps):
                yield f"eps of {name} is {eps:g} in place of {own:g}", rerun()
    with _with(norm, "forward", lambda x: x):
        yield f"{name} is missing", rerun()


def _other_poolings(chain: Chain, rerun: Callable[[], Array]) -> Iterator[tuple[str, Array]]:
    """Another pooling of the same width."""
    model = chain.tail.model
    own = model.pool
    for kind in POOLINGS if own in POOLINGS else ():
        if kind != own:
            with _with(model, "pool", kind):
                yield f"the pooling is {kind} in place of {own}", rerun()


@contextmanager
def _with(module: Any, attribute: str, value: object) -> Iterator[None]:
    own = getattr(module, attribute)
    setattr(module, attribute, value)
    try:
        yield
    finally:
        setattr(module, attribute, own)


def _narrow_ranges(chain: Chain, part: Part) -> Iterator[tuple[str, Array]]:
    """The input of a layer, cut off at the ends of a range that is too narrow for it."""
    from torch import nn

    before = f"{part.name}." if part.name in chain.parts else ""
    for inner, layer in chain.modules(part.name).items():
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        ends: list[float] = []
        with changed_input(layer, partial(_note_ends, ends)):
            chain.run_part(part.name, part.place, part.x)
        low, high = min(ends), max(ends)
        for share in SHARES:
            for least, most in ((low, share * high), (-share * max(-low, high), share * max(-low, high))):
                cause = (
                    f"the input of {before}{inner} has a range of about {least:.3g} to {most:.3g}, and its "
                    f"values are from {low:.3g} to {high:.3g}"
                )
                with changed_input(layer, partial(_cut, least, most)):
                    yield cause, chain.run_part(part.name, part.place, part.x)


def _note_ends(ends: list[float], values: Tensor) -> Tensor:
    ends += [float(values.min()), float(values.max())]
    return values


def _cut(least: float, most: float, values: Tensor) -> Tensor:
    return values.clamp(least, most)
