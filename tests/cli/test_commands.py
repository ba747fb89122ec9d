"""The words: what they print, what they refuse, and how they end."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from PIL import Image
from safetensors.torch import save_file

from exporter.artifact import load, sidecar_path
from exporter.data import synthetic
from tests.conftest import ROOT, copy_artifact, needs_bf16, snapshot, tiny_state, write_tiny

OTHER_WEIGHTS = """
from exporter.model.fit import empty
from tests.conftest import tiny_architecture, tiny_state

def load():
    model = empty(tiny_architecture(), 10).to_empty(device="cpu")
    state = tiny_state()
    state["head.weight"] = -state["head.weight"]
    model.load_state_dict(state)
    return model
"""


@pytest.fixture
def photos(tmp_path):
    """Ten images in five of the tiny model's ten classes."""
    folder = tmp_path / "photos"
    for index in range(10):
        path = folder / f"class {index % 5}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(synthetic.dead_leaves(70, index)).save(path)
    return folder


def test_onnx_prints_the_artifact_as_json(run, tiny, tmp_path):
    result = run("onnx", "--weights", tiny, "-o", tmp_path, "--json")
    assert result.code == 0
    made = result.json["artifact"]
    assert made["path"] == str(tmp_path / "custom_fp32.onnx")
    assert made["weights"]["source"] == str(tiny)
    assert made["files"][0]["sha256"] == made["sha256"]
    assert set(made) >= {"bytes", "backend", "precision", "parents", "variant", "inputs", "outputs", "preprocessing"}
    on_disk = json.loads((tmp_path / "custom_fp32.onnx.json").read_text())
    assert {key: made[key] for key in on_disk} == on_disk


def test_verify_prints_the_report_as_json_and_keeps_it(run, artifacts, photos, tmp_path):
    made = copy_artifact(artifacts["openvino", "fp16"], tmp_path)
    result = run("verify", made.path, "--data", photos, "--json")
    assert result.code == 0, result.err
    report = result.json
    assert report == json.loads((tmp_path / "custom_fp16.xml.report.json").read_text())
    metrics = {(f["check"], f["metric"]): f for f in report["findings"]}
    assert metrics["parity", "cosine"]["value"] > 0.99999
    assert metrics["accuracy", "top1_drop"]["value"] == 0
    assert len(metrics["parity", "cosine"]["samples"]) == 10
    assert report["environment"]["session"] == {"device": "CPU", "arithmetic": "fp32"}
    quality = load(made.path).sidecar.quality
    assert quality["cosine"] == metrics["parity", "cosine"]["value"]
    assert (quality["images"], quality["passed"]) == (10, "yes")
    assert run("verify", made.path, "--data", photos, "--json").json == report, "whatever the sidecar says by now"


def test_verify_prints_a_table_with_verdicts(run, artifacts, tmp_path):
    made = copy_artifact(artifacts["onnxruntime", "fp32"], tmp_path)
    result = run("verify", made.path, "--samples", 4)
    assert result.code == 0
    assert "pass" in result.out
    assert "synthetic" in result.out
    verdict, following = result.out.splitlines()[-2:]
    assert "passed; the report is" in verdict
    assert following == f"time it beside PyTorch: convnext-export bench {made.path}"


def test_a_check_that_does_not_hold_is_exit_5_with_the_report_written(run, artifacts, tmp_path):
    made = copy_artifact(artifacts["openvino", "fp16"], tmp_path)
    result = run("verify", made.path, "--samples", 4, "--atol", 1e-9)
    assert result.code == 5
    assert result.out.splitlines()[-1] == f"find the part that differs: convnext-export bisect {made.path}"
    assert "FAIL" in result.out
    assert json.loads((tmp_path / "custom_fp16.xml.report.json").read_text())["passed"] is False


