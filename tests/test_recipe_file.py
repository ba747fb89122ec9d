"""Recipes as files: what is read, what is refused and where, and that what is saved is what was asked for."""

import json

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import recipes as shipped
from exporter import recipe_file
from exporter.build.int8 import Budget
from exporter.errors import BadRequest, ExporterError
from exporter.recipe import Recipe

GOOD = """\
schema: 1
backend: onnxruntime
precision: fp16
model:
  variant: tiny
  weights: weights/model.safetensors
export:
  imgsz: 224
  batch: 4
"""


@pytest.fixture
def read(tmp_path):
    def read(text, *overrides):
        path = tmp_path / "my.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return recipe_file.read(path, overrides)

    return read


@pytest.fixture
def problems(read, tmp_path):
    def problems(text, *overrides):
        with pytest.raises(BadRequest) as caught:
            read(text, *overrides)
        return [line.strip().replace(f"{tmp_path}/", "") for line in str(caught.value).splitlines()]

    return problems


def test_paths_are_relative_to_the_file_and_those_of_an_override_to_the_working_folder(read, tmp_path):
    assert read(GOOD).model.weights == str(tmp_path / "weights" / "model.safetensors")
    assert read(GOOD, "model.weights=mine.pt").model.weights == "mine.pt"
    assert read(GOOD.replace("weights/model.safetensors", "hf-hub:timm/x")).model.weights == "hf-hub:timm/x"


def test_what_is_not_said_is_the_default_of_the_command_line(read):
    made = read("backend: openvino\nprecision: fp32\n")
    assert made.recipe() == Recipe(backend="openvino")
    assert made.bench_options().batch == (1,)
    assert read(GOOD).bench_options().batch == (4,)
    assert read(GOOD + "bench: null\n").bench_options() is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (GOOD + "export2: 1\n", "my.yaml:10:1: unknown key 'export2'; did you mean 'export'?"),
        (GOOD + "checks:\n  min_cosin: 1\n", "my.yaml:11:3: unknown key 'min_cosin' in checks; did you mean"),
        (GOOD.replace("batch: 4", "batch: four"), "my.yaml:9:10: export.batch: expected a whole number or dynamic"),
        (GOOD.replace("fp16", "fp61"), "my.yaml:3:1: onnxruntime cannot run fp61; did you mean 'fp16'?"),
        (GOOD.replace("onnxruntime", "onnxruntme"), "my.yaml:2:1: backend 'onnxruntme': did you mean 'onnxruntime'?"),
        (GOOD.replace("onnxruntime", "eager"), "my.yaml:2:1: backend 'eager': known: onnxruntime, openvino, tensorrt"),
        (GOOD.replace("fp16", "int8"), "precision int8 needs calibration"),
        (GOOD + "quantization:\n  calib: synthetic\n", "my.yaml:10:1: quantization is for int8 and fp8, and prec"),
        (GOOD + "bench:\n  batch: [1, 4]\n", "my.yaml:11:3: batch 4 is all that is exported, and bench asks for"),
        (GOOD + "checks:\n  max_drop: 0.5\n", "my.yaml:11:3: max_drop: a drop is measured on labelled images"),
        (GOOD + "checks:\n  min_cosine: .nan\n", "my.yaml:11:15: checks.min_cosine: expected a number or null"),
        (GOOD + "checks:\n  min_cosine: 2\n", "my.yaml:11:3: min_cosine 2.0: expected a number from -1 to 1"),
        (GOOD + "target:\n  flavor: tensorrt\n", "my.yaml:11:3: unknown key 'flavor' in target; none is taken here"),
        (GOOD + "model:\n  variant: base\n", "my.yaml:10:1: model stands here twice"),
        (GOOD.replace("tiny", "tinny"), "my.yaml:5:3: unknown variant 'tinny'; did you mean 'tiny'?"),
        (GOOD + "  opset: 12\n", "my.yaml:10:3: opset 12: expected 18 to 23"),
        (GOOD + "  form: [plain]\n", "my.yaml:10:9: export.form: expected text or null, found ['plain']"),
        (GOOD + "bench:\n  duration: -1\n", "my.yaml:11:3: duration -1: expected a number from 0.5 to 86400"),
        (GOOD + "checks:\n  samples: 0\n", "my.yaml:11:3: samples 0: expected a number from 1"),
        ("backend: onnxruntime\n", "precision is missing; every recipe says its own"),
        ("- a\n", "my.yaml: expected sections and keys"),
        ("a: [1\n", "no YAML: expected ',' or ']'"),
        ("\x00", "my.yaml: no YAML: unacceptable character"),
        (b"\xff\xfe\x00\x00", "my.yaml: no text in UTF-8"),
        ("a: " + "[" * 60, "nested more than 16 deep"),
        ("# " + "x" * 70_000, "bytes is no recipe"),
        ("backend: &x onnxruntime\nprecision: *x\n", "my.yaml:1:10: anchors and aliases are not taken (&x)"),
        ("backend: !!python/object/apply:os.system ['id']\n", "the tag !!python/object/apply:os.system, and tags are"),
        (GOOD + "--- \na: 1\n", "no YAML: but found another document"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_place(text, told, problems):
    assert any(told in line for line in problems(text)), problems(text)


def test_all_is_told_at_once(problems):
    text = GOOD.replace("tiny", "tinny").replace("imgsz", "imgsize") + "  opset: 99\nchecks:\n  atol: -1\n"
    assert [line.split(": ")[0] for line in problems(text)] == [
        "my.yaml:5:3",
        "my.yaml:8:3",
        "my.yaml:10:3",
        "my.yaml:12:3",
    ]


def test_profiles_must_hold_the_batches_that_are_timed(problems):
    text = "backend: tensorrt\nprecision: fp16\ntarget:\n  profiles: [[1, 1, 4]]\nbench:\n  batch: [1, 8]\n"
    assert any("profiles [[1, 1, 4]] do not hold a batch of 8, which bench asks for" in line for line in problems(text))


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("export.opsat=18", "--set export.opsat=18: unknown key 'opsat' in export; did you mean 'opset'?"),
        ("export.opset=x", "--set export.opset=x: export.opset: expected a whole number, found 'x'"),
        ("export.opset", "--set export.opset: expected KEY=VALUE"),
        ("model.variant.x=1", "--set model.variant.x=1: model.variant: expected text or null, found keys with values"),
        ("export=!!python/name:os.system", "tags are not taken"),
        ("checks.min_cosine=3", "--set checks.min_cosine=3: min_cosine 3.0: expected a number from -1 to 1"),
    ],
)
def test_a_wrong_override_is_told_as_such(override, told, problems):
    assert any(told in line for line in problems(GOOD, override)), problems(GOOD, override)


