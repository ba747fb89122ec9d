"""The reference network as a chain of parts, each of which can be run on any input of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from exporter.backends import Array, Outputs

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from exporter.model.convnext import ConvNeXt, Embedding, Features

TAIL = "norm and head"
"""The name of the last part: pooling, the last norm, and the head."""


class Chain:
    """The parts of a network in the order they run: downsampling layers, blocks, and what follows the last block."""

    def __init__(self, model: ConvNeXt | Embedding | Features) -> None:
        self.model = model
        self.parts: dict[str, Module] = {}
        for stage, (downsample, blocks) in enumerate(zip(model.downsample_layers, model.stages, strict=True)):
            self.parts[f"downsample_layers.{stage}"] = downsample
            self.parts |= {f"stages.{stage}.{index}": block for index, block in blocks.named_children()}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parts, without the tail."""
        return tuple(self.parts)

    def is_block(self, name: str) -> bool:
        """Whether a part adds its input to its output."""
        return name.startswith("stages.")

    def run(self, name: str, x: Array) -> Array:
        """The output of one part (N, C', H', W') for its input (N, C, H, W)."""
        return _as_array(self._run(self.parts[name], x))

    def tail(self, x: Array) -> Outputs | None:
        """The outputs for the output of the last block; None where the outputs are feature maps."""
        import torch

        from exporter.model.convnext import Features

        if isinstance(self.model, Features):
            return None
        with torch.inference_mode():
            outputs = self.model.finish(torch.from_numpy(np.ascontiguousarray(x)))
        return tuple(map(_as_array, outputs if isinstance(outputs, tuple) else (outputs,)))

    def whole(self, images: Array) -> Outputs:
        """The outputs for images (N, C, H, W)."""
        import torch

        with torch.inference_mode():
            outputs = self.model(torch.from_numpy(images))
        return tuple(map(_as_array, outputs if isinstance(outputs, tuple) else (outputs,)))

    def inner(self, name: str, x: Array) -> dict[str, Array]:
        """What every module within a part gives for its input, by name."""
        seen: dict[str, Array] = {}

        def keep(inner: str) -> Callable[..., None]:
            return lambda module, inputs, output: seen.__setitem__(f"{name}.{inner}", _as_array(output))

        modules = [(inner, module) for inner, module in self.parts[name].named_modules() if inner]
        handles = [module.register_forward_hook(keep(inner)) for inner, module in modules]
        try:
            self._run(self.parts[name], x)
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def _run(self, module: Module, x: Array) -> Tensor:
        import torch

        with torch.inference_mode():
            output: Tensor = module(torch.from_numpy(np.ascontiguousarray(x)))
        return output


def _as_array(tensor: Tensor) -> Array:
    array: Array = tensor.numpy()
    return array
