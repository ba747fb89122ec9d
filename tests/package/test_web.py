"""`package --for web`: a page that gives the answers of `predict`, and sends nothing."""

import functools
import http.server
import json
import re
import shlex
import shutil
import stat
import subprocess
import sys
import threading

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace
from PIL import Image

from exporter import artifact as artifacts_on_disk
from exporter import backends, package, predict
from exporter.artifact.sidecar import Preprocessing
from exporter.backends import as_taken
from exporter.backends.onnxruntime.serving import WEB
from exporter.data import images
from exporter.data.masks import colors
from exporter.data.synthetic import dead_leaves
from exporter.errors import BadRequest
from exporter.machine import may_begin_with_columns
from exporter.package import PackageOptions, npm
from exporter.package.rendering import TEMPLATES
from exporter.predict import PredictOptions
from tests.conftest import ROOT, build, shared, type_command
from tests.package import browser

needs_chromium = pytest.mark.skipif(
    shutil.which("chromium") is None, reason="no chromium here; apt-get install chromium"
)
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="no node here; apt-get install nodejs")
IMAGENETTE = (
    "tench", "English springer", "cassette player", "chain saw", "church", "French horn", "garbage truck", "gas pump",
    "golf ball", "parachute",
)  # fmt: skip


@pytest.fixture
def no_runtime(tmp_path, monkeypatch):
    """Files that stand for those of npm."""
    for name in WEB.files:
        (tmp_path / "dist" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "dist" / name).write_text(name)
    monkeypatch.setattr(npm, "folder_of", lambda _: tmp_path / "dist")


@pytest.fixture
def page(tmp_path):
    with browser.page(tmp_path / "profile") as opened:
        yield opened


@pytest.fixture
def served():
    """A function that serves a folder as any server of static files does, and gives its address."""
    servers = []

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    def serve(folder):
        handler = functools.partial(Quiet, directory=str(folder))
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


CASES = {
    **{
        f"{filter} {crop}": Preprocessing(
            size=56, resize=56 if crop == "border" else 64, crop=crop, interpolation=filter
        )
        for filter in ("bicubic", "bilinear", "lanczos", "hamming", "box", "nearest")
        for crop in ("center", "squash", "border")
    },
    "two sides": Preprocessing(size=(48, 64), resize=(50, 70), offset="floor"),
    "filled up": Preprocessing(size=65, resize=50),
    "pixels": Preprocessing(size=33, resize=40, input="uint8", color="BGR", layout="NHWC"),
    "shares": Preprocessing(size=64, resize=65, input="float01", layout="NHWC"),
    "grey": Preprocessing(size=64, resize=71, mean=(0.4,), std=(0.2,)),
}
SIZES = ((97, 150), (64, 64), (33, 20), (301, 211), (600, 100))  # Pillow 13 resizes the last one's columns first


@needs_node
def test_the_pixels_are_those_of_pillow(tmp_path):
    """Value for value: a canvas would resize in another way."""
    shutil.copy(TEMPLATES / "web" / "pixels.js", tmp_path / "pixels.mjs")
    random, cases = np.random.default_rng(0), []
    for number, (height, width) in enumerate(SIZES):
        picture = np.dstack([random.integers(0, 256, (height, width, 3)), np.full((height, width), 255)])
        (tmp_path / f"{number}.rgba").write_bytes(picture.astype(np.uint8).tobytes())
        drawn = Image.fromarray(picture[..., :3].astype(np.uint8))
        for name, recipe in CASES.items():
            pixels = images.preprocess(images.in_color(drawn, recipe), recipe)[None]
            cases.append((number, width, height, name, as_taken(pixels, recipe)))
    order = {"may_begin_with_columns": may_begin_with_columns()}
    lines = [
        [number, width, height, msgspec.to_builtins(CASES[name]) | order] for number, width, height, name, _ in cases
    ]
    (tmp_path / "cases.json").write_text(json.dumps(lines))
    (tmp_path / "run.mjs").write_text("""
import { readFileSync, writeFileSync } from "node:fs";
import { preprocess } from "./pixels.mjs";
JSON.parse(readFileSync("cases.json")).forEach(([number, width, height, preprocessing], place) => {
  const data = new Uint8ClampedArray(readFileSync(`${number}.rgba`));
  writeFileSync(`${place}.out`, preprocess({ data, width, height }, preprocessing));
});
""")
    subprocess.run(["node", "run.mjs"], cwd=tmp_path, check=True)
    assert len(cases) == len(SIZES) * len(CASES)
    for place, (_, width, height, name, expected) in enumerate(cases):
        pixels = np.frombuffer((tmp_path / f"{place}.out").read_bytes(), expected.dtype).reshape(expected.shape)
        difference = np.abs(pixels.astype(np.float64) - expected)
        limit = 1e-6 if CASES[name].input == "float01" else 0  # which is computed back from normalised pixels
        assert difference.max() <= limit, f"{name}, {width}×{height}: {np.count_nonzero(difference)} pixels differ"


