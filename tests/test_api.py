"""The Python API does what the words do."""

import pytest

import exporter
from exporter.build import build
from exporter.recipe import Model, Recipe
from exporter.verify import VerifyOptions, verify


def test_build_and_verify_from_python(tiny, tmp_path):
    recipe = Recipe(backend="openvino", precision="fp16", model=Model(weights=str(tiny)))
    artifact = build(recipe, tmp_path).artifact
    report = verify(exporter.load(artifact.path), VerifyOptions(samples=4))
    assert isinstance(report, exporter.Report)
    assert report.passed


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = exporter.nothing


def test_a_recipe_with_an_unknown_key_is_an_error():
    with pytest.raises(TypeError, match="colour"):
        exporter.Recipe(colour="red")
