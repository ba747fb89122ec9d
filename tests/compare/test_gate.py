"""`compare` as it is typed: reports, artifacts, git revisions."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from msgspec.structs import replace
from PIL import Image

from exporter import pytest_plugin, report
from exporter.compare import gate
from exporter.errors import BadRequest
from exporter.report import Finding, Report
from tests.conftest import copy_artifact

MACHINE = {"cpu": "AMD EPYC", "isa": ["avx2"], "cores": 2, "system": "Linux 6 x86_64"}


def timed(ms=10.0, eager=30.0, launches=8, seed=0, **facts):
    """A report as `bench` writes it, of an artifact that takes so long."""
    rng = np.random.default_rng(seed)
    samples = ms * np.exp(rng.normal(0, 0.01, launches * 20))
    beside = eager * np.exp(rng.normal(0, 0.01, launches * 10))
    findings = (
        latency("p50_ms", samples, launches),
        latency("eager_p50_ms", beside, launches),
        Finding(check="accuracy", metric="top1", value=90.0, unit="%", samples=(1.0,) * 900 + (0.0,) * 100),
        Finding(check="structure", metric="bytes", value=1000.0),
    )
    environment = {**MACHINE, **facts.pop("environment", {})}
    artifact = {"path": "a.onnx", "sha256": "0", "variant": "tiny", "task": "classify", **facts}
    recipe = {"verify": {"data": "val", "images": "a" * 64}}
    return Report(passed=True, recipe=recipe, artifact=artifact, environment=environment, findings=findings)


def latency(metric, samples, launches):
    counts = (len(samples) // launches,) * launches
    value = float(np.median(samples))
    return Finding(
        check="latency", metric=metric, case="batch 1", value=value, unit="ms",
        samples=tuple(map(float, samples)), launches=counts,
    )  # fmt: skip


@pytest.fixture
def typed(run, tmp_path):
    """Type `compare` over two reports."""

    def compare(base, head, *words):
        for name, made in (("base", base), ("head", head)):
            report.save(made, tmp_path / f"{name}.report.json")
        return run("compare", tmp_path / "base.report.json", tmp_path / "head.report.json", *words, "--json")

    return compare


def test_reports_of_a_slower_head_are_a_regression(typed, tmp_path):
    result = typed(timed(10), timed(11.5, seed=1))
    assert result.code == 6
    (finding,) = result.json["findings"]
    assert finding["value"] == pytest.approx(15, abs=1.5)
    assert not report.load(tmp_path / "head.compare.json").passed
    assert typed(timed(10), timed(10.2, seed=1)).code == 0
    assert typed(timed(10), timed(8, seed=1)).code == 0


def test_a_slower_day_is_no_regression_where_eager_was_slower_too(typed):
    assert typed(timed(10, eager=30), timed(12, eager=36, seed=1)).code == 0
    assert typed(timed(10, eager=30), timed(10, eager=25, seed=1)).code == 6, "as slow as before on a faster day"


@pytest.mark.parametrize("other", ["torch", "reference"])
def test_times_are_not_divided_by_those_of_another_eager(other, typed):
    """PyTorch became 20 % faster, and the artifact is as fast as before."""
    base = replace(timed(10, eager=30, environment={"versions": {"torch": "2.12"}}), recipe={"bench": {}})
    head = timed(10, eager=25, seed=1, environment={"versions": {"torch": "2.13" if other == "torch" else "2.12"}})
    head = replace(head, recipe={"bench": {"reference": "timm"} if other == "reference" else {}})
    assert typed(base, head).code == 0
    assert typed(base, replace(head, environment=base.environment, recipe=base.recipe)).code == 6


def test_a_gate_without_a_limit_on_accuracy_says_so_where_it_may_differ(typed):
    base = timed(10, weights={"digest": "a"}, precision="fp32", quantization=None)
    base.artifact["preprocessing"] = {"size": 224}
    says = "accuracy is not compared, and base and head differ in {}; to compare it too, give --fail-on p50_ms:5% "
    says += "--fail-on"

    def note(*words, **facts):
        return " ".join(typed(base, timed(10, seed=1, **{**base.artifact, **facts}), *words).err.split())

    assert "accuracy is not compared" not in note()
    assert f"{says.format('weights')} top1_drop:0.3 after `verify` of both" in note(weights={"digest": "b"})
    assert f"{says.format('weights')} miou_drop:0.3" in note("--across", "model", weights={}, task="segment")
    assert "differ in weights; `verify` compares each" in note("--across", "model", weights={}, task="embed")
    of_labels = {"weights": {}, "recipe": {"export": {"output": "sigmoid"}}}
    assert f"{says.format('weights')} map_drop:0.3" in note(**of_labels)
    assert says.format("precision, quantization") in note(precision="int8", quantization={"digest": "c"})
    assert says.format("preprocessing") in note(preprocessing={"size": 224, "crop": "squash"})
    assert "accuracy is not compared" not in note("--fail-on", "top1_drop:1", precision="int8")
    base.artifact["quantization"] = {"digest": "c", "calib": "a", "kept": []}
    assert "accuracy is not compared" not in note(quantization={"digest": "c", "calib": "b", "kept": []})
    assert says.format("quantization") in note(quantization={"digest": "c", "calib": "a", "kept": ["head"]})


def test_answers_and_sizes_are_compared_too(typed):
    head = timed(10, seed=1)
    worse = replace(head.find("top1"), samples=(1.0,) * 800 + (0.0,) * 200)
    head = replace(head, findings=tuple(worse if f.metric == "top1" else f for f in head.findings))
    result = typed(timed(10), head, "--fail-on", "top1_drop:0.3", "--fail-on", "bytes:1%")
    assert result.code == 6
    drop, size = result.json["findings"]
    assert (drop["value"], drop["passed"]) == (pytest.approx(10), False)
    assert (size["value"], size["passed"]) == (0, True)


@pytest.mark.parametrize(
    ("base", "words", "said"),
    [
        (timed(environment={"cpu": "Intel"}), (), "two machines: Intel and AMD EPYC"),
        (timed(environment={"cores": 4}), (), "two machines: 4 and 2"),
        (timed(variant="base"), (), "two models: base classify and tiny classify"),
        (timed(preprocessing={"size": 384}), (), "two models: tiny classify at 384 pixels and tiny classify;"),
        (timed(launches=1), (), "1 launches"),
        (
            replace(timed(), findings=(*timed().findings, replace(timed().findings[0], case="batch 8"))),
            (),
            "base was timed with batch 8 too, and head was not; `bench` both with the same --batch",
        ),
        (replace(timed(), recipe={"bench": {"threads": 2}}), (), "timed with different options: device cpu threads 2"),
        (timed(), ("--fail-on", "nodes:0"), "no nodes"),
        (
            replace(timed(), recipe={"verify": {"images": "b" * 64}}),
            ("--fail-on", "top1_drop:0.3"),
            "different images, or with other classes (bbbbbbbbbbbb… and aaaaaaaaaaaa…)",
        ),
        (
            replace(timed(), recipe={"verify": {"data": "val"}}),
            ("--fail-on", "top1_drop:0.3"),
            "the base report does not say on which images; `verify` it again",
        ),
        (timed(), ("--base-rev", "main", "--build", "true"), "expected HEAD alone"),
        (timed(), ("--base-rev", "main"), "expected HEAD alone"),
    ],
)
def test_what_cannot_be_compared_is_refused(base, words, said, tmp_path, refused):
    report.save(base, tmp_path / "base.json")
    report.save(timed(), tmp_path / "head.json")
    assert said in refused(2, "compare", tmp_path / "base.json", tmp_path / "head.json", *words, folder=tmp_path)


def test_a_device_that_is_the_default_of_both_is_the_same(typed):
    """Earlier reports name it, and later ones only where `--device` was given."""
    named = replace(timed(), recipe={"bench": {"device": "cpu", "threads": None, "hint": "latency"}})
    default = replace(timed(seed=1), recipe={"bench": {"device": None, "threads": None, "hint": "latency"}})
    assert typed(named, default).code == 0


def test_reports_of_two_gpus_are_refused(tmp_path, refused):
    report.save(timed(environment={"gpu_before": {"name": "NVIDIA A10"}}), tmp_path / "base.json")
    report.save(timed(environment={"gpu_before": {"name": "NVIDIA H100"}}), tmp_path / "head.json")
    refusal = refused(2, "compare", tmp_path / "base.json", tmp_path / "head.json", folder=tmp_path)
    assert "two machines: NVIDIA A10 and NVIDIA H100" in refusal


def test_asked_for_two_machines_are_compared(typed):
    base = timed(environment={"cpu": "Intel"})
    assert typed(base, timed(seed=1), "--across", "machine").code == 0


def test_a_baseline_without_samples_or_with_damaged_ones_is_refused(tmp_path, refused):
    report.save(timed(), tmp_path / "head.json")
    whole = json.loads((tmp_path / "head.json").read_text())
    for change, said in (
        ({"samples": [], "launches": []}, "no samples"),
        ({"launches": [8] * 8}, "damaged"),
        ({"launches": [160, 0]}, "damaged"),
    ):
        spoilt = {**whole, "findings": [{**whole["findings"][0], **change}, *whole["findings"][1:]]}
        (tmp_path / "base.json").write_text(json.dumps(spoilt))
        assert said in refused(2, "compare", tmp_path / "base.json", tmp_path / "head.json")
    (tmp_path / "base.json").write_text(json.dumps({**whole, "schema": 9}))
    assert "schema 9" in refused(2, "compare", tmp_path / "base.json", tmp_path / "head.json")
    (tmp_path / "base.json").write_text(json.dumps(whole)[:-40])
    assert "truncated" in refused(2, "compare", tmp_path / "base.json", tmp_path / "head.json")


def test_a_report_and_an_artifact_are_not_compared(onnx_copy, tmp_path, refused):
    report.save(timed(), tmp_path / "head.json")
    assert "give two reports or two artifacts" in refused(2, "compare", onnx_copy.path, tmp_path / "head.json")
    assert "1 given" in refused(2, "compare", onnx_copy.path)
    assert "--data" in refused(2, "compare", onnx_copy.path, onnx_copy.path, "--fail-on", "top1_drop:0.3")


def test_two_artifacts_on_their_real_runtime(artifacts, tmp_path, run):
    """The same against itself, with a limit that noise does not reach; size and nodes are exact."""
    made = copy_artifact(artifacts["onnxruntime", "fp32"], tmp_path)
    result = run(
        "compare", made.path, made.path, "--fail-on", "p50_ms:60%", "--fail-on", "bytes:0", "--fail-on", "nodes:0",
        "--duration", "0.5",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert "no regression" in result.out
    assert (tmp_path / "custom_fp32.onnx.compare.json").exists()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A git repository whose build copies an artifact that is in it."""
    monkeypatch.chdir(tmp_path)
    for words in (["init", "-q", "-b", "main"], ["config", "user.email", "a@b.c"], ["config", "user.name", "a"]):
        subprocess.run(["git", *words], check=True)
    return tmp_path


