"""Text from reports, histories, sidecars and labels comes out of every page as text, whatever it contains."""

import csv
import html.parser
import io
import json
import re
import shutil
from xml.etree import ElementTree

import msgspec
import pytest
from markdown_it import MarkdownIt

from exporter import report
from exporter.cli.console import print_table
from exporter.report import Difference, Finding, Prediction, Report, rendering
from exporter.report.formats import html as html_format
from exporter.report.history import Entry
from tests import once
from tests.package import browser
from tests.report.test_formats import decode, made

ATTACKS = (
    '"><script>document.title=1</script>',
    '" onload="document.title=1',
    "' onload='document.title=1",
    "<img src=x onerror=document.title=1>",
    "x | y | z",
    "]]></failure><failure>",
    "<!-- --><script>document.title=1</script>",
    "::error::owned",
    "a\n::error::owned",
    "a\r::set-output name=x::y",
    "=HYPERLINK(1)",
    "+1",
    "-1+cmd",
    "@SUM(1)",
    "\t=1+1",
    "\x1b[31mred\x1b]0;title\x07",
    "\u202egnp.exe\u2066",
    "[link](javascript:alert(1)) @everyone #1 $x$",
    "</style><svg/onload=document.title=1>",
    "\u2028::error::owned",
)
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def hostile(attack):
    """A report with the attack in every field of text of its findings, its artifact, sidecar and machine."""
    base = made("a.onnx", passed=False)
    gain = Finding(check="int8", metric="gain", value=0.9, low=0.8, high=1.0)
    calibration = Finding(check="int8", metric="calibration", value=4.0)
    tried = [
        Finding(check="int8", metric=metric, value=value + index)
        for metric, value in (("tried_loss", 1.0), ("tried_ms", 2.0))
        for index in range(2)
    ]
    sensitivity = Finding(check="int8", metric="sensitivity", value=0.1)
    answer = Prediction(index=1, name=attack, probability=0.5)
    differences = [
        Difference(image=attack, reference=answer, artifact=answer, changed=True, labels=(answer,), thumbnail=content)
        for content in (attack, "/9j/ABCD")
    ]
    unknown = Finding(check=attack, metric=attack, value=1.0, limit=0.5, passed=False)
    findings = [
        msgspec.structs.replace(f, case=f"{attack}{i % 2}", unit=attack, detail=attack)
        for i, f in enumerate([*base.findings, gain, calibration, *tried, sensitivity, unknown, unknown])
    ]
    sidecar = {
        **base.artifact,
        **dict.fromkeys(("sha256", "backend", "variant", "task", "weights", "reference"), attack),
        "path": f"build/{attack}",
        "label": attack,
        "labels": [attack],
        "parents": [attack],
        "versions": {attack: attack},
        "origins": {attack: attack},
    }
    environment = {
        **dict.fromkeys(("cpu", "system", "timing"), attack),
        "isa": [attack],
        "cores": 2,
        "session": {"arithmetic": attack, attack: attack},
        "gpu_before": {"name": attack},
        "versions": {attack: attack, "torch": attack},
    }
    return Report(
        passed=False, recipe={attack: {attack: attack}}, artifact=sidecar, environment=environment,
        findings=tuple(findings), differences=tuple(differences),
    )  # fmt: skip


def trend(attack, path):
    """A history with the attack in every field of text, and a step."""
    entries = [
        Entry(
            commit=f"{index}{attack}", time=f"{index:02}{attack}", artifact=attack, machine=attack,
            values={f"{attack}, {attack}": 1.0 + (index >= 6) + index / 1000},
        )
        for index in range(12)
    ]  # fmt: skip
    path.write_bytes(b"".join(msgspec.json.encode(entry) + b"\n" for entry in entries))
    return path


def render_all(text, folder):
    """Every rendering of a report and a history that hold a text, by format."""
    path = folder / "a.report.json"
    report.save(hostile(text), path)
    history = trend(text, folder / "history.jsonl")
    texts = {
        form: rendering.rendered([path], form)[0] for form in ("csv", "github", "html", "junit", "markdown", "text")
    }
    return texts | {f"trend {form}": rendering.rendered([history], form)[0] for form in ("html", "markdown")}


@pytest.fixture(scope="module", params=ATTACKS, ids=range(len(ATTACKS)))
def pages(request, tmp_path_factory):
    """The renderings of a hostile text, for all of pytest's processes."""

    def write(folder):
        (folder / "pages.json").write_text(json.dumps(render_all(request.param, folder)))

    folder = once.shared_folder(tmp_path_factory, f"attack-{ATTACKS.index(request.param)}")
    return json.loads((once.written(folder, write) / "pages.json").read_text())


@pytest.fixture(scope="module")
def tags(tmp_path_factory):
    """The tags of the pages of a harmless text."""
    pages = render_all("x", tmp_path_factory.mktemp("pages"))
    return set(Reader(pages["html"]).tags)