def test_the_next_step_takes_the_images_and_names_a_reference(run, artifacts, photos, tmp_path, monkeypatch):
    artifact = copy_artifact(artifacts["onnxruntime", "fp32"], tmp_path)
    words = ("verify", artifact.path, "--data", photos)
    following = run(*words, "--atol", 1e-12).out.splitlines()[-1]
    assert following == f"find the part that differs: convnext-export bisect {artifact.path} --data {photos}"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other_weights.py").write_text(OTHER_WEIGHTS)
    result = run(*words, "--reference", "other_weights:load")
    assert result.code == 5
    following = result.out.splitlines()[-1]
    assert following == "to find the module that differs, build the artifact again with --reference other_weights:load"


def test_unreadable_images_are_counted_and_named(run, artifacts, photos, tmp_path):
    (photos / "class 0" / "broken.jpg").write_bytes(b"not an image")
    made = copy_artifact(artifacts["onnxruntime", "fp32"], tmp_path)
    report = run("verify", made.path, "--data", photos, "--json").json
    found = {f["metric"]: f for f in report["findings"]}
    assert found["images"]["value"] == 10
    assert found["unreadable"]["detail"].startswith("1: class 0/broken.jpg: no image of a known format")
    assert found["unreadable"]["passed"]
    (photos / "class 1" / "broken.jpg").write_bytes(b"not an image")
    assert run("verify", made.path, "--data", photos).code == 5, "one in six is too many"


def test_images_of_which_none_can_be_read_are_refused(refused, artifacts, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"nothing")
    made = copy_artifact(artifacts["onnxruntime", "fp32"], tmp_path)
    message = refused(2, "verify", made.path, "--data", tmp_path / "photos", folder=tmp_path)
    assert "none of its 1 images can be read (a.jpg" in message


def test_a_fixed_batch_is_verified_on_any_number_of_images(run, tiny, photos, tmp_path):
    run("onnx", "--weights", tiny, "--batch", 4, "-o", tmp_path)
    report = run("verify", tmp_path / "custom_fp32.onnx", "--data", photos, "--json").json
    assert report["passed"]
    assert len(next(f for f in report["findings"] if f["metric"] == "cosine")["samples"]) == 10


def test_features_are_verified_too(run, tiny_v2, tmp_path):
    assert run("openvino", "--weights", tiny_v2, "--task", "features", "--imgsz", "dynamic", "-o", tmp_path).code == 0
    report = run("verify", tmp_path / "v2_custom_features_fp32.xml", "--samples", 3, "--json").json
    assert report["passed"]
    assert not any(f["metric"] == "top1_agreement" for f in report["findings"])


def test_a_second_build_of_the_same_is_free(run, tiny, tmp_path):
    run("onnx", "--weights", tiny, "-o", tmp_path)
    before = snapshot(tmp_path)
    again = run("onnx", "--weights", tiny, "-o", tmp_path)
    assert "already there, from the same weights and options" in again.err
    assert snapshot(tmp_path) == before
    other = run("onnx", "--weights", tiny, "-o", tmp_path, "--imgsz", 96)
    assert "already there" not in other.err
    assert snapshot(tmp_path) != before


def test_a_spoilt_artifact_is_built_again(run, tiny, tmp_path):
    run("onnx", "--weights", tiny, "-o", tmp_path)
    (tmp_path / "custom_fp32.onnx").write_bytes(b"spoilt")
    assert run("onnx", "--weights", tiny, "-o", tmp_path).code == 0
    assert run("verify", tmp_path / "custom_fp32.onnx", "--samples", 2).code == 0


def test_moved_weights_are_found_where_they_are_said_to_lie(run, refused, tiny, tmp_path):
    import shutil

    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(tiny, first)
    run("onnx", "--weights", first, "-o", tmp_path)
    first.rename(second)
    made = tmp_path / "custom_fp32.onnx"
    assert "say where with --weights" in refused(3, "verify", made, "--samples", 2)
    assert run("verify", made, "--samples", 2, "--weights", second).code == 0
    assert "no such file or folder" in refused(2, "verify", made, "--samples", 2, "--weights", first)