def typed(folder, port):
    """The commands of the README of a package: the server, and the others."""
    blocks = re.findall(r"```console\n(.*?)```", (folder / "README.md").read_text(), flags=re.S)
    commands = "".join(blocks).splitlines()
    assert commands == ["python3 serve.py", "python3 selftest.py"]
    return [
        [sys.executable, *shlex.split(line)[1:], *more] for line, more in zip(commands, ([str(port)], []), strict=True)
    ]


@pytest.mark.slow
@needs_chromium
def test_the_commands_of_its_readme_serve_and_test_the_page(artifacts, runtime, page, tmp_path):
    out = tmp_path / "package"
    written = package.package(artifacts["onnxruntime", "fp32"], "web", out)
    assert {f"runtime/{name}" for name in WEB.files} < set(written.files)
    serve, selftest = typed(out, 0)
    with subprocess.Popen(serve, cwd=out, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            address = server.stdout.readline().strip()
            page.open(address)
            assert re.fullmatch(r"WebAssembly, [1-4] threads?", page.text("runtime"))
            assert page.value("crossOriginIsolated"), "else it may use one thread only"
            words = [*serve[:2], address.rsplit(":")[-1].strip("/")]
            again = subprocess.run(words, cwd=out, capture_output=True, text=True, check=False)
            assert (again.returncode, len(again.stderr.splitlines())) == (1, 1)
            assert "in use; choose another" in again.stderr
        finally:
            server.kill()
    tested = subprocess.run(selftest, cwd=out, capture_output=True, text=True, check=False)
    assert (tested.returncode, tested.stdout.splitlines()[-1]) == (0, "passed"), tested.stderr
    facts = json.loads((out / "model.json").read_text())
    facts["expected"][0][3] += 0.5
    (out / "model.json").write_text(json.dumps(facts))
    tested = subprocess.run(selftest, cwd=out, capture_output=True, text=True, check=False)
    assert (tested.returncode, tested.stdout.splitlines()[-1]) == (1, "FAILED")
    nowhere = subprocess.run([*selftest, "no-such-browser"], cwd=out, capture_output=True, text=True, check=False)
    assert nowhere.returncode == 1
    assert "?selftest" in nowhere.stderr


def shown(artifact, path, top=5):
    """The rows that a page shows for an image, by `predict`."""
    (record,) = predict.answer(artifact, [str(path)], PredictOptions(top=top))
    return [(one.get("label", f"class {one['class']}"), one["probability"]) for one in record["predictions"]]


def assert_rows(rows, expected, path):
    assert [label for label, _ in rows] == [label for label, _ in expected], path
    for (_, percentage), (_, probability) in zip(rows, expected, strict=True):
        assert float(percentage.removesuffix(" %")) == pytest.approx(100 * probability, abs=0.11), path


@pytest.mark.slow
@needs_chromium
def test_a_page_colours_the_pixels_of_a_segmenter(tiny_upernet, runtime, page, served, tmp_path):
    artifact, out = build(tiny_upernet, tmp_path, output="labels"), tmp_path / "package"
    package.package(artifact, "web", out)
    photo = Image.fromarray(dead_leaves((75, 107), 3))
    photo.save(tmp_path / "photo.png")
    page.open(served(out))
    page.choose(tmp_path / "photo.png")
    recipe, ort = artifact.sidecar.preprocessing, backends.runtime("onnxruntime")
    with ort.open(artifact, ort.options()) as session:
        labels = session(images.preprocess(images.in_color(photo, recipe), recipe)[None])[0]
    numbers, counts = np.unique(labels.astype(int), return_counts=True)
    order = np.argsort(-counts, kind="stable")[:5]
    expected = [(artifact.sidecar.labels[numbers[n]], counts[n] / counts.sum()) for n in order]
    assert_rows(page.rows(), expected, "photo.png")
    assert page.value("[...document.querySelectorAll('canvas')].map((one) => [one.width, one.height])") == [[107, 75]]
    corner = page.value("[...document.querySelector('canvas').getContext('2d').getImageData(0, 0, 1, 1).data]")
    mixed = (np.asarray(photo)[0, 0].astype(int) + colors()[int(labels[0, 0, 0])]) / 2
    assert np.abs(np.array(corner[:3]) - mixed).max() <= 1
    command = [sys.executable, "selftest.py"]
    tested = subprocess.run(command, cwd=out, capture_output=True, text=True, check=False)
    share = re.match(r"Self-test passed: ([\d.]+) % of the pixels have another class", tested.stdout)
    # In one of the 96 × 96 pixels two scores differ by 3e-7 of their standard deviation: CPUs choose differently.
    assert share
    assert float(share[1]) <= 0.011
    facts = json.loads((out / "model.json").read_text())
    facts["expected"][0][0] = [number + 1 for number in facts["expected"][0][0]]
    (out / "model.json").write_text(json.dumps(facts))
    tested = subprocess.run(command, cwd=out, capture_output=True, text=True, check=False)
    assert (tested.returncode, tested.stdout.splitlines()[-1]) == (1, "FAILED")


@pytest.mark.slow
@needs_chromium
def test_every_kind_of_picture_is_read_as_predict_reads_it(artifacts, runtime, page, served, tmp_path):
    artifact, out = artifacts["onnxruntime", "fp32"], tmp_path / "package"
    package.package(artifact, "web", out)
    page.open(served(out))
    draw, exif = Image.fromarray(dead_leaves((97, 150), 3)), Image.Exif()
    exif[0x0112] = 6
    draw.save(tmp_path / "rgb.png")
    draw.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    draw.convert("L").save(tmp_path / "grey.png")
    draw.quantize(32).save(tmp_path / "palette.gif")
    draw.resize((400, 301)).save(tmp_path / "large.webp", lossless=True)
    draw.resize((1, 1)).save(tmp_path / "one.png")
    draw.save(tmp_path / "pixels.bmp")
    for name in ("rgb.png", "turned.jpg", "grey.png", "palette.gif", "large.webp", "one.png", "pixels.bmp"):
        page.choose(tmp_path / name)
        assert_rows(page.rows(), shown(artifact, tmp_path / name), name)
        assert page.text("status") == name
    holes = np.dstack([np.asarray(draw), np.full((97, 150), 255, np.uint8)])
    holes[:40, :40, 3] = 0
    Image.fromarray(holes).save(tmp_path / "holes.png")
    page.choose(tmp_path / "holes.png")
    assert "black" in page.text("status")
    draw.resize((9000, 1)).save(tmp_path / "thin.png")
    (tmp_path / "page.html").write_text("<html>not found</html>")
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "turned.jpg").read_bytes()[:300])
    for name in ("page.html", "broken.jpg"):
        page.choose(tmp_path / name)
        assert "no picture that the browser can read" in page.text("status")
        assert page.rows() == []
    page.choose(tmp_path / "rgb.png")
    assert len(page.rows()) == 5, "the page answers after an error"
    page.value("""
      fetch("sample.png").then((answer) => answer.blob()).then((blob) => {
        const data = new DataTransfer();
        data.items.add(new File([blob], "dropped.png", { type: "image/png" }));
        document.getElementById("drop").dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true }));
      })
    """)
    page.until("document.getElementById('status').innerText === 'dropped.png'")
    assert_rows(page.rows(), shown(artifact, out / "sample.png"), "dropped.png")


