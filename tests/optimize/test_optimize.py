"""`optimize`: the best artifact within the budgets is found, written, and can be built again."""

import json
import shutil
from pathlib import Path

import pytest
from msgspec.structs import replace

from exporter import artifact, optimize
from exporter import run as running
from exporter.build import build
from exporter.build import read as read_recipe
from exporter.errors import BadRequest, CheckFailed, Unavailable
from exporter.optimize import candidates, publish, search, tables
from exporter.optimize.builds import Builder
from exporter.optimize.result import front
from exporter.optimize.search import Search
from exporter.optimize.store import Store, key_of
from exporter.recipe import Checks
from exporter.report import Finding
from tests.conftest import snapshot, write_tiny
from tests.optimize import fakes

pytestmark = pytest.mark.slow


def rows(result, state=None):
    return [row for row in result.rows if state in (None, row.state)]


@pytest.fixture(scope="module")
def searched(request_of, tmp_path_factory):
    """A search that was done once."""
    out = tmp_path_factory.mktemp("searched")
    return out, optimize.optimize(request_of(form=None), out, fakes.opened)


@pytest.fixture
def outcome(searched, tmp_path):
    """The result of a search, and in `out` a copy of what it wrote."""
    shutil.copytree(searched[0], tmp_path / "out")
    return searched[1]


def test_the_fastest_within_the_budget_is_written_with_its_report_and_recipe(outcome, tmp_path):
    winner = outcome.result.winner
    assert (winner.precision, winner.threads, winner.state) == ("int8", 2, "chosen")
    assert winner.p50_ms == pytest.approx(1.5, rel=0.1)
    assert winner.speedup[0] == pytest.approx(fakes.EAGER_MS / 1.5, rel=0.1)
    written = artifact.load(tmp_path / "out" / "custom_int8.onnx")
    assert written.sidecar.sha256 == outcome.result.sha256
    assert written.sidecar.quality["passed"] == "yes"
    report = json.loads((tmp_path / "out" / "custom_int8.onnx.report.json").read_text())
    assert report["passed"]
    assert {"cosine", "p50_ms", "speedup", "tried"} <= {finding["metric"] for finding in report["findings"]}
    assert report["differences"]
    assert json.loads((tmp_path / "out" / "optimize.json").read_text())["sha256"] == outcome.result.sha256


def test_the_recipe_builds_the_same_bytes(outcome, tmp_path, monkeypatch):
    monkeypatch.setattr("exporter.build.int8.speed.SECONDS_EACH", 0.3)
    recipe = read_recipe(tmp_path / "out" / "custom_int8.onnx.yaml")
    assert recipe.bench.threads == 2
    again = build(recipe, tmp_path / "again").artifact
    assert again.path.read_bytes() == (tmp_path / "out" / "custom_int8.onnx").read_bytes()
    (job,) = running.read_all([tmp_path / "out" / "custom_int8.onnx.yaml"], tmp_path / "ran")
    assert job.recipe == recipe


def test_everything_that_was_tried_is_in_the_table_with_its_reason(outcome, tmp_path):
    tried = {(row.precision, row.form, row.threads): row for row in outcome.result.rows}
    assert {key[:2] for key in tried} == {*(("fp32", form) for form in fakes.SLOW["form"]), ("int8", "linear")}
    assert all(row.reason for row in outcome.result.rows if row.state != "chosen")
    assert tried["fp32", "plain", 2].state == "dropped"
    assert "slower than onnxruntime fp32 (conv)" in tried["fp32", "plain", 2].reason
    assert tried["fp32", "conv", 2].accuracy is not None, "the best of each precision is verified"
    page = (tmp_path / "out" / "optimize.html").read_text()
    assert "slower than onnxruntime fp32 (conv)" in page
    assert "<svg" in page
    assert "better than the next, onnxruntime fp32 (conv), 2 threads (95 %" in tables.sentence(outcome.result)


