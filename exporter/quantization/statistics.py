"""What the inputs of a network's layers are like on a calibration set: measured in two passes, kept by content.

The first pass finds the extremes and the mean of every channel, the second counts how often each value occurs once
channels are scaled (`smoothing`). Images stream, so memory does not grow with their number. What was measured is kept
in the user's cache under everything it depends on; what an interrupt leaves is taken up again.
"""

from __future__ import annotations

import hashlib
import io
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from exporter.data.calibration import CalibrationSet
from exporter.disk import cache_folder, write_file
from exporter.errors import CheckFailed, ExporterError
from exporter.graph.rounding import Floats
from exporter.progress import note, step, track
from exporter.quantization.smoothing import Layer, Network, factors, layers

BINS = 4096
BATCH = 8
SAVE_S = 5.0  # how often what was measured so far is written down
VERSION = 1
See = Callable[[str, torch.Tensor], None]


@dataclass
class Statistics:
    """Of each layer's input, by the layer's name: smallest, largest and mean of each channel (C,), the factors that
    the channels were divided by, and how often each value occurs then, in equal bins from `range(name)`."""

    low: dict[str, Floats] = field(default_factory=dict)
    high: dict[str, Floats] = field(default_factory=dict)
    total: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    count: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    factor: dict[str, Floats] = field(default_factory=dict)
    histogram: dict[str, NDArray[np.float64]] = field(default_factory=dict)
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

    def macs(self, model: Network, name: str) -> int:
        """Multiply-accumulates of a layer for one image of the calibration's size."""
        layer = model.get_submodule(name)
        positions = int(self.count[name]) // self.done("extremes")
        if isinstance(layer, torch.nn.Conv2d):
            positions //= layer.stride[0] * layer.stride[1]
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        return positions * weight.numel()

    def done(self, which: str) -> int:
        """How many images a pass has seen."""
        return int(self.images.get(which, 0))


def collect(
    model: Network, kinds: frozenset[str], alpha: float, images: CalibrationSet, about: Mapping[str, Any]
) -> Statistics:
    """The statistics of a network's layers, from the cache or measured.

    Args:
        model: in a folded form, not yet smoothed.
        kinds: of the layers to watch.
        alpha: as for `smoothing.factors`.
        images: the calibration set.
        about: every fact beside these that the numbers depend on.

    Raises: CheckFailed when a layer gets NaN or infinity; BadRequest for images that cannot be read.
    """
    facts = {**about, "kinds": sorted(kinds), "alpha": alpha, "images": images.digest, "count": images.total}
    facts |= {"version": VERSION, "bins": BINS, "torch": str(torch.__version__)}
    store = Store(facts)
    found = store.read()
    if found.done("histogram") == images.total:
        note(f"statistics of these {images.total} images are remembered ({store.path})")
        return found
    step(f"calibrating on {images.total} images of {images.source}")
    watched = layers(model, kinds)
    passes: tuple[tuple[str, See], ...] = (
        ("extremes", partial(_extremes, found)),
        ("histogram", partial(_histogram, found)),
    )
    for which, see in passes:
        if which == "histogram" and not found.done(which):
            found.factor = factors(model, found.largest(), alpha)
        with watching(watched, see):
            _pass(model, images, found, which, store)
    return found


def _pass(model: Network, images: CalibrationSet, found: Statistics, which: str, store: Store) -> None:
    """Run the images that this pass has not seen yet, and write down now and then what was seen: only between
    batches, so that none is counted twice."""
    left = images.total - found.done(which)
    saved = time.monotonic()
    for batch in track(images.batches(BATCH, found.done(which)), left, which, lambda batch: len(batch.names)):
        with torch.inference_mode():
            model(torch.from_numpy(batch.images))
        found.images[which] = np.asarray(found.done(which) + len(batch.names))
        if time.monotonic() - saved > SAVE_S:
            store.write(found)
            saved = time.monotonic()
    store.write(found)


@contextmanager
def watching(watched: Mapping[str, Layer], see: See) -> Iterator[None]:
    """Within, `see` is told the input of each layer, channels last (…, C)."""

    def told(name: str, module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        x = given[0]
        see(name, x.movedim(1, -1) if isinstance(module, torch.nn.Conv2d) else x)

    hooks = [module.register_forward_pre_hook(partial(told, name)) for name, module in watched.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _extremes(found: Statistics, name: str, x: torch.Tensor) -> None:
    flat = x.reshape(-1, x.shape[-1])
    low, high = (end.numpy() for end in torch.aminmax(flat, dim=0))
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise CheckFailed(f"{name} is given NaN or infinity: this network cannot be quantised; verify its fp32 export")
    total = flat.sum(0, dtype=torch.float64).numpy()
    before = name in found.low
    found.low[name] = np.minimum(found.low[name], low) if before else low.copy()
    found.high[name] = np.maximum(found.high[name], high) if before else high.copy()
    found.total[name] = found.total[name] + total if before else total
    found.count[name] = found.count.get(name, np.asarray(0)) + len(flat)


def _histogram(found: Statistics, name: str, x: torch.Tensor) -> None:
    low, high = found.range(name)
    scaled = x / torch.from_numpy(found.factor[name]) if name in found.factor else x
    counts = torch.histc(scaled.float(), BINS, low, high).numpy() if high > low else np.zeros(BINS, np.float32)
    found.histogram[name] = found.histogram.get(name, np.zeros(BINS)) + counts


class Store:
    """Where statistics are kept: a file for everything that they depend on, which it also says itself."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.facts = msgspec.json.encode(facts, order="deterministic")
        key = hashlib.sha256(self.facts).hexdigest()[:32]
        self.path = cache_folder() / "statistics" / f"{key}.npz"

    def read(self) -> Statistics:
        """What is kept there; nothing, when the file is damaged or of something else."""
        found = Statistics()
        try:
            if not self.path.is_file():
                return found
            with np.load(self.path, allow_pickle=False) as stored:
                if bytes(stored["facts"]) != self.facts or str(stored["seal"]) != _seal(stored):
                    raise ValueError("of something else")
                for key in set(stored.files) - {"facts", "seal"}:
                    kind, _, name = key.partition("|")
                    getattr(found, kind)[name] = stored[key]
        except (OSError, ValueError, KeyError, AttributeError, EOFError, zipfile.BadZipFile):
            note(f"{self.path} is damaged or of something else; the statistics are measured again")
            return Statistics()
        return found

    def write(self, found: Statistics) -> None:
        """Keep what was measured; a cache that cannot be written is no reason to stop."""
        kinds = ("low", "high", "total", "count", "factor", "histogram", "images")
        arrays = {f"{kind}|{name}": np.asarray(array) for kind in kinds for name, array in getattr(found, kind).items()}
        arrays["facts"] = np.frombuffer(self.facts, np.uint8)
        buffer = io.BytesIO()
        np.savez(buffer, seal=np.asarray(_seal(arrays)), **arrays)  # type: ignore[arg-type]
        with suppress(ExporterError):
            write_file(self.path, buffer.getvalue())


def _seal(arrays: Any) -> str:
    digest = hashlib.sha256()
    for key in sorted(set(arrays) - {"seal"}):
        digest.update(key.encode() + np.ascontiguousarray(arrays[key]).tobytes())
    return digest.hexdigest()
