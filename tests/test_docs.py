"""The documents tell the truth: commands run, and generated parts are what would be generated now."""

import re
import shlex
import shutil

import msgspec
import pytest
import torch
from msgspec.structs import replace
from PIL import Image

from benchmarks import docs, provenance
from exporter.bench import Plan, latency
from exporter.build import tune
from exporter.build.int8 import speed
from exporter.data.synthetic import dead_leaves
from exporter.model import hub, variants
from exporter.model.levels import Pyramid
from exporter.optimize import search
from tests.conftest import ROOT, tiny_architecture, tiny_state, type_command, write_tiny

README = (ROOT / "README.md").read_text()
BASE = variants.VARIANTS["base"]
PAGES = (
    "bisect",
    "cluster",
    "detection",
    "export",
    "gate",
    "inputs",
    "int8",
    "json",
    "measure",
    "multilabel",
    "new-runtime",
    "openvino",
    "optimize",
    "outputs",
    "package",
    "predict",
    "quickstart",
    "recipes",
    "segmentation",
    "tensorrt",
    "verify",
)  # with commands
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PICTURES = tuple(f"docs/pictures/{name}.svg" for name in ("optimize", "rivals", "rivals-sizes"))


def commands(text):
    """The lines of the console blocks of a document."""
    blocks = re.findall(r"```console\n(.*?)```", text, flags=re.S)
    return [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines()]


COMMANDS = commands(README)


def test_there_are_commands_to_run():
    everything = [line for path in TEXTS for line in commands(path.read_text())]
    assert sum(line.startswith("convnext-export") for line in COMMANDS) == 3
    assert sum(line.startswith("convnext-export") for line in everything) >= 70
    assert {"make demo", "make test", "make install"} <= set(COMMANDS)


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder as the README's reader has it: a checkpoint, photographs, and the Hub within reach."""
    write_tiny(tmp_path / "hub")
    write_tiny(tmp_path / "own")
    (tmp_path / "desk" / "photos").mkdir(parents=True)
    (tmp_path / "own" / "model.safetensors").rename(tmp_path / "desk" / "my_convnext.safetensors")
    for index in range(30):
        folder = tmp_path / "desk" / "photos" / ("train" if index >= 10 else "val") / str(index % 10)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(dead_leaves(80, index)).save(folder / f"photo{index}.jpg")
    lines = [f"photos/val/{label}/photo{label}.jpg,{label}|{(label + 3) % 10}" for label in range(10)]
    (tmp_path / "desk" / "scans.csv").write_text("\n".join(["path,label", *lines]))
    base = msgspec.structs.replace(variants.VARIANTS["base"], architecture=tiny_architecture())
    monkeypatch.setitem(variants.VARIANTS, "base", base)
    monkeypatch.setattr(hub, "download", lambda repository: tmp_path / "hub")
    monkeypatch.setattr(tune, "SECONDS", 0.5)
    monkeypatch.setattr(speed, "SECONDS_EACH", 0.3)
    bench = latency.bench  # for a second instead of ten: that the command runs, not how fast the model is
    monkeypatch.setattr(latency, "bench", lambda made, options, *rest: bench(made, replace(options, duration=1), *rest))
    monkeypatch.setattr(search, "Plan", lambda **facts: Plan(**{**facts, "seconds": 0.2}))
    monkeypatch.chdir(tmp_path / "desk")
    return tmp_path / "desk"


