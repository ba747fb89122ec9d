"""A recipe of the tiny model, and what ships on stand-ins of the published networks."""

import msgspec
import pytest

from exporter.int8 import gain
from exporter.model import hub, variants
from tests.conftest import tiny_architecture, write_tiny

# Each another shape, so that every one is recognised as itself.
STAND_INS = {
    "tiny": {}, "small": {"depths": (1, 1, 1, 1)}, "base": {"depths": (2, 1, 1, 1)}, "large": {"depths": (1, 2, 1, 1)},
    "v2_tiny": {"grn": True, "layer_scale": False}, "v2_base": {"grn": True, "layer_scale": False, "depths": (1, 1, 1, 1)},
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path, tiny, monkeypatch):
    """Writes a recipe beside a checkpoint, and gives its path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gain, "SECONDS_EACH", 0.3)

    def write(backend="onnxruntime", precision="fp16", name="my", more=""):
        path = tmp_path / f"{name}.yaml"
        path.write_text(f"backend: {backend}\nprecision: {precision}\nmodel: {{weights: {tiny}}}\n{more or 'bench: null'}\n")
        return path

    return write


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """The published networks are small ones, and the Hub has them."""
    known = {}
    for name, differences in STAND_INS.items():
        write_tiny(tmp_path / "hub" / name, **differences)
        variant = variants.VARIANTS[name]
        known[name] = msgspec.structs.replace(variant, architecture=tiny_architecture(**differences))
    folders = {variant.hub: tmp_path / "hub" / name for name, variant in known.items()}
    monkeypatch.setattr(variants, "VARIANTS", known)
    monkeypatch.setattr(hub, "download", folders.__getitem__)
    monkeypatch.setattr(hub, "cached", folders.get)
    monkeypatch.setattr(gain, "SECONDS_EACH", 0.3)
    return known
