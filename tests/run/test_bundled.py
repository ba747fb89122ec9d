"""Every recipe that ships, on a small network that stands in for the one it names."""

import pytest

from exporter import run as running
from exporter.build.resolve import resolve
from exporter.recipe import bundled

pytestmark = pytest.mark.slow
NAMES = sorted(bundled.recipes())
VARIANTS = ("tiny", "small", "base", "large", "v2_tiny", "v2_base")


def test_all_of_them_are_found():
    assert set(NAMES) == {
        f"{backend}/{variant}{task}_{precision}"
        for backend in ("onnxruntime", "openvino", "tensorrt")
        for variant in VARIANTS
        for task in ("", "_features")
        for precision in ("fp16", "int8")
    }


@pytest.mark.parametrize("name", NAMES)
def test_it_is_that_of_tiny_but_for_its_variant(name):
    variant = max((variant for variant in VARIANTS if f"/{variant}_" in name), key=len)
    text = bundled.find_recipe(name).read_text()
    tiny = bundled.find_recipe(name.replace(f"/{variant}_", "/tiny_")).read_text()
    assert text == tiny.replace("/tiny_", f"/{variant}_").replace("variant: tiny\n", f"variant: {variant}\n")


@pytest.mark.parametrize("name", [f"onnxruntime/{name}_fp16" for name in VARIANTS if not name.endswith("tiny")])
def test_its_weights_are_recognised(name, stand_ins, tmp_path):
    (job,) = running.read_all([bundled.find_recipe(name)], tmp_path / "out", ["bench=null"])
    assert resolve(job.recipe, job.out).sidecar.variant == job.recipe.model.variant


@pytest.mark.parametrize("name", [name for name in NAMES if "/v2_tiny_" in name or "/tiny_fp16" in name])
def test_it_runs(name, stand_ins, tmp_path):
    """Built and verified; timed it is elsewhere. The others' recipes are the same."""
    overrides = ["bench=null"] + (["quantization.calib_size=4"] if name.endswith("int8") else [])
    (job,) = running.read_all([bundled.find_recipe(name)], tmp_path / "out", overrides)
    outcome = running.run(job)
    assert outcome.artifact.path.name.startswith(f"{job.path.stem}.")
    assert outcome.steps == {"build": "done", "verify": "done", "bench": "not asked for"}
    assert outcome.report.value("cosine") > 0.99
    assert outcome.artifact.sidecar.variant == job.recipe.model.variant


def test_the_list_names_each(run):
    result = run("recipes")
    assert result.code == 0
    assert all(name in result.out for name in NAMES)
    assert len(run("recipes", "--json").json) == len(NAMES)
    assert run("recipes", "--schema").json["title"] == "convnext-export recipe"