class Reader(html.parser.HTMLParser):
    """The tags and attributes of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs


def check_html(text, tags):
    page = Reader(text)
    assert not set(page.tags) - tags
    assert page.tags.count("script") == text.count(f"<script>{html_format.SCRIPT.read_text()}</script>") == 1
    assert not [key for key, _ in page.attributes if key.startswith("on")]
    links = [value for key, value in page.attributes if key in ("href", "src", "xlink:href")]
    assert all(link.startswith(("#", "data:,")) or link == "data:image/jpeg;base64,/9j/ABCD" for link in links)


def test_no_page_has_a_script_an_event_or_a_tag_from_its_data(pages, tags):
    for form in ("html", "trend html"):
        assert "svg" in Reader(pages[form]).tags
        check_html(pages[form], tags)
    for form in ("markdown", "trend markdown"):
        page = Reader(MarkdownIt("gfm-like", {"linkify": False}).render(pages[form]))
        assert set(page.tags) <= {"p", "strong", "table", "thead", "tbody", "tr", "th", "td"}


def test_every_row_of_a_table_has_the_cells_of_its_head(pages):
    for form in ("markdown", "trend markdown"):
        for part in MarkdownIt("gfm-like", {"linkify": False}).render(pages[form]).split("<table>")[1:]:
            rows = re.findall(r"<tr>(.*?)</tr>", part, flags=re.S)
            assert len({len(re.findall(r"</t[hd]>", row)) for row in rows}) == 1
        bars = [len(re.findall(r"(?<!\\)\|", line)) for line in pages[form].splitlines() if line.startswith("|")]
        assert len(set(bars)) <= len(pages[form].split("| --- |")) + 10
    for row in re.findall(r"<tr>(.*?)</tr>", pages["trend html"]):
        assert len(re.findall(r"</t[hd]>", row)) == 8


def test_xml_is_parsed_and_has_a_failure_for_each_failed_finding(pages):
    tree = ElementTree.fromstring(pages["junit"].encode())
    assert {element.tag for element in tree.iter()} <= {"testsuites", "testsuite", "testcase", "failure", "system-out"}
    assert len(tree.findall(".//failure")) == 3


def test_csv_has_its_columns_one_line_each_and_no_formula(pages):
    rows = list(csv.reader(io.StringIO(pages["csv"])))
    assert len({len(row) for row in rows}) == 1
    assert len(rows) == len(pages["csv"].splitlines()) == 1 + len(hostile("x").findings)
    for cell in (cell.strip() for row in rows for cell in row):
        assert not cell.startswith(("=", "+", "@"))
        assert not cell.startswith("-") or float(cell) < 0


def test_the_only_commands_of_a_ci_are_those_of_the_github_format(pages):
    for line in pages["github"].splitlines():
        name, properties, _ = decode(line)
        assert name in ("error", "warning")
        assert set(properties) == {"title"}
    for form, text in pages.items():
        assert form == "github" or not [line for line in re.split("[\r\n]", text) if line.lstrip().startswith("::")], (
            form
        )


def test_no_page_has_a_sign_that_a_terminal_obeys(pages):
    for form, text in pages.items():
        assert not UNSAFE.search(text), form


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_table_of_the_terminal_has_a_sign_that_it_obeys(attack, capsys):
    print_table(("a", "b"), [(attack, attack)])
    assert not UNSAFE.search(capsys.readouterr().out)


def content(opened, path):
    """What a browser has of a page once everything was loaded that it names, and what waited for that has run."""
    opened.send("Page.navigate", url=path.as_uri())
    opened.until(f"location.href === '{path.as_uri()}' && document.readyState === 'complete'")
    return opened.value("new Promise((done) => setTimeout(() => done(document.documentElement.outerHTML), 100))")


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """A browser, in which a script that a page brings is seen to run."""
    folder = tmp_path_factory.mktemp("browser")
    with browser.page(folder / "profile") as opened:
        (folder / "page.html").write_text("<title>a</title><img src=x onerror=document.title=1>")
        assert "<title>1</title>" in content(opened, folder / "page.html")
        yield opened


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here; apt-get install chromium")
def test_a_browser_runs_no_script_of_any_page(pages, tags, opened, tmp_path):
    for form in ("html", "trend html"):
        page = tmp_path / f"{form.replace(' ', '_')}.html"
        without_policy = re.sub('<meta http-equiv="Content-Security-Policy".*?>', "", pages[form])
        assert without_policy != pages[form]
        page.write_text(without_policy)
        text = content(opened, page)
        assert re.search("<title>convnext-export (report|trend)</title>", text), "a script would set it to 1"
        check_html(text, {*tags, "button", "input"})


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here; apt-get install chromium")
@pytest.mark.parametrize(
    "attack", ["<script>document.title=1</script>", "<img src=x onerror=document.title=1>", "<a href=x>x</a>"]
)
def test_the_policy_of_a_page_stops_a_script_that_got_into_it(attack, opened, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(html_format.render([made("a.onnx"), made("b.onnx")]).replace("<h1>", f"{attack}<h1>"))
    text = content(opened, page)
    assert "<title>convnext-export report</title>" in text
    assert "<button" in text, "the page's own script has run"