@pytest.mark.slow
@needs_chromium
def test_a_page_of_labels_pixels_and_a_fixed_batch(tiny, runtime, page, served, tmp_path):
    artifact, out = build(tiny, tmp_path / "build", batch=3, input="uint8", layout="nhwc"), tmp_path / "package"
    answers = PredictOptions(outputs="multilabel", threshold=0.4, top=3)
    package.package(artifact, "web", out, answers=answers)
    page.open(served(out) + "?selftest")
    assert page.until("document.getElementById('selftest').innerText").startswith("Self-test passed")
    (record,) = predict.answer(artifact, [str(out / "sample.png")], answers)
    decided = [one["label"] for one in record["predictions"] if one["label"] in record["labels"]]
    assert [label for label, _ in page.rows()] == [
        f"{one['label']} ✓" if one["label"] in decided else one["label"] for one in record["predictions"]
    ]


@pytest.mark.slow
@needs_chromium
def test_webgpu_gives_the_same_outputs_and_is_left_out_where_the_cpu_computes_it(artifacts, runtime, served, tmp_path):
    out = tmp_path / "package"
    package.package(artifacts["onnxruntime", "fp32"], "web", out)
    address = served(out)
    with browser.page(tmp_path / "profile", browser.WEBGPU) as page:
        page.send("Page.navigate", url=f"{address}labels.txt")
        if not page.value("navigator.gpu && navigator.gpu.requestAdapter().then(Boolean)"):
            pytest.skip("this Chromium has no WebGPU")
        page.open(f"{address}?selftest&runtime=webgpu")
        assert page.text("runtime") == "WebGPU"
        assert page.until("document.getElementById('selftest').innerText").startswith("Self-test passed")
        page.open(f"{address}?selftest")
        assert page.text("runtime").startswith("WebAssembly")


