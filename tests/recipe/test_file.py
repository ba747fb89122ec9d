"""Recipes as files: what is read, what is refused and where, and that what is saved is what was asked for."""

import json
from types import SimpleNamespace
from typing import Annotated, Literal, get_args, get_origin

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import recipes as bundled
from exporter import backends, build
from exporter.errors import BadRequest, ExporterError
from exporter.recipe import Bench, Checks, Export, Model, Quantization, Recipe, fields, file
from exporter.recipe.fields import bare, fields_of, fits, kinds

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
        return build.read(path, overrides)

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
    assert read("backend: openvino\nprecision: fp32\n") == Recipe(backend="openvino", precision="fp32")
    assert read(GOOD + "bench: null\n").bench is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (GOOD + "export2: 1\n", "my.yaml:10:1: unknown key 'export2'; did you mean 'export'?"),
        (GOOD + "checks:\n  min_cosin: 1\n", "my.yaml:11:3: unknown key 'min_cosin' in checks; did you mean"),
        (
            GOOD.replace("batch: 4", "batch: four"),
            "my.yaml:9:10: export.batch: expected a whole number from 1 to 1024 or dynamic",
        ),
        (GOOD.replace("fp16", "fp61"), "my.yaml:3:1: onnxruntime cannot run fp61; did you mean 'fp16'?"),
        (GOOD.replace("onnxruntime", "onxruntime"), "my.yaml:2:1: unknown backend 'onxruntime'; did you mean 'onnx"),
        (GOOD.replace("onnxruntime", "eager"), "my.yaml:2:1: nothing is built for backend 'eager'; known: null, onnx"),
        (GOOD.replace("fp16", "int8"), "precision int8 needs calibration"),
        (GOOD + "quantization:\n  calib: synthetic\n", "my.yaml:10:1: quantization is for int8 and fp8, and prec"),
        (
            GOOD + "bench:\n  batch: [1, 4]\n",
            "my.yaml:11:3: batch 1, 4: the artifact is exported for batch 4 alone",
        ),
        (GOOD + "checks:\n  max_drop: 0.5\n", "my.yaml:11:3: max_drop: a loss is measured on images with labels"),
        (
            GOOD + "checks:\n  min_cosine: .nan\n",
            "my.yaml:11:15: checks.min_cosine: expected a number from -1 to 1 or null",
        ),
        (
            GOOD + "checks:\n  min_cosine: 2\n",
            "my.yaml:11:15: checks.min_cosine: expected a number from -1 to 1 or null, found '2'",
        ),
        (GOOD + "target:\n  flavor: tensorrt\n", "my.yaml:11:3: unknown key 'flavor' in target; no key is known here"),
        (GOOD + "model:\n  variant: base\n", "my.yaml:10:1: model is given twice"),
        (GOOD.replace("tiny", "tinny"), "my.yaml:5:3: unknown variant 'tinny'; did you mean 'tiny'?"),
        (GOOD + "  opset: 12\n", "my.yaml:10:10: export.opset: expected a whole number from 13 to 23, found '12'"),
        (
            GOOD + "  form: [plain]\n",
            "my.yaml:10:9: export.form: expected plain, linear, conv, nchw, auto or null, found ['plain']",
        ),
        (
            GOOD + "bench:\n  duration: -1\n",
            "my.yaml:11:13: bench.duration: expected a number from 0.5 to 86400, found '-1'",
        ),
        (
            GOOD + "checks:\n  samples: 0\n",
            "my.yaml:11:12: checks.samples: expected a whole number from 1 or null, found '0'",
        ),
        ("backend: onnxruntime\n", "precision is missing; each recipe names its own"),
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
def test_problems_are_reported_with_their_place(text, told, problems):
    assert any(told in line for line in problems(text)), problems(text)


def test_all_is_told_at_once(problems):
    text = GOOD.replace("tiny", "tinny").replace("imgsz", "imgsize") + "  opset: 99\nchecks:\n  atol: -1\n"
    assert [line.split(": ")[0] for line in problems(text)] == [
        "my.yaml:5:3",
        "my.yaml:8:3",
        "my.yaml:10:10",
        "my.yaml:12:9",
    ]


