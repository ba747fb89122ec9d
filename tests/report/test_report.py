"""Reports are kept whole, read strictly, and shown safely."""

import json

import msgspec
import pytest
from msgspec.structs import replace

from exporter import report
from exporter.errors import BadRequest
from exporter.report import Finding, Report, judged
from exporter.report.formats import markdown


@pytest.fixture
def example():
    finding = Finding(check="parity", metric="cosine", value=0.999, samples=(0.998, 1.0))
    artifact = {"path": "build/tiny_fp16.xml", "backend": "openvino", "precision": "fp16"}
    return Report(passed=True, recipe={}, artifact=artifact, environment={"cpu": "A"}, findings=(finding,))


def test_a_report_is_read_as_it_was_written(example, tmp_path):
    report.save(example, tmp_path / "report.json")
    assert report.load(tmp_path / "report.json") == example


@pytest.mark.parametrize(
    ("value", "better", "passed"),
    [
        (1.0, "low", True),
        (1.1, "low", False),
        (1.0, "high", True),
        (0.9, "high", False),
        (None, "low", False),
        (None, "high", False),
    ],
)
def test_a_limit_is_held_or_not(value, better, passed):
    assert judged(Finding(check="c", metric="m", value=value), 1.0, better).passed is passed


def test_a_truncated_report_is_refused(example, tmp_path):
    path = tmp_path / "report.json"
    report.save(example, path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadRequest, match="not a report of this tool, or truncated"):
        report.load(path)


def test_a_report_of_another_schema_is_refused(example, tmp_path):
    report.save(replace(example, schema=2), tmp_path / "report.json")
    with pytest.raises(BadRequest, match="report of schema 2, this version reads 1"):
        report.load(tmp_path / "report.json")


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"\xff\xfe", b'{"schema": 1}', b'{"schema": 1, "passed": "yes"}']
)
def test_what_is_no_report_is_refused(content, tmp_path):
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(BadRequest, match="report"):
        report.load(tmp_path / "report.json")


def test_markdown_has_a_row_per_artifact(example):
    table = markdown.render([example, replace(example, artifact={**example.artifact, "path": "b/tiny_fp32.onnx"})])
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) == 4
    assert "tiny_fp16.xml" in rows[2]
    assert "0.9990000" in rows[2]
    assert len({row.count("|") for row in rows}) == 1


def test_markdown_names_what_failed(example):
    failed = judged(example.findings[0], 0.9999, "high")
    assert "**fails** cosine" in markdown.render([replace(example, passed=False, findings=(failed,))])


def test_names_cannot_break_out_of_a_table(example):
    nasty = {**example.artifact, "path": "x/a|b`<script>alert(1)</script>[l](u)\n# h.onnx"}
    table = markdown.render([replace(example, artifact=nasty)])
    assert "a&#124;b&#96;&#60;script&#62;alert(1)" not in table  # the name is the last part of the path
    assert "[l](u)" not in table
    assert "&#91;l&#93;(u) # h.onnx" in table
    assert len([line for line in table.splitlines() if line.startswith("|")]) == 3
    assert "\n# h" not in table


def test_the_report_verb_writes_what_it_prints(run, example, tmp_path):
    report.save(example, tmp_path / "a.json")
    result = run("report", tmp_path / "a.json", "-o", tmp_path / "table.md")
    assert result.code == 0
    assert str(tmp_path / "table.md") in result.out
    assert run("report", tmp_path / "a.json").out == (tmp_path / "table.md").read_text()


def test_an_unknown_format_is_refused(refused, example, tmp_path):
    report.save(example, tmp_path / "a.json")
    assert "unknown report format 'pdf'; known: csv, github, html, junit, markdown, text" in refused(
        2, "report", tmp_path / "a.json", "--format", "pdf"
    )


