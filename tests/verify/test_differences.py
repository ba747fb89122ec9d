"""The images whose answers differ most: which they are, what a report has of them, and their thumbnails."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from msgspec.structs import replace
from PIL import Image
from scipy.special import expit, softmax

from exporter.data import synthetic
from exporter.data.images import normalise, preprocess_pictures
from exporter.data.samples import open_samples
from exporter.recipe import Checks
from exporter.report import MOST_DIFFERENCES
from exporter.verify import VerifyOptions, thumbnails, verify
from exporter.verify.checks import Seen, Subject
from exporter.verify.checks.differences import Differences
from exporter.verify.thumbnails import MOST_BYTES, SIDE, Thumbnails, drop_unused_thumbnails, leading, thumbnail
from tests.conftest import PX

NAMES = tuple(f"{number}.png" for number in range(40))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Forty drawn images in folders of classes, and one that is cut off."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(40):
        folder = root / f"class {number % 10}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(synthetic.dead_leaves(48, number)).save(folder / f"{number}.png")
    whole = (root / "class 0" / "0.png").read_bytes()
    (root / "class 0" / "0.png").write_bytes(whole[: len(whole) // 2])
    return root


def decoded(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))


def nearest(thumbnail, images):
    """The number of the image that a thumbnail shows best; it is at most half as far away as any other."""
    shown = np.asarray(decoded(thumbnail)).astype(float)
    far = [np.abs(shown - image).mean() for image in images]
    assert 2 * min(far) < sorted(far)[1]
    return int(np.argmin(far))


def differing(meter, eager, got, labels=None, size=16):
    labels = np.full(len(eager[0]), -1) if labels is None else labels
    for start in range(0, len(eager[0]), size):
        part = slice(start, start + size)
        seen = Seen(labels[part], tuple(one[part] for one in eager), tuple(one[part] for one in got), NAMES[part])
        meter.add(meter.measure(seen), seen.names)
    return [entry.difference for entry in meter.entries]


@pytest.fixture
def subject(artifacts):
    return Subject(artifacts["onnxruntime", "fp32"], [])


def subject_of(artifact, **outputs):
    """A subject whose outputs have other contents, by name."""
    tensors = [replace(artifact.sidecar.outputs[0], name=name, holds=holds) for name, holds in outputs.items()]
    return Subject(type(artifact)(artifact.path, replace(artifact.sidecar, outputs=tuple(tensors))), [])


def noisy(shape=(40, 10), noise=0.3):
    rng = np.random.default_rng(0)
    eager = rng.normal(size=shape).astype(np.float32)
    return eager, eager + rng.normal(scale=noise, size=shape).astype(np.float32)


def expected_order(a, b):
    """By SciPy's softmax: images whose class changed, then by the change of the probability of the first class."""
    first, second = a.argmax(1), b.argmax(1)
    moved = np.abs(a[np.arange(len(a)), first] - b[np.arange(len(a)), first])
    return sorted(range(len(a)), key=lambda image: (first[image] == second[image], -moved[image]))


@pytest.mark.parametrize("noise", [0.05, 0.3, 1.5])
def test_images_with_another_class_come_first_then_the_largest_changes(subject, noise):
    eager, got = noisy(noise=noise)
    a, b = (softmax(scores.astype(np.float64), 1) for scores in (eager, got))
    order = expected_order(a, b)[:MOST_DIFFERENCES]
    shown = differing(Differences(Checks(), subject), (eager,), (got,), np.arange(40) % 11 - 1)
    assert [one.image for one in shown] == [NAMES[image] for image in order]
    for one, image in zip(shown, order, strict=True):
        assert (one.reference.index, one.artifact.index) == (a[image].argmax(), b[image].argmax())
        assert one.changed == (one.reference.index != one.artifact.index)
        assert one.reference.name == f"class {one.reference.index}"
        assert one.reference.probability == pytest.approx(a[image].max(), abs=1e-5)
        assert one.artifact.probability == pytest.approx(b[image].max(), abs=1e-5)
        label = image % 11 - 1
        assert (None if one.labels is None else [label.index for label in one.labels]) == (
            None if label < 0 else [label]
        )
    assert sum(one.changed for one in shown) == min(MOST_DIFFERENCES, (a.argmax(1) != b.argmax(1)).sum())


