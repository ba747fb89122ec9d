"""The table of precisions, and artifacts in one that is not in it."""

import json

import msgspec
import pytest

from exporter import backends, precision
from exporter.artifact import load, sidecar_path
from exporter.artifact.sidecar import encode
from exporter.errors import BadRequest
from exporter.precision import PRECISIONS
from exporter.report import charts
from tests.conftest import copy_artifact


@pytest.fixture
def unknown(artifacts, tmp_path):
    """An artifact as a later version might build it, whole and sealed, in a precision that this one does not know."""
    made = copy_artifact(artifacts["onnxruntime", "fp32"], tmp_path)
    sidecar = msgspec.structs.replace(made.sidecar, precision="int4")
    sidecar_path(made.path).write_bytes(encode(sidecar))
    return load(made.path)


def test_the_table_has_every_precision_that_a_target_builds():
    built = {name for target in map(backends.target, backends.targets()) for name in target.precisions}
    assert built == set(PRECISIONS)
    assert all(name == one.name for name, one in PRECISIONS.items())


def test_the_next_higher_precision_has_more_bits():
    for one in PRECISIONS.values():
        assert not one.higher or PRECISIONS[one.higher].bits > one.bits
    assert [one.name for one in PRECISIONS.values() if not one.higher] == ["fp32"]


def test_precisions_have_colours_of_their_own():
    colors = {one.color for one in PRECISIONS.values()}
    assert len(colors) == len(PRECISIONS)
    assert colors <= set(charts.COLORS)


def test_an_unknown_precision_is_refused_with_the_file_and_those_that_are_known():
    with pytest.raises(BadRequest, match=r"^a\.onnx: precision 'int4' is not known to this version; known: fp32, fp16"):
        precision.get("int4", "a.onnx")


@pytest.mark.parametrize(
    "words",
    [
        ("verify", "{}"),
        ("bench", "{}"),
        ("inspect", "{}"),
        ("inspect", "{}", "--json"),
        ("compare", "{}", "{}"),
        ("compare", "{}", "{}", "--fail-on", "nodes:0"),
    ],
    ids=" ".join,
)
def test_an_artifact_in_an_unknown_precision_is_one_clear_error(words, unknown, refused):
    error = refused(2, *(word.format(unknown.path) for word in words), folder=unknown.path.parent)
    assert f"{unknown.path}: precision 'int4' is not known to this version; known: fp32" in error


@pytest.mark.parametrize("words", [("report", "{}"), ("compare", "{}", "{}")], ids=" ".join)
def test_a_report_of_an_unknown_precision_is_one_clear_error(words, unknown, refused):
    report = unknown.path.with_name("int4.report.json")
    fields = {"passed": True, "recipe": {}, "artifact": unknown.to_dict(), "environment": {}, "findings": []}
    report.write_text(json.dumps({**fields, "schema": 1}))
    error = refused(2, *(word.format(report) for word in words), folder=report.parent)
    assert f"{report}: precision 'int4' is not known to this version" in error


def test_an_artifact_of_an_unknown_runtime_is_one_clear_error(artifacts, tmp_path, refused):
    made = copy_artifact(artifacts["onnxruntime", "fp32"], tmp_path)
    sidecar_path(made.path).write_bytes(encode(msgspec.structs.replace(made.sidecar, backend="openvina")))
    for command in ("verify", "bench", "inspect"):
        error = refused(2, command, made.path, folder=tmp_path)
        assert f"{made.path}: built for 'openvina', which is not known to this version" in error
        assert "did you mean 'openvino'?" in error