def test_a_number_that_is_not_finite_is_null_in_json(example, tmp_path):
    nothing = Finding(check="parity", metric="max_abs", value=report.number(float("nan")))
    report.save(replace(example, findings=(nothing,)), tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["findings"][0]["value"] is None


def test_what_other_checks_found_is_kept_if_it_is_of_the_same_file_and_machine(example, tmp_path):
    path = tmp_path / "a.report.json"
    same = replace(example, artifact={**example.artifact, "sha256": "1"})
    latency = replace(
        same, passed=False, findings=(Finding(check="latency", metric="p50_ms", value=None, passed=False),)
    )
    report.save(same, path)
    whole = report.save_merged(latency, path)
    assert [finding.metric for finding in whole.findings] == ["cosine", "p50_ms"]
    assert not whole.passed
    better = replace(same, findings=(Finding(check="latency", metric="p50_ms", value=1.0),))
    assert report.save_merged(better, path).passed, "the failed measurement is replaced"
    newer = {"environment": {**example.environment, "versions": {"torch": "3.0"}}}
    for other in ({"artifact": {"sha256": "2"}}, {"environment": {"cpu": "B"}}, newer):
        report.save(same, path)
        assert [f.metric for f in report.save_merged(replace(better, **other), path).findings] == ["p50_ms"]
    on_gpu = replace(better, environment={**better.environment, "gpu_before": {"name": "A10"}, "gpu_after": {}})
    report.save_merged(on_gpu, path)
    assert not {"gpu_before", "gpu_after"} & report.save_merged(better, path).environment.keys(), "timed on the CPU now"
    path.write_bytes(b"damaged")
    assert report.save_merged(better, path) == better


def test_a_commit_without_a_history_is_refused(refused, example, tmp_path):
    report.save(example, tmp_path / "a.json")
    assert "--commit: there is no history to write it to; add --history FILE" in refused(
        2, "report", tmp_path / "a.json", "--commit", "abc", folder=tmp_path
    )


def test_an_epoch_that_is_no_time_is_refused(refused, example, tmp_path, monkeypatch):
    report.save(example, tmp_path / "a.json")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "9" * 14)
    words = ("report", tmp_path / "a.json", "--history", tmp_path / "h.jsonl", "--commit", "abc")
    assert "SOURCE_DATE_EPOCH=99999999999999: not a time" in refused(2, *words, folder=tmp_path)


def test_samples_are_written_one_line_a_list(example, tmp_path):
    many = replace(example, findings=(replace(example.findings[0], samples=tuple(i / 7 for i in range(500))),))
    report.save(many, tmp_path / "a.json")
    assert len((tmp_path / "a.json").read_text().splitlines()) < 60
    assert report.load(tmp_path / "a.json") == many
    strange = replace(many, environment={"cpu": "[ 1,\n 2 ]"})
    report.save(strange, tmp_path / "a.json")
    assert report.load(tmp_path / "a.json") == strange


def test_the_machine_says_where_eager_is_slow():
    """On AMD, MKL leaves AVX-512 unused, which ONNX Runtime and OpenVINO do not."""
    from exporter.report import Report, tables

    def machine(cpu, isa):
        return tables.machine(
            Report(passed=True, recipe={}, artifact={}, environment={"cpu": cpu, "isa": isa, "cores": 2}, findings=())
        )

    assert "× eager flatters" in machine("AMD EPYC", ["avx512f", "avx2"])
    assert "flatters" not in machine("AMD EPYC", ["avx2"])
    assert "flatters" not in machine("Intel Xeon", ["avx512f", "avx2"])


def test_a_new_verification_keeps_no_finding_of_an_older_one(tmp_path):
    """Its images may be others; latencies and the findings of the build stay."""
    from exporter import report
    from exporter.report import Finding, Report

    def of(recipe, *checks, passed=True):
        findings = tuple(Finding(check=check, metric=check, value=1.0, passed=passed) for check in checks)
        return Report(passed=passed, recipe=recipe, artifact={"sha256": "0"}, environment={}, findings=findings)

    path = tmp_path / "report.json"
    report.save_merged(of({"verify": {"images": "a"}}, "accuracy", "values", passed=False), path)
    report.save_merged(of({"bench": {}}, "latency"), path)
    report.save_merged(of({}, "int8"), path)
    merged = report.save_merged(of({"verify": {"images": "b"}}, "parity"), path)
    assert [finding.check for finding in merged.findings] == ["latency", "int8", "parity"]
    assert merged.passed
    assert merged.recipe["verify"] == {"images": "b"}


def test_brackets_in_texts_stay_as_they_are():
    names = ("scan [ 12 ].png", "[ 3, 4 ]")
    finding = Finding(check="data", metric="unreadable", value=1.0, detail=names[0], samples=(1.0, 2.5))
    one = Report(passed=True, recipe={"data": names[1]}, artifact={}, environment={}, findings=(finding,))
    assert b"[1.0,2.5]" in report.encode(one)
    assert msgspec.json.decode(report.encode(one), type=Report) == one
