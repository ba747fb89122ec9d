"""Every kind of image file becomes the input that a careful person would make of it."""

import hashlib
import sys
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from exporter.artifact.sidecar import Preprocessing
from exporter.data import images, synthetic

RECIPE = Preprocessing(size=32, resize=32, interpolation="bilinear", mean=(0, 0, 0), std=(1, 1, 1))
ROOM = 0.02


@pytest.fixture
def picture():
    """A photograph-like image, 48 × 32."""
    return Image.fromarray(synthetic.dead_leaves(48, 0)).crop((0, 0, 48, 32))


def expected(picture):
    return images.preprocess(picture.convert("RGB"), RECIPE)


def read(path):
    array = images.read(path, RECIPE)
    assert array.shape == (3, 32, 32)
    assert array.dtype == np.float32
    return array


def test_a_plain_file(picture, tmp_path):
    picture.save(tmp_path / "a.png")
    assert np.array_equal(read(tmp_path / "a.png"), expected(picture))


def test_the_recipe_is_followed_pixel_by_pixel():
    """Worked out by hand: 4 × 2 pixels, the centre 2 × 2 cut out, (x / 255 − mean) / std."""
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 10
    recipe = Preprocessing(size=2, resize=2, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5))
    array = images.preprocess(Image.fromarray(pixels), recipe)
    assert array[:, 0, 0] == pytest.approx([(30 / 255 - 0.5) / 0.2, (40 / 255 - 0.4) / 0.25, (50 / 255 - 0.3) / 0.5])
    assert array[:, 1, 1] == pytest.approx([(180 / 255 - 0.5) / 0.2, (190 / 255 - 0.4) / 0.25, (200 / 255 - 0.3) / 0.5])


def test_squash_cuts_nothing(picture):
    recipe = Preprocessing(size=32, resize=32, crop="squash", mean=(0, 0, 0), std=(1, 1, 1))
    whole = np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC), np.float32).transpose(2, 0, 1) / 255
    assert images.preprocess(picture, recipe) == pytest.approx(whole, abs=1e-6)


def test_grey_is_repeated(picture, tmp_path):
    grey = picture.convert("L")
    grey.save(tmp_path / "a.png")
    array = read(tmp_path / "a.png")
    assert np.array_equal(array[0], array[1])
    assert np.array_equal(array, expected(grey))


def test_16_bit_grey_is_scaled_not_clipped(picture, tmp_path):
    grey = picture.convert("L")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(tmp_path / "a.png")
    assert read(tmp_path / "a.png") == pytest.approx(expected(grey), abs=1e-6)
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(tmp_path / "a.tif")
    assert read(tmp_path / "a.tif") == pytest.approx(expected(grey), abs=1e-6)
    Image.fromarray(np.asarray(grey).astype(np.int32) * 2**20).save(tmp_path / "a.tif")
    with pytest.raises(images.Unreadable, match="32-bit pixels beyond 16 bits have no known range"):
        read(tmp_path / "a.tif")


@pytest.mark.parametrize(
    ("mode", "suffix"), [("P", ".png"), ("P", ".gif"), ("RGBA", ".png"), ("LA", ".png"), ("1", ".png")]
)
def test_other_modes_look_as_they_do_in_a_viewer(mode, suffix, picture, tmp_path):
    converted = picture.convert(mode)
    converted.save(tmp_path / f"a{suffix}")
    assert read(tmp_path / f"a{suffix}") == pytest.approx(expected(converted), abs=ROOM)


def test_cmyk_is_not_inverted(picture, tmp_path):
    picture.convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    assert np.abs(read(tmp_path / "a.jpg") - expected(picture)).mean() < ROOM


@pytest.mark.parametrize(("orientation", "turn"), [(3, 180), (6, 270), (8, 90)])
def test_an_exif_rotation_is_undone(orientation, turn, picture, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read(tmp_path / "a.png"), expected(picture.rotate(turn, expand=True)))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_unreadable(share, picture, tmp_path):
    path = tmp_path / "a.jpg"
    picture.save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(images.Unreadable):
        images.read(path, RECIPE)


def test_noise_is_unreadable(tmp_path):
    (tmp_path / "a.jpg").write_bytes(bytes(range(256)) * 10)
    with pytest.raises(images.Unreadable, match="no image of a known format"):
        images.read(tmp_path / "a.jpg", RECIPE)


