"""The license of weights: read where they come from, kept beside and in the model file, noted when it limits use."""

import json
import shutil

import pytest

from exporter.model import hub, weights
from exporter.model.variants import VARIANTS
from exporter.progress import REPORTER, Silent
from tests.conftest import build

CARD = "---\ntags:\n- timm\nlicense: {}\n---\n# Model card\nlicense: mit\n"


@pytest.fixture
def on_the_hub(monkeypatch, tiny, tmp_path):
    """A repository in the Hub's cache, with a model card."""
    import huggingface_hub

    folder = tmp_path / "snapshot"
    shutil.copytree(tiny, folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(folder))
    return folder


@pytest.fixture
def notes():
    class Heard(Silent):
        def note(self, text):
            heard.append(text)

    heard = []
    token = REPORTER.set(Heard())
    yield heard
    REPORTER.reset(token)


@pytest.mark.parametrize(
    ("card", "license_id"),
    [
        (CARD.format("cc-by-nc-4.0"), "cc-by-nc-4.0"),
        (CARD.format('"Apache-2.0"'), "apache-2.0"),
        (CARD.format("cc-by-nc-4.0").replace("\n", "\r\n"), "cc-by-nc-4.0"),
        ("# Model card\n---\nlicense: mit\n---\n", None),
        ("---\ntags: [x]\n---\nlicense: mit\n", None),
        (CARD.format("[mit, other]"), None),
        (CARD.format("x" * 100), None),
        ("", None),
    ],
)
def test_the_license_is_that_of_the_header_of_the_model_card(card, license_id, tmp_path):
    (tmp_path / "README.md").write_bytes(card.encode())
    assert hub.license_in(tmp_path) == license_id


def test_a_folder_without_a_model_card_has_no_license(tmp_path):
    assert hub.license_in(tmp_path) is None


def test_the_model_card_is_believed_before_the_config_and_the_table(on_the_hub):
    tiny_v2 = VARIANTS["v2_tiny"].hub
    assert weights.load("hf-hub:someone/convnext").weights.license is None
    assert weights.load(f"hf-hub:{tiny_v2}").weights.license == "cc-by-nc-4.0"
    assert weights.load(f"hf-hub:{VARIANTS['tiny'].hub}").weights.license == "apache-2.0"
    config = json.loads((on_the_hub / "config.json").read_text())
    config["pretrained_cfg"]["license"] = "mit"
    (on_the_hub / "config.json").write_text(json.dumps(config))
    assert weights.load(f"hf-hub:{tiny_v2}").weights.license == "mit"
    (on_the_hub / "README.md").write_text(CARD.format("other"))
    assert weights.load(f"hf-hub:{tiny_v2}").weights.license == "other"


def test_the_license_of_a_files_own_folder_is_not_guessed(tiny, tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(tiny, folder)
    (folder / "README.md").write_text(CARD.format("cc-by-nc-4.0"))
    assert weights.load(str(folder)).weights.license is None
    assert weights.load("random:0").weights.license is None


def test_another_license_is_another_recipe(on_the_hub, monkeypatch):
    before = weights.fingerprint("hf-hub:someone/convnext")
    (on_the_hub / "README.md").write_text(CARD.format("mit"))
    assert weights.fingerprint("hf-hub:someone/convnext") != before


def test_the_license_is_in_the_sidecar_and_in_the_model_file(on_the_hub, tmp_path, run):
    import onnx

    from exporter.graph.files import PREFIX

    (on_the_hub / "README.md").write_text(CARD.format("cc-by-nc-4.0"))
    made = build("hf-hub:someone/convnext", tmp_path / "out")
    assert made.sidecar.weights.license == "cc-by-nc-4.0"
    metadata = {entry.key: entry.value for entry in onnx.load(made.path).metadata_props}
    assert json.loads(metadata[f"{PREFIX}weights"])["license"] == "cc-by-nc-4.0"
    assert "cc-by-nc-4.0 (of the weights)" in run("inspect", made.path).out


@pytest.mark.parametrize(
    ("license_id", "said"),
    [
        ("cc-by-nc-4.0", ["the weights someone/convnext have the license cc-by-nc-4.0: no commercial use"]),
        ("gpl-3.0", ["the weights someone/convnext have the license gpl-3.0: read it before you pass them on"]),
        ("apache-2.0", []),
        (None, []),
    ],
)
def test_a_license_that_limits_use_is_noted(license_id, said, on_the_hub, notes, tmp_path):
    if license_id:
        (on_the_hub / "README.md").write_text(CARD.format(license_id))
    build("hf-hub:someone/convnext", tmp_path / "out")
    assert [note for note in notes if "license" in note] == said


def test_a_build_command_says_the_license_once(on_the_hub, run, tmp_path):
    (on_the_hub / "README.md").write_text(CARD.format("cc-by-nc-4.0"))
    words = ["onnx", "--weights", "hf-hub:someone/convnext", "--fp16", "-o", tmp_path / "out"]
    result = run(*words)
    assert result.code == 0, result.err
    assert result.err.count("no commercial use") == 1


def test_every_default_checkpoint_has_a_license():
    assert {variant.license for variant in VARIANTS.values() if variant.hub is None} == {None}
    assert {v.license for v in VARIANTS.values() if v.hub and v.architecture.grn} == {"cc-by-nc-4.0"}
    assert {v.license for v in VARIANTS.values() if v.hub and not v.architecture.grn} == {"apache-2.0"}


def test_variants_says_the_license(run):
    rows = {row["name"]: row["license"] for row in run("variants", "--json").json}
    assert (rows["tiny"], rows["v2_tiny"], rows["isotropic_small"]) == ("apache-2.0", "cc-by-nc-4.0", None)
    line = next(line for line in run("variants").out.splitlines() if line.startswith("v2_tiny"))
    assert "cc-by-nc-4.0" in line
