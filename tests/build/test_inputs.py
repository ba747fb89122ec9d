"""Networks of any number of input channels, at sizes with two sides: built, calibrated, verified and timed."""

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from exporter import backends, build
from exporter.data import synthetic
from exporter.data.images import normalise
from exporter.errors import BadRequest
from exporter.model import shapes, variants, weights
from exporter.model.head import Head
from exporter.verify import VerifyOptions, verify
from tests import conftest

RUNTIMES = [name for name in backends.targets() if not backends.runtime(name).unable()]
SIZE = (64, 96)


@pytest.fixture(scope="session")
def networks(tmp_path_factory):
    """A function that gives the folder of a tiny network of so many input channels."""
    folder = tmp_path_factory.mktemp("channels")

    def network(channels):
        path = folder / str(channels)
        return path if path.exists() else conftest.write_tiny(path, in_chans=channels)

    return network


def test_channels_are_read_from_the_weights(networks):
    loaded = weights.load(str(networks(4)))
    arch = loaded.variant.architecture
    assert arch.in_chans == 4
    state = {name: tensor for name, tensor in loaded.state.items() if not name.startswith("head")}
    head = 10 * arch.dims[-1] + 10
    assert variants.count_params(arch, 10) == sum(tensor.numel() for tensor in state.values()) + head
    by_hand = variants.count_macs(arch, SIZE, 10) - variants.count_macs(conftest.tiny_architecture(), SIZE, 10)
    assert by_hand == 16 * 24 * 16 * 1 * 16  # positions, width and the patch of one more channel


@pytest.mark.parametrize("variant", ["tiny", "isotropic_small", "atto_ols", "zepto_rms_ols"])
def test_a_published_network_of_other_channels_keeps_its_name(variant):
    arch = variants.VARIANTS[variant].architecture
    state = weights._random_state(type(arch)(**{**vars_of(arch), "in_chans": 2}), 0)
    derived = shapes.architecture(state, Head(), type(arch)(**vars_of(arch)).norm)
    assert (derived.in_chans, variants.named(derived).name) == (2, variant)


def vars_of(record):
    return {name: getattr(record, name) for name in record.__struct_fields__}


@pytest.mark.parametrize("channels", [1, 12])
@pytest.mark.parametrize("name", RUNTIMES)
def test_it_is_built_and_verified(name, channels, networks, tmp_path):
    made = conftest.build(networks(channels), tmp_path, name, imgsz=SIZE)
    assert made.sidecar.inputs[0].shape == ("batch", channels, *SIZE)
    assert made.sidecar.preprocessing.shape == (channels, *SIZE)
    report = verify(made, VerifyOptions(samples=2))
    assert report.passed, [finding for finding in report.findings if not finding.passed]


@pytest.mark.parametrize("word", ["uint8", "float01"])
@pytest.mark.parametrize("name", RUNTIMES)
def test_it_takes_pixels(name, word, networks, tmp_path):
    made = conftest.build(networks(4), tmp_path, name, imgsz=SIZE, input=word)
    recipe = made.sidecar.preprocessing
    images = normalise(synthetic.dead_leaves(SIZE, 0, 4), recipe)[None]
    eager = backends.runtime("eager")
    runtime = backends.runtime(name)
    with runtime.open(made, runtime.options()) as session, eager.open(made, eager.options()) as reference:
        (got,), (expected,) = session(images), reference(images)
    assert np.abs(got - expected).max() <= 1e-4 * expected.std()


@pytest.mark.parametrize("word", ["uint8", "float01", "normalized"])
@pytest.mark.parametrize(("layout", "color"), [("nhwc", "rgb"), ("nchw", "bgr"), ("nhwc", "bgr")])
def test_a_stock_runtime_gets_what_opencv_reads(word, layout, color, networks, tmp_path):
    """The pixels of PIL, as (H, W, 3) with blue first where it is asked for, into ONNX Runtime without this tool."""
    artifact = conftest.build(networks(3), tmp_path, imgsz="dynamic", input=word, layout=layout, color=color)
    recipe = artifact.sidecar.preprocessing
    assert (recipe.layout, recipe.color) == (layout.upper(), color.upper())
    axes = ("batch", "height", "width", 3) if layout == "nhwc" else ("batch", 3, "height", "width")
    assert artifact.sidecar.inputs[0].shape == axes
    pixels = synthetic.dead_leaves(SIZE, 0, 3)
    inputs = {
        "uint8": pixels,
        "float01": pixels / np.float32(255),
        "normalized": normalise(pixels, recipe).transpose(1, 2, 0),
    }
    taken = inputs[word][:, :, ::-1] if color == "bgr" else inputs[word]
    taken = taken if layout == "nhwc" else taken.transpose(2, 0, 1)
    session = onnxruntime.InferenceSession(str(artifact.path), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"images": np.ascontiguousarray(taken[None])})
    eager = backends.runtime("eager")
    with eager.open(artifact, eager.options()) as reference:
        (expected,) = reference(normalise(pixels, recipe)[None])
    assert np.abs(got - expected).max() <= 1e-4 * expected.std()


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        (name, word)
        for name in RUNTIMES
        for word in ("fp32", "fp16", "int8")
        if word in backends.target(name).precisions
    ],
)
def test_every_runtime_takes_bytes_with_blue_first_and_channels_last(name, precision, networks, tmp_path):
    artifact = conftest.build(networks(3), tmp_path, name, precision, input="uint8", layout="nhwc", color="bgr")
    assert artifact.sidecar.inputs[0].dtype == "uint8"
    report = verify(artifact, VerifyOptions(samples=4))
    assert report.passed, [finding for finding in report.findings if not finding.passed]


