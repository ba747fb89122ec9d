"""The answer of a report page: which artifact to ship, and why none of the others."""

import pytest
from msgspec.structs import replace

from exporter.report import Finding, Report
from exporter.report.answer import answer, caveats
from exporter.report.formats import html, markdown, text


def report(name, ms=None, speedup=None, drop=None, passed=True, noise="", cpu="a", case="batch 1", **shares):
    findings = []
    if ms is not None:
        findings.append(Finding(check="latency", metric="p50_ms", value=ms, case=case))
    if speedup is not None:
        low, value, high = speedup
        findings.append(
            Finding(check="latency", metric="speedup", value=value, low=low, high=high, case=case, noise=noise)
        )
    if drop is not None:
        findings.append(
            Finding(check="accuracy", metric="top1_drop", value=drop, low=drop - 0.2, high=drop + 0.2, passed=passed)
        )
    findings += [Finding(check="parity", metric=metric, value=value) for metric, value in shares.items()]
    return Report(
        passed=passed, recipe={}, artifact={"path": f"build/{name}"}, environment={"cpu": cpu}, findings=tuple(findings)
    )


FAST = report("int8.xml", 4.0, (2.7, 2.9, 3.1), 0.05)
SLOW = report("fp32.xml", 8.0, (1.3, 1.4, 1.5), 0.0)
BAD = report("int8.onnx", 3.0, (3.5, 3.8, 4.1), 2.0, passed=False)


def test_the_fastest_that_passes_is_shipped_and_the_others_have_a_reason():
    known = answer([SLOW, BAD, FAST, report("int8.plan")])
    assert known.passes
    assert known.sentence == (
        "Ship int8.xml: 2.90 × as fast as PyTorch (95 % 2.70 to 3.10), 4 ms for batch 1; it loses 0.05 points of top-1 "
        "(95 % -0.15 to 0.25)."
    )
    assert known.others == (
        "fp32.xml takes 2.00 × as long; no loss of top-1 (95 % -0.20 to 0.20)",
        "int8.plan was not timed",
        "int8.onnx fails top1_drop",
    )


def test_intervals_that_overlap_are_said():
    close = report("fp16.xml", 4.2, (2.6, 2.8, 3.0), 0.05)
    known = answer([FAST, close])
    assert known.others == ("fp16.xml takes 1.05 × as long; the intervals of their speed-ups overlap",)
    assert known.sentence.endswith(" By these intervals it may be no faster than fp16.xml.")


def test_a_disturbed_timing_is_said():
    sentence = answer([report("a", 1.0, (1, 2, 3), noise="noisy: others used 40 %")]).sentence
    assert sentence.endswith("1 ms for batch 1 (noisy); its accuracy was not verified.")


def test_without_labels_the_agreement_is_said():
    sentence = answer([report("a.onnx", 2.0, top1_agreement=99.75)]).sentence
    assert sentence == "Ship a.onnx: 2 ms for batch 1; 99.75 % of the images get PyTorch's class."


def test_nothing_is_shipped_where_all_fail():
    known = answer([BAD])
    assert not known.passes
    assert (known.sentence, known.others) == (
        "Ship none of these: the artifact fails a check.",
        ("int8.onnx fails top1_drop",),
    )
    assert (
        answer([BAD, replace(BAD, artifact={"path": "b"})]).sentence
        == "Ship none of these: every artifact fails a check."
    )


@pytest.mark.parametrize(
    "reports",
    [
        [],
        [report("a", top1_agreement=100.0)],
        [FAST, report("b", 5.0, cpu="another")],
        [FAST, report("b", 5.0, case="batch 8")],
    ],
    ids=["nothing", "no timing", "two machines", "no common batch"],
)
def test_there_is_no_answer_where_artifacts_cannot_be_compared(reports):
    assert answer(reports) is None


def verified(name, images="a", **words):
    timed = report(name, **words)
    counted = Finding(check="data", metric="images", value=64, detail=f"64 of {images}")
    right = Finding(check="accuracy", metric="top1", value=90.0)
    return replace(timed, findings=(*timed.findings, counted, right), recipe={"verify": {"images": images}})


def without_accuracy(of):
    return replace(of, findings=tuple(f for f in of.findings if f.metric != "top1"))


NONE = "No artifact is recommended: "
CRASHED = replace(verified("a"), findings=(*verified("a").findings, Finding("latency", "p50_ms", None, case="batch 1")))


@pytest.mark.parametrize(
    ("reports", "said"),
    [
        ([], []),
        ([FAST], []),
        ([verified("a", ms=3.0)], []),
        ([verified("a")], [NONE + "time them with convnext-export bench."]),
        ([CRASHED], [NONE + "none could be timed."]),
        ([verified("a", ms=1.0), verified("b", ms=1.0, cpu="b")],
         [NONE + "they were measured on different machines."]),
        ([verified("a", ms=1.0), verified("b", ms=1.0, case="batch 8")],
         [NONE + "no batch size was timed for all of them."]),
        ([verified("a", ms=1.0), verified("b", "c", ms=1.0), verified("d", ms=1.0)],
         ["Accuracies are of different images: compare them only within a group (a, d; b)."]),
        ([verified("a", ms=1.0), without_accuracy(verified("b", "c", ms=1.0))], []),
        ([verified("a", ms=1.0), replace(verified("b", ms=1.0), recipe={})], []),
    ],
)  # fmt: skip
def test_a_page_says_why_nothing_is_recommended_and_which_rows_are_of_other_images(reports, said):
    assert caveats(reports) == said
    pages = [html.render(reports), markdown.render(reports), text.render(reports).replace("\n", " ")]
    assert all(line in page for line in said for page in pages)


