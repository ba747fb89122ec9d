"""`run`: what is done, what is skipped, and that nothing skipped is out of date."""

import json
import logging
import os
import queue
import re
import shutil
import signal
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

import msgspec
import pytest

from exporter import machine
from exporter import run as running
from exporter.build.int8 import speed
from exporter.progress import REPORTER
from exporter.report import Finding, Report
from exporter.run import pool
from exporter.run.steps import Steps, verify_options
from tests.conftest import recipe_of, snapshot, write_tiny

pytestmark = pytest.mark.slow
FAST = "quantization: {calib: synthetic, calib_size: 8}\nbench: null"
TIMED = "bench: {duration: 0.5}"


def steps(result):
    return [outcome["steps"] for outcome in result.json]


def test_a_recipe_is_built_verified_timed_and_reported(recipe, run, tmp_path):
    result = run("run", recipe(more=TIMED))
    assert result.code == 0, result.err
    assert "custom_fp16.onnx" in result.out
    assert "passes" in result.out
    found = json.loads((tmp_path / "build" / "custom_fp16.onnx.report.json").read_text())
    assert {f["check"] for f in found["findings"]} >= {"parity", "latency", "structure"}
    assert isinstance(found["differences"], list), "the images of the verification are kept"
    assert "custom_fp16.onnx" in (tmp_path / "build" / "report.html").read_text()


def test_the_second_run_does_nothing_and_says_so(recipe, run, tmp_path, monkeypatch):
    path = recipe(more=TIMED)
    assert run("run", path).code == 0
    before = snapshot(tmp_path / "build")
    for name in ("build.build", "verify.verify", "latency.bench"):
        monkeypatch.setattr(f"exporter.run.{name}", None)
    result = run("run", path, "--json")
    assert result.code == 0, result.err
    assert steps(result) == [dict.fromkeys(("build", "verify", "bench"), "already there")]
    assert "custom_fp16.onnx is already there, from the same weights, images and options" in result.err
    assert snapshot(tmp_path / "build") == before


def test_a_dry_run_tells_what_is_there_and_does_nothing(recipe, run, tmp_path):
    path = recipe()
    assert run("run", path, "--dry-run", "--json").json == {
        "onnxruntime/my": {"build": "to do", "verify": "to do", "bench": "not asked for"}
    }
    assert not (tmp_path / "build").exists()
    assert run("run", path).code == 0
    before = snapshot(tmp_path)
    assert run("run", path, "--dry-run", "--json").json["onnxruntime/my"]["build"] == "already there"
    again = run("run", path, "--dry-run", "--set", "export.opset=19", "--json").json
    assert again["onnxruntime/my"] == {"build": "to do", "verify": "to do", "bench": "not asked for"}
    assert snapshot(tmp_path) == before


def test_other_limits_rebuild_nothing_and_are_held(recipe, run, monkeypatch):
    path = recipe(more=TIMED)
    assert run("run", path).code == 0
    monkeypatch.setattr("exporter.run.build.build", None)
    failing = run("run", path, "--set", "checks.min_cosine=1.0", "--json")
    assert failing.code == 5
    assert steps(failing) == [{"build": "already there", "verify": "done", "bench": "already there"}]
    monkeypatch.setattr("exporter.run.latency.bench", None)
    slow = run("run", path, "--set", "bench.max_p50_ms=0.0001", "--json")
    assert slow.code == 5
    (finding,) = [f for f in slow.json[0]["report"]["findings"] if f["metric"] == "p50_ms"]
    assert (finding["limit"], finding["passed"]) == (0.0001, False)
    assert run("run", path, "--set", "bench.min_speedup=0.0001").code == 0


@pytest.mark.parametrize("spoil", ["weights", "labels", "artifact", "sidecar", "part", "torn part", "gone"])
def test_nothing_skipped_is_out_of_date(spoil, recipe, run, tmp_path):
    own = write_tiny(tmp_path / "own")
    path = recipe()
    path.write_text(path.read_text().replace(path.read_text().split("weights: ")[1].split("}")[0], str(own)))
    assert run("run", path).code == 0
    made, part = tmp_path / "build" / "custom_fp16.onnx", tmp_path / "build" / "runs" / "onnxruntime_my" / "build.json"
    if spoil == "weights":
        write_tiny(own, seed=1)
    elif spoil == "labels":
        text = (own / "config.json").read_text()
        (own / "config.json").write_text(text.replace("class 3", "another"))
    elif spoil == "artifact":
        made.write_bytes(made.read_bytes()[:-8] + b"spoiled!")
    elif spoil == "sidecar":
        sidecar = made.with_name(f"{made.name}.json")
        sidecar.write_text(sidecar.read_text().replace("custom", "costum"))
    elif spoil == "part":
        part.write_text(part.read_text().replace('"key":"', '"key":"0'))
    elif spoil == "torn part":
        part.write_bytes(part.read_bytes()[:40])
    else:
        made.unlink()
    result = run("run", path, "--json")
    assert result.code == 0, result.err
    assert result.json[0]["steps"]["build"] == "done"
    again = run("run", path, "--json")
    assert again.json[0]["steps"] == {"build": "already there", "verify": "already there", "bench": "not asked for"}
    if spoil == "labels":
        assert "another" in again.json[0]["artifact"]["labels"]


