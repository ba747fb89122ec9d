"""Statistics of the layers' inputs on a calibration set.

The first pass over the images records the minimum, maximum and mean of every channel. Methods other than `minmax` need
a second: a histogram of each layer's inputs after smoothing. Images stream, so memory does not grow with their number.
Results are cached per user under a key of every input that determines them; an interrupted run resumes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any, Literal

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from exporter.artifact import sealed
from exporter.artifact.disk import cache_folder
from exporter.artifact.outputs import DENSE
from exporter.data.calibration import CalibrationSet
from exporter.errors import CheckFailed, ExporterError
from exporter.machine import installed
from exporter.model import structure
from exporter.model.convnext import ConvNeXt
from exporter.progress import note, step, track
from exporter.quantize.rounding import Floats
from exporter.quantize.smoothing import Layer, factors, layers

BINS = 4096
BATCH = 8  # images at once
PIXELS_FEWER = 8  # how many times fewer images are run at once where the outputs are of pixels
COUNTED = 1 << 20  # values that are counted at once
CACHED = 1 << 17  # values of a depthwise convolution that are computed at once, so that they stay in a core's cache
SAVE_S = 5.0  # how often what was measured so far is written down
VERSION = 5
USUAL = frozenset({"pwconv1", "pwconv2", "downsampling", "decoder"})
"""The kinds that are always measured, so that one calibration serves runtimes that quantize different layers."""
See = Callable[[str, torch.Tensor, int], None]
Pass = Literal["extremes", "histogram"]


@dataclass
class Statistics:
    """Statistics of each layer's input, by the name of the layer.

    They are smallest, largest and mean of each channel (C,), the factors by which the channels were divided, and a
    histogram of the divided values in equal bins over `range(name)`.
    """

    low: dict[str, Floats] = field(default_factory=dict)
    high: dict[str, Floats] = field(default_factory=dict)
    total: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    count: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    factor: dict[str, Floats] = field(default_factory=dict)
    histogram: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    sides: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    """Height and width of the feature map that each convolution is given."""
    images: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    """How many images each pass has seen."""

    def largest(self) -> dict[str, Floats]:
        """The largest |x| of every channel."""
        return {name: np.maximum(-self.low[name], self.high[name]) for name in self.low}

    def mean(self, name: str) -> Floats:
        """The mean of every channel, divided by its factor."""
        mean: Floats = (self.total[name] / self.count[name]).astype(np.float32)
        return mean / self.factor[name] if name in self.factor else mean

    def range(self, name: str) -> tuple[float, float]:
        """The smallest and the largest value of a layer's scaled input, zero included."""
        s = self.factor.get(name, np.float32(1))
        return min(0.0, float((self.low[name] / s).min())), max(0.0, float((self.high[name] / s).max()))

    def macs(self, model: ConvNeXt, name: str) -> int:
        """Multiply-accumulates of a layer for one image of the calibration's size."""
        layer = model.get_submodule(name)
        positions = int(self.count[name]) // self.done("extremes")
        if isinstance(layer, torch.nn.Conv2d):
            positions = prod(_output_side(layer, axis, int(side)) for axis, side in enumerate(self.sides[name]))
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        return positions * weight.numel()

    def of(self, names: Collection[str]) -> Statistics:
        """The statistics of these layers."""
        kept = {}
        for kind in dataclasses.fields(self):
            values = getattr(self, kind.name)
            kept[kind.name] = values if kind.name == "images" else {k: v for k, v in values.items() if k in names}
        return Statistics(**kept)

    def done(self, which: Pass) -> int:
        """The number of images that a pass has counted."""
        return int(self.images.get(which, 0))

    def add(self, other: Statistics) -> None:
        """Add the statistics of other images. Only the last bits of `total` depend on the order of additions."""
        _merge(self.low, other.low, np.minimum)
        _merge(self.high, other.high, np.maximum)
        for mine, others in (
            (self.total, other.total),
            (self.count, other.count),
            (self.histogram, other.histogram),
            (self.images, other.images),
        ):
            _merge(mine, others, np.add)
        self.sides |= other.sides

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All arrays by kind and layer, as `of_arrays` takes them."""
        kinds = [kind.name for kind in dataclasses.fields(self)]
        return {f"{kind}|{name}": np.asarray(array) for kind in kinds for name, array in getattr(self, kind).items()}

    @staticmethod
    def of_arrays(arrays: Mapping[str, NDArray[Any]]) -> Statistics:
        """The statistics of which these are the `arrays`."""
        statistics = Statistics()
        for key, array in arrays.items():
            kind, _, name = key.partition("|")
            getattr(statistics, kind)[name] = array
        return statistics


Measure = Callable[[Pass, Statistics], Iterator[Statistics]]
"""Takes the pass and the statistics so far, and yields those of each remaining batch in the order of the images."""


def _merge(mine: dict[str, NDArray[Any]], others: Mapping[str, NDArray[Any]], how: np.ufunc) -> None:
    for name, array in others.items():
        mine[name] = how(mine[name], array) if name in mine else array


def _output_side(conv: torch.nn.Conv2d, axis: int, side: int) -> int:
    """Height (axis 0) or width of the output of a convolution for that of its input."""
    if isinstance(conv.padding, str):
        return side  # "same", whose stride is 1
    reach = conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1
    return (side + 2 * conv.padding[axis] - reach) // conv.stride[axis] + 1


def collect(
    model: ConvNeXt,
    kinds: frozenset[str],
    alpha: float,
    images: CalibrationSet,
    about: Mapping[str, Any],
    histogram: bool = True,
    measure: Measure | None = None,
) -> Statistics:
    """The statistics of a network's layers, from the cache or measured in fp64 (`in_double`); `histogram` is {} in them
    unless it is asked for.

    Args:
        model: in a folded form, not yet smoothed.
        kinds: of the layers whose statistics are returned.
        alpha: as for `smoothing.factors`.
        images: the calibration set.
        about: every fact beside these that the numbers depend on.
        histogram: whether histograms are needed; they take a second pass over the images.
        measure: runs the network elsewhere; by default it runs in this process.

    Raises: CheckFailed when a layer gets NaN or infinity; BadRequest for images that cannot be read.
    """
    measured = sorted({found for name in layers(model, kinds | USUAL) if (found := structure.kind(name))})
    facts = {**about, "kinds": measured, "alpha": alpha, "images": images.ordered_digest, "count": images.total}
    facts |= {"version": VERSION, "bins": BINS, "torch": str(torch.__version__)}
    facts |= {"pillow": installed("pillow")}  # decoders of JPEG differ
    store = Store(facts)
    statistics = store.read()
    if statistics.done("histogram" if histogram else "extremes") == images.total:
        note(f"statistics of these {images.total} images are cached ({store.path})")
    else:
        step(f"calibrating on {images.total} images of {images.source}")
    measure = measure or partial(_measure_here, model, kinds, images)
    _pass(measure, images, statistics, "extremes", store)
    statistics.factor = factors(model, statistics.largest(), alpha)
    if histogram:
        _pass(measure, images, statistics, "histogram", store)
    return statistics.of(layers(model, kinds))


def batch_size(model: ConvNeXt) -> int:
    """How many images a batch of the statistics has."""
    return some_of(model, BATCH)


def measure_batches(
    model: ConvNeXt,
    kinds: frozenset[str],
    images: CalibrationSet,
    which: Pass,
    ranges: Statistics,
    first: int = 0,
    last: int | None = None,
) -> Iterator[Statistics]:
    """The statistics of each batch of images.

    Args:
        model: as for `collect`, but in fp64 (`in_double`).
        kinds: as for `collect`.
        images: the whole set.
        which: the pass.
        ranges: for histograms, minimum, maximum and factor of each channel over all images.
        first: the number of the first image.
        last: the number of the image after the last; None for all.

    Raises: as `collect` does.
    """
    watched = layers(model, kinds | USUAL)
    for batch in images.batches(batch_size(model), first, last):
        part = Statistics(images={which: np.asarray(len(batch.names))})
        see = partial(_extremes, part) if which == "extremes" else partial(_histogram, part, ranges)
        with watching(watched, see), torch.inference_mode():
            model(torch.from_numpy(batch.images).double())
        yield part


def _measure_here(
    model: ConvNeXt, kinds: frozenset[str], images: CalibrationSet, which: Pass, statistics: Statistics
) -> Iterator[Statistics]:
    """A `Measure` of this process."""
    with in_double(model):
        yield from measure_batches(model, kinds, images, which, statistics, statistics.done(which))


@contextmanager
def in_double(model: ConvNeXt) -> Iterator[None]:
    """Run an fp32 network in fp64 inside the `with` block, in place, and restore fp32 on exit.

    The last bits of an fp32 sum depend on the instruction set and the number of threads, and scales, biases and the
    artifact's bytes would depend on them too. Differences in fp64 are about 1e-16 of a value and practically never
    survive rounding to fp32. `_depthwise` replaces PyTorch's fp64 depthwise convolution, which is several times slower.
    """
    depthwise = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d) and _is_plain_depthwise(m)]
    try:
        model.double()
        for module in depthwise:
            module.forward = partial(_depthwise, module)  # type: ignore[method-assign]
        yield
    finally:
        for module in depthwise:
            vars(module).pop("forward", None)
        model.float()


def some_of(model: ConvNeXt, count: int) -> int:
    """How many images to run at once instead of `count`: fewer through a head that computes large maps."""
    return max(1, count // PIXELS_FEWER) if set(DENSE) & set(model.spec.tasks) else count


def _is_plain_depthwise(conv: torch.nn.Conv2d) -> bool:
    alone = conv.groups == conv.in_channels == conv.out_channels
    plain = conv.stride == conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    return alone and plain and not isinstance(conv.padding, str)


def _depthwise(conv: torch.nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """A depthwise convolution of stride 1 as a sum of shifted inputs: (N, C, H, W) to (N, C, H', W') with
    H' = H + 2 · padding − kernel + 1.

    Channels are last in memory, so that a shifted input is read in long rows also where the map is small.
    """
    assert not isinstance(conv.padding, str)
    rows, columns = conv.padding
    padded = torch.nn.functional.pad(x.permute(0, 2, 3, 1), (0, 0, columns, columns, rows, rows)).contiguous()
    height, width = (padded.shape[axis] - conv.kernel_size[axis - 1] + 1 for axis in (1, 2))
    taps = conv.weight[:, 0].permute(1, 2, 0).contiguous()
    output = padded.new_zeros(len(x), height, width, x.shape[1])
    if conv.bias is not None:
        output += conv.bias
    row = output[0, 0].numel()
    images_each, rows_each = max(1, CACHED // (height * row)), max(1, CACHED // row)
    for first in range(0, len(x), images_each):
        for top in range(0, height, rows_each):
            images = slice(first, first + images_each)
            _add_taps(padded[images, top:], taps, output[images, top : top + rows_each])
    return output.permute(0, 3, 1, 2)


def _add_taps(padded: torch.Tensor, taps: torch.Tensor, total: torch.Tensor) -> None:
    """Add the products of every tap of a depthwise kernel (K, K, C) to rows of an output (N, H', W', C)."""
    height, width = total.shape[1:3]
    for i in range(taps.shape[0]):
        for j in range(taps.shape[1]):
            total.addcmul_(padded[:, i : i + height, j : j + width], taps[i, j])


def _pass(measure: Measure, images: CalibrationSet, statistics: Statistics, which: Pass, store: Store) -> None:
    """Add the images that this pass has not counted yet, and save the statistics from time to time.

    They are saved between batches only, so that no image is counted twice.
    """
    left = images.total - statistics.done(which)
    if not left:
        return
    saved = time.monotonic()
    try:
        for part in track(measure(which, statistics), left, which, lambda part: part.done(which)):
            statistics.add(part)
            if time.monotonic() - saved > SAVE_S:
                store.write(statistics)
                saved = time.monotonic()
    except ExporterError:
        store.write(statistics)
        raise
    store.write(statistics)


@contextmanager
def watching(watched: Mapping[str, Layer], see: See) -> Iterator[None]:
    """Call `see` with the name and the input of each layer, and the axis of its channels, inside the `with` block."""

    def before_forward(name: str, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0]
        see(name, x, 1 if isinstance(module, torch.nn.Conv2d) else x.ndim - 1)

    hooks = [module.register_forward_pre_hook(partial(before_forward, name)) for name, module in watched.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _extremes(statistics: Statistics, name: str, x: torch.Tensor, axis: int) -> None:
    # Over the other axes, without a copy that has the channels last: several times faster.
    others = [other for other in range(x.ndim) if other != axis]
    low, high = (end.float().numpy() for end in (x.amin(others), x.amax(others)))
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise CheckFailed(f"the input of {name} has NaN or infinity: it has no range; verify the fp32 export")
    total = x.sum(others, dtype=torch.float64).numpy()
    sides = {name: np.asarray([x.shape[other] for other in others[1:]])} if x.ndim == 4 else {}
    count = np.asarray(x.numel() // x.shape[axis])
    statistics.add(Statistics({name: low}, {name: high}, {name: total}, {name: count}, sides=sides))


def _histogram(statistics: Statistics, ranges: Statistics, name: str, x: torch.Tensor, axis: int) -> None:
    low, high = ranges.range(name)
    counts = np.zeros(BINS)
    if high > low:
        bins_each = BINS / (high - low)
        scale = torch.full((x.shape[axis],), bins_each, dtype=torch.float64)
        if name in ranges.factor:
            scale /= torch.from_numpy(ranges.factor[name])
        scale = scale.view(-1, *[1] * (x.ndim - 1 - axis))
        for part in torch.split(x, max(1, COUNTED * len(x) // x.numel())):
            bins = (part * scale).sub_(low * bins_each).clamp_(0, BINS - 1).to(torch.int32)
            counts += torch.bincount(bins.flatten(), minlength=BINS).numpy()
    statistics.add(Statistics(histogram={name: counts}))


class Store:
    """The cache of statistics: one sealed file for each cache key."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.facts = msgspec.json.encode(facts, order="deterministic")
        key = hashlib.sha256(self.facts).hexdigest()[:32]
        self.path = cache_folder() / "statistics" / f"{key}.sealed"

    def read(self) -> Statistics:
        """The cached statistics; empty when the file is damaged or has another key."""
        return Statistics.of_arrays(sealed.read(self.path, self.facts, "the statistics are measured again"))

    def write(self, statistics: Statistics) -> None:
        """Write the statistics to the cache; an error is ignored, because the cache is optional."""
        sealed.write(self.path, self.facts, statistics.arrays())
