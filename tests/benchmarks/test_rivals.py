"""The benchmark of other families: what is compared with what, and what the tables and pictures say."""

import re

import pytest
from msgspec.structs import replace

from benchmarks import racing
from benchmarks.rivals import NETWORKS, WAYS, Network, Race, Row, Way, engines, files, pictures, sizes, table, timing
from exporter.artifact import Artifact
from exporter.bench import Launch, Plan, Timing
from exporter.machine import Conditions, environment

RESNET, CONVNEXT = NETWORKS[0], NETWORKS[1]
SWIN = next(network for network in NETWORKS if network.name == "Swin-T")
PLAIN, BEST = (next(way for way in WAYS if way.runtime == "openvino" and way.plain is plain) for plain in (True, False))


def row(network: Network, way: Way, ms: float, **facts):
    return Row(
        network=network.name,
        way=way.name,
        runtime=way.runtime,
        precision="fp32",
        plain=way.plain,
        milliseconds=((ms, ms * 1.1), (ms * 0.9, ms)),
        **facts,
    )


def test_a_race_that_was_interrupted_goes_on(tmp_path, monkeypatch):
    conditions = Conditions(load=0, others_pct=0, steal_pct=0, throttled=None, mhz=None)
    launched = []

    def launches(timing, opener):
        while len(launched) < stop:
            launched.append(timing.plan.batch)
            blocks = {"a": [[float(len(launched))]]}
            timing.launches.append(
                Launch(blocks=blocks, cosine={}, streams={}, facts={}, settled={}, dropped=0, conditions=conditions)
            )
            yield timing.launches[-1]
        raise KeyboardInterrupt

    def timings():
        return [Timing(Plan(arms=(), preprocessing=files.preprocessing(64), batch=batch)) for batch in (1, 2)]

    monkeypatch.setattr(racing.supervisor, "launches", launches)
    monkeypatch.setattr(racing.supervisor, "PROCESSES", 6)
    stop = 5
    with pytest.raises(KeyboardInterrupt):
        racing.race_in_turn(timings(), tmp_path)
    stop, two = 99, timings()
    racing.race_in_turn(two, tmp_path)
    assert launched == [1, 2] * 6
    measured = [[launch.blocks["a"][0][0] for launch in timing.launches] for timing in two]
    assert measured == [[1, 3, 5, 7, 9, 11], [2, 4, 6, 8, 10, 12]]
    other = Timing(replace(two[0].plan, seconds=9.0))
    racing.resume(other, tmp_path / "0.json")
    assert other.launches == [], "of another plan"


@pytest.fixture
def race():
    rows = (
        row(RESNET, PLAIN, 30),
        row(RESNET, BEST, 20),
        row(CONVNEXT, PLAIN, 40),
        row(SWIN, PLAIN, 60, peak_bytes=7e8),
    )
    failed = Row(network=SWIN.name, way=BEST.name, runtime="openvino", precision="fp32", failure="out of memory")
    eager = {RESNET.name: ((44.7,),), CONVNEXT.name: ((58.0,),)}
    gmacs = {RESNET.name: 4.1, CONVNEXT.name: 4.5, SWIN.name: 4.5}
    compiled = {RESNET.name: ((29.6,),), CONVNEXT.name: ((28.8,),)}
    return Race(batch=2, rows=(*rows, failed), eager=eager, compiled=compiled, gmacs=gmacs, environment=environment())


@pytest.mark.parametrize(("name", "gmacs"), [("ResNet-50", 4.11), ("ConvNeXt-T", 4.47), ("ViT-S (DeiT)", 4.61)])
def test_multiply_accumulates_are_those_that_timm_publishes(name, gmacs):
    network = next(network for network in NETWORKS if network.name == name)
    assert files.gmacs(network) == pytest.approx(gmacs, rel=0.01)


def test_every_convnext_is_one_of_ours_and_no_other_is():
    assert [network.name for network in NETWORKS if network.variant] == [
        n.name for n in NETWORKS if "ConvNeXt" in n.name
    ]
    ours = next(way for way in WAYS if way.name == "ours")
    with pytest.raises(files.Cannot, match="exports ConvNeXt"):
        files.ours(SWIN, ours, 1, 224, None)


def test_the_table_of_the_plain_and_that_of_the_best(race):
    text = table.races(race)
    plain, best = (part.split("\n\n")[1] for part in re.split("(?=###)", text)[1:])
    assert [line.split(" | ")[5:8] for line in plain.splitlines()[2:]] == [
        ["torch.onnx.export", "30", "66.67"],
        ["torch.onnx.export", "40", "50"],
        ["torch.onnx.export", "60", "33.33"],
    ]
    assert [line.split(" | ")[5:7] for line in best.splitlines()[2:]] == [
        ["openvino.convert_model", "20"],
        ["torch.onnx.export", "40"],
        ["torch.onnx.export", "60"],
    ]
    assert "* openvino.convert_model, OpenVINO fp32: out of memory (Swin-T)" in text


