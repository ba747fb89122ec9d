"""Eager PyTorch: the model that every artifact is held against."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from exporter.artifact import Artifact
from exporter.backends import Array, Backend, Layer, Options, Outputs, require
from exporter.errors import BadRequest, Unavailable

if TYPE_CHECKING:
    import torch


class EagerOptions(Options, frozen=True):
    """`weights` says where the checkpoint lies now; None is where the artifact was made from."""

    weights: str | None = None


class EagerSession:
    """The PyTorch network an artifact was made from, in fp32."""

    def __init__(self, model: torch.nn.Module, device: str) -> None:
        self.model, self.device = model, device
        self.facts = {"device": device, "arithmetic": "fp32"}

    def __call__(self, images: Array) -> Outputs:
        """Run: images (N, 3, H, W) float32 to outputs (N, …) float32."""
        import torch

        outputs = self._forward(torch.from_numpy(np.ascontiguousarray(images)).to(self.device))
        return tuple(output.float().cpu().numpy() for output in outputs)

    def bind(self, images: Array) -> Callable[[], None]:
        """The images on the device, and one run of the model over them."""
        import torch

        held = torch.from_numpy(np.ascontiguousarray(images)).to(self.device)

        def run() -> None:
            self._forward(held)
            if held.is_cuda:
                torch.cuda.synchronize()

        return run

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
    model = weights.reload(artifact, options.weights).model(artifact.sidecar.task)
    yield EagerSession(model.to(options.device), options.device)


def _nothing_to_build(artifact: Artifact, precision: str, out: Path) -> Artifact:
    raise BadRequest("eager PyTorch is what artifacts are held against; it builds none")


def layers(artifact: Artifact, options: EagerOptions) -> list[Layer]:
    """The modules of the network."""
    from exporter.model import weights

    model = weights.reload(artifact, options.weights).model(artifact.sidecar.task)
    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    return [Layer(name=n, module=n, operator=type(m).__name__, precision="fp32") for n, m in leaves]


BACKEND = Backend(
    name="eager",
    precisions=frozenset({"fp32"}),
    options=EagerOptions,
    probe=probe,
    lower=_nothing_to_build,
    build=_nothing_to_build,
    session=session,
    layers=layers,
)
