"""Sizes of one or two sides, and any number of channels, in the record of preprocessing."""

import msgspec
import pytest

from exporter.artifact.sidecar import Preprocessing, size_text
from exporter.errors import BadRequest


def decoded(text):
    return msgspec.json.decode(text, type=Preprocessing)


def test_equal_sides_are_one_number():
    square = Preprocessing(size=(64, 64), resize=(72, 72))
    assert square == Preprocessing(size=64, resize=72)
    assert b'"size":64,"resize":72' in msgspec.json.encode(square)
    assert decoded(b'{"size":[64,64],"resize":72}') == square


def test_two_sides_survive_being_written():
    recipe = Preprocessing(size=(320, 256), resize=(365, 292))
    assert decoded(msgspec.json.encode(recipe)) == recipe
    assert (recipe.height, recipe.width, recipe.shape) == (320, 256, (3, 320, 256))
    assert [size_text(size) for size in (recipe.size, 224)] == ["320×256", "224"]


@pytest.mark.parametrize(
    ("published", "size", "resize"),
    [((224, 256), 112, 128), ((224, 256), (224, 112), (256, 128)), (((64, 32), (72, 40)), (128, 64), (144, 80))],
)
def test_another_size_keeps_the_ratio_of_crop_to_resize(published, size, resize):
    recipe = Preprocessing(size=published[0], resize=published[1]).at(size)
    assert (recipe.size, recipe.resize) == (size, resize)


def test_colours_follow_from_the_channels():
    assert [Preprocessing(mean=(0.5,) * n, std=(1,) * n).color for n in (1, 2, 3, 4, 12)] == [
        "L", "bands", "RGB", "RGBA", "bands",
    ]  # fmt: skip


def test_channels_get_the_average_of_three_or_the_only_value():
    grey = Preprocessing(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)).of_channels(1)
    assert (grey.mean, grey.std) == (pytest.approx((0.4,)), pytest.approx((0.3,)))
    assert grey.of_channels(4).mean == pytest.approx((0.4,) * 4)
    own = Preprocessing(mean=(0.1, 0.2), std=(1, 2))
    assert own.of_channels(2) is own
    with pytest.raises(BadRequest, match="mean and std have 2 values, and the network takes 12 channels"):
        own.of_channels(12)


@pytest.mark.parametrize("text", [b'{"mean":[0.5]}', b'{"mean":[],"std":[]}', b'{"size":[1,2,3]}', b'{"size":[64]}'])
def test_other_shapes_are_refused(text):
    with pytest.raises(msgspec.ValidationError):
        decoded(text)