def test_other_weights_are_refused(refused, artifacts, tmp_path):
    made = copy_artifact(artifacts["onnxruntime", "fp32"], tmp_path)
    other = write_tiny(tmp_path / "other")
    save_file(tiny_state(seed=5), other / "model.safetensors")
    assert "other weights than the artifact was made from" in refused(2, "verify", made.path, "--weights", other)


def test_inspect_tells_what_an_artifact_is(run, artifacts):
    made = artifacts["openvino", "fp16"]
    result = run("inspect", made.path)
    for fact in (
        made.sidecar.sha256,
        made.sidecar.parents[0],
        "bilinear to 64",
        "10: class 0",
        "stages.2.1",
        "logits",
        "nchw",
    ):
        assert fact in result.out
    layers = run("inspect", made.path, "--json").json["layers"]
    assert {"name", "module", "operator", "precision", "pair_sum"} == set(layers[0])
    assert len(run("inspect", made.path, "--layers").out.splitlines()) > len(layers)


def test_inspect_tells_what_is_done_inside(run, tiny, tmp_path):
    made = run("onnx", "--weights", tiny, "--input", "uint8", "--form", "linear", "-o", tmp_path, "--json").json
    told = run("inspect", made["artifact"]["path"]).out
    assert "images (batch, 3, 64, 64) uint8" in told
    assert "applied inside the artifact; it takes uint8 pixels from 0 to 255" in told
    assert "linear" in told
    assert run("verify", made["artifact"]["path"], "--samples", 3).code == 0


def test_doctor_tells_what_is_there_and_what_is_not(run):
    facts = {fact["what"]: fact for fact in run("doctor", "--json").json}
    assert facts["backend onnxruntime"]["mark"] == "✓"
    assert facts["torch"]["found"].startswith("2.")
    assert facts["devices of openvino"]["found"].startswith("cpu (")
    assert "backend openvino" in run("doctor").out


def test_doctor_names_a_device_whose_driver_does_not_load(run, monkeypatch):
    import openvino

    monkeypatch.setattr(openvino.Core, "available_devices", ["CPU", "XPU"])
    facts = {fact["what"]: fact for fact in run("doctor", "--json").json}
    assert "cpu (" in facts["devices of openvino"]["found"]
    assert "xpu (does not load: " in facts["devices of openvino"]["found"]


def test_doctor_says_when_both_builds_of_onnxruntime_got_in(run, monkeypatch):
    from importlib import metadata

    monkeypatch.setattr(metadata, "version", lambda name: "1.0")
    facts = {fact["what"]: fact for fact in run("doctor", "--json").json}
    assert facts["backend onnxruntime"]["mark"] == "✗"
    assert "fill the same folder" in facts["backend onnxruntime"]["found"]
    assert facts["backend onnxruntime"]["remedy"].startswith("pip uninstall")