def test_a_comparison_beside_reports_changes_no_reason():
    compared = replace(change("p50_ms", 1.0, 5.0), environment={"cpu": "another"})
    assert caveats([verified("a", ms=1.0), compared]) == []
    assert caveats([verified("a"), compared]) == [NONE + "time them with convnext-export bench."]


def change(metric, value, limit, passed=True, **more):
    finding = Finding(check="regression", metric=metric, value=value, unit="%", limit=limit, passed=passed, **more)
    return replace(FAST, passed=passed, findings=(*FAST.findings, finding))


def test_of_a_comparison_the_answer_is_what_regressed_most():
    worst = change("p50_ms", 12.0, 5.0, passed=False, low=10.0, high=14.0, case="batch 1")
    reports = [change("p90_ms", 1.0, 5.0), change("bytes", 2.0, 1.0, passed=False), worst]
    reports += [change("p99_ms", 20.0, 10.0, unsure=True)]
    known = answer(reports)
    assert not known.passes
    assert known.sentence == "2 of 4 changes regressed: p50_ms batch 1 +12.00 % (95 % +10.00 to +14.00, limit 5 %)."
    assert known.others == ("bytes +2.00 % (limit 1 %)", "unsure: p99_ms +20.00 % (limit 10 %)")
    assert markdown.render(reports).startswith("**2 of 4 changes regressed: p50")
    good = answer(reports[:1])
    assert (good.sentence, good.passes, good.others) == ("No regression in 1 change.", True, ())


def test_the_page_and_the_table_begin_with_it():
    reports = [FAST, SLOW]
    text = markdown.render(reports)
    assert text.startswith("**Ship int8.xml: 2.90 × as fast as PyTorch")
    assert text.splitlines()[2] == "* fp32.xml takes 2.00 × as long; no loss of top-1 (95 % -0.20 to 0.20)"
    page = html.render(reports)
    assert page.index('<p class="answer good">Ship int8.xml') < page.index('<p class="verdict') < page.index("<table")
    assert '<p class="answer bad">Ship none of these' in html.render([BAD])


def test_facts_of_a_machine_may_be_anything():
    odd = replace(FAST, environment={"cpu": ["a", {"b": 1}]})
    assert answer([odd, replace(odd, artifact={"path": "b"})]).passes
    assert answer([odd, SLOW]) is None


def test_names_are_escaped():
    hostile = replace(FAST, artifact={"path": '"><script>|'})
    assert '"><script>' not in html.render([hostile, SLOW])
    assert "<script>" not in markdown.render([hostile, SLOW])


def timed(name, ms, rate, setting):
    return Report(
        passed=True,
        recipe={},
        artifact={"path": name},
        environment={},
        findings=(
            Finding(check="latency", metric="p50_ms", value=ms, case="batch 1", setting=setting),
            Finding(check="latency", metric="throughput_ips", value=rate, case="batch 1", setting=setting),
            Finding(check="data", metric="images", value=9.0),
        ),
    )


def test_for_throughput_the_most_images_a_second_are_shipped():
    setting = "cpu, 2 threads, throughput"
    known = answer([timed("one.xml", 4.0, 250.0, setting), timed("two.xml", 6.0, 333.0, setting)])
    assert known.sentence == "Ship two.xml: 333 images/s for batch 1."
    assert known.others == ("one.xml takes 1.33 × as long",)


def test_timings_on_two_kinds_of_gpu_are_not_ranked():
    first, second = (
        replace(
            one,
            environment={**one.environment, "gpu_before": {"name": gpu}},
            findings=(*one.findings, Finding(check="data", metric="images", value=64)),
        )
        for one, gpu in ((FAST, "NVIDIA L4"), (SLOW, "NVIDIA H200"))
    )
    assert answer([first, second]) is None
    assert "No artifact is recommended: they were measured on different machines." in caveats([first, second])
    assert answer([first, SLOW]) is not None, "the other was timed on the CPU"


def test_timings_with_other_threads_are_not_ranked():
    reports = [timed(f"{n}.xml", 4.0, 250.0, f"cpu, {n} threads, latency") for n in (2, 8)]
    assert answer(reports) is None
    assert any("they were timed with different threads or hints" in line for line in caveats(reports))


def test_a_batch_on_a_gpu_is_compared_with_a_batch():
    cpu = timed("cpu.xml", 80.0, 100.0, "cpu, 2 threads, throughput")
    gpu = timed("gpu.onnx", 12.0, 80.0, "cuda, latency")
    assert answer([cpu, gpu]) is None
    same_hint = timed("gpu.onnx", 12.0, 80.0, "cuda, throughput")
    assert answer([cpu, same_hint]).sentence.startswith("Ship cpu.xml")