def test_images_that_differ_by_less_than_a_tenth_of_a_percent_are_left_out(subject):
    eager, _ = noisy()
    got = eager.copy()
    got[7, eager[7].argmax()] += 0.05
    got[9, eager[9].argmax()] += 0.0005
    assert [one.image for one in differing(Differences(Checks(), subject), (eager,), (got,))] == ["7.png"]
    assert differing(Differences(Checks(), subject), (eager,), (eager,)) == []


def test_of_equal_differences_the_first_images_are_kept(subject):
    eager = np.tile(np.eye(10, dtype=np.float32)[:1], (40, 1))
    shown = differing(Differences(Checks(), subject), (eager,), (2 * eager,))
    assert [one.image for one in shown] == list(NAMES[:MOST_DIFFERENCES])


def test_an_answer_that_is_not_finite_is_first_and_has_no_probability(subject):
    eager, got = noisy()
    got[23, 4], got[5] = np.nan, np.inf
    shown = differing(Differences(Checks(), subject), (eager,), (got,))
    assert [one.image for one in shown[:2]] == ["5.png", "23.png"]
    assert [one.probability_change for one in shown[:2]] == [None, None]
    assert shown[1].artifact.probability is None
    assert shown[1].reference.probability == pytest.approx(softmax(eager[23]).max(), abs=1e-5)


def test_probabilities_of_an_output_are_taken_as_they_are(artifacts):
    eager, got = (softmax(scores, 1) for scores in noisy())
    meter = Differences(Checks(), subject_of(artifacts["onnxruntime", "fp32"], probabilities="softmax"))
    shown = differing(meter, (eager,), (got,))
    assert [one.image for one in shown] == [NAMES[image] for image in expected_order(eager, got)[:MOST_DIFFERENCES]]
    assert shown[0].reference.probability == pytest.approx(float(eager[int(shown[0].image[:-4])].max()), abs=1e-6)


def test_the_five_most_probable_classes_are_compared_by_their_numbers(artifacts):
    eager, got = (softmax(scores, 1) for scores in noisy(noise=1.5))
    order = [(-one).argsort(1)[:, :5] for one in (eager, got)]
    outputs = [
        (places.astype(np.float32), np.take_along_axis(one, places, 1))
        for one, places in zip((eager, got), order, strict=True)
    ]
    artifact = artifacts["onnxruntime", "fp32"]
    shown = differing(Differences(Checks(), subject_of(artifact, classes="classes", probabilities="top5")), *outputs)
    assert len(shown) == MOST_DIFFERENCES
    for one in shown:
        image = int(one.image[:-4])
        assert (one.reference.index, one.artifact.index) == (eager[image].argmax(), got[image].argmax())
        assert one.artifact.probability == pytest.approx(float(got[image].max()), abs=1e-6)
        place = np.flatnonzero(order[1][image] == one.reference.index)
        other = got[image, one.reference.index] if len(place) else np.sort(got[image])[-5]
        assert one.probability_change == pytest.approx(abs(float(eager[image].max() - other)), abs=1e-5)


@pytest.mark.parametrize("holds", ["logits", "sigmoid"])
def test_of_several_labels_the_one_that_changed_most_is_shown(artifacts, holds):
    eager, got = noisy(noise=0.1)
    eager, got = (2 * eager - 1, 2 * got - 1) if holds == "logits" else (expit(eager), expit(got))
    a, b = (eager, got) if holds == "sigmoid" else (expit(eager), expit(got))
    flipped, moved = (a >= 0.5) != (b >= 0.5), np.abs(a - b)
    score = (2 * flipped + moved).max(1)
    labels = np.random.default_rng(1).integers(0, 2, (40, 10))
    meter = Differences(Checks(outputs="multilabel"), subject_of(artifacts["onnxruntime", "fp32"], scores=holds))
    shown = differing(meter, (eager,), (got,), labels)
    assert [one.image for one in shown] == [NAMES[image] for image in (-score).argsort()[:MOST_DIFFERENCES]]
    for one in shown:
        image = int(one.image[:-4])
        assert one.reference.index == one.artifact.index == (2 * flipped + moved)[image].argmax()
        assert one.changed == flipped[image].any()
        assert one.artifact.probability == pytest.approx(float(b[image, one.artifact.index]), abs=1e-5)
        assert [label.index for label in one.labels] == np.flatnonzero(labels[image]).tolist()


