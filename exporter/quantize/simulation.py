"""Simulation of the quantized network in PyTorch: bias correction, and the sensitivity of each part.

Inputs and weights are quantized as in the Q/DQ graph; products are computed in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from msgspec import structs
from torch import Tensor, nn

from exporter.data.calibration import CalibrationSet
from exporter.model.convnext import ConvNeXt
from exporter.model.multiscale import ConvReLU
from exporter.model.structure import part
from exporter.progress import step, track
from exporter.quantize import QuantizeOptions, ranges
from exporter.quantize.rounding import LARGEST, Floats, Plan, Rounding, round_weights
from exporter.quantize.smoothing import Layer, layers
from exporter.quantize.statistics import Statistics, in_double, some_of

CORRECTING = 32  # images at once that the full bias correction looks at
JUDGING = 32  # images that sensitivities are measured on


def plan(
    model: ConvNeXt,
    kinds: frozenset[str],
    symmetric: bool,
    statistics: Statistics,
    images: CalibrationSet,
    options: QuantizeOptions,
) -> Plan:
    """Compute the quantization of every layer of these kinds.

    Args:
        model: smoothed with the factors of the statistics.
        kinds: of the layers to quantize.
        symmetric: whether activations are quantized around zero.
        statistics: the statistics.
        images: for the full bias correction.
        options: the grid, the method and the bias correction.
    """
    roundings: Plan = {}
    watched = layers(model, kinds)
    for name, layer in watched.items():
        counts = statistics.histogram.get(name, np.zeros(0))
        low, high = ranges.choose(counts, *statistics.range(name), options.method, symmetric)
        scale, zero_point = ranges.scale_of(low, high, symmetric, LARGEST[options.grid])
        shift = np.zeros(layer.weight.shape[0], np.float32)
        roundings[name] = Rounding(
            scale, zero_point, symmetric, shift, options.grid, options.inputs, options.half, options.exact_pairs
        )
        if options.bias_correction == "fast":
            roundings[name] = replace(roundings[name], shift=_fast_shift(layer, statistics.mean(name), roundings[name]))
    return _full(model, roundings, images) if options.bias_correction == "full" else roundings


def _fast_shift(layer: Layer, mean: Floats, rounding: Rounding) -> Floats:
    """The change of the mean output by quantizing the weights: (W − Ŵ)·E[x] (Nagel et al., "Data-free quantization
    through weight equalization and bias correction", ICCV 2019, section 4.2, with E[x] as measured)."""
    lost = layer.weight.detach().double() - rounded_weight(layer, rounding)
    taps: Tensor = lost.flatten(2).sum(2) if lost.ndim > 2 else lost
    mean_input = torch.from_numpy(mean).double()
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:  # depthwise: each channel has its own
        taps, mean_input = taps * mean_input[:, None], torch.ones(1, dtype=torch.float64)
    shift: Floats = (taps @ mean_input).float().numpy()
    return shift


def _full(model: ConvNeXt, roundings: Plan, images: CalibrationSet) -> Plan:
    """Correct the mean output of one layer after the other, with all earlier layers quantized and corrected.

    The fp32 and the quantized network run on the same batch, so memory does not grow with the set.
    """
    batch = torch.from_numpy(next(iter(images.batches(min(some_of(model, CORRECTING), images.total)))).images).double()
    step(f"correcting biases on {len(batch)} images")
    expected: dict[str, Tensor] = {}
    corrected = dict(roundings)

    def remember(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        expected[name] = _channel_means(module, _before_relu(module, inputs, output))

    def correct(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        output = _before_relu(module, inputs, output)
        shift = expected[name] - _channel_means(module, output)
        corrected[name] = replace(roundings[name], shift=shift.float().numpy())
        output = output + (shift[:, None, None] if isinstance(module, nn.Conv2d) else shift)
        return output.relu() if isinstance(module, ConvReLU) else output

    with torch.no_grad():
        with in_double(model), _hooked(model, roundings, remember):
            model(batch)
        with rounded(model, roundings), in_double(model), _hooked(model, roundings, correct):
            model(batch)
    return corrected


def _before_relu(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """The output of a layer to which its bias is added."""
    return nn.Conv2d.forward(module, *inputs) if isinstance(module, ConvReLU) else output


def _channel_means(module: nn.Module, output: Tensor) -> Tensor:
    axes = [0, 2, 3] if isinstance(module, nn.Conv2d) else list(range(output.ndim - 1))
    return output.mean(axes)


@contextmanager
def _hooked(model: ConvNeXt, names: Iterable[str], hook: Callable[..., Tensor | None]) -> Iterator[None]:
    handles = [model.get_submodule(name).register_forward_hook(partial(hook, name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def rounded(model: ConvNeXt, roundings: Plan) -> Iterator[None]:
    """Quantize the inputs and weights, and shift the biases, of a plan's layers inside the `with` block."""
    kept: list[tuple[Layer, Tensor, Tensor | None]] = []
    handles = []
    try:
        for name, rounding in roundings.items():
            layer = model.get_submodule(name)
            assert isinstance(layer, nn.Linear | nn.Conv2d)
            kept.append((layer, layer.weight, layer.bias))
            shift = torch.from_numpy(rounding.shift)
            layer.weight = nn.Parameter(rounded_weight(layer, rounding), requires_grad=False)
            layer.bias = nn.Parameter(shift if layer.bias is None else layer.bias + shift, requires_grad=False)
            if rounding.inputs:
                handles.append(layer.register_forward_pre_hook(partial(_round_input, rounding)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer, weight, bias in kept:
            layer.weight = nn.Parameter(weight, False)
            layer.bias = None if bias is None else nn.Parameter(bias, False)


def _round_input(rounding: Rounding, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    del module
    if rounding.grid == "fp8":
        largest = LARGEST["fp8"]
        steps = (inputs[0] / rounding.scale).clamp(-largest, largest)  # beyond it PyTorch gives NaN, ONNX the largest
        return (steps.to(torch.float8_e4m3fn).to(inputs[0].dtype) * rounding.scale,)
    low, high = (-127, 127) if rounding.symmetric else (0, 255)
    return (
        torch.fake_quantize_per_tensor_affine(
            inputs[0], rounding.scale, rounding.zero_point, low, high
        ),
    )  # fmt: skip


def rounded_weight(layer: Layer, rounding: Rounding) -> Tensor:
    """The quantized weights, dequantized to fp32."""
    weight = layer.weight.detach().numpy()
    whole, scale = round_weights(weight, 0, rounding.grid, rounding.half, rounding.exact_pairs)
    return torch.from_numpy(whole.astype(np.float32) * scale.reshape(-1, *[1] * (weight.ndim - 1)))


def sensitivities(model: ConvNeXt, plan: Plan, images: CalibrationSet) -> dict[str, float]:
    """The sensitivity of each part: the mean square error of the outputs, as a share of their variance, with only this
    part quantized; the most sensitive part first."""
    batch = torch.from_numpy(next(iter(images.batches(min(some_of(model, JUDGING), images.total)))).images)
    parts: dict[str, Plan] = {}
    for name, rounding in plan.items():
        parts.setdefault(part(name), {})[name] = rounding
    step(f"measuring the sensitivity of {len(parts)} parts on {len(batch)} images")
    with torch.inference_mode():
        expected = _outputs(model, batch)
        errors: dict[str, float] = {}
        for name in track(parts, len(parts), "parts", lambda _: 1):
            with rounded(model, parts[name]):
                errors[name] = _noise(expected, _outputs(model, batch))
    return dict(sorted(errors.items(), key=lambda item: -item[1]))


def _outputs(model: ConvNeXt, batch: Tensor) -> tuple[Tensor, ...]:
    """The outputs, of heads as logits: numbers of classes say nothing about the size of an error. Logits of pixels are
    those before the last resize, of which there are 16 times fewer."""
    spec = model.spec
    model.spec = structs.replace(spec, answer="logits4" if "segment" in spec.tasks else "logits")
    try:
        return _run(model, batch)
    finally:
        model.spec = spec


def _run(model: ConvNeXt, batch: Tensor) -> tuple[Tensor, ...]:
    outputs = [model(batch[start : start + 8]) for start in range(0, len(batch), 8)]
    columns = zip(*(one if isinstance(one, tuple) else (one,) for one in outputs), strict=True)
    return tuple(torch.cat(column) for column in columns)


def _noise(expected: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> float:
    shares = [float(((b - a) ** 2).mean() / a.var().clamp(min=1e-20)) for a, b in zip(expected, outputs, strict=True)]
    return sum(shares) / len(shares)