def test_profiles_must_hold_the_batches_that_are_timed(problems):
    text = "backend: tensorrt\nprecision: fp16\ntarget:\n  profiles: [[1, 1, 4]]\nbench:\n  batch: [1, 8]\n"
    assert any("batch 8 of 'bench' is in none of the profiles [[1, 1, 4]]" in line for line in problems(text))


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("export.opsat=18", "--set export.opsat=18: unknown key 'opsat' in export; did you mean 'opset'?"),
        ("export.opset=x", "--set export.opset=x: export.opset: expected a whole number from 13 to 23, found 'x'"),
        ("export.opset", "--set export.opset: expected KEY=VALUE"),
        ("model.variant.x=1", "--set model.variant.x=1: model.variant: expected text or null, found keys with values"),
        ("export=!!python/name:os.system", "tags are not taken"),
        (
            "checks.min_cosine=3",
            "--set checks.min_cosine=3: checks.min_cosine: expected a number from -1 to 1 or null, found '3'",
        ),
    ],
)
def test_a_wrong_override_is_told_as_such(override, told, problems):
    assert any(told in line for line in problems(GOOD, override)), problems(GOOD, override)


def test_a_value_of_an_override_may_have_a_number_sign(read):
    assert read(GOOD, "checks.data=photos #2").checks.data.endswith("photos #2")
    assert read(GOOD, "checks.data=#2 📷").checks.data.endswith("#2 📷")
    assert read(GOOD, "checks.data='photos' # a comment").checks.data.endswith("photos")


@pytest.mark.parametrize("text", ["[320, 256]", "320,256", "320, 256", "'320,256'"])
def test_a_size_has_one_or_two_sides(text, read):
    assert read(GOOD.replace("imgsz: 224", f"imgsz: {text}")).export.imgsz == (320, 256)
    assert read(GOOD, "export.imgsz=320,256").export.imgsz == (320, 256)
    assert read(GOOD, "export.imgsz=[224, 224]").export.imgsz == 224


@pytest.mark.parametrize("text", ["[320]", "[320, 256, 3]", "[320, 16]", "320x256", "320,,256", "320,a"])
def test_other_sizes_are_refused(text, problems):
    (problem,) = problems(GOOD.replace("imgsz: 224", f"imgsz: {text}"))
    assert "export.imgsz: expected a whole number from 32 to 4096, two of these (height, width)" in problem


def test_overrides_replace_and_add(read):
    made = read(GOOD, "precision=int8", "quantization.calib=synthetic", "bench.batch=[4]", "export.batch=4")
    assert (made.precision, made.quantization.calib, made.bench.batch) == ("int8", "synthetic", (4,))
    assert read(GOOD, "bench=null").bench is None
    assert read(GOOD, "checks.atol=1e-3").checks.atol == 0.001


TEXTS = [
    "", "hub", "random:3", "a.safetensors#model_ema", "/srv/weights.pt", "timm", "no", "1.0", "null", "ünï cödé", "a b",
    "classify", "features,embed",
]  # fmt: skip
NUMBERS = [0, 1, 2, 3, 4.5, 10, 18, 20, 32, 64, 100, 0.0, 0.05, 0.5, 1.0, -1.0, 1e-7]


def values(field):
    """Any value of a field's type, falsy ones included."""
    choices = []
    for kind in kinds(field.hint):
        base = bare(kind)
        if base is str:
            choices.append(st.sampled_from([text for text in TEXTS if fits(text, kind)]))
        elif base in (int, float):
            choices.append(st.sampled_from([number for number in map(base, NUMBERS) if fits(number, kind)]))
        elif base is bool:
            choices.append(st.booleans())
        elif kind is type(None):
            choices.append(st.none())
        elif get_origin(base) is Literal:
            choices.append(st.sampled_from(get_args(base)))
        elif fields.is_pair(kind):
            choices.append(st.tuples(*[items(get_args(base)[0])] * 2).filter(lambda sides: len(set(sides)) == 2))
        elif base is tuple or get_origin(base) is tuple:
            choices.append(
                st.lists(items(get_args(kind if get_origin(kind) is tuple else base)[0]), max_size=3).map(tuple)
            )
        else:
            raise AssertionError(f"{field.name}: {kind} is not drawn")
    return st.one_of(choices)


def items(kind):
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return st.builds(kind, *[st.integers(1, 9)] * len(kind.__struct_fields__))
    return values(SimpleNamespace(name="item", hint=kind))


def sections(kind):
    return st.builds(kind, **{name: values(field) for name, field in fields_of(kind).items()})


def differing(record):
    return fields.differing(record, type(record)())


