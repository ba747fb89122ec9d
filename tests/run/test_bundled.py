"""Every recipe that ships, on a small network that stands in for the one it names."""

import pytest

from exporter import run as running
from exporter.recipe import bundled

pytestmark = pytest.mark.slow
NAMES = sorted(bundled.recipes())


def test_all_of_them_are_found():
    variants = ("tiny", "small", "base", "large", "v2_tiny", "v2_base")
    assert set(NAMES) == {
        f"{backend}/{variant}{task}_{precision}"
        for backend in ("onnxruntime", "openvino", "tensorrt")
        for variant in variants
        for task in ("", "_features")
        for precision in ("fp16", "int8")
    }


@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name, stand_ins, tmp_path):
    """Built and verified; timed it is elsewhere."""
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
