"""Eager PyTorch: the model that every artifact is held against."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from exporter.artifact import Artifact
from exporter.backends import (
    Array,
    Backend,
    Blocks,
    Bound,
    Layer,
    Options,
    Outputs,
    Product,
    Target,
    ends_of_blocks,
    peak_matrix,
    require,
)
from exporter.errors import BadRequest, Unavailable

if TYPE_CHECKING:
    import torch


class EagerOptions(Options, frozen=True):
    """`weights` says where the checkpoint lies now, None being where the artifact was made from; `compiled` runs the
    network through torch.compile."""

    weights: str | None = None
    compiled: bool = False


class EagerSession:
    """The PyTorch network an artifact was made from, in fp32."""

    def __init__(self, model: Any, device: str) -> None:
        self.model, self.device = model, device
        self.facts = {"device": device, "arithmetic": "fp32"}

    def __call__(self, images: Array) -> Outputs:
        """Run: images (N, 3, H, W) float32 to outputs (N, …) float32."""
        import torch

        outputs = self._forward(torch.from_numpy(np.ascontiguousarray(images)).to(self.device))
        return tuple(output.float().cpu().numpy() for output in outputs)

    def bind(self, batches: Sequence[Array]) -> Bound:
        """The images on the device, and one run of the model over a batch."""
        import torch

        held = [torch.from_numpy(np.ascontiguousarray(images)).to(self.device) for images in batches]
        turn = itertools.cycle(held)
        last: tuple[torch.Tensor, ...] = ()

        def run() -> None:
            nonlocal last
            last = self._forward(next(turn))
            if held[0].is_cuda:
                torch.cuda.synchronize()

        return Bound(run, lambda: tuple(output.float().cpu().numpy() for output in last))

    def _forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        import torch

        with torch.inference_mode():
            outputs = self.model(images)
        return outputs if isinstance(outputs, tuple) else (outputs,)


def probe() -> str:
    """The version of torch."""
    return require("torch", "cpu")


@contextmanager
def session(artifact: Artifact, options: EagerOptions) -> Iterator[EagerSession]:
    """The network that an artifact was made from, found through its sidecar.

    Raises: BadRequest when the weights are others now; Unavailable when they or the device are not there.
    """
    import torch

    from exporter.model import weights

    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise Unavailable("torch sees no CUDA device here; use --device cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
    model = weights.reload(artifact, options.weights).model(artifact.sidecar.task).to(options.device)
    yield EagerSession(torch.compile(model) if options.compiled else model, options.device)


def _nothing_to_build(artifact: Artifact, precision: str, out: Path, *target: Target) -> Artifact:
    raise BadRequest("eager PyTorch is what artifacts are held against; it builds none")


def layers(artifact: Artifact, options: EagerOptions) -> list[Layer]:
    """The modules of the network."""
    from exporter.model import weights

    model = weights.reload(artifact, options.weights).model(artifact.sidecar.task)
    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    return [Layer(name=n, module=n, operator=type(m).__name__, precision="fp32") for n, m in leaves]


@contextmanager
def blocks(artifact: Artifact, options: EagerOptions) -> Iterator[Blocks]:
    """The network with a hook on every block."""
    with session(artifact, options) as opened:
        modules = dict(opened.model.named_modules())
        names = tuple(ends_of_blocks(f"{name}/" for name in modules))
        seen: dict[str, Array] = {}
        for name in names:
            modules[name].register_forward_hook(
                lambda module, given, output, name=name: seen.__setitem__(name, output.float().cpu().numpy())
            )

        def run(images: Array) -> Outputs:
            opened(images)
            return tuple(seen[name] for name in names)

        yield Blocks(names, run)


@contextmanager
def peak(artifact: Artifact, options: EagerOptions) -> Iterator[Product]:
    """A matrix product of torch's."""
    import torch

    del artifact
    weight = torch.from_numpy(peak_matrix()).to(options.device)
    yield Product(EagerSession(lambda given: given @ weight, options.device))


def form(precision: str, batch: int | None) -> str:
    """As the papers write it: this is the model that forms are held against."""
    del precision, batch
    return "plain"


BACKEND = Backend(
    name="eager",
    precisions=frozenset({"fp32"}),
    options=EagerOptions,
    probe=probe,
    lower=_nothing_to_build,
    build=_nothing_to_build,
    session=session,
    layers=layers,
    blocks=blocks,
    peak=peak,
    form=form,
)
