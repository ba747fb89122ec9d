"""The benchmarks' own logic: that peers get our very weights, and that tables say what was timed."""

import sys

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from benchmarks import forms, racing
from benchmarks.peers import OURS_BF16, OURS_OV, PEERS, Case, Row, build, huggingface, table, timing
from exporter.bench import Arm, Launch, Plan, Timing, supervisor
from exporter.machine import Conditions, environment
from exporter.model.layouts import to_ours
from tests.conftest import build as build_artifact
from tests.conftest import tiny_state


@pytest.mark.parametrize("differences", [{}, {"grn": True, "layer_scale": False}])
def test_transformers_names_come_back_as_ours(differences):
    state = tiny_state(**differences)
    prefix = "convnextv2." if differences else "convnext."
    renamed = {huggingface.huggingface_key(key): tensor for key, tensor in state.items()}
    renamed = {key if key.startswith("classifier") else prefix + key: tensor for key, tensor in renamed.items()}
    converted = to_ours(renamed)
    ours = converted.state
    assert converted.layout == "huggingface"
    assert list(ours) == list(state)
    assert all(ours[key] is state[key] or (ours[key] == state[key]).all() for key in state)


def test_every_peer_is_held_against_one_of_ours():
    ours = {peer.name for peer in PEERS if peer.maker == "ours"}
    assert len(ours) == 5
    assert {peer.ours for peer in PEERS if peer.maker != "ours"} == ours
    makers = {peer.maker for peer in PEERS} - {"ours", "torch", "torch channels_last"}
    assert makers == set(build.MAKERS)


@pytest.mark.parametrize("maker", ["plain", "onnxsim"])
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_plain_export_is_opened_and_gives_what_ours_gives(maker, runtime, tiny, tmp_path):
    folder = tmp_path / "custom-b2"
    ours = build_artifact(tiny, folder / "ours", batch=2)
    peer = next(p for p in PEERS if (p.maker, p.runtime, p.precision) == (maker, runtime, "fp32"))
    path = build.MAKERS[maker](folder, ours)
    arm = Arm(name=peer.name, path=str(path), weights=str(ours.path), threads=1)
    images = build.inputs(ours, 2)[0]
    with timing.open_peer(arm) as session, timing.open_peer(Arm(name="x", path=str(ours.path))) as reference:
        assert np.abs(session(images)[0] - reference(images)[0]).max() < 1e-5 * reference(images)[0].std()


def test_channels_last_is_the_same_model(tiny, tmp_path):
    ours = build_artifact(tiny, tmp_path / "custom-b1", batch=1)
    images = build.inputs(ours, 1)[0]
    names = ("eager", "eager, channels_last")
    found = []
    for name in names:
        with timing.open_peer(Arm(name=name, path=str(ours.path), runtime="eager", threads=1)) as session:
            found.append(session(images)[0])
    assert np.allclose(*found, atol=1e-5)
    assert "channels_last" in next(peer.maker for peer in PEERS if peer.name == names[1])


def test_a_peer_that_cannot_says_why_in_its_own_words(tmp_path):
    with pytest.raises(build.Cannot, match="ValueError: convnextv2 is not supported"):
        build.run("python3", "-c", "raise ValueError('convnextv2 is not supported')")


def made():
    rows = {
        "eager": Row(
            name="eager", launches=((20.0, 21.0),), over_eager=(1, 1, 1), over_ours=(0.4, 0.4, 0.4), cosine=1.0
        ),
        "plain export, OpenVINO fp32": Row(
            name="plain export, OpenVINO fp32", launches=((10.0,),), over_eager=(2, 1.9, 2.1), over_ours=(0.8, 0.7, 0.9)
        ),
        "optimum-intel, OpenVINO fp32": Row(name="optimum-intel, OpenVINO fp32", failure="ValueError: no | such model"),
        OURS_OV: Row(
            name=OURS_OV, launches=((8.0, 8.2, 7.8),), over_eager=(2.5, 2.4, 2.6), peak_pct=81.6, cosine=0.9999999
        ),
    }
    absent = [peer.name for peer in PEERS if peer.name not in rows]
    all_rows = (*rows.values(), *(Row(name=name, failure="not run") for name in absent))
    return Case(
        variant="tiny", batch=1, threads=2, rows=all_rows, environment=environment(), peers={}, peaks_gflops={}
    )  # fmt: skip