def test_eager_ratios_far_from_those_of_timm_are_marked(race):
    (line,) = table.control(race).splitlines()[2:]
    assert line == "| ResNet-50 / ConvNeXt-T | 1.03 | 0.77 | **-25 %** | 1.03 | +0 % |"


def test_a_network_that_could_not_be_compiled_has_no_ratio(race):
    race.compiled[RESNET.name] = ((), ())
    assert table.control(race).splitlines()[2].endswith("| 0.77 | **-25 %** | – | |")
    del race.eager[CONVNEXT.name]
    assert len(table.control(race).splitlines()) == 2


def test_the_front_has_the_fastest_and_those_that_are_more_accurate(race):
    assert not pictures._beats((20, 80.4), (40, 82.1))
    assert pictures._beats((40, 82.1), (60, 81.3))
    svg = pictures.accuracy(race)
    assert {name for name in ("ResNet-50", "ConvNeXt-T", "Swin-T") if f">{name}<" in svg} == {
        "ResNet-50",
        "ConvNeXt-T",
        "Swin-T",
    }


def test_networks_that_do_not_fit_into_memory_together_are_timed_in_groups():
    chosen = {network.name: [(network.name, PLAIN)] for network in NETWORKS[:4]}
    candidates = timing.Candidates()
    for network, size in zip(NETWORKS, (3.0, 1.0, 0.5, 5.0), strict=False):
        sidecar = replace(files.sidecar(network, PLAIN, 1, 224), bytes=int(size * 1e9))
        candidates.artifacts[network.name, PLAIN] = Artifact(None, sidecar)
    groups = timing._groups(NETWORKS[:4], chosen, candidates)
    assert [[network.name for network in group] for group in groups] == [
        ["ResNet-50", "ConvNeXt-T"],
        ["ConvNeXt-S"],
        ["ConvNeXt-B"],
    ]


def time_of_resnet(size, failure=""):
    """A timing of ResNet-50 at one input size, linear in the number of pixels, or its failure."""
    name = sizes._name(RESNET, "openvino", size)
    timing = Timing(Plan(arms=(), preprocessing=files.preprocessing(size)))
    if failure:
        timing.failures[name] = failure
        return timing
    for factor in (0.9, 1.0, 1.1):
        conditions = Conditions(load=0.0, others_pct=0.0, steal_pct=0.0, throttled=0, mhz=None)
        blocks = {name: [[factor * size**2 / 1e3]]}
        timing.launches.append(Launch(blocks, {}, {name: 1}, {name: {}}, {name: True}, 0, conditions))
    return timing


def test_the_exponent_of_a_network_whose_time_grows_with_its_pixels():
    timings = {size: time_of_resnet(size) for size in sizes.SIZES}
    memory = {sizes._name(RESNET, "openvino", size): size**4 for size in sizes.SIZES}
    curve = sizes._curve(RESNET, "openvino", timings, memory)
    assert curve.time_exponent == pytest.approx((1, 1, 1), abs=1e-6)
    assert curve.memory_exponent == pytest.approx(2)
    svg = pictures.latency_by_size(sizes.Sizes(curves=(curve,), environment={}))
    assert "ResNet-50, OpenVINO: pixels to the 1.00" in svg
    assert "| ResNet-50 | OpenVINO | 50.18 ms" in table.by_size(sizes.Sizes(curves=(curve,), environment={}))


def test_a_size_that_could_not_be_timed_is_left_out_of_its_curve():
    timings = {224: time_of_resnet(224), 448: time_of_resnet(448), 896: time_of_resnet(896, "out of memory")}
    memory = {sizes._name(RESNET, "openvino", size): size**4 for size in timings}
    curve = sizes._curve(RESNET, "openvino", timings, memory)
    assert curve.sizes == (224, 448)
    result = sizes.Sizes(curves=(curve,), environment={}, failures=timings[896].failures)
    assert table.by_size(result).endswith("\n\n* ResNet-50, openvino, 896 pixels: out of memory\n")
    del timings[448]
    assert sizes._curve(RESNET, "openvino", timings, memory) is None


@pytest.mark.slow
def test_engines_and_the_reason_where_there_is_none():
    pytest.importorskip("tensorrt_rtx")
    networks = [Network("Small", "test_resnet", 0, "", 0), Network("Missing", "no_such_network", 0, "", 0)]
    result = engines.build_all(networks)
    in_fp32, in_fp16, *missing = result.rows
    assert 0 < in_fp16.bytes < in_fp32.bytes
    assert in_fp16.kernels
    assert ["no_such_network" in row.failure for row in missing] == [True, True]
    first, *_, last = engines.table(result).splitlines()[2:]
    assert first.startswith("| Small | fp32 | torch.onnx.export | ")
    assert last.startswith("| Missing | fp16 | torch.onnx.export | Unknown model (no_such_network)")
