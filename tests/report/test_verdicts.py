"""What a report says of its artifact stands in every format: a contradiction, the part that bisect names, a regression
among other reports."""

import pytest
from msgspec.structs import replace

from exporter import report
from exporter.report import Finding, Report, rendering, summary, tables
from exporter.report.answer import answer
from exporter.report.formats import html, markdown, text
from tests.report.test_answer import BAD, FAST, SLOW, change
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
    assert words in shown
    assert "Ship int8" not in shown
    assert "checks passed" not in shown


def test_a_comparison_marked_as_failed_is_no_pass(tmp_path):
    path = tmp_path / "a.compare.json"
    report.save(replace(change("p90_ms", 1.0, 5.0), passed=False), path)
    shown, _ = rendering.rendered([path], "text")
    assert "No regression in 1 change, but int8.xml failed." in shown


@pytest.mark.parametrize("form", [html, markdown, text])
def test_a_report_of_bisect_has_its_sentence_in_every_format(form):
    shown = form.render([BISECTED])
    assert shown.count("stages.1.0: ranges clip") == 1
    assert "keep stages.1.0 in higher precision: convnext-export onnx" in shown
    assert "every part is within its limit" in form.render([replace(BISECTED, findings=BISECTED.findings[2:3])])


def test_the_errors_of_bisect_are_a_table():
    (table,) = tables.tables([BISECTED])
    assert table.rows[1] == ("int8.onnx", "error", "stages.1.0", "7.5 %", "2 %", "**fails**", "")
    assert "7.5 %" in html.render([BISECTED])


def test_of_a_comparison_among_other_reports_both_are_said():
    regressed = change("p50_ms", 12.0, 5.0, passed=False, case="batch 1")
    known = answer([SLOW, regressed, FAST])
    assert known.sentence.startswith(
        "1 of 1 change regressed: p50_ms batch 1 +12.00 % (limit 5 %). Ship int8.xml: 2.90"
    )
    assert not known.passes
    assert answer([change("p50_ms", 1.0, 5.0), FAST]).passes
    for form in (html, markdown, text):
        assert "1 of 1 change regressed" in form.render([SLOW, regressed])
    assert "✗ fails: int8.onnx" in html.render([change("p50_ms", 1.0, 5.0), BAD])
    assert '<p class="verdict">' not in html.render([regressed, SLOW]), "red and green would contradict each other"
    assert "✓ passes</span></p>" in html.render([SLOW])


def test_failed_metrics_are_named_as_displayed_and_without_sentences():
    contradiction = Finding(check="report", metric="verdict", value=None, passed=False, detail="marked as failed")
    both = (*BISECTED.findings, contradiction)
    assert tables.failed_metrics(both) == ["error"]
    assert [chip.text for chip in summary.chips(both)] == ["fails error"]
    assert [chip.text for chip in summary.chips([contradiction])] == ["fails"]
    assert "fails error" in text.render([BISECTED])
    slower = replace(BISECTED, findings=(*FAST.findings, *both))
    assert answer([FAST, slower]).others == ("int8.onnx fails error",)
    assert answer([replace(FAST, findings=(*FAST.findings, contradiction), passed=False)]).others == ("int8.xml fails",)


def test_errors_of_bisect_alone_are_no_row_of_the_table_of_artifacts():
    contradiction = Finding(check="report", metric="verdict", value=None, passed=False)
    assert summary.views([BISECTED, replace(BISECTED, findings=(contradiction,))]) == []
    assert [view.title for view in summary.views([FAST, BISECTED])] == ["Artifacts"]


@pytest.mark.parametrize(
    ("metric", "more", "words"),
    [
        ("top1_drop", {"unsure": True}, ["unsure"]),
        ("top1_drop", {"unsure": True, "passed": False}, []),
        ("gain", {"noise": "noisy: others used 40 %", "low": 1.5}, ["noisy"]),
    ],
)
def test_text_and_page_doubt_by_the_same_rule(metric, more, words):
    one = replace(SLOW, passed=more.get("passed", True))
    one = replace(one, findings=(*one.findings, Finding(check="int8", metric=metric, value=2.0, **more)))
    verdict = text.render([one]).splitlines()[2].partition("fp32.xml")[2]
    chips = [chip.text for chip in summary.chips(one.findings)[1:]]
    assert chips == words
    assert [word for word in ("unsure", "noisy") if word in verdict] == words


@pytest.mark.parametrize(("check", "metric"), [("segmentation", "miou_drop"), ("neighbours", "neighbour_agreement")])
def test_a_failed_segmenter_or_embedding_fails_in_the_table(check, metric):
    findings = (
        Finding(check="parity", metric="cosine", value=0.99),
        Finding(check=check, metric=metric, value=5.0, passed=False),
    )
    one = Report(passed=False, recipe={}, artifact={"path": "a.onnx"}, environment={}, findings=findings)
    (row,) = tables.accuracy([one]).rows
    assert row[-1].startswith("**fails**")
