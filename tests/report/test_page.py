"""The page of a report: tables whose columns fit, verdicts as chips, and facts that all rows share once."""

import base64
import itertools
import re
import shutil

import numpy as np
import pytest
from msgspec.structs import replace
from PIL import Image

from benchmarks import screenshots
from exporter.precision import PRECISIONS
from exporter.report import Finding, charts, summary, tables
from exporter.report.formats import html
from exporter.report.tables import Table, changes
from tests.conftest import ROOT
from tests.package import browser
from tests.report.test_history import entries

NEEDS_CHROMIUM = pytest.mark.skipif(
    shutil.which("chromium") is None, reason="no chromium here; apt-get install chromium"
)
WIDE, NARROW = 1280, 390


def failing(report):
    findings = [
        replace(f, value=2.4, passed=False, detail="14 images lost, 2 won") if f.metric == "top1_drop" else f
        for f in report.findings
    ]
    return replace(report, passed=False, findings=tuple(findings))


def cells(view, column):
    return [row[view.columns.index(column)] for row in view.rows]


def test_a_column_that_all_rows_share_becomes_a_line_and_an_empty_one_is_left_out():
    table = Table(
        "t", ("artifact", "setting", "load ms", "p50 ms"), ("p50 ms",), [("a", "cpu", "–", "1"), ("b", "cpu", "", "1")]
    )
    view = summary.view(table)
    assert (view.columns, view.rows) == (("artifact", "p50 ms"), [("a", "1"), ("b", "1")])
    assert view.shared == (("setting", "cpu"),)
    other = replace_rows(table, [("a", "cpu", "", "1"), ("b", "gpu", "", "1")])
    assert summary.view(other).columns == ("artifact", "setting", "p50 ms")
    assert summary.view(replace_rows(table, table.rows[:1])).columns == ("artifact", "setting", "p50 ms")


def replace_rows(table, rows):
    return Table(table.title, table.columns, table.right, rows)


def test_the_table_of_artifacts_has_one_row_each_and_the_fastest_that_passes_first():
    reports = screenshots.demo()
    fast = min((r for r in reports if r.value("p50_ms")), key=lambda r: r.value("p50_ms"))
    view = summary.views(reports)[0]
    assert (view.title, len(view.rows)) == ("Artifacts", 9)
    assert cells(view, "artifact")[0] == fast.artifact["path"].rpartition("/")[2]
    reports[reports.index(fast)] = failing(fast)
    view = summary.views(reports)[0]
    assert cells(view, "artifact")[-1] == fast.artifact["path"].rpartition("/")[2]


def test_a_chip_names_each_metric_that_failed_and_each_doubt():
    def chips(*findings):
        return [f"{chip.sign} {chip.text}" for chip in summary.chips(findings)]

    good = Finding(check="parity", metric="cosine", value=1.0)
    bad = replace(good, metric="max_abs", passed=False)
    unsure = replace(good, metric="top1_drop", unsure=True)
    noisy = replace(good, metric="speedup", noise="noisy: x")
    assert chips(good) == ["✓ passes"]
    assert chips(good, bad, bad, unsure, noisy) == ["✗ fails max_abs", "? unsure", "~ noisy"]


def test_machine_setting_noise_and_images_are_each_said_once():
    reports = screenshots.demo()
    facts = dict(summary.facts(reports))
    labels = [label for label, _ in summary.facts(reports)]
    assert labels == ["machine", "images", "timed on", "unsure", "unsure", "noise"]
    assert ("unsure", "top1_agreement (custom_fp32.onnx, custom_fp32.xml)") in summary.facts(reports)
    assert facts["timed on"] == "cpu, 1 thread, latency"
    assert facts["noise"] == "interval wider than ±5 %"
    text = html.render(reports)
    tables = text[text.index("<h2>Artifacts") : text.index("<h2>Environment")]
    assert "interval wider" not in tables
    other = replace(reports[0], environment={**reports[0].environment, "cpu": "Another", "commit": "abc"})
    lines = summary.facts([other, *reports[1:3]])
    assert lines[0][0] == "machine"
    assert lines[0][1].endswith("(custom_bf16.xml)")
    assert ("commit", "abc") in lines