@pytest.mark.parametrize("holds", ["embedding", "map", "pixel_logits"])
def test_outputs_without_answers_have_no_list(artifacts, holds):
    meter = Differences(Checks(), subject_of(artifacts["onnxruntime", "fp32"], output=holds))
    assert not meter.active
    assert meter.measure(Seen(np.array([-1]), (np.zeros((1, 4)),), (np.ones((1, 4)),))) == {}


def test_a_report_has_the_images_that_differ_most_with_their_thumbnails(artifacts, photos):
    """The order and the answers are those of sessions that run here, image by image; Pillow decodes the thumbnails."""
    artifact = artifacts["onnxruntime", "int8"]
    options = VerifyOptions(data=str(photos))
    report = verify(artifact, options)
    assert report == verify(artifact, options)
    recipe = artifact.sidecar.preprocessing
    samples = open_samples(str(photos), recipe, artifact.sidecar.labels, 10)
    images, names, labels = zip(
        *((batch.images, batch.names, batch.labels) for batch in samples.batches(1)), strict=True
    )
    names = [name for each in names for name in each]
    assert len(names) == 39
    eager, got = _outputs(artifact, images)
    mean, std = (np.array(values)[:, None, None] for values in (recipe.mean, recipe.std))
    pixels = [255 * (image[0] * std + mean).transpose(1, 2, 0) for image in images]
    order = expected_order(softmax(eager, 1), softmax(got, 1))
    moved = report.differences
    assert moved
    assert [one.image for one in moved] == [names[image] for image in order[: len(moved)]]
    for one, image in zip(moved, order[: len(moved)], strict=True):
        assert one.artifact.index == got[image].argmax()
        assert one.labels[0].index == labels[image][0]
        shown = decoded(one.thumbnail)
        assert (shown.format, shown.size) == ("JPEG", (PX, PX))
        assert nearest(one.thumbnail, pixels) == image


def _outputs(artifact, images):
    """Scores of PyTorch and of ONNX Runtime, opened without `verify`."""
    import onnxruntime

    from exporter.backends import eager

    engine = onnxruntime.InferenceSession(artifact.path)
    taken = engine.get_inputs()[0].name
    with eager.session(artifact, eager.EagerOptions()) as original:
        expected = np.concatenate([original(image)[0] for image in images])
    return expected, np.concatenate([engine.run(None, {taken: image})[0] for image in images])


@pytest.mark.parametrize("source", ["synthetic", "pixels.npz", "inputs.npz"])
def test_images_without_a_file_have_thumbnails_too(artifacts, source, tmp_path):
    artifact = artifacts["onnxruntime", "int8"]
    pixels = np.stack([synthetic.dead_leaves(PX, seed) for seed in range(16)])
    np.savez(tmp_path / "pixels.npz", images=pixels)
    np.savez(tmp_path / "inputs.npz", images=normalise(pixels, artifact.sidecar.preprocessing))
    data = source if source == "synthetic" else str(tmp_path / source)
    report = verify(artifact, VerifyOptions(data=data, samples=16))
    assert report.differences
    for one in report.differences:
        number = int(one.image.rpartition("[")[2].rstrip("]") if "[" in one.image else one.image.split()[-1])
        assert nearest(one.thumbnail, pixels) == number
        assert one.labels is None


def test_a_thumbnail_is_small_whatever_it_shows(artifacts):
    recipe = artifacts["onnxruntime", "fp32"].sidecar.preprocessing
    for height, width in ((72, SIDE), (225, 300), (768, 1024)):
        noise = np.random.default_rng(0).choice([0, 255], (height, width, 3)).astype(np.uint8)
        content = thumbnail(normalise(noise, recipe), recipe)
        assert len(content) <= MOST_BYTES
        assert Image.open(io.BytesIO(content)).size == (SIDE, 72)
    broken = np.full((3, 8, 8), np.nan, np.float32)
    broken[0], broken[1] = np.inf, -np.inf
    assert Image.open(io.BytesIO(thumbnail(broken, recipe))).size == (8, 8)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "L"), (3, "RGB"), (4, "RGB"), (12, "L")])