def test_overrides_replace_and_add(read):
    made = read(GOOD, "precision=int8", "quantization.calib=synthetic", "bench.batch=[4]", "export.batch=4")
    assert (made.precision, made.quantization.calib, made.bench.batch) == ("int8", "synthetic", (4,))
    assert read(GOOD, "bench=null").bench is None
    assert read(GOOD, "checks.atol=1e-3").checks.atol == 0.001


WORDS = st.sampled_from(
    ["hub", "random:3", "a.safetensors#model_ema", "/srv/weights.pt", "no", "1.0", "null", "ünï cödé"]
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(weights=WORDS, batch=st.sampled_from(["dynamic", 3]), imgsz=st.sampled_from([None, "dynamic", 96]),
       precision=st.sampled_from(["fp32", "fp16", "int8"]), capability=st.lists(st.sampled_from(["8.9", "12.0"])),
       size=st.none() | st.integers(1, 9))  # fmt: skip
def test_what_is_saved_is_read_again(weights, batch, imgsz, precision, capability, size, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target = {"compute_capability": capability, "flavor": "tensorrt-rtx"} if capability else {}
    if precision == "int8":
        target["tf32"] = True
    told = {"calib_size": size, "calib": "images"} if precision == "int8" else {}
    recipe = Recipe(backend="tensorrt", weights=weights, batch=batch, imgsz=imgsz, precision=precision,
                    target=target, **told)  # fmt: skip
    budget = Budget(max_drop=0.3, data="val") if precision == "int8" and not weights.startswith("random") else Budget()
    asked = recipe_file.of(recipe, budget)
    text = recipe_file.write(asked, tmp_path / "deeper" / "my.yaml")
    assert len(text.splitlines()) <= 30
    (tmp_path / "deeper").mkdir(exist_ok=True)
    (tmp_path / "deeper" / "my.yaml").write_bytes(text)
    here = recipe_file.read(tmp_path / "deeper" / "my.yaml")
    assert msgspec.json.encode(here).replace(f"{tmp_path}/".encode(), b"") == msgspec.json.encode(asked)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text() | st.binary() | st.builds(lambda a, b: GOOD[:a] + b + GOOD[a:], st.integers(0, 150), st.text()))
def test_no_file_brings_it_down(text, tmp_path):
    (tmp_path / "any.yaml").write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    try:
        recipe_file.read(tmp_path / "any.yaml")
    except ExporterError as error:
        assert str(error)


def test_what_ships_is_what_would_be_written_now():
    folder = {str(path.relative_to(shipped.FOLDER)): path.read_bytes() for path in shipped.FOLDER.rglob("*.*")}
    assert folder == shipped.files(), "run `make docs`"


def test_every_shipped_recipe_is_sound_and_short():
    paths = sorted(shipped.FOLDER.glob("*/*.yaml"))
    assert len(paths) == 6 * 3 * 2 * 2
    for path in paths:
        made = recipe_file.read(path)
        assert len(path.read_text().splitlines()) <= 30
        assert path.parent.name == made.backend
        assert path.stem == "_".join(
            [made.model.variant, *([] if made.model.task == "classify" else ["features"]), made.precision]
        )


def test_the_schema_knows_every_key_and_the_keys_of_each_target():
    schema = json.loads((shipped.FOLDER / shipped.SCHEMA).read_text())
    assert set(schema["properties"]) == set(recipe_file.RecipeFile.__struct_fields__)
    assert schema["additionalProperties"] is False
    named = {
        rule["if"]["properties"]["backend"]["const"]: rule["then"]["properties"]["target"]["$ref"]
        for rule in schema["allOf"]
    }
    assert set(named) == set(schema["properties"]["backend"]["enum"])
    assert "profiles" in schema["$defs"][named["tensorrt"].rpartition("/")[2]]["properties"]
    assert schema["$defs"]["Export"]["properties"]["opset"]["type"] == "integer"
