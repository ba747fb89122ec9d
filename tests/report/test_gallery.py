"""The images of the page whose answers differ most: what is shown of each, and that the page stays small and whole."""

import base64
import io
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from msgspec.structs import replace
from PIL import Image

from exporter import report as reports
from exporter.report import Difference, Prediction, rendering
from exporter.report.formats import html, markdown
from exporter.report.gallery import MOST_CHARACTERS, first_changed, gallery
from tests.package import browser
from tests.report.test_formats import made
from tests.report.test_page import NARROW, WIDE, visit

NEEDS_CHROMIUM = pytest.mark.skipif(
    shutil.which("chromium") is None, reason="no chromium here; apt-get install chromium"
)


def jpeg(seed, side=96, size=None):
    """A JPEG in base64; padded to `size` bytes behind its end."""
    file = io.BytesIO()
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(small).resize((side, side * 3 // 4)).save(file, "JPEG")
    content = file.getvalue()
    return base64.b64encode(content + bytes((size or len(content)) - len(content))).decode()


def difference(number, **fields):
    known = {
        "image": f"cat/{number:03}.png", "reference": Prediction(index=2, name="cat", probability=0.5126),
        "artifact": Prediction(index=7, probability=0.49), "changed": True, "probability_change": 0.2,
        "thumbnail": jpeg(number),
    }  # fmt: skip
    return Difference(**known | fields)


def with_images(count, name="a.onnx", first=0, **fields):
    return replace(made(name), differences=tuple(difference(first + number, **fields) for number in range(count)))


class Reader(HTMLParser):
    """The text of each card, the ids of its pictures with their words, and the contents of all pictures by id."""

    def __init__(self, text):
        super().__init__()
        self.cards, self.uses, self.contents, self.words = [], [], {}, []
        self.inside, self.symbol = False, ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        facts = dict(attrs)
        if tag == "ul" and facts.get("class") == "cards":
            self.inside = True
        elif tag == "li" and self.inside:
            self.cards.append([])
        elif tag == "symbol":
            self.symbol = facts["id"]
        elif tag == "image" and self.symbol:
            self.contents[self.symbol] = facts["href"]
        elif tag == "svg" and self.inside:
            self.words.append((facts["role"], facts["aria-label"]))
        elif tag == "use" and self.inside:
            self.uses.append(facts["href"].removeprefix("#"))

    def handle_endtag(self, tag):
        if tag == "ul":
            self.inside = False

    def handle_data(self, data):
        if self.inside and data.strip():
            self.cards[-1].append(data.strip())


def test_a_card_has_the_name_both_answers_and_the_label():
    label = (Prediction(index=2, name="cat"),)
    shown = with_images(1, labels=label).differences[0]
    page = Reader(html.render([replace(made("a.onnx"), differences=(shown,))]))
    (card,) = page.cards
    assert card == [
        "cat/000.png", "✗ lost", "reference", "cat, 51.3 %", "artifact", "class 7, 49.0 %", "label", "cat",
    ]  # fmt: skip
    assert page.words == [("img", "cat/000.png")]
    content = page.contents[page.uses[0]].removeprefix("data:image/jpeg;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(content))).size == (96, 72)


@pytest.mark.parametrize(
    ("fields", "chip"),
    [
        ({}, "≠ changed"),
        ({"changed": False}, None),
        ({"labels": (Prediction(index=2),)}, "✗ lost"),
        ({"labels": (Prediction(index=7),)}, "✓ won"),
        ({"labels": (Prediction(index=5),)}, "≠ changed"),
        ({"labels": (Prediction(index=2),), "artifact": Prediction(index=2, probability=0.1)}, "≠ changed"),
    ],
)
def test_a_chip_says_whether_the_right_answer_was_lost_or_won(fields, chip):
    ((*_, (card,)),) = gallery([with_images(1, **fields)]).groups
    assert [f"{one.sign} {one.text}" for one in card.chips] == ([chip] if chip else [])


def test_an_image_without_labels_or_probability_has_neither():
    lines = {
        labels: gallery([with_images(1, artifact=Prediction(index=1), labels=labels)]).groups[0][2][0].lines
        for labels in (None, ())
    }
    assert lines[None] == (("reference", "cat, 51.3 %"), ("artifact", "class 1"))
    assert lines[()][2] == ("label", "none")


def test_artifacts_share_the_picture_of_an_image():
    page = Reader(html.render([with_images(3), with_images(2, "b.onnx"), with_images(1, "c.onnx", first=2)]))
    assert page.uses == ["image-0", "image-2", "image-1", "image-0", "image-2", "image-1"]
    assert len(page.contents) == 3


def test_artifacts_that_differ_nowhere_are_named_and_old_reports_have_no_list():
    old, equal = made("old.onnx"), replace(made("same.onnx"), differences=())
    assert gallery([old]) is None
    assert "Images that differ most" not in html.render([old])
    page = html.render([old, equal, with_images(1)])
    assert (
        "No image has another class or label, or a probability that changed by at least 0.1 points: same.onnx" in page
    )
    assert "a.onnx: 1 image, 1 with another class or label" in page
    assert "✗ lost: only the reference is right; ✓ won: only the artifact is right; ≠ changed:" in page
    assert "≠ changed:" not in html.render([old, equal])


def test_images_without_a_thumbnail_are_counted():
    assert "<p>1 image is shown by name only" in html.render([with_images(1, thumbnail="")])
    assert "<p>2 images are shown by name only" in html.render([with_images(2, thumbnail="")])


def test_a_page_of_twenty_artifacts_stays_within_two_megabytes_and_shows_the_first_images_of_each():
    each = [
        with_images(12, f"{number}.onnx", first=100 * number, thumbnail=jpeg(number, size=3000 + number))
        for number in range(20)
    ]
    each = [
        replace(one, differences=tuple(
            replace(image, thumbnail=jpeg(place, size=3000 + 12 * number + place))
            for place, image in enumerate(one.differences)
        ))
        for number, one in enumerate(each)
    ]  # fmt: skip
    page = html.render(each)
    read = Reader(page)
    assert len(page.encode()) < 2e6
    assert len(read.cards) == 240
    assert len(read.uses) < 240
    assert f"{240 - len(read.uses)} images are shown by name only" in page
    assert MOST_CHARACTERS - 5000 < sum(len(one.partition(",")[2]) for one in read.contents.values()) <= MOST_CHARACTERS
    shown = [[bool(card.thumbnail) for card in cards] for _, _, cards in gallery(each).groups]
    assert min(map(sum, shown)) >= max(map(sum, shown)) - 1
    assert all(flags == sorted(flags, reverse=True) for flags in shown)


def test_markdown_names_the_image_with_another_answer():
    text = markdown.render(
        [with_images(3, image="a|b.png"), with_images(1, "same.onnx", changed=False), made("old.onnx")]
    )
    lines = [line for line in text.splitlines() if "answers" in line]
    assert lines == ["a.onnx answers class 7 (49.0 %) for a&#124;b.png; the reference answers cat (51.3 %)."]


@pytest.mark.parametrize(
    ("artifact", "sentence"),
    [
        (Prediction(index=7), "a.onnx answers class 7 for b.png; the reference answers cat (51.3 %)."),
        (
            Prediction(index=2, name="cat", probability=0.45),
            "a.onnx and the reference disagree on label cat for b.png: 45.0 % and 51.3 %.",
        ),
        (
            Prediction(index=2, name="cat"),
            "a.onnx and the reference disagree on label cat for b.png: no number and 51.3 %.",
        ),
    ],
)
def test_the_first_image_with_another_answer_is_in_a_sentence(artifact, sentence):
    undefined = difference(0, image="nan.png", changed=False, probability_change=None)
    report = replace(made("a.onnx"), differences=(undefined, difference(1, image="b.png", artifact=artifact)))
    assert first_changed([report, made("old.onnx"), replace(made("same.onnx"), differences=())]) == [sentence]


@pytest.mark.parametrize("content", ["", "a b", '"><script>', "AAAA", "/9j/" + "A" * MOST_CHARACTERS])
def test_a_thumbnail_that_is_none_is_not_shown(content):
    page = Reader(html.render([with_images(1, thumbnail=content)]))
    assert (page.uses, page.contents) == ([], {})
    assert page.cards[0][0] == "cat/000.png"


def test_more_images_than_twelve_are_not_shown():
    assert len(Reader(html.render([with_images(40)])).cards) == 12


@pytest.mark.parametrize("name", ['"><script>alert(1)</script>.png', "a\u202egnp.exe", "a\nb.png", "<b>.png"])
def test_a_name_stays_text(name, tmp_path):
    reports.save(with_images(1, image=name, reference=Prediction(index=1, name=name)), tmp_path / "a.json")
    page, _ = rendering.rendered([tmp_path / "a.json"], "html")
    read = Reader(page)
    spelled = {"a\u202egnp.exe": "a\\u202egnp.exe", "a\nb.png": "a b.png"}.get(name, name)
    assert read.cards[0][0] == read.words[0][1] == read.cards[0][3] == spelled
    assert page.count("<script") == 1


def test_a_later_timing_keeps_the_images_and_a_later_verification_replaces_them(tmp_path):
    verified = replace(with_images(2), recipe={"verify": {}})
    timed = replace(verified, recipe={"bench": {}}, differences=None)
    reports.save_merged(verified, tmp_path / "a.json")
    assert reports.save_merged(timed, tmp_path / "a.json").differences == verified.differences
    assert reports.load(tmp_path / "a.json").differences == verified.differences
    again = replace(verified, differences=())
    assert reports.save_merged(again, tmp_path / "a.json").differences == ()


def test_the_schema_describes_the_images():
    definitions = reports.schema()["$defs"]
    assert set(Difference.__struct_fields__) == set(definitions["Difference"]["properties"])
    assert "thumbnail" not in definitions["Difference"].get("required", [])


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page of three artifacts with images, with a long name."""
    path = tmp_path_factory.mktemp("gallery") / "page.html"
    long = difference(50, image="photos/" + 120 * "x" + ".png", reference=Prediction(index=1, name="Wort" * 40))
    first = with_images(11, labels=(Prediction(index=2, name="cat"),))
    first = replace(first, differences=(*first.differences, long))
    path.write_text(html.render([first, with_images(12, "b.onnx", first=6), with_images(3, "c.onnx")]))
    return path


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser.page(tmp_path_factory.mktemp("browser") / "profile") as opened:
        yield opened


SIZES = """[...document.querySelectorAll('.cards svg')].filter((one) => one.checkVisibility())
    .map((one) => one.getBoundingClientRect()).map((box) => [Math.round(box.width), Math.round(box.height)])"""


@pytest.mark.slow
@NEEDS_CHROMIUM
@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("script", [True, False])
def test_images_are_shown_at_every_width_with_and_without_script(page, chromium, width, script):
    visit(chromium, page, width, script)
    assert chromium.value("document.documentElement.scrollWidth") == width
    assert chromium.value(SIZES) == [[96, 96]] * 12, "the first artifact's are open"
    names = "[...document.querySelectorAll('.cards b')].filter((one) => one.checkVisibility())"
    assert chromium.value(f"{names}.length") == 12
    assert chromium.value(f"{names}.every((one) => one.getBoundingClientRect().width >= 100)")
    assert chromium.value(f"{names}.every((one) => one.getBoundingClientRect().right <= {width})")
    content = chromium.send("Page.captureScreenshot", captureBeyondViewport=True)["data"]
    assert base64.b64decode(content).startswith(b"\x89PNG")


@pytest.mark.slow
@NEEDS_CHROMIUM
def test_the_pixels_of_a_thumbnail_are_on_the_screen(page, chromium):
    visit(chromium, page, WIDE)
    chromium.value("document.querySelector('.cards').scrollIntoView()")
    box = chromium.value("""((box) => [box.x, box.y])(document.querySelector('.cards svg').getBoundingClientRect())""")
    chromium.value("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    content = chromium.send("Page.captureScreenshot")["data"]
    x, y = map(round, box)
    taken = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB")).astype(float)
    taken = taken[y + 12 : y + 84, x : x + 96]
    expected = np.asarray(Image.open(io.BytesIO(base64.b64decode(jpeg(0))))).astype(float)
    assert np.abs(taken - expected).mean() < 6


@pytest.mark.slow
@NEEDS_CHROMIUM
def test_on_paper_the_images_of_every_artifact_are_there(page, chromium):
    visit(chromium, page, WIDE)
    chromium.send("Emulation.setEmulatedMedia", media="print")
    assert chromium.value(SIZES) == [[96, 96]] * 27
    pdf = base64.b64decode(chromium.send("Page.printToPDF", preferCSSPageSize=True)["data"])
    chromium.send("Emulation.setEmulatedMedia", media="")
    pictures = len(re.findall(rb"/Subtype\s*/Image", pdf))
    assert pictures >= 18, "each image once"