def test_int8_that_is_slower_is_not_chosen(request_of, tmp_path):
    result = optimize.optimize(request_of(), tmp_path, fakes.slow_int8).result
    assert result.winner.precision == "fp32"
    (row,) = [row for row in result.rows if row.precision == "int8"]
    assert row.state == "dropped"
    assert "slower than onnxruntime fp32" in row.reason


def test_a_model_that_crashes_is_left_out(request_of, tmp_path):
    result = optimize.optimize(request_of(), tmp_path, fakes.crashing_int8).result
    assert result.winner.precision == "fp32"
    (row,) = [row for row in result.rows if row.precision == "int8"]
    assert (row.state, row.reason) == ("failed", "crashed its process (SIGSEGV)")


def test_nothing_faster_than_eager_is_no_success(request_of, tmp_path):
    result = optimize.optimize(request_of(), tmp_path, fakes.slow_everything).result
    assert not result.passed
    assert "no faster than eager PyTorch" in result.winner.reason
    assert (tmp_path / "custom_int8.onnx").is_file(), "the nearest is written"
    assert not json.loads((tmp_path / "custom_int8.onnx.report.json").read_text())["passed"]
    assert "nothing is within the budgets" in tables.sentence(result)


def test_a_limit_of_size_excludes_what_is_larger(request_of, tmp_path):
    result = optimize.optimize(request_of(max_bytes="0.2MB"), tmp_path, fakes.slow_int8).result
    assert result.winner.precision == "int8", "slower, but the only one that is small enough"
    assert any("limit 0.2 MB" in row.reason for row in result.rows if row.precision == "fp32")


def test_a_limit_of_latency_that_nothing_keeps_is_no_success(request_of, tmp_path):
    result = optimize.optimize(request_of(max_latency="1ms"), tmp_path, fakes.opened).result
    assert not result.passed
    assert "limit 1 ms" in result.winner.reason
    assert result.winner.precision == "int8", "the nearest"


def test_the_smallest_is_chosen_for_size(request_of, tmp_path):
    result = optimize.optimize(request_of(goal="size"), tmp_path, fakes.slow_int8).result
    assert result.winner.precision == "int8"
    assert "MB smaller than the next" in result.certainty


def test_images_a_second_are_counted_over_all_streams(request_of, tmp_path):
    result = optimize.optimize(request_of(goal="throughput", batch=4), tmp_path, fakes.opened).result
    assert {row.hint for row in result.rows if row.state in ("chosen", "not chosen")} >= {"latency"}
    assert result.winner.images_s == pytest.approx(1e3 * 4 / 1.5, rel=0.1)
    assert artifact.load(tmp_path / "custom_int8.onnx").sidecar.inputs[0].shape[0] == 4