@pytest.mark.parametrize(
    ("code", "words", "message"),
    [
        (2, ["onx"], "did you mean 'onnx'"),
        (2, ["onnx", "--varient", "tiny"], "Did you mean '--variant'?"),
        (2, ["onnx", "--variant", "tinny", "--weights", "random:0"], "unknown variant 'tinny'; did you mean 'tiny'"),
        (2, ["onnx", "--precision", "fp61"], "onnxruntime cannot run fp61; did you mean 'fp16'"),
        (2, ["onnx", "--precision", "bf16"], "onnxruntime cannot run bf16"),
        (2, ["openvino", "--fp16", "--bf16"], "one precision at a time, not fp16 and bf16"),
        (
            2,
            ["onnx", "--imgsz", "big"],
            "'--imgsz': 'big': expected a whole number from 32 to 4096, two of these (height, width) or dynamic",
        ),
        (2, ["onnx", "--opset", "9"], "'--opset': '9': expected a whole number from 13 to 23"),
        (2, ["onnx", "--weights", "random:x"], "the seed must be a whole number"),
        (2, ["onnx", "--weights", "nothing.pth"], "nothing.pth: no such file or folder"),
        (2, ["onnx", "--variant", "v2_small"], "v2_small has no published weights on the Hub"),
        (2, ["verify", "nothing.onnx"], "nothing.onnx: no such file"),
        (2, ["inspect", "nothing.onnx"], "nothing.onnx: no such file"),
        (2, ["report", "nothing.json"], "nothing.json: no such report"),
    ],
)
def test_a_bad_request_is_one_line_and_writes_nothing(code, words, message, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(code, *words, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused(refused, tiny, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(2, "onnx", "--weights", tiny, "-o", tmp_path / "file" / "below")


def test_an_image_size_other_than_the_artifacts_is_no_concern_of_the_data(run, artifacts, photos, tmp_path):
    """Photographs are 70 pixels, the model takes 64: preprocessing sees to it."""
    made = copy_artifact(artifacts["onnxruntime", "fp32"], tmp_path)
    assert run("verify", made.path, "--data", photos).code == 0


def test_bf16_builds_and_verifies(run, tiny, tmp_path):
    needs_bf16("openvino", "bf16")
    assert run("openvino", "--weights", tiny, "--bf16", "-o", tmp_path).code == 0
    assert run("verify", tmp_path / "custom_bf16.xml").code == 0


def test_bf16_on_a_cpu_without_it_is_exit_3(refused, tiny, tmp_path, monkeypatch):
    import openvino

    honest = openvino.Core.get_property

    def without(self, device, name):
        found = honest(self, device, name)
        return [x for x in found if x != "BF16"] if name == "OPTIMIZATION_CAPABILITIES" else found

    from tests.conftest import build

    made = build(tiny, tmp_path, "openvino", "bf16")
    monkeypatch.setattr(openvino.Core, "get_property", without)
    assert "this CPU has no bf16 arithmetic" in refused(3, "verify", made.path, folder=tmp_path)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_ctrl_c_and_its_like_are_exit_4_and_leave_no_torn_file(name, tiny, tmp_path):
    program = [sys.executable, "-c", "from exporter.cli import main; main()"]
    words = ["onnx", "--weights", str(tiny), "-o", str(tmp_path / "out")]
    process = subprocess.Popen(program + words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "tracing" in line:
            break
    time.sleep(0.5)
    process.send_signal(getattr(signal, name))
    rest = process.stderr.read()
    assert process.wait(30) == 4
    assert "interrupted: no file is incomplete" in rest
    assert "Traceback" not in rest
    out = tmp_path / "out"
    assert not out.exists() or list(out.iterdir()) == []


@pytest.mark.parametrize("is_ignored", [True, False])
def test_a_closed_terminal_ends_no_command_under_nohup(is_ignored):
    script = """
        import os, signal, sys
        from exporter import cli
        if sys.argv[1] == "True":
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with cli._interruptible():
            os.kill(os.getpid(), signal.SIGHUP)
    """
    words = [sys.executable, "-c", textwrap.dedent(script), str(is_ignored)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert ("KeyboardInterrupt" in done.stderr) != is_ignored


INTERRUPTED_IN_A_CALLBACK = """
import signal, time, weakref
from exporter import cli

class Weight: pass

def work(standalone_mode):
    weight = Weight()
    reference = weakref.ref(weight, lambda _: signal.raise_signal(signal.{name}))
    del weight
    for _ in range(500):
        time.sleep(0.01)
    print("went on")

cli.cli.main = work
cli.main()
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupt_that_python_discards_is_repeated(name):
    """Python discards what the callback of a weak reference raises."""
    script = INTERRUPTED_IN_A_CALLBACK.format(name=name)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.splitlines() == ["interrupted: no file is incomplete; run the same command again"]


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -c 'from exporter.cli import main; main()' variants | head -1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert "variant" in done.stdout
    assert done.stderr == ""


def test_help_loads_no_heavy_library():
    script = """
import sys
from exporter.cli import cli, groups
for words in [["--help"], *([verb, "--help"] for verbs in groups().values() for verb in verbs)]:
    try:
        cli.main(words, standalone_mode=False)
    except SystemExit:
        pass
heavy = {"torch", "onnx", "onnxruntime", "openvino", "tensorrt", "rich", "PIL", "scipy", "jinja2", "matplotlib"}
print("LOADED", sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "LOADED []" in done.stdout


def test_the_installed_program_answers():
    from pathlib import Path

    program = Path(sys.executable).with_name("convnext-export")
    if not program.exists():
        pytest.skip("the package is not installed here; `make install` does it")
    done = subprocess.run([program, "--version"], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.stdout.startswith("convnext-export, version 0.")


def test_a_bug_of_ours_is_exit_1_with_its_traceback(monkeypatch):
    script = """
import exporter.model.variants as variants
variants.VARIANTS = None
import sys
sys.argv = ["convnext-export", "variants"]
from exporter.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(
    "name", ["with space", "brackets [bold] [/]", "hash#tag", "ünïcode 漢字", "-dash", "quote'quote"]
)
def test_folders_may_have_any_name(name, run, tiny, tmp_path):
    import shutil

    source, out = tmp_path / f"{name} in", tmp_path / name
    shutil.copytree(tiny, source)
    result = run("onnx", "--weights", source, "-o", out)
    assert result.code == 0, result.err
    assert str(out / "custom_fp32.onnx") in result.out
    verified = run("verify", out / "custom_fp32.onnx", "--samples", 2)
    assert verified.code == 0, verified.err
    assert str(out / "custom_fp32.onnx.report.json") in verified.out


def test_a_gate_that_cannot_measure_is_refused(refused, artifacts, tmp_path):
    made = copy_artifact(artifacts["onnxruntime", "fp32"], tmp_path)
    assert "synthetic has no labels to measure a drop on" in refused(2, "verify", made.path, "--max-drop", 0.1)
    for words in (["--max-drop", "nan"], ["--atol", "-1"], ["--min-cosine", "2"]):
        assert "expected a number from" in refused(2, "verify", made.path, *words)


def test_a_report_is_not_written_over_an_artifact(refused, artifacts, tmp_path):
    made = copy_artifact(artifacts["onnxruntime", "fp32"], tmp_path)
    for target in (made.path, sidecar_path(made.path)):
        assert "its sidecar has this name; write to another file" in refused(
            2, "verify", made.path, "-o", target, folder=tmp_path
        )
    for target in (tmp_path, "/dev/null"):
        assert "not a regular file" in refused(2, "verify", made.path, "-o", target, folder=tmp_path)


def test_a_report_of_an_older_build_is_pointed_out(run, tiny, tmp_path):
    run("onnx", "--weights", tiny, "-o", tmp_path)
    run("verify", tmp_path / "custom_fp32.onnx", "--samples", 2)
    assert run("report", tmp_path / "custom_fp32.onnx.report.json").err == ""
    run("onnx", "--weights", tiny, "-o", tmp_path, "--imgsz", 96)
    assert "was rebuilt after this report" in run("report", tmp_path / "custom_fp32.onnx.report.json").err


def test_a_folder_where_the_artifact_should_go_is_refused(refused, tiny, tmp_path):
    (tmp_path / "custom_fp32.onnx").mkdir()
    assert "not written by this tool" in refused(2, "onnx", "--weights", tiny, "-o", tmp_path, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["custom_fp32.onnx"]


def test_an_empty_word_is_refused(refused):
    assert "'--weights': it is empty" in refused(2, "onnx", "--weights", "")


def test_a_precision_of_another_backend_is_pointed_to_it(refused):
    assert "onnxruntime cannot run bf16; openvino and tensorrt can" in refused(2, "onnx", "--precision", "bf16")
