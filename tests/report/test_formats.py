"""Every format is read by a reader of its own, with names in it that want to break out."""

import csv
import html
import html.parser
import io
import json
import re
import shutil
import subprocess
import warnings

import junitparser
import numpy as np
import pytest
from markdown_it import MarkdownIt
from msgspec.structs import replace
from rich.cells import cell_len

from exporter import discover, report
from exporter.report import Finding, Report, tables
from tests.conftest import ROOT

EVIL = 'a"><script>alert(1)<b>|`$x^2$`.onnx'
FORMATS = ("csv", "github", "html", "junit", "markdown", "text")


def latency(metric, samples, **told):
    value = float(np.median(samples))
    counts = (len(samples) // 8,) * 8
    told = {"case": "batch 1", "unit": "ms", **told}
    return Finding(check="latency", metric=metric, value=value, samples=tuple(samples), launches=counts, **told)


def made(name=EVIL, ms=10.0, passed=True, seed=0):
    rng = np.random.default_rng(seed)
    samples, eager = (list(map(float, one * np.exp(rng.normal(0, 0.1, 160)))) for one in (ms, 30))
    findings = (
        Finding(
            check="regression", metric="p50_ms", case="batch 1", value=12.0, low=10.0, high=14.0, unit="%", limit=5,
            passed=passed, detail="regressed: 9 → 10,\nand so on: 100 % or %0A",
        ),
        Finding(check="accuracy", metric="top1", value=82.1, unit="%", low=80.0, high=84.0),
        Finding(check="accuracy", metric="top1_eager", value=82.2, unit="%"),
        Finding(check="parity", metric="cosine", value=0.9999, limit=0.999),
        Finding(check="structure", metric="bytes", value=1e6, unit="bytes"),
        *(Finding(check="blocks", metric="block_error", case=f"stages.0.{i}", value=1e-3 * i) for i in range(3)),
        latency("p50_ms", samples),
        Finding(check="latency", metric="speedup", case="batch 1", value=3.0, low=2.9, high=3.1, unit="×"),
        latency("eager_p50_ms", eager),
    )  # fmt: skip
    artifact = {
        "path": f"build/{name}",
        "backend": "onnxruntime",
        "precision": "fp32",
        "sha256": "ab",
        "variant": "tiny",
    }
    environment = {"cpu": "A <b>CPU</b>", "cores": 2, "versions": {"torch": "2"}}
    return Report(passed=passed, recipe={}, artifact=artifact, environment=environment, findings=findings)


def rendered(form, *reports):
    return discover.load("exporter.report.formats", form, "RENDER")(reports)


def noisy():
    """A comparison on a busy machine, and the times of a `bench` there."""
    noise = {"noise": "noisy: other processes used 45 % of the machine", "setting": "cpu, 3 threads, latency"}
    change = Finding(
        check="regression", metric="p50_ms", case="batch 1", value=1.0, low=0.5, high=2.0, unit="%", limit=5,
        detail="no regression", **noise,
    )  # fmt: skip
    times = [replace(f, **noise) for f in made().findings if f.check == "latency"]
    return replace(made("a.onnx"), findings=(change, *times))


def test_a_noisy_ratio_is_marked_once_in_a_row_with_its_setting_in_every_format():
    report = noisy()
    for table in tables.tables([report]):
        *_, row = table.rows
        assert " | ".join(row).count("noisy: other processes used 45 %") == 1, row
        assert "cpu, 3 threads, latency" in row
    (change,) = tables.regressions([report]).rows
    assert "passes, noisy" in change
    for form in ("junit", "github", "markdown", "csv"):
        lines = [line for line in rendered(form, report).splitlines() if "used 45 %" in line.replace("%25", "%")]
        assert lines
        assert all("3 threads" in line for line in lines), lines
        assert {line.count("noisy: other") for line in lines} == {1}


def test_github_marks_noisy_ratios_and_not_each_of_their_times():
    found = [decode(line) for line in rendered("github", noisy()).splitlines()]
    titles = [properties["title"] for kind, properties, _ in found if kind == "warning"]
    assert titles == ["a.onnx: p50_ms, batch 1", "a.onnx: speedup, batch 1"]


def test_every_format_is_tried_here():
    assert set(discover.names("exporter.report.formats")) == set(FORMATS)


@pytest.mark.parametrize("form", FORMATS)
def test_a_report_of_nothing_is_still_a_document(form):
    empty = Report(passed=True, recipe={}, artifact={}, environment={}, findings=())
    assert rendered(form, empty) or form == "github"


def test_junit_is_read_by_a_junit_reader():
    suites = junitparser.JUnitXml.fromstring(rendered("junit", made(passed=False), made()).encode())
    first, second = list(suites)
    assert first.name == EVIL
    assert (first.tests, first.failures, second.failures) == (11, 1, 0)
    (failed,) = [case for case in first if case.result]
    assert failed.name == "p50_ms (batch 1)"
    assert failed.classname == f"{EVIL}.regression"
    assert "12 %, limit 5" in failed.result[0].message


def test_junit_has_no_character_that_xml_lacks():
    assert junitparser.JUnitXml.fromstring(rendered("junit", made("a\x00\x1b\ud800b.onnx")).encode())


def decode(line):
    """GitHub's grammar: `::name key=value,key=value::message`, as the runner reads it."""
    name, properties, message = re.fullmatch(r"::(\w+) (.*?)::(.*)", line).groups()
    pairs = dict(pair.split("=", 1) for pair in properties.split(","))
    unescape = [("%3A", ":"), ("%2C", ","), ("%0D", "\r"), ("%0A", "\n"), ("%25", "%")]
    for code, sign in unescape:
        pairs = {key: value.replace(code, sign) for key, value in pairs.items()}
    for code, sign in unescape[2:]:
        message = message.replace(code, sign)
    return name, pairs, message


def test_github_annotations_are_read_as_the_runner_does():
    lines = rendered("github", made(passed=False), made("b.onnx")).splitlines()
    found = [decode(line) for line in lines]
    assert [name for name, _, _ in found] == ["error", "notice"]
    _, properties, message = found[0]
    assert properties == {"title": f"{EVIL}: p50_ms, batch 1"}
    assert message == "12 %, limit 5: regressed: 9 → 10,\nand so on: 100 % or %0A"


def test_csv_is_read_by_a_csv_reader_and_holds_no_formula():
    text = rendered("csv", made(), made("=HYPERLINK(1)"))
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == 2 * len(made().findings)
    assert rows[0]["artifact"] == EVIL
    assert rows[-1]["artifact"] == "'=HYPERLINK(1)"
    assert [float(row["value"]) for row in rows if row["metric"] == "top1"] == [82.1, 82.1]
    assert rows[0]["detail"].endswith("100 % or %0A")


class Page(html.parser.HTMLParser):
    """Tags, what they link to, and the text of the page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("href", "src", "xlink:href") and value]

    def handle_data(self, data):
        self.words.append(data)


def test_html_needs_nothing_else_and_runs_its_own_script_only():
    page = Page(rendered("html", *(made(f"{i}{EVIL}", 5 + i, seed=i) for i in range(6))))
    assert page.tags.count("script") == 1
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert page.tags.count("svg") == 4, "change, accuracy against latency, blocks, latencies"
    assert "url(http" not in (text := rendered("html", made()))
    assert "@import" not in text
    assert len(text) < 2e6


def test_html_says_what_the_report_says():
    words = " ".join(Page(rendered("html", made(passed=False))).words)
    assert "1 of 1 change regressed: p50_ms batch 1 +12.00 % (95 % +10.00 to +14.00, limit 5 %)." in words
    for part in ("82.10 %", "12.00", "regressed", "A <b>CPU</b>", "stages.0.2", "cosine"):
        assert part in words, part


def test_html_keeps_within_two_megabytes_however_many_samples():
    samples = tuple(map(float, np.random.default_rng(0).gamma(9, 1, 400_000)))
    large = latency("p50_ms", samples)
    many = [
        Report(passed=True, recipe={}, artifact={"path": f"{i}.onnx"}, environment={}, findings=(large,))
        for i in range(6)
    ]
    assert len(rendered("html", *many).encode()) < 2e6


def test_markdown_keeps_names_inside_their_cells():
    text = rendered("markdown", made())
    assert "<script>" not in text
    rows = [line for line in text.splitlines() if line.startswith("| a")]
    assert {line.count("|") for line in rows if "onnxruntime" in line} == {10}


def test_the_charts_follow_the_page_from_light_to_dark():
    text = rendered("html", made())
    assert "currentColor" in text
    assert "var(--faint)" in text
    assert "#123456" not in text


def test_signs_in_names_are_no_formulas():
    labels = re.findall(r"<text[^>]*>(.*?)</text>", rendered("html", made()), flags=re.S)
    assert html.escape(EVIL, quote=False) in [label.strip() for label in labels]


def test_markdown_is_read_by_a_markdown_reader():
    page = MarkdownIt().enable("table").render(rendered("markdown", made(passed=False), made("b.onnx")))
    read = Page(page)
    assert read.tags.count("table") == 3
    assert not {"script", "b", "a"} & set(read.tags)
    assert EVIL in "".join(read.words)
    widths = {row.count("</td>") + row.count("</th>") for row in page.split("<tr>")[1:]}
    assert widths == {9, 12}, "every row of a table has all of its cells"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here; apt-get install chromium")
def test_html_in_a_browser_asks_for_nothing_and_complains_of_nothing(tmp_path):
    (tmp_path / "page.html").write_text(rendered("html", *(made(f"{i}{EVIL}", 5 + i, seed=i) for i in range(6))))
    words = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr", f"--log-net-log={tmp_path / 'net.json'}", "--dump-dom",
        (tmp_path / "page.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    assert done.stdout.count("<svg") == 4
    asked = set(re.findall(r'"url":"(.*?)"', (tmp_path / "net.json").read_text()))
    assert not [url for url in asked if not url.startswith(("file:", "data:", "chrome")) and "google" not in url], asked


def test_artifacts_of_one_name_are_labelled_with_their_paths():
    one, same, other, third = (
        replace(made("a.onnx"), artifact={"path": p}) for p in ("x/a.onnx", "x/a.onnx", "y/a.onnx", "b.onnx")
    )
    names = [tables.name(report) for report in tables.disambiguated([one, same, other, third])]
    assert names == ["x/a.onnx", "x/a.onnx", "y/a.onnx", "b.onnx"]
    assert [tables.name(report) for report in tables.disambiguated([one, same, third])] == [
        "a.onnx",
        "a.onnx",
        "b.onnx",
    ]


def test_text_is_a_table_that_fits_a_terminal():
    lines = rendered("text", made("a.onnx", 10.0), made(f"{'b' * 20}.xml", 20.0, passed=False)).splitlines()
    assert lines[0].split() == ["artifact", "size", "top-1", "agreement", "p50", "ms", "×", "eager"]
    assert "1.00 MB  82.10 %" in lines[2]
    assert lines[3].endswith("fails p50_ms")
    long = rendered("text", made("a.onnx", 10.0), made(f"{'b' * 60}.xml", 20.0)).splitlines()
    assert max(map(len, long)) <= 100
    assert "size" not in long[0]
    assert "p50 ms" in long[0]


def test_text_is_aligned_by_the_width_of_letters_in_a_terminal():
    lines = rendered("text", *map(made, ("模型模型模型.onnx", "cafe\u0301.onnx", "model_of_ours.onnx"))).splitlines()
    starts = {cell_len(line[: line.index("1.00 MB")]) for line in lines[2:5]}
    assert len(starts) == 1
    assert cell_len(lines[1]) == max(map(cell_len, lines[2:5]))


def test_names_in_other_scripts_cause_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "模型" in rendered("html", made("模型.onnx"), made("b.onnx", 20.0))


def test_a_latency_of_zero_is_none():
    zero = made("zero.onnx")
    findings = tuple(replace(one, value=0.0) if one.metric == "p50_ms" else one for one in zero.findings)
    for form in FORMATS:
        rendered(form, replace(zero, findings=tuple(f for f in findings if f.check != "regression")), noisy())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("value", "other"), [(1e308, -1e308), (1.7e308, 1e308), (5e-324, 1e308), (-0.0, 5e-324)])
def test_any_finite_number_is_rendered(form, value, other):
    one = made("a.onnx")
    numbers = {"value": value, "low": min(value, other), "high": max(value, other), "limit": other}
    metrics = ("tried_loss", "tried_ms")
    searched = [Finding(check="int8", metric=metric, case=case, value=number)
                for metric in metrics for case, number in (("a", value), ("b", other))]  # fmt: skip
    extreme = [replace(f, **numbers, samples=f.samples and (value, other, *f.samples)) for f in one.findings]
    text = rendered(form, replace(one, findings=(*extreme, *searched)), made("b.onnx"))
    assert "b.onnx" in text
    if form == "html":
        assert "Accuracy loss of int8 by latency" in text


def test_text_ends_with_the_artifact_to_ship():
    folder = ROOT / "benchmarks" / "results" / "epyc-genoa-2-cores" / "demo"
    reports = [report.load(path) for path in sorted(folder.glob("*.report.json"))]
    lines = rendered("text", *reports).splitlines()
    table, answer = lines[: len(reports) + 2], lines[len(reports) + 3 :]
    assert max(map(len, lines)) <= 100
    assert table[-1].startswith("custom_int8.xml")
    findings = json.loads((folder / "custom_int8.onnx.report.json").read_text())["findings"]
    [speedup] = [finding["value"] for finding in findings if finding["metric"] == "speedup"]
    assert answer[0].startswith(f"Ship custom_int8.onnx: {speedup:.2f} × as fast as PyTorch")


@pytest.mark.parametrize(("metric", "word"), [("miou", "mIoU 82.10 %"), ("map", "mAP 82.10 %"), ("top1", "82.10 %")])
def test_text_has_the_accuracy_that_was_measured(metric, word):
    one = made("a.onnx")
    named = {"top1": metric, "top1_eager": f"{metric}_eager"}
    findings = tuple(replace(finding, metric=named.get(finding.metric, finding.metric)) for finding in one.findings)
    assert word in rendered("text", replace(one, findings=findings))