def test_an_interrupted_search_goes_on_where_it_stopped(request_of, tmp_path, monkeypatch):
    wanted = request_of()
    race_settings = Search._race_settings
    monkeypatch.setattr(Search, "_race_settings", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        optimize.optimize(wanted, tmp_path, fakes.opened)
    assert not (tmp_path / "custom_int8.onnx").exists()
    monkeypatch.setattr(Search, "_race_settings", race_settings)
    monkeypatch.setattr("exporter.optimize.builds.Builder._artifact", lambda *_: pytest.fail("built again"))
    monkeypatch.setattr(search, "compare", lambda *_: pytest.fail("verified again"))
    result = optimize.optimize(wanted, tmp_path, fakes.opened).result
    assert result.winner.precision == "int8"


def test_the_same_search_again_does_nothing(outcome, request_of, tmp_path, monkeypatch):
    monkeypatch.setattr(Search, "run", lambda *_: pytest.fail("searched again"))
    moved = optimize.optimize(request_of(form=None), tmp_path / "out", fakes.opened)
    assert (moved.result.artifact, moved.result.sha256) == (f"{tmp_path}/out/custom_int8.onnx", outcome.result.sha256)
    assert moved.report.artifact["path"] == moved.result.artifact
    before = snapshot(tmp_path)
    assert optimize.optimize(request_of(form=None), tmp_path / "out", fakes.opened) == moved
    assert snapshot(tmp_path) == before


def test_another_file_in_place_of_the_artifact_is_noticed(outcome, request_of, tmp_path):
    (tmp_path / "out" / "custom_int8.onnx").unlink()
    again = optimize.optimize(request_of(form=None), tmp_path / "out", fakes.opened).result
    assert again.sha256 == outcome.result.sha256
    assert (tmp_path / "out" / "custom_int8.onnx").is_file()


def test_candidates_are_removed_from_the_disk_at_the_end(outcome, tmp_path):
    assert not list((tmp_path / "out").rglob("artifacts"))


def test_other_weights_are_refused_before_anything_is_built(outcome, request_of, tmp_path, monkeypatch):
    monkeypatch.setattr("exporter.optimize.builds.Builder.build", lambda *_: pytest.fail("built"))
    other = request_of(weights=write_tiny(tmp_path / "other", seed=5))
    with pytest.raises(BadRequest, match="built from other weights"):
        optimize.optimize(other, tmp_path / "out", fakes.opened)


def test_other_bytes_than_those_that_were_measured_are_never_handed_out(request_of, tmp_path, monkeypatch):
    monkeypatch.setattr(
        publish,
        "_artifact",
        lambda search, measured, row, out: build(request_of().recipe("onnxruntime", "fp32", "plain"), out).artifact,
    )
    with pytest.raises(CheckFailed, match="gave other bytes"):
        optimize.optimize(request_of(), tmp_path, fakes.opened)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--max-bytes", "0"), "above 0"),
        (("--precision", ","), "no name is given"),
        (("--backend", "onnxruntme"), "did you mean 'onnxruntime'"),
        (("--precision", "int7"), "did you mean"),
        (("--max-latency", "15 parsecs"), "a time, as in 15ms"),
        (("--max-bytes", "lots"), "a size in B, kB, MB"),
        (("--goal", "speed"), "latency"),
        (("--max-drop", "0.3"), "there are only synthetic images"),
        (("--device", "tpu"), "nothing can be tried on --device tpu"),
        (("--data", "nowhere"), "no such data"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_with_what_to_do(words, expected, tiny, run, tmp_path):
    done = run("optimize", "--weights", tiny, *words, "-o", tmp_path / "out")
    assert done.code == 2, done.err
    assert expected in done.err
    assert "Traceback" not in done.err
    assert not list((tmp_path / "out").rglob("*.onnx"))


@pytest.mark.parametrize(("text", "ms"), [("15ms", 15.0), ("15", 15.0), ("0.2s", 200.0)])
def test_times_are_read_with_their_unit(text, ms):
    assert optimize.OptimizeOptions(max_latency=text).latency_limit_ms == ms


@pytest.mark.parametrize(("text", "count"), [("30MB", 30e6), ("30", 30), ("3mb", 3e6), ("1.5KiB", 1536), ("2GB", 2e9)])
def test_sizes_are_read_with_their_unit(text, count):
    assert optimize.OptimizeOptions(max_bytes=text).bytes_limit == count


def test_where_everything_crashes_the_reasons_are_named(request_of, tmp_path):
    with pytest.raises(CheckFailed, match=r"nothing could be timed: onnxruntime .*SIGSEGV"):
        optimize.optimize(request_of(), tmp_path, fakes.crashing)


def test_a_slow_process_of_eager_decides_nothing(request_of, tmp_path):
    """A model that was dropped after the first process, in which eager was slow, has the largest speed-up."""
    result = optimize.optimize(request_of(), tmp_path, fakes.slow_eager_at_first).result
    assert (result.winner.precision, result.winner.threads) == ("int8", 2)


def test_a_device_that_is_not_here_is_refused_after_the_first_build(request_of, tmp_path):
    with pytest.raises(Unavailable):
        optimize.optimize(request_of(device="cuda"), tmp_path)
    assert len(list((tmp_path / "optimize").rglob("built-*.json"))) == 1


def test_what_int8_keeps_is_kept_when_it_is_built_again(outcome, request_of, tmp_path):
    out = tmp_path / "out"
    (path,) = (out / "optimize").rglob("built-onnxruntime-int8-linear.json")
    path.write_text(path.read_text().replace('"kept":[]', '"kept":["stages.0.0"]'))
    (out / "custom_int8.onnx").unlink()
    again = optimize.optimize(request_of(form=None), out, fakes.opened).result
    assert again.winner.kept == artifact.load(out / "custom_int8.onnx").sidecar.quantization.kept
    assert again.winner.kept == () or again.sha256 != outcome.result.sha256, "the report is of these bytes"


def test_lost_pages_are_written_again(outcome, request_of, tmp_path):
    for name in ("optimize.html", "custom_int8.onnx.yaml"):
        (tmp_path / "out" / name).unlink()
    optimize.optimize(request_of(form=None), tmp_path / "out", fakes.opened)
    assert (tmp_path / "out" / "optimize.html").is_file()
    assert (tmp_path / "out" / "custom_int8.onnx.yaml").is_file()


def test_nothing_but_the_artifact_is_left_in_the_folder(outcome, tmp_path):
    names = {path.name for path in (tmp_path / "out").iterdir() if path.is_file()}
    about = ("", ".json", ".report.json", ".yaml")
    assert names == {*(f"custom_int8.onnx{suffix}" for suffix in about), "optimize.html", "optimize.json"}


def test_the_number_of_images_holds_for_calibration_images_too(request_of, tmp_path):
    few = replace(request_of(), checks=Checks(samples=3))
    assert Search(few, tmp_path, *candidates.find(few), fakes.opened).samples.total == 3


@pytest.mark.parametrize("changed", ["gpu", "reference"])
def test_a_search_of_another_gpu_or_reference_is_another(changed, request_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "searched_network.py").write_text("def build(): ...")
    request = request_of()
    request = replace(request, model=replace(request.model, reference="searched_network:build"))
    before = key_of(request)
    if changed == "gpu":
        monkeypatch.setattr("exporter.machine.gpu", lambda: {"name": "Another GPU"})
    else:
        (tmp_path / "searched_network.py").write_text("def build(): print()")
    assert key_of(request) != before


def test_a_segmenter_is_judged_by_its_pixels(request_of, tiny_upernet, tmp_path):
    outcome = optimize.optimize(request_of(weights=tiny_upernet, backend=("openvino",)), tmp_path, fakes.opened)
    winner = outcome.result.winner
    assert (winner.precision, winner.accuracy.metric, winner.accuracy.exact) == ("int8", "pixel_agreement", 100)
    assert 97 < winner.accuracy.value < 100
    assert "agreement with PyTorch" in tables.sentence(outcome.result)
    assert "% of pixels" in tables.tried(outcome.result).columns[7]
    written = json.loads(Path(f"{outcome.result.artifact}.report.json").read_text())
    assert written["pictures"], "the masks are kept"


@pytest.mark.parametrize(("error", "stored"), [(CheckFailed("differs"), True), (Unavailable("no space left"), False)])
def test_a_build_that_may_succeed_later_is_tried_again(error, stored, request_of, tmp_path, monkeypatch):
    def fail(*_):
        raise error

    builder = Builder(request_of(), Store(tmp_path))
    candidate = candidates.Candidate(backend="onnxruntime", precision="fp32", form="linear")
    monkeypatch.setattr(Builder, "_artifact", fail)
    assert builder.build(candidate).failure == str(error)
    monkeypatch.undo()
    assert bool(builder.build(candidate).failure) == stored


def test_a_search_without_a_candidate_that_may_succeed_later_goes_on_with_it(request_of, tmp_path, monkeypatch):
    """The disk is full for int8; the others are not built again."""
    real, built = Builder._artifact, []

    def full(builder, candidate, kept):
        built.append(candidate.precision)
        if candidate.precision == "int8":
            raise Unavailable("no space left")
        return real(builder, candidate, kept)

    monkeypatch.setattr(Builder, "_artifact", full)
    first = optimize.optimize(request_of(), tmp_path, fakes.opened).result
    assert (first.winner.precision, built) == ("fp32", ["fp32", "int8"])
    monkeypatch.setattr(Builder, "_artifact", lambda *words: built.append(words[1].precision) or real(*words))
    built.clear()
    assert optimize.optimize(request_of(), tmp_path, fakes.opened).result.winner.precision == "int8"
    assert built == ["int8"]


def test_int8_is_judged_on_the_device_that_is_asked_for(request_of, tmp_path):
    found, skipped = candidates.find(request_of(device="cpu"))
    assert Search(request_of(device="cpu"), tmp_path, found, skipped, fakes.opened).verifying.device == "cpu"


def test_for_throughput_the_runtimes_are_not_compared_by_latency(request_of, tmp_path):
    """How many batches a runtime computes at once is its own choice."""
    both = request_of(goal="throughput", form=None, backend=("onnxruntime", "openvino"), precision=("fp32",))
    result = optimize.optimize(both, tmp_path, fakes.opened).result
    assert not any("not verified" in row.reason for row in result.rows)
    assert {row.backend for row in result.rows if row.accuracy} == {"onnxruntime", "openvino"}


def test_where_nothing_is_small_enough_the_nearest_is_written_and_only_verified_ones_timed_at_last(
    request_of, tmp_path
):
    both = request_of(max_bytes="1kB", form=None, backend=("onnxruntime", "openvino"), precision=("fp32",))
    result = optimize.optimize(both, tmp_path, fakes.opened).result
    assert not result.passed
    assert "limit 0.001 MB" in result.winner.reason
    assert Path(result.artifact).is_file()
    assert result.winner.accuracy is not None
    assert {row.backend for row in result.rows if row.threads == 1} == {"onnxruntime"}, "the other is behind it"


def test_the_smallest_is_chosen_where_pytorch_cannot_be_timed(request_of, tmp_path):
    result = optimize.optimize(request_of(goal="size"), tmp_path, fakes.crashing_eager).result
    assert (result.passed, result.winner.precision) == (True, "int8")


def test_the_front_is_of_what_is_asked_for(outcome):
    row = outcome.result.winner
    alike = [replace(row, p50_ms=1.0, images_s=1000.0), replace(row, p50_ms=2.0, images_s=2000.0)]
    assert front(alike, "latency") == [True, False]
    assert front(alike, "throughput") == [False, True]


def test_every_row_of_a_disturbed_timing_says_so(outcome):
    noise = "noisy: interval wider than ±3 %"
    rows = tuple(replace(row, noise=noise) for row in outcome.result.rows)
    assert all(cells[-1].endswith(noise) for cells in tables.tried(replace(outcome.result, rows=rows)).rows)


def test_a_precision_that_a_runtime_lacks_is_named(request_of):
    with pytest.raises(BadRequest, match="onnxruntime bf16: onnxruntime is built in fp32, fp16, int8"):
        candidates.find(request_of(precision=("bf16",)))


def test_masks_that_count_from_1_can_be_searched_on(request_of, tiny_upernet, tmp_path):
    request = request_of(weights=tiny_upernet, data=str(tmp_path), backend=("openvino",))
    found, _ = candidates.find(replace(request, checks=Checks(reduce_zero_label=True)))
    assert found


def test_a_search_in_ci_is_another_where_being_unsure_fails(request_of, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    before = key_of(request_of())
    monkeypatch.setenv("CI", "true")
    assert key_of(request_of()) != before


def test_the_verdict_is_that_of_the_report(request_of, tmp_path, monkeypatch):
    """Of the inputs that it was timed with too."""
    late = Finding(check="latency", metric="outputs_cosine", value=0.5, limit=0.9, passed=False)
    findings_of = publish.latency.findings_of
    monkeypatch.setattr(publish.latency, "findings_of", lambda *words: [*findings_of(*words), late])
    outcome = optimize.optimize(request_of(), tmp_path, fakes.opened)
    assert (outcome.report.passed, outcome.result.passed) == (False, False)
    assert tables.sentence(outcome.result).startswith("a check of the chosen artifact failed, see its report: custom")