def test_other_images_are_looked_at_again(recipe, run, tmp_path):
    from PIL import Image

    from exporter.data.synthetic import dead_leaves

    (tmp_path / "photos").mkdir()
    for index in range(4):
        Image.fromarray(dead_leaves(80, index)).save(tmp_path / "photos" / f"{index}.png")
    path = recipe(more="checks: {data: photos}\nbench: null")
    assert run("run", path).code == 0
    Image.fromarray(dead_leaves(80, 9)).save(tmp_path / "photos" / "2.png")
    assert run("run", path, "--json").json[0]["steps"]["verify"] == "done"
    os.utime(tmp_path / "photos" / "3.png", (1, 1))
    assert run("run", path, "--json").json[0]["steps"]["verify"] == "done"
    (tmp_path / "photos" / "1.png").unlink()
    result = run("run", path, "--json")
    (images,) = [f["value"] for f in result.json[0]["report"]["findings"] if f["metric"] == "images"]
    assert images == 3
    assert result.json[0]["steps"] == {"build": "already there", "verify": "done", "bench": "not asked for"}


def test_recipes_share_one_trace_and_one_calibration(recipe, run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # other tests calibrate on these images too
    fp16, fp32 = recipe("openvino", "fp16", "a"), recipe("openvino", "fp32", "b")
    result = run("run", fp16, fp32)
    assert result.code == 0, result.err
    assert result.err.count("tracing to ONNX") == 1
    result = run("run", recipe("onnxruntime", "int8", "c", FAST), recipe("tensorrt", "int8", "d", FAST))
    assert result.code == 0, result.err
    assert result.err.count("calibrating on 8 images") == 1
    assert "statistics of these 8 images are cached" in result.err


def test_one_that_cannot_be_run_does_not_stop_the_others(recipe, run, tmp_path, monkeypatch):
    bad, good = recipe(name="bad"), recipe("openvino", "fp32", "good")
    bad.write_text(bad.read_text().replace("weights: ", "weights: gone"))
    assert run("run", bad).code == 2
    assert not (tmp_path / "build").exists()
    result = run("run", bad, good)
    assert result.code == 2
    assert result.err.count("\nerror: onnxruntime/bad: ") == 1
    assert "no such file or folder" in result.err
    assert (tmp_path / "build" / "custom_fp32.xml").is_file()
    assert "FAILED" in result.out


def test_what_would_write_over_each_other_is_refused(recipe, refused, tmp_path):
    one, two = recipe(name="one"), recipe(name="two")
    assert "would all write" in refused(2, "run", one, two, folder=tmp_path)
    (tmp_path / "deeper").mkdir()
    shutil.copy(one, tmp_path / "deeper" / "one.yaml")
    assert "would all write" in refused(2, "run", one, tmp_path / "deeper" / "one.yaml", folder=tmp_path)
    assert "no such recipe" in refused(2, "run", "onnxruntime/tinny_int8", folder=tmp_path)


def test_one_graph_cannot_be_two(recipe, refused, run, tmp_path):
    """The fp32 graph is an artifact of one recipe, and what the other is built from."""
    one = recipe(precision="fp32", name="one")
    two = recipe(name="two", more="export: {imgsz: 96}\nbench: null")
    line = refused(2, "run", one, two, folder=tmp_path)
    assert "one.yaml and" in line
    assert "would write different graphs" in line
    three = recipe(name="three", more="export: {form: linear}\nbench: null")
    assert "would write different graphs" in refused(2, "run", one, three, folder=tmp_path)
    four = recipe(name="four", more="export: {form: conv}\nbench: null")
    int8 = recipe("onnxruntime", "int8", "int8", f"export: {{form: linear}}\n{FAST}")
    assert run("run", one, four, int8, "--dry-run").code == 0
    auto = [recipe("onnxruntime", word, f"auto_{word}", "export: {form: auto}") for word in ("fp32", "fp16")]
    assert "would write different graphs" in refused(2, "run", *auto, folder=tmp_path)
    of_openvino = [recipe("openvino", "fp32", "five"), recipe("openvino", "fp16", "six", "export: {form: linear}")]
    assert run("run", *of_openvino, "--dry-run").code == 0


def test_two_weights_of_one_network_are_refused_before_anything_is_built(recipe, refused, tmp_path):
    """Only the weights say that both are written to `custom_fp16.onnx`."""
    own = write_tiny(tmp_path / "own", seed=1)
    one, two = recipe(name="one"), recipe(name="two")
    two.write_text(re.sub(r"weights: [^}]*", f"weights: {own}", two.read_text()))
    line = refused(2, "run", one, two, folder=tmp_path)
    assert "one.yaml, " in line
    assert "two.yaml would all write custom, task classify for onnxruntime, in fp16; run them apart" in line
    two.write_text(two.read_text().replace("fp16", "fp32"))
    assert "would write different graphs of custom" in refused(2, "run", one, two, folder=tmp_path)


def test_log_messages_of_several_at_once_are_displayed_with_the_name_of_the_recipe(monkeypatch, caplog, tmp_path):
    def log(recipe_run):
        logging.getLogger("library").info("%d nodes", 3)
        return running.Outcome(recipe_run.name)

    root, lines = logging.getLogger(), queue.Queue()
    (tmp_path / "turn").touch()
    with caplog.at_level(logging.INFO):
        with monkeypatch.context() as patch:  # as in a worker process
            patch.setattr(root, "handlers", [])
            patch.setattr(pool, "_SHARED", [])
            patch.setattr(pool, "run_or_explain", log)
            patch.setattr("signal.signal", lambda *_: None)
            pool._begin(lines, tmp_path / "turn", logging.INFO)
            for name in ("a", "b"):
                pool._run(SimpleNamespace(name=name))
        lines.put(None)
        pool._draw(lines, REPORTER.get())
    records = [(record.name, record.getMessage()) for record in caplog.records]
    assert records == [("library", "a: 3 nodes"), ("library", "b: 3 nodes")]


def test_a_process_that_is_terminated_removes_its_temporary_files(monkeypatch, tmp_path):
    def work(recipe_run):
        with tempfile.TemporaryDirectory(dir=tmp_path):
            os.kill(os.getpid(), signal.SIGTERM)
            try:
                time.sleep(5)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)  # again, during the removal

    def end(code):
        raise SystemExit(code)

    (tmp_path / "turn").touch()
    monkeypatch.setattr(pool, "_SHARED", [queue.Queue(), tmp_path / "turn", SimpleNamespace()])
    monkeypatch.setattr(pool, "run_or_explain", work)
    monkeypatch.setattr(pool.os, "_exit", end)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit, match="4"):
            pool._run(SimpleNamespace(name="a"))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [path.name for path in tmp_path.iterdir()] == ["turn"]


