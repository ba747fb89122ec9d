"""Finds the single weight or bias whose change explains the error of a part.

Each weight or bias is fitted alone, the smallest first. With as many numbers as equations any error can be fitted, so
the remaining error is compared with that of a fit to noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from exporter.backends import Array
from exporter.errors import some

if TYPE_CHECKING:
    from torch import Tensor

LEFT = 1 / 4  # share of a noise fit's remaining error below which a tensor counts as the cause
ITERATIONS = 60
MOST = 2**20  # numbers of an input that are used, whole images
SHOWN = 0.1  # of the largest change of a channel: a channel that changes less is not named

Run = Callable[[Mapping[str, "Tensor"], "Tensor"], "Tensor"]


def other_weights(tensors: Mapping[str, Tensor], run: Run, x: Array, y: Array) -> Iterator[tuple[str, float]]:
    """The tensors that explain an error, the smallest first: which one differs, and the share of the error left.

    Args:
        tensors: weights and biases of the part in the reference model, by name.
        run: (some tensors by name in place of its own, input) to the output of the part.
        x, y: input and output (N, …) of the part in the artifact.
    """
    import torch

    count = max(1, min(len(x), MOST * len(x) // x.size))
    inputs, wanted = torch.from_numpy(x[:count].copy()), torch.from_numpy(y[:count].copy())
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].numel()):
        free = 1 - tensor.numel() / wanted.numel()
        if free <= 0:
            return  # the others are larger
        change, left = _fit(tensor.detach(), lambda fitted, name=name: run({name: fitted}, inputs), wanted)  # type: ignore[misc]
        if left < LEFT * math.sqrt(free):
            yield f"{name} differs{_channels(change)}", left


def _fit(own: Tensor, run: Callable[[Tensor], Tensor], wanted: Tensor) -> tuple[Array, float]:
    """The change of a tensor that brings the output nearest, and the share of the error that is left."""
    import torch

    size = float(own.square().mean().sqrt()) or 1.0
    change = torch.zeros_like(own, requires_grad=True)
    with torch.no_grad():
        before = (run(own) - wanted).square().mean()
    optimizer = torch.optim.LBFGS([change], max_iter=ITERATIONS, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (run(own + size * change) - wanted).square().mean() / before
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        left = float((run(own + size * change) - wanted).square().mean() / before)
    return (size * change).detach().numpy(), math.sqrt(left) if math.isfinite(left) else math.inf


def _channels(change: Array) -> str:
    """The channels that a change is in, if they are fewer than half."""
    sizes = np.abs(change.reshape(len(change), -1)).max(1)
    changed = np.flatnonzero(sizes > SHOWN * sizes.max())
    return f" in channels {some(map(str, changed))}" if 2 * len(changed) < len(change) else ""