def commit(message):
    subprocess.run(["git", "add", "-A"], check=True)
    subprocess.run(["git", "commit", "-q", "-m", message], check=True)


def test_revisions_end_to_end(repository, artifacts, run):
    made = artifacts["onnxruntime", "fp32"]
    for path in (*made.files, made.path.with_name(made.path.name + ".json")):
        Path(path.name).write_bytes(path.read_bytes())
    Path("build.sh").write_text("mkdir -p out && cp custom_fp32.onnx* out/")
    Path(".gitignore").write_text("out/\n")
    commit("base")
    Path("build.sh").write_text("mkdir -p out && cp custom_fp32.onnx* out/ && echo built")
    commit("head")
    told = ("--build", "sh build.sh", "--fail-on", "bytes:0")
    result = run("compare", "--base-rev", "HEAD~1", *told, "out/custom_fp32.onnx", "--json")
    assert result.code == 0, result.err
    assert result.json["findings"][0]["value"] == 0
    assert result.json["recipe"]["compare"]["base"]["sha256"] == made.sidecar.sha256
    worktrees = subprocess.run(["git", "worktree", "list"], capture_output=True, text=True, check=True).stdout
    assert len(worktrees.splitlines()) == 1, "the checkout of the base is gone"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--base-rev", "nowhere", "--build", "true", "a.onnx"), 2, "git fetch --depth=1 origin nowhere"),
        (("--base-rev", "HEAD", "--build", "echo no weights >&2; false", "a.onnx"), 5, "exit code 1: no weights"),
        (("--base-rev", "HEAD", "--build", "true", "a.onnx"), 2, "left no a.onnx"),
        (("--base-rev", "HEAD", "--build", "true", "/a.onnx"), 2, "relative to here"),
        (("--base-rev", "HEAD", "a.onnx"), 2, "go together"),
    ],
)
def test_revisions_that_cannot_be_built_are_refused(words, code, said, repository, refused):
    Path("file").write_text("x")
    commit("one")
    assert said in refused(code, "compare", *words)