@st.composite
def recipes(draw):
    backend = draw(st.sampled_from(backends.targets()))
    target = backends.target(backend)
    return Recipe(
        backend=backend,
        precision=draw(st.sampled_from(sorted(target.precisions))),
        model=draw(sections(Model)),
        export=draw(sections(Export)),
        quantization=draw(st.none() | sections(Quantization)),
        target=differing(draw(sections(target.options))),
        checks=draw(sections(Checks)),
        bench=draw(st.none() | sections(Bench)),
    )


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(recipe=recipes())
def test_every_field_survives_being_written_and_read(recipe, tmp_path, monkeypatch):
    """0, "", False and null included."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "deeper" / "my.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(file.write(recipe, path, backends.target(recipe.backend).options))
    again, marks = file.read(path, (), build.target_options)
    assert marks.problems == []
    assert msgspec.json.encode(again).replace(f"{tmp_path}/".encode(), b"") == msgspec.json.encode(recipe)


def test_a_falsy_option_of_the_command_line_survives(run, tmp_path):
    words = ("--opt-level", 0, "--calib-seed", 0, "--smoothing", 0, "--no-simplify", "--int8", "--max-batch", 4)
    path = tmp_path / "my.yaml"
    done = run("trt", "--weights", "random:0", *words, "--save-config", path, "--dry-run")
    assert done.code == 0, done.err
    recipe = build.read(path)
    assert recipe.target == {"opt_level": 0, "profiles": [[1, 1, 4]]}
    assert (recipe.quantization.smoothing, recipe.export.simplify) == (0, False)
    assert len(path.read_text().splitlines()) <= 30


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text() | st.binary() | st.builds(lambda a, b: GOOD[:a] + b + GOOD[a:], st.integers(0, 150), st.text()))
def test_no_file_brings_it_down(text, tmp_path):
    (tmp_path / "any.yaml").write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    try:
        build.read(tmp_path / "any.yaml")
    except ExporterError as error:
        assert str(error)


def test_what_ships_is_what_would_be_written_now():
    folder = {str(path.relative_to(bundled.FOLDER)): path.read_bytes() for path in bundled.FOLDER.rglob("*.*")}
    assert folder == bundled.files(), "run `make docs`"


def test_every_shipped_recipe_is_sound_and_short():
    paths = sorted(bundled.FOLDER.glob("*/*.yaml"))
    assert len(paths) == 6 * 3 * 2 * 2
    for path in paths:
        made = build.read(path)
        assert len(path.read_text().splitlines()) <= 30
        assert path.parent.name == made.backend
        assert path.stem == "_".join(
            [made.model.variant, *([] if made.model.task == "classify" else ["features"]), made.precision]
        )


def test_the_schema_knows_every_key_and_the_keys_of_each_target():
    schema = json.loads((bundled.FOLDER / bundled.SCHEMA).read_text())
    assert set(schema["properties"]) == set(Recipe.__struct_fields__)
    assert schema["additionalProperties"] is False
    named = {
        word: rule["then"]["properties"]["target"]["$ref"]
        for rule in schema["allOf"]
        for word in rule["if"]["properties"]["backend"]["enum"]
    }
    assert set(named) == set(schema["properties"]["backend"]["enum"])
    assert "profiles" in schema["$defs"][named["tensorrt"].rpartition("/")[2]]["properties"]
    assert schema["$defs"]["Export"]["properties"]["opset"]["type"] == "integer"


@pytest.mark.parametrize(
    ("hint", "inside", "outside"),
    [
        (Annotated[float, msgspec.Meta(gt=0, le=1)], (0.1, 1), (0.0, 1.1)),
        (Annotated[int, msgspec.Meta(ge=1)] | Literal["dynamic"] | None, (1, "dynamic", None), (0,)),
        (Annotated[float, msgspec.Meta(gt=0, lt=1)], (0.5,), (0.0, 1.0)),
        (tuple[Annotated[float, msgspec.Meta(gt=0)], ...], ([1.0], []), ([1.0, 0.0],)),
    ],
)
def test_bounds_hold_where_msgspec_forgets_them(hint, inside, outside, monkeypatch):
    monkeypatch.setattr(fields.msgspec, "convert", lambda value, hint: tuple(value) if type(value) is list else value)
    assert all(fits(value, hint) for value in inside)
    assert not any(fits(value, hint) for value in outside)