def test_a_recipe_whose_memory_runs_out_stops_no_other():
    outcome = running.Outcome("a")
    with running.recording_error(outcome):
        raise MemoryError
    assert outcome.exit_code == 3
    assert outcome.error.startswith("the memory of this machine has run out")


def test_a_second_interrupt_does_not_keep_processes_from_being_ended(monkeypatch):
    outcome, turns = Future(), []

    def sleep(seconds):
        turns.append(seconds)
        if len(turns) == 1:
            raise KeyboardInterrupt
        outcome.set_result(None)

    monkeypatch.setattr(pool.time, "sleep", sleep)
    monkeypatch.setattr("psutil.Process.children", lambda process, recursive: [])
    pool._stop(ThreadPoolExecutor(1), [outcome])
    assert len(turns) == 2


def test_several_at_once_give_the_same(recipe, run, tmp_path, monkeypatch):
    both = recipe("onnxruntime", "fp32", "a", TIMED), recipe("openvino", "fp32", "b")
    result = run("run", "-v", *both, "--jobs", "2", "--json", "-o", "out")
    assert result.code == 0, result.err
    assert [set(one["steps"].values()) for one in result.json] == [{"done"}, {"done", "not asked for"}]
    assert "onnxruntime/a: tracing" in result.err
    assert "openvino/b: tracing" in result.err
    again = run("run", *both, "--jobs", "2", "--json", "-o", "out")
    assert [one["steps"]["build"] for one in again.json] == ["already there", "already there"]
    assert [one["steps"]["verify"] for one in again.json] == ["already there", "already there"]
    alone = run("run", *both, "--json", "-o", "other", "--set", "bench=null")
    same = [[one["artifact"]["sha256"] for one in found.json] for found in (result, alone)]
    assert same[0] == same[1], "the bytes do not depend on the folder"