def test_a_base_without_the_folder_is_refused(repository, refused, monkeypatch):
    Path("file").write_text("x")
    commit("one")
    Path("new").mkdir()
    monkeypatch.chdir("new")
    message = "it has no folder new/; run this in a folder that both revisions have"
    assert message in refused(2, "compare", "--base-rev", "HEAD", "--build", "true", "a.onnx")


def test_answers_of_several_kinds_of_processors_are_not_compared(typed):
    """The images of each kind are counted apart, and are others in each report."""
    one = timed(10)
    of_others = Finding(check="accuracy", metric="top1", case="avx2", value=50.0, samples=(1.0, 0.0))
    one = replace(one, findings=(*one.findings, of_others))
    done = typed(one, one, "--fail-on", "top1_drop:1")
    assert done.code == 2
    assert "a separate top1 for each kind of processor; verify on machines of one kind" in " ".join(done.err.split())


def test_outside_a_repository(tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert "git" in refused(2, "compare", "--base-rev", "HEAD", "--build", "true", "a.onnx")


def test_the_pytest_fixture_fails_a_test_that_regressed(pytester, tmp_path):
    report.save(timed(10), tmp_path / "base.json")
    report.save(timed(12, seed=1), tmp_path / "slow.json")
    pytester.makepyfile(
        f"""
        import msgspec
        import pytest

        def test_same(convnext_gate):
            assert convnext_gate("{tmp_path}/base.json", "{tmp_path}/base.json", "p50_ms:5%").passed

        def test_slow(convnext_gate):
            convnext_gate("{tmp_path}/base.json", "{tmp_path}/slow.json", "p50_ms:5%")

        def test_one_batch(convnext_gate):
            with pytest.raises(msgspec.ValidationError, match="batch"):
                convnext_gate("{tmp_path}/base.json", "{tmp_path}/base.json", "p50_ms:5%", batch=8)
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["*slow.json regressed against*", "*p50_ms*regressed*"])


def test_the_pytest_fixture_takes_paths(tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(gate, "compare", lambda sides, options: taken.append(options) or SimpleNamespace(passed=True))
    pytest_plugin._gate("base.onnx", "head.onnx", "p50_ms:5%", data=tmp_path, batch=[1, 8])
    assert taken == [gate.GateOptions(fail_on=("p50_ms:5%",), data=str(tmp_path), batch=(1, 8))]


def saved(path, *reports):
    """A list of reports as `bench --json` prints it."""
    path.write_bytes(b"[" + b",".join(report.encode(one) for one in reports) + b"]")
    return path


def test_lists_of_reports_are_compared_by_the_names_of_their_artifacts(tmp_path, run):
    base = saved(tmp_path / "base.json", timed(10, path="x/a.onnx"), timed(20, seed=2, path="x/b.xml"))
    head = saved(tmp_path / "head.json", timed(25, seed=3, path="y/b.xml"), timed(10, seed=1, path="y/a.onnx"))
    result = run("compare", base, head, "--json")
    assert result.code == 6
    found = {finding["case"]: finding["passed"] for finding in result.json["findings"]}
    assert found == {"b.xml batch 1": False, "a.onnx batch 1": True}
    assert run("compare", base, base).code == 0


def test_a_list_of_one_report_is_that_report(tmp_path, run):
    path = saved(tmp_path / "a.json", timed(10))
    (finding,) = run("compare", path, path, "--json").json["findings"]
    assert finding["case"] == "batch 1"


def test_lists_of_other_artifacts_are_refused(tmp_path, refused):
    base = saved(tmp_path / "base.json", timed(path="a.onnx"), timed(path="b.xml"))
    for others in (("a.onnx",), ("a.onnx", "c.xml"), ("a.onnx", "x/a.onnx")):
        head = saved(tmp_path / "head.json", *(timed(path=path) for path in others))
        assert "give the same artifacts, each once" in refused(2, "compare", base, head)
    assert "no report in it" in refused(2, "compare", base, saved(tmp_path / "none.json"))


def test_what_bench_prints_is_read_by_report_and_compare(artifacts, tmp_path, run):
    made = copy_artifact(artifacts["onnxruntime", "fp32"], tmp_path)
    printed = run("bench", made.path, "--duration", "0.5", "-o", tmp_path / "out", "--json")
    assert printed.code == 0
    (tmp_path / "a.json").write_text(printed.out)
    shown = run("report", tmp_path / "a.json", "--history", tmp_path / "h.jsonl", "--commit", "abc")
    assert shown.code == 0
    assert "custom_fp32.onnx" in shown.out
    assert len((tmp_path / "h.jsonl").read_text().splitlines()) == 1
    again = run("compare", tmp_path / "a.json", tmp_path / "a.json", "--fail-on", "top1_drop:1")
    assert (again.code, "the base report does not say on which images" in again.err) == (2, True)


@pytest.fixture
def photographs(tmp_path):
    """Two folders of as many images with the same names, of which one image differs, and a copy of the first."""
    rng = np.random.default_rng(0)
    for name in ("one", "two", "copy"):
        for index in range(6):
            path = tmp_path / name / f"{index % 3}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            if name == "one" or (name == "two" and index == 4):
                Image.fromarray(pixels).save(path)
            else:
                path.write_bytes((tmp_path / "one" / path.parent.name / path.name).read_bytes())
    return tmp_path


def test_answers_are_paired_only_on_the_same_images(photographs, onnx_copy, run, refused):
    reports = {}
    for name in ("one", "two", "copy"):
        reports[name] = photographs / f"{name}.report.json"
        assert run("verify", onnx_copy.path, "--data", photographs / name, "-o", reports[name]).code == 0
    limit = ("--fail-on", "top1_drop:0.3")
    assert run("compare", reports["one"], reports["copy"], *limit).code == 0
    assert "different images" in refused(2, "compare", reports["one"], reports["two"], *limit)


@pytest.mark.parametrize(
    "words", [("--data", "val"), ("--device", "cpu"), ("--batch", "8"), ("--threads", "4"), ("--duration", "60")]
)
def test_options_that_have_no_effect_on_reports_are_refused(words, tmp_path, refused):
    saved(tmp_path / "a.json", timed())
    message = refused(2, "compare", tmp_path / "a.json", tmp_path / "a.json", *words)
    assert f"{words[0]}: two reports are compared as they are; leave it out" in message


def test_options_that_have_no_effect_on_artifacts_are_named(onnx_copy, run):
    result = run(
        "compare", onnx_copy.path, onnx_copy.path, "--fail-on", "bytes:1%", "--data", "val", "--threads", 1, "--json"
    )
    assert result.code == 0, result.err
    printed = " ".join(result.err.split())
    assert "--data: no effect without a limit on accuracy, as --fail-on top1_drop:0.3" in printed
    assert "--threads: no effect without a limit on a time" in printed


def test_batches_at_once_are_counted_in_the_throughput_of_reports(typed):
    """Two batches in twice the time are no other throughput."""

    def of_streams(count):
        one = timed(10.0 * count, eager=30.0)
        rate = 1e3 * count / float(np.mean(one.find("p50_ms").samples))
        throughput = Finding(check="latency", metric="throughput_ips", case="batch 1", value=rate, unit="images/s")
        return replace(one, findings=(*one.findings, throughput))

    result = typed(of_streams(1), of_streams(2), "--fail-on", "throughput_ips:5%")
    assert result.code == 0, result.err
    assert abs(result.json["findings"][0]["value"]) < 3


def test_masks_that_count_from_1_are_read_so(onnx_copy, monkeypatch):
    seen = []

    def verify(artifact, options):
        seen.append(options.reduce_zero_label)
        raise BadRequest("enough")

    monkeypatch.setattr(gate, "verify", verify)
    for flag in (True, False):
        options = gate.GateOptions(fail_on=("miou_drop:0.3",), data="scenes", reduce_zero_label=flag)
        with pytest.raises(BadRequest, match="enough"):
            gate.compare([onnx_copy.path, onnx_copy.path], options)
    assert seen == [True, False]