def test_what_failed_is_listed_with_value_limit_and_detail():
    (line,) = summary.failures([failing(screenshots.demo()[0])])
    assert line == "custom_bf16.xml fails top1_drop: 2.4 points (limit 0.5); 14 images lost, 2 won"
    assert line in html.render([failing(screenshots.demo()[0])])


def test_what_regressed_is_first_then_what_is_nearest_to_its_limit():
    def change(metric, value, limit, **more):
        return Finding(check="regression", metric=metric, value=value, limit=limit, **more)

    findings = (
        change("p50_ms", -3.0, 5.0), change("bytes", 0.0, 0.0), change("throughput_ips", -4.0, -5.0),
        change("p99_ms", 30.0, 10.0, unsure=True), change("nodes", 7.0, 0.0, passed=False),
        change("top1_drop", None, 0.3), change("p90_ms", 12.0, 10.0, passed=False),
    )  # fmt: skip
    report = replace(screenshots.demo()[0], findings=findings)
    order = [change.metric for _, change in changes([report])]
    assert order == ["nodes", "p90_ms", "p99_ms", "throughput_ips", "bytes", "top1_drop", "p50_ms"]
    view = summary.views([report])[0]
    assert [chips[0].text for chips in cells(view, "verdict")] == ["regressed"] * 2 + ["passes"] * 5


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The pages of 2, 8 and 20 artifacts, of a failing gate, and of a failing artifact with a long name."""
    folder = tmp_path_factory.mktemp("pages")
    reports = screenshots.cases()
    hostile = replace(failing(screenshots.demo()[0]), artifact={"path": "build/" + 200 * "x" + ".onnx"})
    reports["failing"] = [hostile, *screenshots.demo()[1:3]]
    for name, each in reports.items():
        (folder / f"{name}.html").write_text(html.render(each))
    (folder / "trend.html").write_text(html.render_trend(entries([1.0] * 60 + [1.2] * 4 + [1.1] * 40 + [1.4] * 9)))
    return {name: folder / f"{name}.html" for name in (*reports, "trend")}


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser.page(tmp_path_factory.mktemp("browser") / "profile") as opened:
        yield opened


def visit(opened, path, width, script=True):
    opened.send("Emulation.setScriptExecutionDisabled", value=not script)
    opened.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=True)
    opened.send("Page.navigate", url="about:blank")
    opened.send("Page.navigate", url=path.as_uri())
    opened.until(f"location.href === '{path.as_uri()}' && document.readyState === 'complete'")


@pytest.mark.slow
@NEEDS_CHROMIUM
@pytest.mark.parametrize("name", ["report-2", "report-8", "report-20", "gate", "failing", "trend"])
def test_no_page_is_wider_than_its_window(pages, chromium, name):
    for width in (WIDE, NARROW):
        visit(chromium, pages[name], width)
        assert chromium.value("document.documentElement.scrollWidth") == width


@pytest.mark.slow
@NEEDS_CHROMIUM
@pytest.mark.parametrize("name", ["report-2", "report-8", "report-20", "gate"])
def test_the_first_table_fits_in_a_wide_window_and_scrolls_alone_in_a_narrow_one(pages, chromium, name):
    first = "((one) => one.scrollWidth > one.clientWidth)(document.querySelector('.scroll'))"
    visit(chromium, pages[name], WIDE)
    assert chromium.value(first) is False
    visit(chromium, pages[name], NARROW)
    assert chromium.value(first) is True
    chromium.value("document.querySelector('.scroll').scrollLeft = 500")
    stays = "document.querySelector('.scroll tbody td').getBoundingClientRect().left"
    assert chromium.value(stays) >= 0, "the name of the row stays in sight"


NAMES = """[...document.querySelectorAll('table')[0].tBodies[0].rows].filter((row) => !row.hidden)
    .map((row) => row.cells[0].innerText)"""


def click(opened, title):
    heads = "[...document.querySelectorAll('table')[0].tHead.rows[0].cells]"
    opened.value(f"{heads}.find((one) => one.innerText.trim().startsWith({title!r})).firstChild.click()")


@pytest.mark.slow
@NEEDS_CHROMIUM
def test_a_click_on_the_title_of_a_column_sorts_by_number_then_backwards(pages, chromium):
    visit(chromium, pages["report-8"], WIDE)
    sizes = {tables.name(report): report.value("bytes") for report in screenshots.demo()[:8]}
    click(chromium, "size")
    ordered = chromium.value(NAMES)
    assert [sizes[one] for one in ordered] == sorted(sizes.values())
    click(chromium, "size")
    assert [sizes[one] for one in chromium.value(NAMES)] == sorted(sizes.values(), reverse=True)
    click(chromium, "p50")
    assert chromium.value(NAMES)[-1] == "custom_fp16.plan", "what was not timed is last"
    click(chromium, "p50")
    assert chromium.value(NAMES)[-1] == "custom_fp16.plan"
    click(chromium, "artifact")
    assert chromium.value(NAMES) == sorted(sizes)


@pytest.mark.slow
@NEEDS_CHROMIUM
def test_the_field_above_a_long_table_keeps_rows_with_all_of_its_words(pages, chromium):
    visit(chromium, pages["report-8"], WIDE)
    write = "((one) => {{ one.value = {!r}; one.dispatchEvent(new Event('input')); }})(document.querySelector('input'))"
    chromium.value(write.format("INT8 onnx"))
    assert chromium.value(NAMES) == ["custom_int8.onnx"]
    chromium.value(write.format(""))
    assert len(chromium.value(NAMES)) == 8
    visit(chromium, pages["report-2"], WIDE)
    assert chromium.value("document.querySelector('table').parentElement.previousElementSibling.tagName") == "P"


@pytest.mark.slow
@NEEDS_CHROMIUM
def test_the_page_is_whole_without_its_script(pages, chromium):
    shown = []
    for script in (True, False):
        visit(chromium, pages["report-8"], WIDE, script)
        shown.append(chromium.value("document.body.innerText.split(/\\s+/).join(' ')"))
        assert chromium.value("document.querySelectorAll('button, input').length > 0") is script
    assert shown[0] == shown[1]
    assert "custom_int8.onnx" in shown[1]


PAPER_WIDTH = round((297 - 2 * 10) / 25.4 * 96)  # A4 landscape within its margins, in CSS pixels


@pytest.mark.slow
@NEEDS_CHROMIUM
@pytest.mark.parametrize("name", ["report-8", "report-20", "gate"])
def test_on_paper_the_page_is_white_nothing_is_cut_and_details_are_open(pages, chromium, name):
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    background = "getComputedStyle(document.body).backgroundColor"
    chromium.send("Emulation.setEmulatedMedia", media="screen", features=dark)
    visit(chromium, pages[name], PAPER_WIDTH)
    assert chromium.value(background) == "rgb(22, 24, 27)"
    chromium.send("Emulation.setEmulatedMedia", media="print", features=dark)
    assert chromium.value(background) == "rgb(255, 255, 255)"
    widths = "[...document.querySelectorAll('table')].slice(0, 2).map((one) => one.scrollWidth)"
    assert max(chromium.value(widths)) <= PAPER_WIDTH
    assert chromium.value("[...document.querySelectorAll('input')].every((one) => !one.offsetHeight)")
    assert chromium.value("[...document.querySelectorAll('details dd')].every((one) => one.checkVisibility())")
    pdf = base64.b64decode(chromium.send("Page.printToPDF", preferCSSPageSize=True)["data"])
    assert pdf.startswith(b"%PDF")
    chromium.send("Emulation.setEmulatedMedia", media="", features=[])


def test_the_docs_show_each_case_in_a_small_picture():
    docs = "".join((ROOT / "docs" / f"{page}.md").read_text() for page in ("verify", "gate"))
    assert set(screenshots.cases()) == {"report-2", "report-8", "report-20", "gate"}
    for name in screenshots.cases():
        picture = ROOT / "docs" / "pictures" / f"{name}.png"
        assert f"](pictures/{name}.png)" in docs
        assert picture.stat().st_size <= 200_000
        assert Image.open(picture).size == (screenshots.WIDTH, screenshots.HEIGHT)


def test_the_page_of_twenty_artifacts_stays_small(pages):
    for path in pages.values():
        assert path.stat().st_size < 1e6


OVERLAPS = """[...document.querySelectorAll('svg')].flatMap((svg) => {
    const texts = [...svg.querySelectorAll('text')].map((one) => [one.textContent, one.getBoundingClientRect()]);
    const frame = svg.getBoundingClientRect();
    const meet = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
        && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3;
    return texts.flatMap(([text, box], index) => [
        ...texts.slice(index + 1).filter(([, other]) => meet(box, other)).map(([other]) => text + ' | ' + other),
        ...(box.left < frame.left - 1 || box.right > frame.right + 1 ? [text + ' is cut'] : [])]);
})"""


@pytest.mark.slow
@NEEDS_CHROMIUM
@pytest.mark.parametrize("name", ["report-2", "report-8", "report-20", "gate", "failing", "trend"])
def test_no_text_of_a_chart_covers_another_or_is_cut(pages, chromium, name):
    visit(chromium, pages[name], WIDE)
    assert chromium.value(OVERLAPS) == []


def test_the_overlap_of_two_texts_is_noticed(chromium, tmp_path):
    text = "<text x='10' y='20'>one</text><text x='{}' y='20'>two</text><text x='80' y='80'>three</text>"
    (tmp_path / "page.html").write_text(f"<svg width='300' height='100'>{text.format(20)}</svg>")
    visit(chromium, tmp_path / "page.html", WIDE)
    assert chromium.value(OVERLAPS) == ["one | two"]


@pytest.mark.parametrize("count", [2, 8, 20])
def test_every_artifact_has_its_label_in_every_chart(count):
    reports = screenshots.many(count)
    names = {tables.name(report) for report in reports}
    for chart in (charts.accuracy_against_latency, charts.blocks, lambda them: charts.distributions(them, "batch 1")):
        svg = chart(reports)
        assert names <= {text.strip() for text in re.findall(r"<text[^>]*>(.*?)</text>", svg, flags=re.S)}
        words = re.search('aria-label="(.*?)"', svg)[1]
        assert all(one in words for one in names), "the numbers are there for readers who see no chart"


def test_the_accuracy_axis_is_zoomed_to_the_artifacts():
    svg = charts.accuracy_against_latency(screenshots.demo())
    numbers = [float(text) for text in re.findall(r">\s*([\d.]+)\s*</text>", svg)]
    accuracies, times = [n for n in numbers if n > 50], [n for n in numbers if n < 50]
    assert min(accuracies) > 96
    assert max(accuracies) < 99
    assert max(times) < 1, "eager PyTorch takes 2.6 ms and is a line"


@pytest.mark.parametrize("deficiency", ["protan", "deutan", "tritan"])
def test_colours_of_precisions_differ_for_colour_blind_readers(deficiency):
    """Simulated with the matrices of Machado, Oliveira and Fernandes (2009), severity 1; differences in CIE Lab."""
    colors = [precision.color for precision in PRECISIONS.values()]
    seen = [lab(MACHADO[deficiency] @ linear(color)) for color in colors]
    for one, other in itertools.combinations(range(len(colors)), 2):
        assert np.linalg.norm(seen[one] - seen[other]) > 10, (colors[one], colors[other])


MACHADO = {
    "protan": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deutan": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritan": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}


def linear(color):
    shares = np.array([int(color[index : index + 2], 16) / 255 for index in (1, 3, 5)])
    return np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ np.clip(rgb, 0, 1)
    x, y, z = np.cbrt(xyz / np.array([0.9505, 1.0, 1.089]))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])
