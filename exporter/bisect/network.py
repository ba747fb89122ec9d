"""The reference model as a chain of parts, each of which can be run on any input of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from msgspec.structs import replace

from exporter.artifact.outputs import Content
from exporter.backends import Array, Outputs
from exporter.model import structure

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from exporter.model.convnext import ConvNeXt

TAIL = "norm and head"
"""The name of the last part: pooling, the last norm and the head, or the norms of feature maps."""
Keep = Callable[[str, "Module", "Tensor", "Tensor"], None]


class Chain:
    """The parts of a network in the order they run: downsampling layers, blocks, and what follows the last block."""

    def __init__(self, model: ConvNeXt) -> None:
        from exporter.model.convnext import Tail

        self.model = model
        self.parts: dict[str, Module] = {}
        self.last: set[str] = set()  # of each stage
        for stage, (downsample, blocks) in enumerate(zip(model.downsample_layers, model.stages, strict=True)):
            self.parts[f"downsample_layers.{stage}"] = downsample
            self.parts |= {f"stages.{stage}.{index}": block for index, block in blocks.named_children()}
            self.last.add(list(self.parts)[-1])
        without_maps = copy.copy(model)  # of the same modules
        without_maps.spec = replace(model.spec, tasks=tuple(task for task in model.spec.tasks if task != "features"))
        self.tail = Tail(without_maps)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parts, without the tail."""
        return tuple(self.parts)

    def is_block(self, name: str) -> bool:
        """Whether a part adds its input to its output."""
        return bool(structure.block(name))

    def contents(self) -> list[Content]:
        """What each output of the network holds."""
        return list(self.model.spec.named(list(self.model.heads), range(len(self.model.stages))).values())

    def is_tail(self, place: int) -> bool:
        """Whether an output of the network is computed from that of the last block alone: it is no feature map."""
        return self.contents()[place] != "map"

    def is_logits(self, place: int) -> bool:
        """Whether an output of the network is the logits of a head."""
        return self.contents()[place] == "logits"

    def ends_stage(self, name: str) -> bool:
        """Whether a part is the last one of its stage."""
        return name in self.last

    def tail_name(self, hidden: Sequence[str]) -> str:
        """The name of the tail together with the parts before it that an artifact does not show."""
        return f"{hidden[0]} … {TAIL}" if hidden else TAIL

    def run(self, name: str, x: Array) -> Array:
        """The output of one part (N, C', H', W') for its input (N, C, H, W)."""
        return _as_arrays(_run(self.parts[name], x))[0]

    def run_part(self, name: str, place: int, x: Array) -> Array:
        """The output of one part, of the tail the one at a place, for its input (N, C, H, W)."""
        if name in self.parts:
            return self.run(name, x)
        return _as_arrays(_run(self.tail, x))[self._place_without_maps(place)]

    def run_all(self, names: Sequence[str], x: Array) -> Array:
        """The output of the last of these parts for the input of the first; without parts the input."""
        for name in names:
            x = self.run(name, x)
        return x

    def modules(self, name: str) -> dict[str, Module]:
        """The modules of a part by their names within it; those of the tail by their full names."""
        if name in self.parts:
            return dict(self.parts[name].named_modules())
        return {inner: one for inner, one in self.model.named_modules() if structure.is_in(inner, ["head"])}

    def run_with(self, name: str, place: int, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The output of a part, of the tail the one at a place, with other weights, as tensors that gradients reach."""
        from torch.func import functional_call

        if name in self.parts:
            output: Tensor = functional_call(self.parts[name], dict(tensors), (x,))
            return output
        weights = {f"model.{key}": value for key, value in tensors.items()}
        outputs = functional_call(self.tail, weights, (x,))
        tail: Tensor = outputs[self._place_without_maps(place)]
        return tail

    def _place_without_maps(self, place: int) -> int:
        """The place of an output among those that are no feature maps."""
        return sum(content != "map" for content in self.contents()[:place])

    def finish(self, stages: Sequence[Array]) -> Outputs:
        """The outputs of the network for the outputs of its stages, (N, C, H, W) each."""
        import torch

        with torch.inference_mode():
            return _as_arrays(self.model.finish([torch.from_numpy(np.ascontiguousarray(x)) for x in stages]))

    def whole(self, images: Array) -> Outputs:
        """The outputs for images (N, C, H, W)."""
        return _as_arrays(_run(self.model, images))

    def record(self, name: str, x: Array, keep: Keep) -> None:
        """Run a part, and call `keep` with the full name of each module within it, the module, its input and output."""
        modules = [(inner, module) for inner, module in self.modules(name).items() if inner]
        before = f"{name}." if name in self.parts else ""

        def see(inner: str, module: Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            keep(f"{before}{inner}", module, inputs[0], output)

        handles = [module.register_forward_hook(partial(see, inner)) for inner, module in modules]
        try:
            self.run_part(name, 0, x)
        finally:
            for handle in handles:
                handle.remove()


def _run(module: Callable[[Tensor], Tensor | tuple[Tensor, ...]], x: Array) -> tuple[Tensor, ...]:
    import torch

    with torch.inference_mode():
        outputs = module(torch.from_numpy(np.ascontiguousarray(x)))
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _as_arrays(tensors: tuple[Tensor, ...]) -> Outputs:
    return tuple(tensor.numpy() for tensor in tensors)


@contextmanager
def changed_input(layer: Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change the input of a layer inside the `with` block."""

    def hook(module: Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (change(inputs[0]),)

    handle = layer.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
