"""Statistics: right, in constant memory, kept by content, taken up again, and never another model's."""

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from PIL import Image

from exporter.artifact.sidecar import Preprocessing
from exporter.data import calibration, synthetic
from exporter.data.calibration import open_calibration
from exporter.errors import CheckFailed
from exporter.model import forms, weights
from exporter.model.structure import KINDS
from exporter.quantize import statistics
from exporter.quantize.smoothing import layers
from exporter.quantize.statistics import collect, in_double
from tests.conftest import PX

RECIPE = Preprocessing(size=PX, resize=PX)
ABOUT = {"weights": "w"}
ALL = frozenset(KINDS)


@pytest.fixture(autouse=True)
def a_cache_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def model(tiny):
    return forms.rewrite(weights.load(str(tiny)).model(), "nchw")


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
    return list((tmp_path / "cache" / "convnext-export" / "statistics").glob("*.sealed"))


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


def test_work_on_odd_feature_maps_is_what_torch_counts(tiny):
    """225 × 301 pixels give maps of 56 × 75, 28 × 37, 14 × 18 and 7 × 9."""
    model = forms.rewrite(weights.load(str(tiny)).model(), "nchw")
    recipe = Preprocessing(size=(225, 301), resize=(225, 301))
    found = collect(model, ALL, 0.5, open_calibration("synthetic", recipe, 10, 2), ABOUT, histogram=False)
    counted = {}

    def count(name):
        def see(module, inputs, output):
            width = output.shape[1] if isinstance(module, torch.nn.Conv2d) else output.shape[-1]
            counted[name] = output.numel() // width * module.weight.numel()

        return see

    watched = layers(model, ALL)
    handles = [module.register_forward_hook(count(name)) for name, module in watched.items()]
    with torch.inference_mode():
        model(torch.zeros(1, 3, 225, 301))
    for handle in handles:
        handle.remove()
    assert {name: found.macs(model, name) for name in watched} == counted
    assert found.macs(model, "downsample_layers.2.1") == 14 * 18 * 24 * 32 * 4


def test_counts_go_beyond_what_float32_can_count():
    found = statistics.Statistics(
        low={"layer": np.zeros(1, np.float32)}, high={"layer": np.ones(1, np.float32)}, factor={}
    )
    values = torch.full((2**24 + 5, 1), 0.5)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        statistics._histogram(found, found, "layer", values, 1)
    finally:
        torch.set_num_threads(threads)
    assert found.histogram["layer"].sum() == 2**24 + 5


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


def test_the_same_images_in_another_order_continue_no_calibration(model, monkeypatch, tmp_path):
    """Images are counted by their number: some would count twice, and others not at all."""
    (tmp_path / "images").mkdir()
    for number in range(12):
        Image.fromarray(synthetic.dead_leaves(PX, number)).save(tmp_path / "images" / f"{number:02d}.png")
    frozen = calibration.freeze(str(tmp_path / "images"), 12, 0)
    reverse = replace(frozen, entries=frozen.entries[::-1])
    one, other = (calibration.of_manifest("set", manifest, RECIPE) for manifest in (frozen, reverse))
    assert one.digest == other.digest
    expected = collect(model, ALL, 0.5, other, {"weights": "uninterrupted"}, histogram=False)
    real, seen = type(model).forward, []

    def interrupted(self, x):
        seen.append(len(x))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(self, x)

    monkeypatch.setattr(statistics, "SAVE_S", 0.0)
    monkeypatch.setattr(type(model), "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect(model, ALL, 0.5, one, ABOUT, histogram=False)
    monkeypatch.setattr(type(model), "forward", real)
    continued = collect(model, ALL, 0.5, other, ABOUT, histogram=False)
    assert all(np.array_equal(continued.low[name], expected.low[name]) for name in expected.low)
    assert all(np.array_equal(continued.total[name], expected.total[name]) for name in expected.total)


def test_a_network_that_gives_nan_is_named_where_it_begins(model, images):
    model.get_submodule("stages.2.0.pwconv2").weight.data[0, 0] = float("nan")
    with pytest.raises(CheckFailed, match=r"the input of stages.2.1.dwconv has NaN"):
        collect(model, ALL, 0.5, images, ABOUT)


def test_a_cache_that_cannot_be_written_stops_nothing(model, images, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nothing")
    assert collect(model, ALL, 0.5, images, ABOUT).done("histogram") == 20


def test_minmax_takes_one_pass(model, images, monkeypatch):
    seen = []
    real = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, x: (seen.append(len(x)), real(self, x))[1])
    found = collect(model, ALL, 0.5, images, ABOUT, histogram=False)
    assert sum(seen) == 20
    assert (found.done("extremes"), found.done("histogram"), found.histogram) == (20, 0, {})
    again = collect(model, ALL, 0.5, images, ABOUT, histogram=True)
    assert sum(seen) == 40, "only what was missing"
    assert all(np.array_equal(found.factor[name], again.factor[name]) for name in found.factor)


def test_an_interrupt_after_the_first_pass_keeps_the_factors(model, images, monkeypatch):
    expected = collect(model, ALL, 0.5, images, {"weights": "uninterrupted"}, histogram=False)
    with monkeypatch.context() as patch:
        patch.setattr(statistics, "factors", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            collect(model, ALL, 0.5, images, ABOUT, histogram=False)
    found = collect(model, ALL, 0.5, images, ABOUT, histogram=False)
    assert expected.factor.keys() == found.factor.keys() != set()
    assert all(np.array_equal(expected.factor[name], found.factor[name]) for name in found.factor)


def test_in_double_matches_fp32_and_restores_the_network(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(2, 3, PX, PX, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        single = model(x)
        with in_double(model):
            double = model(x.double())
        assert double.dtype == torch.float64
        assert torch.allclose(single.double(), double, atol=1e-5)
        assert torch.equal(model(x), single)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("kernel", "padding"), [(7, 3), (3, 1), (5, 0)])
def test_the_sum_of_shifted_images_is_the_depthwise_convolution(kernel, padding):
    conv = torch.nn.Conv2d(6, 6, kernel, padding=padding, groups=6).double()
    x = torch.randn(2, 6, 9, 11, dtype=torch.float64)
    with torch.inference_mode():
        assert torch.allclose(statistics._depthwise(conv, x), conv(x), atol=1e-12)


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_statistics_do_not_depend_on_threads(model, images, method):
    def measured_with(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return collect(model, ALL, 0.5, images, {"threads": threads}, histogram=method != "minmax")
        finally:
            torch.set_num_threads(before)

    one, two = measured_with(1), measured_with(2)
    for kind in ("low", "high", "factor", "histogram"):
        first, second = getattr(one, kind), getattr(two, kind)
        assert all(np.array_equal(first[name], second[name]) for name in first)
    assert all(np.array_equal(one.mean(name), two.mean(name)) for name in one.low)
