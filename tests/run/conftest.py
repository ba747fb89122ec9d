"""A recipe of the tiny model, and what ships on stand-ins of the published networks."""

import msgspec
import pytest

from exporter.build.int8 import speed
from exporter.model import hub, variants
from tests.conftest import tiny_architecture, write_tiny

# Each another shape, so that every one is recognised as itself.
SHAPES = {
    "tiny": (16, 24, 32, 48),
    "small": (16, 24, 32, 40),
    "base": (16, 24, 32, 56),
    "large": (16, 24, 40, 48),
    "v2_tiny": (16, 24, 32, 48),
    "v2_base": (16, 24, 32, 40),
}
ONE_EACH = (1, 1, 1, 1)


@pytest.fixture
def recipe(tmp_path, tiny, monkeypatch):
    """Writes a recipe beside a checkpoint, and gives its path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(speed, "SECONDS_EACH", 0.3)

    def write(backend="onnxruntime", precision="fp16", name="my", more=""):
        path = tmp_path / f"{name}.yaml"
        path.write_text(
            f"backend: {backend}\nprecision: {precision}\nmodel: {{weights: {tiny}}}\n{more or 'bench: null'}\n"
        )
        return path

    return write


@pytest.fixture(scope="session")
def small_networks(tmp_path_factory):
    """Weights of small networks by the names of those they stand in for, and how these differ from the tiny one."""
    written = {}
    for name, dims in SHAPES.items():
        v2 = name.startswith("v2")
        differences = {"depths": ONE_EACH, "dims": dims, "grn": v2, "layer_scale": not v2}
        written[name] = write_tiny(tmp_path_factory.mktemp(name), **differences), differences
    return written


@pytest.fixture
def stand_ins(small_networks, monkeypatch):
    """The published networks are small ones, and the Hub has them."""
    known, folders = {}, {}
    for name, (folder, differences) in small_networks.items():
        variant = variants.VARIANTS[name]
        known[name] = msgspec.structs.replace(variant, architecture=tiny_architecture(**differences))
        folders[variant.hub] = folder
    monkeypatch.setattr(variants, "VARIANTS", known)
    monkeypatch.setattr(hub, "download", folders.__getitem__)
    monkeypatch.setattr(hub, "cached", folders.get)
    monkeypatch.setattr(speed, "baseline", lambda work, build, folder: None)  # what int8 gains is asked elsewhere
    return known