def write_upernet(desk):
    """A UPerNet of ten classes on a tiny ConvNeXt, and images with masks that number these from 1."""
    levels = (2, 3)  # two are traced in less time than four
    decoder = variants.Decoder(classes=10, width=16, levels=levels, scales=(1, 2, 3, 6))
    write_tiny(desk / "upernet_folder", head_norm=False, stage_norms=levels, decoder=decoder)
    for index in range(4):
        for folder, suffix in (("images", "jpg"), ("annotations", "png")):
            path = desk / "ade20k" / folder / "validation" / f"{index}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = dead_leaves(80, index)
            Image.fromarray(pixels if folder == "images" else pixels[..., 0] // 24).save(path)


def write_detector(desk):
    """A checkpoint as mmdet writes it: a tiny ConvNeXt with an FPN, and the head of an RPN."""
    pyramid = Pyramid(width=8, stages=(0, 1, 2, 3), outputs=5)
    state = tiny_state(head_norm=False, stage_norms=(0, 1, 2, 3), pyramid=pyramid)
    names = {key: key if key.startswith("neck.") else f"backbone.{key}" for key in state}
    names = {key: re.sub(r"\.stage_norms\.", ".norm", name) for key, name in names.items()}
    state = {re.sub(r"(convs\.\d)\.", r"\1.conv.", names[key]): tensor for key, tensor in state.items()}
    state["rpn_head.rpn_conv.weight"] = state["neck.fpn_convs.0.conv.weight"]
    torch.save({"meta": {"CLASSES": ("person", "bicycle")}, "state_dict": state}, desk / "mask_rcnn.pth")


def type_in(desk, run, lines):
    """Type commands in order, as a reader does."""
    for line in lines:
        words = shlex.split(line.replace("--calib-size 256", "--calib-size 20"))[1:]  # as many as there are
        if words[0] == "compare":  # with what was built before
            shutil.copytree(desk / "build", desk / "baseline", dirs_exist_ok=True)
        words, file = (words[:-2], words[-1]) if ">" in words else (words, None)
        result = run(*words)
        if file:
            (desk / file).write_text(result.out)
        if "--for web" in line and result.code == 3 and "npm" in result.err:
            continue  # there is no network
        assert result.code == 0, f"{line}\n{result.err}"
        assert result.out, line


def check_files(desk):
    """Commands write to the folders that they name, and leave no temporary file."""
    written = {path.relative_to(desk).as_posix() for path in desk.rglob("*") if path.is_file()}
    unexpected = {
        name
        for name in written
        if not name.startswith(("build/", "photos/", "baseline/"))
        and name not in ("my_convnext.safetensors", "my_convnext.yaml", "scans.csv")
    }
    assert not unexpected, "a command wrote outside its output folder"
    assert not [name for name in written if "/." in name], "a temporary file was left"


def put_atto(monkeypatch):
    """Let the checkpoint of the desk be an atto."""
    atto = replace(variants.VARIANTS["atto"], architecture=tiny_architecture())
    monkeypatch.setitem(variants.VARIANTS, "atto", atto)


@pytest.mark.slow
def test_every_command_of_the_readme_runs(desk, run, monkeypatch):
    put_atto(monkeypatch)
    type_in(desk, run, [line for line in COMMANDS if line.startswith("convnext-export")])
    check_files(desk)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_the_docs_runs(page, desk, run, monkeypatch):
    if page in ("segmentation", "detection"):
        tiny = replace(variants.VARIANTS["tiny"], architecture=tiny_architecture())
        monkeypatch.setitem(variants.VARIANTS, "tiny", tiny)
        write_upernet(desk) if page == "segmentation" else write_detector(desk)
    elif page in ("optimize", "export", "cluster"):  # PyTorch runs in processes that know no stand-ins
        monkeypatch.setitem(variants.VARIANTS, "base", BASE)
    elif page != "quickstart":
        put_atto(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(ROOT / "build"))  # has what npm downloaded for other tests
    typed = [line for line in commands((ROOT / "docs" / f"{page}.md").read_text()) if line.startswith("convnext")]
    assert len(typed) >= 2
    if page == "quickstart":  # the stand-in for base comes first, as the one for atto has the same shape
        own = next(index for index, line in enumerate(typed) if "my_convnext" in line)
        type_in(desk, run, typed[:own])
        typed = typed[own:]
        monkeypatch.setitem(variants.VARIANTS, "base", BASE)
        put_atto(monkeypatch)
    if page == "cluster":
        typed = [line.replace("atto_", "custom_") for line in typed]
    type_in(desk, run, typed)
    if page in ("quickstart", "export", "recipes", "gate", "measure", "verify"):
        check_files(desk)


def test_the_pages_with_commands_are_known():
    with_commands = {path.stem for path in (ROOT / "docs").glob("*.md") if "\nconvnext-export " in path.read_text()}
    assert with_commands - {"cli"} == set(PAGES)


def test_make_has_every_target_that_is_named():
    makefile = (ROOT / "Makefile").read_text()
    named = {
        target for path in TEXTS for target in re.findall(r"`make ([a-z-]+)|^make ([a-z-]+)", path.read_text(), re.M)
    }
    for target in {first or second for first, second in named}:
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


def test_the_help_in_the_docs_is_the_programs():
    assert (ROOT / "docs" / "cli.md").read_text() == docs.cli_help(), "run `make docs`"


def test_the_page_of_results_is_that_of_the_files():
    assert (ROOT / "docs" / "results.md").read_text() == provenance.page(), "run `make docs`"


def test_every_result_records_its_commit():
    without = [path.name for path in provenance.results() if provenance.recorded_commit(path) is None]
    assert without == []


MEASURED = re.compile(
    r"\d (ms|µs|seconds|images/s|GFLOP/s)\b|\d(\.\d+)? ×(?! ?\d)|\d(\.\d+)? % (agreement|faster|slower)"
)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_measured_figures_stand_in_generated_tables_only(path):
    """Elsewhere nothing would notice that they are out of date."""
    text = re.sub(r"<!-- ([\w-]+) -->.*?<!-- /\1 -->", "", path.read_text(), flags=re.S)
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    assert [line for line in text.splitlines() if MEASURED.search(line)] == []


@pytest.mark.parametrize("name", docs.DOCUMENTS)
def test_the_tables_in_the_documents_are_those_of_the_results(name):
    text = (ROOT / name).read_text()
    assert docs.filled(text) == text, "run `make docs`"


def test_the_pictures_are_known():
    assert set(docs.pictures()) == set(PICTURES)


@pytest.mark.parametrize("name", PICTURES)
def test_the_pictures_in_the_documents_are_those_of_the_results(name):
    assert (ROOT / name).read_text() == docs.pictures()[name], "run `make docs`"
    texts = [README, *((ROOT / page).read_text() for page in docs.DOCUMENTS)]
    assert any(f"({path})" in text for text in texts for path in (name, name.removeprefix("docs/")))


def test_every_table_stands_in_a_document():
    texts = "".join((ROOT / name).read_text() for name in docs.DOCUMENTS)
    for mark, content in docs.tables().items():
        assert f"<!-- {mark} -->" in texts
        assert content in texts


def test_the_map_names_every_folder():
    modules = (ROOT / "CONTRIBUTING.md").read_text()
    for folder in (path for path in (ROOT / "exporter").iterdir() if path.is_dir() and path.name != "__pycache__"):
        assert f"`exporter/{folder.name}/`" in modules


@pytest.mark.slow
def test_the_demo_makes_what_the_readme_shows(tmp_path, monkeypatch):
    """The same functions on two epochs: that the pieces fit, not how well it learns."""
    pytest.importorskip("sklearn")
    from benchmarks import demo, digits

    monkeypatch.chdir(tmp_path)
    digits.prepare(tmp_path, epochs=2)
    assert len(list((tmp_path / "val").glob("*/*.png"))) == digits.HELD_OUT
    assert type_command("onnx", "--weights", tmp_path / "model", "-o", tmp_path / "out").code == 0
    result = type_command("verify", tmp_path / "out" / "custom_fp32.onnx", "--data", tmp_path / "val", "--json")
    assert result.code == 0
    top1 = next(f["value"] for f in result.json["findings"] if f["metric"] == "top1")
    assert top1 > 50, "two epochs are enough for half of them"
    whole = ("--calib", tmp_path / "train", "--data", tmp_path / "val")
    monkeypatch.setattr(speed, "SECONDS_EACH", 0.3)
    for verb in ("onnx", "openvino"):
        result = type_command(verb, "--int8", "--weights", tmp_path / "model", *whole, "-o", tmp_path / "out", "--json")
        assert result.code == 0, "half a point of real top-1 is the budget"
        assert result.json["artifact"]["quantization"]["images"] == 256
    assert [demo.artifact(words).name for words in demo.builds()][:2] == ["custom_fp32.onnx", "custom_fp16.onnx"]