def test_bgr_of_other_channels_is_refused(networks, refused, tmp_path):
    message = refused(2, "onnx", "--weights", networks(4), "--color", "bgr", "-o", tmp_path / "out", folder=tmp_path)
    assert "--color bgr: the network takes 4 channels" in message


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_int8_is_calibrated_on_arrays(name, networks, tmp_path):
    pixels = np.stack([synthetic.dead_leaves(SIZE, seed, 12) for seed in range(16)])
    np.savez(tmp_path / "bands.npz", images=pixels)
    made = conftest.build(networks(12), tmp_path, name, "int8", imgsz=SIZE, calib=str(tmp_path / "bands.npz"))
    assert verify(made, VerifyOptions(data=str(tmp_path / "bands.npz"))).value("cosine") > 0.998
    pointwise = 8 * (256 * 384 + 576 * 96 + 1024 * 24 * 2 + 2304 * 6)
    by_hand = {"onnxruntime": pointwise, "openvino": pointwise + 4 * (384 * 96 + 768 * 24 + 1536 * 6)}
    assert sum(made.sidecar.quantization.layers.values()) == by_hand[name]


def test_a_grey_network_from_the_command_line(networks, run, tmp_path):
    for index in range(2):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(synthetic.dead_leaves((80, 120), index)).save(tmp_path / "photos" / f"{index}.png")
    done = run(
        "onnx",
        "--weights",
        networks(1),
        "--imgsz",
        "64,96",
        "-o",
        tmp_path / "out",
        "--save-config",
        tmp_path / "r.yaml",
    )
    assert done.code == 0, done.err
    assert "input channels: 1; mean 0.4 and std 0.3 for each are the averages of the known ones" in done.err.replace(
        "\n", " "
    )
    assert "imgsz: [64, 96]" in (tmp_path / "r.yaml").read_text()
    made = tmp_path / "out" / "custom_fp32.onnx"
    assert run("verify", made, "--data", tmp_path / "photos").code == 0
    told = run("inspect", made).out
    assert "bilinear to 64×96, center 64×96, L" in told
    assert "images (batch, 1, 64, 96) float32" in told


def test_image_files_for_many_channels_are_refused(networks, refused, tmp_path):
    (tmp_path / "photos").mkdir()
    Image.fromarray(synthetic.dead_leaves(64, 0)).save(tmp_path / "photos" / "0.png")
    made = conftest.build(networks(12), tmp_path / "out", imgsz=SIZE)
    told = refused(2, "verify", made.path, "--data", tmp_path / "photos", folder=tmp_path)
    assert "give an .npz file with 'images' as uint8 (N, H, W, 12)" in told


@pytest.mark.parametrize("text", ["64,16", "64,96,3", "64x96", ","])
def test_other_sizes_are_refused(text, refused, tmp_path):
    message = refused(2, "onnx", "--weights", "random:0", "--imgsz", text, "-o", tmp_path / "out", folder=tmp_path)
    expected = "a whole number from 32 to 4096, two of these (height, width) or dynamic"
    assert f"'--imgsz': '{text}': expected {expected}" in message


def test_a_mean_of_other_channels_than_the_network_is_refused(tmp_path):
    import json

    folder = conftest.write_tiny(tmp_path / "w", in_chans=12)
    config = conftest.tiny_config()
    config["pretrained_cfg"] |= {"mean": [0.5] * 4, "std": [0.2] * 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadRequest, match="mean and std have 4 values, and the network takes 12 channels"):
        conftest.build(folder, tmp_path / "out")


def test_both_sides_are_timed():
    from exporter.artifact.sidecar import Preprocessing
    from exporter.bench import Arm, Plan, worker

    recipe = Preprocessing(size=(16, 24), resize=(16, 24), mean=(0.5,) * 5, std=(0.25,) * 5)
    plan = Plan(arms=(Arm(name="a", path="a"),), preprocessing=recipe, batch=2, seconds=1.0, seed=0)
    assert [batch.shape for batch in worker.inputs(plan)] == [(2, 5, 16, 24)] * 4


def test_an_artifact_of_two_sides_is_timed(networks, run, tmp_path):
    made = conftest.build(networks(1), tmp_path, imgsz=SIZE)
    done = run("bench", made.path, "--duration", 0.6, "--json")
    assert done.code == 0, done.err
    assert "of one image of 64×96 pixels" in done.out


def test_a_recipe_holds_equal_sides_as_one_number():
    recipe = conftest.recipe_of(imgsz=(64, 64))
    assert recipe.export.imgsz == 64
    build.check(recipe)
