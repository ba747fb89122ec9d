"""What commands print as JSON: it has the shape of the schemas, and `report` and `compare` read it."""

import json
from pathlib import Path

import jsonschema
import pytest

from exporter.artifact import sidecar_path
from exporter.cli import cli, groups
from exporter.cli.console import WithSchema
from tests.conftest import ROOT, copy_artifact

REPORTS = sorted((ROOT / "benchmarks" / "results").rglob("*.report.json"))


@pytest.fixture(scope="module")
def schemas():
    """The schema of each kind of document, as commands print it."""
    from tests.conftest import type_command

    printed = {word: type_command(word, "--schema") for word in ("report", "inspect", "recipes")}
    assert {result.code for result in printed.values()} == {0}
    for result in printed.values():
        jsonschema.Draft202012Validator.check_schema(result.json)
    return {word: jsonschema.Draft202012Validator(result.json) for word, result in printed.items()}


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.relative_to(REPORTS[0].parents[3]).as_posix())
def test_every_committed_report_has_the_shape_of_the_schema(path, schemas):
    schemas["report"].validate(json.loads(path.read_text()))


def test_reports_are_committed():
    assert len(REPORTS) > 10


@pytest.mark.parametrize("word", ["report", "inspect", "recipes"])
def test_a_schema_is_printed_alone(word, refused, tmp_path):
    line = refused(2, word, "--schema", "--json", folder=tmp_path)
    assert "--schema takes no other word; leave out --json" in line


@pytest.mark.parametrize("words", [("--schema", "--help"), ("--help", "--schema")])
@pytest.mark.parametrize("word", ["report", "inspect", "recipes"])
def test_help_is_shown_with_schema(word, words, run):
    result = run(word, *words)
    assert result.code == 0
    assert "Print the JSON schema of" in result.out


def test_every_command_with_a_schema_takes_it_alone():
    parent = cli.make_context("convnext-export", [], resilient_parsing=True)
    known = {name: cli.get_command(parent, name) for names in groups().values() for name in names}
    with_schema = {name for name, one in known.items() for option in one.params if "--schema" in option.opts}
    assert with_schema == {"report", "inspect", "recipes"}
    assert {name for name, one in known.items() if isinstance(one, WithSchema)} == with_schema


def test_a_report_with_a_wrong_or_an_unknown_key_has_not(schemas):
    good = json.loads(REPORTS[0].read_text())
    unversioned = {key: value for key, value in good.items() if key != "schema"}
    for bad in (
        unversioned,
        {**good, "schema": 2},
        {**good, "passed": "yes"},
        {**good, "more": 1},
        {**good, "findings": [{"check": "parity"}]},
    ):
        assert not schemas["report"].is_valid(bad)


def test_sidecars_and_recipes_have_the_shape_of_their_schemas(artifacts, run, tmp_path, schemas):
    for artifact in artifacts.values():
        schemas["inspect"].validate(json.loads(sidecar_path(artifact.path).read_text()))
    planned = run("onnx", "--variant", "atto", "--weights", "random", "--dry-run", "--json")
    schemas["recipes"].validate(planned.json["recipe"])
    assert not schemas["recipes"].is_valid({**planned.json["recipe"], "precison": "fp16"})


@pytest.fixture
def printed(artifacts, run, tiny, tmp_path, monkeypatch):
    """What each command that measures or builds prints, as a file."""
    monkeypatch.chdir(tmp_path)
    artifact = copy_artifact(artifacts["onnxruntime", "fp32"], tmp_path)
    Path("my.yaml").write_text(
        f"backend: onnx\nprecision: fp32\nmodel: {{weights: {tiny}}}\nexport: {{imgsz: 64}}\n"
        "checks: {samples: 4}\nbench: null\n"
    )
    commands = {
        "openvino": (
            "openvino",
            "--int8",
            "--calib",
            "synthetic",
            "--calib-size",
            4,
            "--weights",
            tiny,
            "--imgsz",
            64,
            "-o",
            "built",
        ),
        "verify": ("verify", artifact.path, "--samples", 4),
        "bench": ("bench", artifact.path, "--duration", 0.5),
        "bisect": ("bisect", artifact.path),
        "run": ("run", "my.yaml", "-o", "ran"),
    }
    for name, words in commands.items():
        result = run(*words, "--json")
        assert result.code == 0, result.err
        Path(f"{name}.json").write_text(result.out)
    return [Path(f"{name}.json") for name in commands]