def test_a_decompression_bomb_is_not_decoded(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    with pytest.raises(images.Unreadable, match="pixels"):
        images.read(tmp_path / "bomb.png", RECIPE)


def test_an_image_too_long_and_thin_is_not_resized(tmp_path):
    """20 × 200,000 is 12 kB of PNG and would be 7 GB at the short side asked for."""
    Image.new("1", (20, 200_000)).save(tmp_path / "thin.png")
    with pytest.raises(images.Unreadable, match="too long and thin"):
        images.read(tmp_path / "thin.png", Preprocessing())


def test_dead_leaves_have_the_spectrum_of_photographs():
    """Power falls with the square of frequency (Field 1987); white noise would give 0."""
    power = np.zeros(64)
    rows, columns = np.mgrid[:128, :128] - 64
    radius = np.hypot(rows, columns).astype(int)
    for seed in range(8):
        grey = synthetic.dead_leaves(128, seed).mean(-1)
        spectrum = np.abs(np.fft.fftshift(np.fft.fft2(grey - grey.mean()))) ** 2
        power += np.array([spectrum[radius == r].mean() for r in range(64)])
    slope = np.polyfit(np.log(np.arange(3, 40)), np.log(power[3:40]), 1)[0]
    assert -2.8 < slope < -1.6


def test_dead_leaves_have_the_colours_of_photographs():
    """Each image has a tint of its own, and its channels vary together; of uniform colours these are 11 and 0.04."""
    pixels = np.stack([synthetic.dead_leaves(48, seed) for seed in range(48)]).astype(np.float64)
    means = pixels.mean((1, 2))
    assert (means - means.mean(-1, keepdims=True)).std() > 14
    correlations = [np.corrcoef(image.reshape(-1, 3).T)[np.triu_indices(3, 1)].mean() for image in pixels]
    assert np.median(correlations) > 0.6


def test_dead_leaves_are_those_of_their_seed():
    assert np.array_equal(synthetic.dead_leaves(64, 3), synthetic.dead_leaves(64, 3))
    assert not np.array_equal(synthetic.dead_leaves(64, 3), synthetic.dead_leaves(64, 4))


def test_dead_leaves_of_other_shapes_are_cut_from_the_same_square():
    """Those of three channels, which calibration sets are frozen from, have this digest."""
    square = synthetic.dead_leaves(64, 3)
    assert hashlib.sha256(square.tobytes()).hexdigest()[:16] == "5af75324d3e04e99"
    assert np.array_equal(synthetic.dead_leaves((64, 32), 3), square[:, 16:48])
    assert np.array_equal(synthetic.dead_leaves((32, 64), 3), square[16:48])
    assert np.array_equal(synthetic.dead_leaves(64, 3, 2), square[..., :2])
    grey = np.asarray(Image.fromarray(square).convert("L"))
    assert np.array_equal(synthetic.dead_leaves(64, 3, 1)[..., 0], grey)


def test_dead_leaves_of_many_channels_are_all_different():
    bands = synthetic.dead_leaves((32, 48), 3, 12)
    assert bands.shape == (32, 48, 12)
    assert len({band.tobytes() for band in np.moveaxis(bands, -1, 0)}) == 12
    assert np.array_equal(bands, synthetic.dead_leaves((32, 48), 3, 12))


CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P"])
def test_an_image_is_read_with_the_channels_of_the_network(mode, channels, picture, tmp_path):
    stored = picture.convert(mode)
    stored.save(tmp_path / "a.png")
    recipe = Preprocessing(size=32, resize=32, mean=(0,) * channels, std=(1,) * channels)
    expected = np.asarray(stored.convert(CHANNELS[channels]).crop((8, 0, 40, 32)), np.float32) / 255
    got = images.read(tmp_path / "a.png", recipe)
    assert got == pytest.approx(expected.reshape(32, 32, -1).transpose(2, 0, 1), abs=1e-6)
    assert got.shape == (channels, 32, 32)


def test_pages_of_a_tiff_are_bands(picture, tmp_path):
    pages = [Image.fromarray(synthetic.dead_leaves((32, 48), seed, 1)[..., 0]) for seed in range(5)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    recipe = Preprocessing(size=24, resize=24, mean=(0.1, 0.2, 0.3, 0.4, 0.5), std=(1, 2, 3, 4, 5))
    got = images.read(tmp_path / "a.tif", recipe)
    for index, page in enumerate(pages):
        alone = images.preprocess(page, Preprocessing(size=24, resize=24, mean=(recipe.mean[index],), std=(index + 1,)))
        assert np.array_equal(got[index], alone[0])
    with pytest.raises(images.Unreadable, match="5 pages of L, and the network takes 12 channels"):
        images.read(tmp_path / "a.tif", Preprocessing(mean=(0,) * 12, std=(1,) * 12))


def test_planes_are_resized_as_colours_are(picture):
    """To the last bit: Pillow computes each channel by itself."""
    recipe = Preprocessing(size=(24, 16), resize=(27, 18))
    planes = [Image.fromarray(plane) for plane in np.moveaxis(np.asarray(picture), -1, 0)]
    assert np.array_equal(images.preprocess_planes(planes, recipe), images.preprocess(picture, recipe))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest", "lanczos"])
@pytest.mark.parametrize("size", [(64, 96), (96, 64), (33, 50), (64, 63), 48])
@pytest.mark.parametrize("crop_pct", [0.875, 0.95, 1.0])
def test_two_sides_are_resized_and_cropped_as_timm_does(crop_pct, size, interpolation, monkeypatch):
    """Pixel for pixel, with images that are wider, taller and smaller than the input."""
    # torchvision's compiled part does not load beside this torch; its Python part is enough.
    monkeypatch.setitem(sys.modules, "torchvision._meta_registrations", ModuleType("torchvision._meta_registrations"))
    factory = pytest.importorskip("timm.data.transforms_factory")
    height, width = size if isinstance(size, tuple) else (size, size)
    resize = (int(height / crop_pct), int(width / crop_pct))
    recipe = Preprocessing(size=size, resize=resize, interpolation=interpolation, mean=(0, 0, 0), std=(1, 1, 1))
    theirs = factory.transforms_imagenet_eval(
        size, crop_pct=crop_pct, interpolation=interpolation, mean=(0.0,) * 3, std=(1.0,) * 3
    )
    for shape in [(150, 100), (100, 150), (40, 31), (97, 131), (80, 80), (64, 300)]:
        picture = Image.fromarray(synthetic.dead_leaves(shape, 0))
        ours = images.preprocess(picture, recipe)
        assert ours.shape == (3, height, width)
        assert np.array_equal(np.rint(255 * ours), np.rint(255 * theirs(picture).numpy())), shape


def test_squash_takes_both_sides(picture):
    recipe = Preprocessing(size=(24, 40), resize=(24, 40), crop="squash", mean=(0, 0, 0), std=(1, 1, 1))
    whole = np.asarray(picture.resize((40, 24), Image.Resampling.BICUBIC), np.float32).transpose(2, 0, 1) / 255
    assert images.preprocess(picture, recipe) == pytest.approx(whole, abs=1e-6)