@pytest.mark.slow
@needs_chromium
def test_the_trained_network_answers_20_photographs_in_the_browser(runtime, page, served, tmp_path):
    weights = shared("data", "weights", "convnext_atto_imagenette.safetensors")
    photographs = sorted(shared("data", "images", "val").glob("*/*.JPEG"))[::100]
    assert len(photographs) == 20
    words = ("--weights", weights, "--imgsz", 112, "--resize", 128, "-o", tmp_path / "build")
    assert type_command("onnx", *words).code == 0
    (tmp_path / "labels.txt").write_text("\n".join(IMAGENETTE))
    path, out = tmp_path / "build" / "atto_fp32.onnx", tmp_path / "package"
    words = ("--labels", tmp_path / "labels.txt", "--sample", photographs[0])
    result = type_command("package", path, "--for", "web", "-o", out, *words)
    assert result.code == 0, result.err
    artifact = artifacts_on_disk.load(path)
    named = replace(artifact.sidecar, labels=IMAGENETTE)
    address = served(out)
    page.open(address)
    page.value("performance.mark('loaded')")
    for number, photograph in enumerate(photographs):
        page.choose(photograph)
        if number == 0:
            seconds = page.value("performance.measure('first', 'loaded').duration") / 1000
            assert seconds <= 3, "from the loaded page to the first answer"
        assert_rows(page.rows(), shown(type(artifact)(path, named), photograph), photograph)
        assert re.fullmatch(r"model [\d.]+ ms, reading and resizing [\d.]+ ms", page.text("times"))
    assert all(one.startswith((address, f"blob:{address}")) for one in page.addresses())
    assert page.complaints() == []
    (ROOT / "build" / "web.png").write_bytes(page.screenshot())


def refusals(artifacts, tiny, tmp_path):
    yield artifacts["openvino", "fp32"], {}, "built for OpenVINO, and browsers run artifacts for ONNX Runtime"
    yield artifacts["onnxruntime", "int8"], {}, "int8, and browsers run fp32 or fp16"
    yield build(tiny, tmp_path / "features", task="features"), {}, "returns features, and a page shows one"
    Image.fromarray(dead_leaves(40, 1)).save(tmp_path / "picture.tiff")
    options = PackageOptions(sample=str(tmp_path / "picture.tiff"))
    yield artifacts["onnxruntime", "fp32"], {"options": options}, "a sample that ends in .tiff, and browsers read .png"
    artifact = artifacts["onnxruntime", "fp32"]
    half = tuple(replace(tensor, dtype="float16") for tensor in artifact.sidecar.inputs)
    yield type(artifact)(artifact.path, replace(artifact.sidecar, inputs=half)), {}, "an input of float16"
    wide = replace(artifact.sidecar.preprocessing, mean=(0.5,) * 4, std=(0.2,) * 4)
    yield type(artifact)(artifact.path, replace(artifact.sidecar, preprocessing=wide)), {}, "4 channels"