def test_a_process_that_is_killed_fails_its_own_recipe_only(recipe, run, tmp_path, monkeypatch):
    (tmp_path / "killed.py").write_text("import os\n\n\ndef model():\n    os.kill(os.getpid(), 9)\n")
    monkeypatch.syspath_prepend(tmp_path)
    first, killed, last = (
        recipe("onnxruntime", name="a"),
        recipe("openvino", name="b"),
        recipe("onnxruntime", "fp32", "c"),
    )
    killed.write_text(killed.read_text().replace("model: {", "model: {reference: 'killed:model', "))
    result = run("run", killed, first, last, "--jobs", "2", "--json", "-o", "out")
    assert result.code == 3, result.err
    errors = {outcome["recipe"]: outcome["error"] for outcome in result.json}
    assert errors.pop("openvino/b") == "its process was killed: memory may have run out; use fewer --jobs"
    assert errors == {"onnxruntime/a": None, "onnxruntime/c": None}


@pytest.mark.parametrize(("backend", "more"), [("onnxruntime", FAST), ("openvino", FAST), ("openvino", "")])
def test_the_same_recipe_gives_the_same_bytes_anywhere(backend, more, tiny, tmp_path, monkeypatch, request):
    """In another folder, with the weights in another place, after other things were built in this process."""
    monkeypatch.setattr(speed, "baseline", lambda work, build, folder: None)
    found = []
    for place in ("a", "b"):
        shutil.copytree(tiny, tmp_path / place / f"weights of {place}")
        path = tmp_path / place / f"{place}.yaml"
        precision = "int8" if more else "fp16"
        path.write_text(f"backend: {backend}\nprecision: {precision}\nmodel: {{weights: weights of {place}}}\n{more}\n")
        (job,) = running.read_all([path], tmp_path / place / "out", ["bench=null"])
        if place == "b":  # the graph of a may be one that another process traced
            request.getfixturevalue("traced_anew")
        made = running.run(job).artifact
        found.append({file.name: file.sha256 for file in made.sidecar.files})
    assert found[0] == found[1]


def test_what_is_not_the_same_bytes_each_time_is_said(recipe, run):
    result = run("run", recipe("tensorrt", "fp16"), "--json")
    assert result.code == 0, result.err
    (finding,) = [f for f in result.json[0]["report"]["findings"] if f["metric"] == "reproducible"]
    assert result.json[0]["artifact"]["parents"][0][:12] in finding["detail"]


def test_a_saved_build_runs_as_it_was(tiny, run, tmp_path, monkeypatch):
    """From the one who built it to a colleague, with the recipe and the weights and another working folder."""
    monkeypatch.setattr(speed, "SECONDS_EACH", 0.3)
    for who in ("mine", "colleague"):
        shutil.copytree(tiny, tmp_path / who / "weights")
    monkeypatch.chdir(tmp_path / "mine")
    built = run("onnx", "--int8", "--weights", "weights", "--calib-size", 8, "--save-config", "model.yaml", "--json")
    assert built.code == 0, built.err
    shutil.copy("model.yaml", tmp_path / "colleague")
    monkeypatch.chdir(tmp_path)
    result = run("run", "colleague/model.yaml", "-o", "theirs", "--set", "bench=null", "--json")
    assert result.code == 0, result.err
    assert result.json[0]["artifact"]["sha256"] == built.json["artifact"]["sha256"]