def test_a_way_that_cannot_run_is_a_row_with_its_reason_and_the_others_are_kept(artifacts):
    """A CPU without bf16: neither ours nor the peak opens, and another fails after two processes."""
    names = [peer.name for peer in PEERS if peer.precision != "bf16"]
    peaks = [timing.peak_name(kind) for kind in timing.PEAKS if kind[1] != "bf16"]
    late = "torch.compile"
    launches = [
        Launch(
            blocks={name: [[2.0]] * 3 for name in (*names, *peaks) if name != late or turn < 2},
            cosine=dict.fromkeys(names, 1.0), streams=dict.fromkeys((*names, *peaks), 1), settled={}, dropped=0,
            facts={peak: {"macs": "1000000", "product": "a matrix product"} for peak in peaks},
            conditions=Conditions(load=0, others_pct=0, steal_pct=0, throttled=None, mhz=None),
        )
        for turn in range(5)
    ]  # fmt: skip
    plan = Plan(arms=(), preprocessing=artifacts["onnxruntime", "fp32"].sidecar.preprocessing)
    failures = {OURS_BF16: "failed: this CPU has no bf16 arithmetic", late: "crashed its process (SIGSEGV)"}
    case = timing.as_case(Timing(plan, launches, failures), "tiny", {"optimum-intel, OpenVINO fp32": "no"}, 500_000)
    rows = {row.name: row for row in case.rows}
    assert rows.keys() == {peer.name for peer in PEERS}
    assert rows[OURS_BF16].failure == "failed: this CPU has no bf16 arithmetic"
    assert rows["plain export, OpenVINO bf16"].failure == "was never timed"
    assert rows[late].failure.startswith("crashed")
    assert rows[OURS_OV].peak_pct == pytest.approx(50)
    assert rows[OURS_OV].over_eager == (1, 1, 1)
    assert set(case.peaks_gflops) == set(peaks)
    assert table.case_table(case).count("cannot: ") == 6


def test_the_table_has_a_row_for_each_peer_and_its_failure():
    lines = table.case_table(made()).splitlines()
    assert len(lines) == 2 + len(PEERS)
    assert {line.count("|") for line in lines} == {8}
    assert "| **ours, OpenVINO fp32** | 8 | 8.196 | 2.50 (2.40–2.60) |  | 82 % | 1.000000 |" in lines
    assert any("| cannot: ValueError: no / such model |" in line for line in lines)


def test_the_summary_names_the_best_other():
    assert table.best_other(made(), OURS_OV) == ("plain export", 1.25)
    assert "1.25 × plain export, 2.50 × eager" in table.summary([made()])
    lonely = replace(made(), rows=tuple(row for row in made().rows if "plain" not in row.name))
    assert table.best_other(lonely, OURS_OV) is None


@pytest.mark.parametrize("setting", ["denormals are zero", "no operators fused, no layout of its own"])
def test_a_setting_changes_the_session_and_not_the_answers(setting, artifacts):
    made = artifacts["onnxruntime", "fp32"]
    images = build.inputs(made, 1)[0]
    with (
        forms.open_with_setting(Arm(name=setting, path=str(made.path))) as changed,
        forms.open_with_setting(Arm(name="own", path=str(made.path))) as own,
    ):
        assert np.allclose(changed(images)[0], own(images)[0], atol=1e-4)


@pytest.fixture
def denormals():
    """One of the settings has the calling thread take denormals for zero, for good: the next tests need them."""
    yield
    torch.set_flush_denormal(False)
    assert sys.float_info.min / 2 > 0


@pytest.mark.parametrize("setting", forms.OV_SETTINGS)
def test_openvinos_settings_are_known_to_it(setting, artifacts, denormals):
    made = artifacts["openvino", "fp32"]
    images = build.inputs(made, 1)[0]
    with forms.open_with_setting(Arm(name=setting, path=str(made.path))) as changed:
        assert changed(images)[0].shape == (1, 10)


def test_the_forms_table_marks_the_backends_own():
    gains = {"linear": (1.0, 0.9, 1.1), "conv": (1.2, 1.1, 1.3), "nchw": (1.1, 1.0, 1.2)}
    row = forms.Row(
        variant="tiny", batch=1, backend="onnxruntime", precision="fp32", own="conv", plain=((10.0,),), gains=gains
    )
    settings = (forms.Setting(backend="openvino", name="pinned", gain=(1.0, 0.9, 1.1)),)
    result = forms.Result(environment={}, rows=(row,), settings=settings)
    assert "| tiny | 1 | onnxruntime fp32 | 10 | 1.00 (0.90–1.10) | **1.20 (1.10–1.30)** |" in forms.form_table(result)
    assert "| openvino | pinned | 1.00 (0.90–1.10) |" in forms.setting_table(result)


def test_a_race_is_so_many_launches_in_pairs(artifacts):
    made = artifacts["onnxruntime", "fp32"]
    arms = [Arm(name=name, path=str(made.path), threads=1) for name in ("one", "other")]
    timing_ = racing.race(arms, made.sidecar.preprocessing, 1, 0.5)
    assert len(racing.samples(timing_, "one")) == supervisor.PROCESSES
    value, low, high = racing.ratio(timing_, "one", "other")
    assert low <= value <= high
    assert 0.5 < value < 2