def test_report_and_compare_read_what_every_command_prints(printed, run, schemas):
    for path in printed:
        shown = run("report", path)
        assert shown.code == 0, (path, shown.err)
        assert "custom" in shown.out or path.stem == "bisect"  # its differences have no table
    compared = run("compare", "verify.json", "verify.json", "--fail-on", "bytes:0", "--json")
    assert compared.code == 0, compared.err
    schemas["report"].validate(compared.json)
    Path("compared.json").write_text(compared.out)
    assert run("report", "compared.json").code == 0
    for name in ("verify", "bench", "bisect"):  # one artifact, one report
        schemas["report"].validate(json.loads(Path(f"{name}.json").read_text()))


def test_json_without_a_report_is_refused_with_its_keys(run, refused, artifacts, tiny, tmp_path):
    artifact = copy_artifact(artifacts["onnxruntime", "fp32"], tmp_path)
    (tmp_path / "a.json").write_text(run("inspect", artifact.path, "--json").out)
    line = refused(2, "report", tmp_path / "a.json")
    assert "an object with artifact, layers, findings, expected a report" in line
    (tmp_path / "a.json").write_text(run("onnx", "--weights", tiny, "-o", tmp_path / "b", "--json").out)
    assert "an object with artifact, expected a report" in refused(2, "report", tmp_path / "a.json")
    (tmp_path / "a.json").write_text(run("doctor", "--json").out)
    assert "expected a report" in refused(2, "compare", tmp_path / "a.json", tmp_path / "a.json")


def test_build_commands_and_backends_have_the_names_of_each_other(run, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for word in ("onnx", "onnxruntime"):
        assert run(word, "--weights", tiny, "--dry-run", "--json").json["recipe"]["backend"] == "onnxruntime"
    for word in ("trt", "tensorrt"):
        Path("my.yaml").write_text(f"backend: {word}\nprecision: fp16\ntarget: {{opt_level: 0}}\n")
        assert "unknown" not in run("run", "my.yaml", "--dry-run").err
        assert run("run", f"{word}/tiny_fp16", "--dry-run").code == 0
    assert run("run", "onnxruntime/my", "--dry-run").code == 2


def test_the_names_of_build_commands_give_the_same_artifact_from_python(tiny, tmp_path):
    from exporter.build import build
    from exporter.recipe import Export, Model, Recipe

    paths = []
    for word in ("onnx", "onnxruntime"):
        recipe = Recipe(backend=word, precision="fp32", model=Model(weights=str(tiny)), export=Export(imgsz=64))
        paths.append(build(recipe, tmp_path / word).artifact)
    assert paths[0].sidecar.sha256 == paths[1].sidecar.sha256
    assert paths[0].sidecar.recipe == paths[1].sidecar.recipe


def test_recipes_that_failed_are_named_and_other_values_than_reports_are_refused(tmp_path, run, refused):
    good = json.loads(REPORTS[0].read_text())
    path = tmp_path / "run.json"
    path.write_text(
        json.dumps([{"recipe": "a", "report": good}, {"recipe": "b", "report": None, "error": "no such file"}])
    )
    result = run("report", path, "--format", "text")
    assert result.code == 0
    assert "no report of a recipe that failed, b: no such file" in result.err
    for wrong in ("x", 5, [good]):
        path.write_text(json.dumps([good, {"report": wrong}]))
        assert "`report` holds no report" in refused(2, "report", path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_json_that_a_shell_of_windows_wrote_is_read(encoding, tmp_path, run):
    (tmp_path / "a.json").write_text(REPORTS[0].read_text(), encoding=encoding)
    assert run("report", tmp_path / "a.json").code == 0


def test_misspelled_names_have_the_nearest_as_a_hint(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "did you mean 'onnxruntime'?" in run("onnxruntimes", "--dry-run").err
    assert "did you mean 'tensorrt'?" in run("tensort", "--dry-run").err
    Path("my.yaml").write_text("backend: onxx\nprecision: fp32\n")
    assert "onnx" in run("run", "my.yaml", "--dry-run").err
    assert run("run", "onnx/tinny_int8", "--dry-run").err.startswith("error: onnx/tinny_int8: no such recipe")