def test_inputs_of_any_number_of_channels_are_drawn(artifacts, channels, mode):
    recipe = artifacts["onnxruntime", "fp32"].sidecar.preprocessing
    recipe = replace(recipe, mean=(0.5,) * channels, std=(0.25,) * channels)
    pixels = np.repeat(np.arange(channels, dtype=np.uint8)[None, None] * 20 + 10, 64, 0).repeat(64, 1)
    shown = Image.open(io.BytesIO(thumbnail(normalise(pixels, recipe), recipe)))
    assert shown.mode == mode
    assert np.abs(np.asarray(shown)[32, 32].astype(int) - pixels[0, 0, : len(shown.getbands())]).max() < 12


@pytest.mark.parametrize("channels", [1, 3])
def test_of_a_picture_the_part_that_the_network_gets_is_drawn(artifacts, channels):
    recipe = artifacts["onnxruntime", "fp32"].sidecar.preprocessing
    recipe = replace(recipe, mean=(0.5,) * channels, std=(0.25,) * channels, input="image")
    picture = synthetic.dead_leaves(160, 0)[20:140, :, :channels]
    content = thumbnail(picture, recipe)
    assert Image.open(io.BytesIO(content)).size == (PX, PX)
    assert content == thumbnail(preprocess_pictures(picture[None], recipe)[0], replace(recipe, input="normalized"))


def test_only_images_that_may_be_in_the_report_are_drawn(artifacts, monkeypatch):
    recipe = artifacts["onnxruntime", "fp32"].sidecar.preprocessing
    drawn = []
    monkeypatch.setattr(thumbnails, "thumbnail", lambda image, _: drawn.append(float(image[0, 0, 0])) or b"x")
    running = Thumbnails(recipe)
    ranks = np.random.default_rng(0).random(4000)
    for start in range(0, len(ranks), 16):
        part = ranks[start : start + 16]
        images = np.arange(start, start + 16, dtype=np.float32)[:, None, None, None]
        rows = running.with_thumbnails({"differences": {"ranks": part}}, images)["differences"]
        assert rows["jpeg_sizes"].sum() == len(rows["jpeg"])
    assert set(np.argsort(-ranks)[:MOST_DIFFERENCES]) <= set(drawn)
    assert len(drawn) < 12 + 2 * 12 * np.log(4000 / 12)
    assert running.with_thumbnails({"parity": {}}, images) == {"parity": {}}


def test_a_shard_has_the_thumbnails_of_its_twelve_largest_ranks_only(monkeypatch, artifacts):
    monkeypatch.setattr(thumbnails, "thumbnail", lambda image, _: bytes([int(image[0, 0, 0])] * int(image[0, 0, 0])))
    running = Thumbnails(artifacts["onnxruntime", "fp32"].sidecar.preprocessing)
    ranks = np.random.default_rng(0).random(100)
    parts = [slice(start, start + 16) for start in range(0, 100, 16)]
    images = np.arange(1, 101, dtype=np.float32)[:, None, None, None]
    batches = [running.with_thumbnails({"differences": {"ranks": ranks[part]}}, images[part]) for part in parts]
    kept = drop_unused_thumbnails([*batches, {"parity": {}}])
    assert kept.pop() == {"parity": {}}
    sizes = np.concatenate([rows["differences"]["jpeg_sizes"] for rows in kept])
    first = np.sort(ranks.argsort()[-MOST_DIFFERENCES:])
    assert np.flatnonzero(sizes).tolist() == first.tolist()
    content = np.concatenate([rows["differences"]["jpeg"] for rows in kept])
    assert content.tolist() == [number + 1 for number in first for _ in range(number + 1)]
    assert sum(len(rows["differences"]["jpeg"]) for rows in batches) > len(content)


def test_ranks_of_zero_do_not_lead():
    assert leading(np.array([0.0, 0.5, 2.5, 0.0, np.inf, 0.5])).tolist() == [4, 2, 1, 5]
    assert leading(np.zeros(0)).tolist() == []
    assert len(leading(np.ones(20))) == MOST_DIFFERENCES


def test_names_that_are_no_utf8_can_be_written(subject):
    eager, _ = noisy((1, 10))
    meter, names = Differences(Checks(), subject), (b"\xff.png".decode("utf-8", "surrogateescape"),)
    meter.add(meter.measure(Seen(np.array([-1]), (eager,), (-eager,), names)), names)
    assert meter.entries[0].difference.image == "\ufffd.png"
