"""Statistics: right, in constant memory, kept by content, taken up again, and never another model's."""

import numpy as np
import pytest
import torch

from exporter.data.calibration import open_calibration
from exporter.errors import CheckFailed
from exporter.graph.rounding import KINDS
from exporter.model import forms, weights
from exporter.quantization import statistics
from exporter.quantization.smoothing import layers
from exporter.quantization.statistics import collect
from exporter.sidecar import Preprocessing
from tests.conftest import PX

RECIPE = Preprocessing(size=PX, resize=PX)
ABOUT = {"weights": "w"}
ALL = frozenset(KINDS)


@pytest.fixture(autouse=True)
def a_cache_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def model(tiny):
    return forms.rewrite(weights.load(str(tiny)).model("classify"), "nchw")


@pytest.fixture
def images():
    return open_calibration("synthetic", RECIPE, 10, 20)


def measured(model, name, images):
    """What a layer is given, all at once."""
    seen = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda module, given: seen.append(given[0].movedim(1, -1)))
    with torch.inference_mode():
        for batch in images.batches(20):
            model(torch.from_numpy(batch.images))
    handle.remove()
    return torch.cat(seen).numpy()


def stored(tmp_path):
    return list((tmp_path / "cache" / "convnext-export" / "statistics").glob("*.npz"))


def test_they_are_those_of_all_images_together(model, images):
    found = collect(model, ALL, 0.5, images, ABOUT)
    assert set(found.low) == set(layers(model, ALL))
    for name in ("stages.1.0.pwconv1", "stages.2.1.pwconv2", "downsample_layers.2.1"):
        x = measured(model, name, images).reshape(-1, len(found.low[name]))
        assert found.low[name] == pytest.approx(x.min(0), abs=1e-4)
        assert found.high[name] == pytest.approx(x.max(0), abs=1e-4)
        s = found.factor.get(name, np.float32(1))
        assert found.mean(name) == pytest.approx((x / s).mean(0), abs=1e-4)
        low, high = found.range(name)
        expected = np.histogram(x / s, statistics.BINS, (low, high))[0]
        assert found.histogram[name].sum() == pytest.approx(x.size, rel=1e-5)
        assert np.abs(found.histogram[name] - expected).sum() < 0.02 * x.size


def test_work_is_that_of_the_layer(model, images):
    found = collect(model, ALL, 0.5, images, ABOUT)
    assert found.macs(model, "stages.0.0.pwconv1") == (PX // 4) ** 2 * 16 * 64
    assert found.macs(model, "downsample_layers.1.1") == (PX // 8) ** 2 * 16 * 24 * 4


def test_the_second_time_is_free_and_says_so(model, images, monkeypatch, tmp_path):
    first = collect(model, ALL, 0.5, images, ABOUT)
    monkeypatch.setattr(type(images), "batches", lambda *_: pytest.fail("measured again"))
    second = collect(model, ALL, 0.5, images, ABOUT)
    assert all(np.array_equal(first.histogram[name], second.histogram[name]) for name in first.histogram)
    assert len(stored(tmp_path)) == 1


@pytest.mark.parametrize(
    "differently",
    [{"about": {"weights": "others"}}, {"alpha": 0.4}, {"kinds": frozenset({"pwconv1"})}, {"count": 19}],
)
def test_anything_else_is_measured_anew(model, images, differently, tmp_path):
    collect(model, ALL, 0.5, images, ABOUT)
    told = {"about": ABOUT, "alpha": 0.5, "kinds": ALL, "count": 20, **differently}
    other = open_calibration("synthetic", RECIPE, 10, told["count"])
    collect(model, told["kinds"], told["alpha"], other, told["about"])
    assert len(stored(tmp_path)) == 2


def test_a_cache_that_is_damaged_or_of_something_else_is_never_used(model, images, tmp_path):
    good = collect(model, ALL, 0.5, images, ABOUT)
    (path,) = stored(tmp_path)
    content = path.read_bytes()
    other = collect(model, ALL, 0.5, images, {"weights": "others"})
    assert other.histogram.keys() == good.histogram.keys()
    (another,) = set(stored(tmp_path)) - {path}
    spoiled = bytearray(content)
    spoiled[len(spoiled) // 2] ^= 1
    for bad in (b"", content[:1000], bytes(spoiled), another.read_bytes()):
        path.write_bytes(bad)
        again = collect(model, ALL, 0.5, images, ABOUT)
        assert all(np.array_equal(good.low[name], again.low[name]) for name in good.low)
        assert path.read_bytes() != bad


@pytest.mark.parametrize("stop_at", [1, 3, 4, 5])
def test_an_interrupt_is_taken_up_where_it_was(model, images, stop_at, monkeypatch):
    """20 images are three batches; two passes are six."""
    expected = collect(model, ALL, 0.5, images, {"weights": "uninterrupted"})
    monkeypatch.setattr(statistics, "SAVE_S", 0.0)
    seen = []
    real = type(model).forward

    def interrupted(self, x):
        seen.append(len(x))
        if len(seen) == stop_at + 1:
            real(self, x)  # the layers have seen this batch already, and it is not counted twice
            raise KeyboardInterrupt
        return real(self, x)

    monkeypatch.setattr(type(model), "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect(model, ALL, 0.5, images, ABOUT)
    monkeypatch.setattr(type(model), "forward", real)
    rest = []
    monkeypatch.setattr(type(model), "forward", lambda self, x: (rest.append(len(x)), real(self, x))[1])
    found = collect(model, ALL, 0.5, images, ABOUT)
    assert len(rest) == 6 - stop_at
    for name in expected.histogram:
        assert np.array_equal(found.histogram[name], expected.histogram[name])
        assert found.mean(name) == pytest.approx(expected.mean(name), rel=1e-6)


def test_a_network_that_gives_nan_is_named_where_it_begins(model, images):
    model.get_submodule("stages.2.0.pwconv2").weight.data[0, 0] = float("nan")
    with pytest.raises(CheckFailed, match=r"stages.2.1.dwconv is given NaN"):
        collect(model, ALL, 0.5, images, ABOUT)


def test_a_cache_that_cannot_be_written_stops_nothing(model, images, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nothing")
    assert collect(model, ALL, 0.5, images, ABOUT).done("histogram") == 20
