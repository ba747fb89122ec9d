"""Our network gives the answers of the public implementations, for weights in their own layouts."""

import functools
import json
import math
import re
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from exporter.model import fit, weights
from exporter.model.layouts import to_ours
from exporter.model.shapes import architecture
from exporter.model.variants import named, resolve
from tests.conftest import SHARED

OWN = json.loads((Path(__file__).parent / "answers.json").read_text())
FILES = ["timm", "torchvision", "facebook", "transformers"]
LAYOUT = {"facebook": "facebookresearch", "transformers": "huggingface"}


def fill(key, shape):
    """The rule by which the reference answers were made."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    last = key.split(".")[-1]
    if "grn" in key:
        return 0.3 * noise
    if re.search("gamma|layer_scale|lambda", last):
        return 0.5 + 0.1 * noise
    if len(shape) >= 2:
        return noise / math.sqrt(math.prod(shape[1:]))
    return 0.05 * noise if last in ("bias", "beta") else 1 + 0.1 * noise


@functools.cache
def parity(source):
    content = json.loads((SHARED / "parity" / f"{source}.json").read_text())
    return content.get("models", content)


def cases(with_answers):
    if not SHARED.exists():
        return [pytest.param("", "", marks=pytest.mark.skip(reason="needs ../shared/parity, which only CI has"))]
    models = [(source, name) for source in FILES for name in parity(source)]
    return [(source, name) for source, name in models if ("logits" in parity(source)[name]) == with_answers]


def check_answers(source, name, reference, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({key: fill(key, shape) for key, shape in reference["keys"].items()}, path)
    found = weights.load(str(path), name.partition("@")[0])
    assert found.weights.layout == LAYOUT.get(source, source)
    px = reference["px"]
    images = torch.randn(2, 3, px, px, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = found.model()(images)
    expected = torch.tensor(reference["logits"])
    assert ((logits[:, :8] - expected).abs().max() / reference["std"]).item() <= 2e-4
    assert logits.norm(dim=1).tolist() == pytest.approx(reference["norm"], rel=1e-4)


@pytest.mark.parametrize(("source", "name"), [(s, n) for s in OWN for n in OWN[s]])
def test_answers_that_travel_with_the_product(source, name, tmp_path):
    check_answers(source, name, OWN[source][name], tmp_path)


@pytest.mark.parametrize(("source", "name"), cases(with_answers=True))
def test_answers_of_every_public_implementation(source, name, tmp_path):
    check_answers(source, name, parity(source)[name], tmp_path)


@pytest.mark.parametrize(("source", "name"), cases(with_answers=False))
def test_every_other_public_model_loads(source, name):
    reference = parity(source)[name]
    with torch.device("meta"):
        raw = {key: torch.empty(shape) for key, shape in reference["keys"].items()}
    converted = to_ours(raw)
    state = converted.state
    variant = named(architecture(state, converted.head))
    fit._check_keys(state, variant.architecture)
    assert converted.layout == LAYOUT.get(source, source)
    assert variant.name == resolve(name.partition("@")[0])[0].name
    assert len(state["head.weight"]) == int(name.partition("@")[2] or 1000)
    assert sum(tensor.numel() for tensor in state.values()) == reference["params"]