def test_a_dry_build_writes_only_the_recipe(tiny, run, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    assert run("openvino", "--fp16", "--weights", tiny, "--save-config", "a.yaml", "--dry-run").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.yaml"]
    refused(2, "onnx", "--weights", tiny, "--opset", 9, "--save-config", "b.yaml", folder=tmp_path)
    (tmp_path / "other.yaml").write_text("services: {}\n")
    assert "another file than a recipe stands there" in refused(
        2, "onnx", "--save-config", "other.yaml", folder=tmp_path
    )
    assert "is a .yaml file" in refused(2, "onnx", "--save-config", "b.json", folder=tmp_path)
    refused(2, "onnx", "--weights", "gone.pth", "--save-config", "b.yaml", folder=tmp_path)


def test_the_same_run_twice_at_once_takes_turns(recipe, tmp_path, monkeypatch):
    import threading

    (job,) = running.read_all([recipe()], tmp_path / "out")
    built = []
    real = running.build.build
    monkeypatch.setattr("exporter.run.build.build", lambda *words: built.append(time.sleep(0.2)) or real(*words))
    both = [threading.Thread(target=running.run, args=(job,)) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert len(built) == 1


def test_a_recipe_can_ask_for_sliding_windows(recipe, tmp_path):
    (one,) = running.read_all([recipe(more="checks: {slide: true, window: 64, stride: 32}")], tmp_path)
    options = verify_options(one.recipe)
    assert (options.slide, options.window, options.stride) == (True, 64, 32)


def test_a_limit_of_a_recipe_that_is_not_timed_here_is_not_kept(recipe, run):
    """A TensorRT engine on a machine without a GPU."""
    limits = "bench: {min_speedup: 2, max_p50_ms: 5}"
    result = run("run", recipe("tensorrt", "fp32", more=limits), "--json")
    assert result.code == 5
    failed = [one for one in result.json[0]["report"]["findings"] if not one["passed"]]
    assert [(one["metric"], one["value"], one["limit"]) for one in failed] == [
        ("speedup", None, 2),
        ("p50_ms", None, 5),
    ]
    assert all(one["detail"].startswith("not timed: ") for one in failed)
    assert run("run", recipe("tensorrt", "fp32", more="bench: {duration: 1}"), "--json").code == 0


def test_other_labels_of_random_weights_are_another_build(recipe, run, tmp_path):
    path = recipe("onnxruntime", "fp32")
    path.write_text(re.sub(r"model: .*", "model: {weights: 'random:0', variant: atto}", path.read_text()))
    (tmp_path / "names.txt").write_text("".join(f"class {number}\n" for number in range(1000)))
    assert run("run", path).code == 0
    result = run("run", path, "--set", "model.labels=names.txt", "--json")
    assert result.code == 0, result.err
    assert steps(result)[0]["build"] == "done"
    assert result.json[0]["artifact"]["labels"][0] == "class 0"


@pytest.mark.parametrize("checks", ["max_drop: 0.5", "reduce_zero_label: true"])
def test_checks_are_of_the_images_that_int8_is_chosen_on(checks, recipe, tmp_path):
    images = f"quantization: {{calib: synthetic, data: {tmp_path}}}\nchecks: {{{checks}}}"
    (one,) = running.read_all([recipe(precision="int8", more=images)], tmp_path)
    assert verify_options(one.recipe).data == str(tmp_path)


def test_an_engine_with_another_sidecar_has_another_key_of_verification(recipe, run, monkeypatch):
    """The file of an engine does not say how its images are resized."""
    path = recipe("tensorrt", "fp32")
    assert run("run", path).code == 0
    (job,) = running.read_all([path], path.parent / "build")
    kept = running.run(job).artifact
    wide = msgspec.structs.replace(kept.sidecar.preprocessing, resize=300)
    other = type(kept)(kept.path, msgspec.structs.replace(kept.sidecar, preprocessing=wide))
    stored = Steps(job.recipe, job.out, job.folder)
    before = stored.key("verify", kept)
    assert stored.key("verify", other) != before
    assert stored.key("verify", kept) == before
    with monkeypatch.context() as patch:
        patch.setattr("exporter.run.steps.backends.runtime_of", lambda _: SimpleNamespace(unable=lambda: "another"))
        assert stored.key("verify", kept) != before, "an engine that was simulated is verified where it can run"
    installed = machine.installed
    monkeypatch.setattr(machine, "installed", lambda name: "1" if name == "pillow" else installed(name))
    assert stored.key("verify", kept) != before, "Pillow decodes and resizes the images"


@pytest.mark.parametrize("passed", [True, False])
def test_what_the_search_of_int8_measured_on_its_images_is_left_to_the_verification(passed, artifacts):
    def report(picture, *findings):
        return Report(passed=True, recipe={}, artifact={}, environment={}, findings=findings, pictures=(picture,))

    drop = Finding(check="accuracy", metric="top1_drop", value=2.0, limit=0.5, passed=passed, detail="of 64")
    parts = {
        "build": report("of the search", drop, Finding(check="int8", metric="kept", value=0)),
        "verify": report(
            "of the verification", msgspec.structs.replace(drop, value=0.1, passed=True, detail="of 2000")
        ),
    }
    kept = SimpleNamespace(part=lambda name, artifact: SimpleNamespace(report=parts[name]) if name in parts else None)
    merged = running._merged(recipe_of(bench=None), kept, artifacts["onnxruntime", "int8"])
    assert merged.pictures == ("of the verification",)
    assert merged.passed == passed
    assert merged.find("kept") is not None
    assert merged.find("top1_drop").detail == "of 2000"
    details = [one.detail for one in merged.findings if not one.passed]
    assert details == ([] if passed else ["the images of the search of int8; of 64"])
