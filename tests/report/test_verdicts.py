"""What a report says of its artifact stands in every format: a contradiction, the part that bisect names, a regression
among other reports."""

import pytest
from msgspec.structs import replace

from exporter import report
from exporter.report import Finding, rendering, tables
from exporter.report.formats import html, markdown, text
from tests.report.test_answer import BAD, FAST
from tests.report.test_formats import FORMATS

BISECTED = replace(
    FAST,
    passed=False,
    artifact={"path": "build/int8.onnx"},
    findings=(
        Finding(check="bisect", metric="reason", case="stages.1.0", value=None, passed=False, detail="ranges clip"),
        Finding(check="bisect", metric="keep", case="stages.1.0", value=None, detail="convnext-export onnx"),
        Finding(check="bisect", metric="part_error", case="stages.0.0", value=0.5, unit="%", limit=2.0),
        Finding(check="bisect", metric="part_error", case="stages.1.0", value=7.5, unit="%", limit=2.0, passed=False),
    ),
)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("contradictory", "words"),
    [
        (replace(FAST, passed=False), "marked as failed, but no finding failed"),
        (replace(BAD, passed=True), "marked as passed, but top1_drop failed"),
    ],
)
def test_a_verdict_that_contradicts_the_findings_is_no_pass(contradictory, words, form, tmp_path):
    path = tmp_path / "a.report.json"
    report.save(contradictory, path)
    shown, _ = rendering.rendered([path], form)
    assert words in " ".join(shown.split()), shown
    assert "Ship int8" not in shown
    assert "checks passed" not in shown


@pytest.mark.parametrize("form", [html, markdown, text])
def test_a_report_of_bisect_has_its_sentence_in_every_format(form):
    shown = form.render([BISECTED])
    assert shown.count("stages.1.0: ranges clip") == 1
    assert "keep it in higher precision: convnext-export onnx" in shown
    assert "every part is within its limit" in form.render([replace(BISECTED, findings=BISECTED.findings[2:3])])


def test_the_errors_of_bisect_are_a_table():
    (table,) = tables.tables([BISECTED])
    assert table.rows[1] == ("int8.onnx", "error", "stages.1.0", "7.5 %", "2 %", "**fails**", "")
    assert "7.5 %" in html.render([BISECTED])