def test_what_no_browser_runs_is_refused(artifacts, tiny, no_runtime, tmp_path):
    count = 0
    for artifact, more, message in refusals(artifacts, tiny, tmp_path):
        with pytest.raises(BadRequest, match=message) as refused:
            package.package(artifact, "web", tmp_path / "package", **more)
        assert re.search("; (build|package|use|give)", str(refused.value)), "what to do"
        assert not (tmp_path / "package").exists()
        count += 1
    assert count == 6


def test_fp16_and_any_size_are_packaged_at_the_size_of_the_preprocessing(artifacts, tiny, no_runtime, tmp_path):
    package.package(artifacts["onnxruntime", "fp16"], "web", tmp_path / "half")
    artifact = build(tiny, tmp_path / "build", imgsz="dynamic")
    package.package(artifact, "web", tmp_path / "any")
    facts = json.loads((tmp_path / "any" / "model.json").read_text())
    assert facts["input"]["shape"] == [1, 3, 64, 64]
    assert facts["labels"] == [f"class {number}" for number in range(10)]
    html = (tmp_path / "any" / "index.html").read_text()
    assert "connect-src 'self'" in html
    assert set(re.findall(r'(?:src|href)="([^"]+)"', html)) == {"page.js", "style.css", "data:,"}


def with_npm(folder, monkeypatch, script):
    """A program `npm` in place of the real one."""
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_without_npm_or_network_a_line_says_what_to_do(artifacts, tmp_path, monkeypatch, refused):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    words = ("package", artifacts["onnxruntime", "fp32"].path, "--for", "web", "-o", tmp_path / "package")
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        line = refused(3, *words)
        assert (
            f"{WEB.package}@{WEB.version} is not here, and npm, which downloads it, is missing: apt-get install npm"
            in line
        )
    with_npm(tmp_path / "bin", monkeypatch, "echo npm error network is unreachable >&2; exit 1")
    assert "npm cannot download" in (line := refused(3, *words))
    assert "network is unreachable" in line
    assert not (tmp_path / "package").exists()


def test_files_of_another_version_are_refused(artifacts, tmp_path, monkeypatch, refused):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name in WEB.files:
        (tmp_path / "package" / "dist" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "package" / "dist" / name).write_text("another version")
    with_npm(tmp_path / "bin", monkeypatch, f'tar -czf "${{6#*=}}/x.tgz" -C {tmp_path} package')
    words = ("package", artifacts["onnxruntime", "fp32"].path, "--for", "web", "-o", tmp_path / "out")
    assert "npm downloads other files" in refused(3, *words)
    assert list((tmp_path / "cache").rglob("*.mjs")) == []
    shutil.copytree(tmp_path / "package", tmp_path / "node_modules" / WEB.package)
    assert "npm downloads other files" in refused(3, *words), "a node_modules of another version is not used"


def test_a_node_modules_beside_or_above_is_used(tmp_path, monkeypatch):
    dist = tmp_path / "node_modules" / WEB.package / "dist"
    dist.mkdir(parents=True)
    digests = {}
    for name in WEB.files:
        (dist / name).write_text(name)
        digests[name] = artifacts_on_disk.sha256_file(dist / name)
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    monkeypatch.setenv("PATH", "")
    assert npm.folder_of(type(WEB)(WEB.package, WEB.version, digests, WEB.precisions)) == dist


def test_what_npm_downloads_is_kept_without_the_rest_of_its_package(runtime, monkeypatch):
    assert {path.name for path in runtime.iterdir()} == set(WEB.files)
    monkeypatch.setenv("PATH", "")
    assert npm.folder_of(WEB) == runtime
