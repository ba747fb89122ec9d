"""Multi-label heads: decisions at a threshold, mean average precision, and data with several labels an image."""

import csv
import importlib
import json

import numpy as np
import onnx
import pytest
from msgspec.structs import replace
from onnx import numpy_helper
from PIL import Image
from sklearn.metrics import average_precision_score

from exporter import artifact as artifact_files
from exporter import backends, report
from exporter.artifact.sidecar import Preprocessing
from exporter.data.samples import open_samples
from exporter.errors import BadRequest
from exporter.recipe import Checks
from exporter.report.formats import junit, markdown
from exporter.stats import drop_interval, proportion
from exporter.verify import VerifyOptions, average_precision, open_data, run_batch, verify
from exporter.verify.checks import Subject
from tests.conftest import PX, prepared, recipe_of
from tests.verify.test_checks import measure
from tests.verify.test_values import head

COUNT, LABELS = 48, 10
LOOSE = {"atol": 1e9, "min_cosine": -1.0, "outputs": "multilabel"}
RECIPE = Preprocessing(size=32, resize=32)
NAMES = ("Edema", "Mass", "Nodule")


def scores(count=400, labels=14, seed=0, offset=-1.0):
    """Logits of eager, and labels that they tell better than chance."""
    rng = np.random.default_rng(seed)
    eager = rng.normal(offset, 1.5, (count, labels)).astype(np.float32)
    return eager, (eager + rng.normal(0, 1.5, eager.shape) > 0).astype(np.int64)


def noisy(eager, size, seed=1):
    return eager + np.random.default_rng(seed).normal(0, size, eager.shape).astype(np.float32)


def judged(artifacts, eager, got, truth=None, precision="int8", **options):
    made = artifacts["onnxruntime", precision]
    subject = head(made, eager.shape[1])
    return measure(subject, eager, got, truth, Checks(**{**LOOSE, **options}), batch=50)


@pytest.mark.parametrize("digits", [0, 1, 6])
def test_average_precision_is_that_of_scikit_learn(digits):
    """Also where scores are equal."""
    eager, truth = scores(60, 5)
    rounded = np.round(eager, digits)
    ranked = average_precision.rankings(truth, rounded)
    assert average_precision.precisions(ranked) == pytest.approx(average_precision_score(truth, rounded, average=None))


def test_images_that_are_drawn_twice_count_twice():
    eager, truth = scores(30, 1)
    times = np.random.default_rng(3).integers(0, 4, 30)
    ranked = average_precision.ranking(truth[:, 0], np.round(eager[:, 0], 1))
    found = ranked.precision(times[:, None].astype(np.float32))[0]
    repeated = np.repeat(truth[:, 0], times), np.repeat(np.round(eager[:, 0], 1), times)
    assert found == pytest.approx(average_precision_score(*repeated))


@pytest.mark.parametrize("digits", [0, 6])
def test_pseudo_values_are_those_of_map_without_each_image(digits):
    eager, truth = scores(25, 3)
    truth[:, 2] = 0
    truth[4, 2] = 1
    rounded = np.round(eager, digits)

    def mean_precision(keep):
        labels = truth[keep].any(0)
        return average_precision_score(truth[keep][:, labels], rounded[keep][:, labels], average="macro")

    every = np.arange(25)
    expected = [25 * mean_precision(every) - 24 * mean_precision(every != image) for image in every]
    assert average_precision.pseudo_values(average_precision.rankings(truth, rounded)) == pytest.approx(expected)


def test_map_is_the_mean_over_labels_with_a_positive_image(artifacts):
    eager, truth = scores()
    truth[:, 3] = 0
    got = noisy(eager, 0.5)
    found = judged(artifacts, eager, got, truth)
    kept = np.delete(np.arange(14), 3)
    for metric, logits in (("map_eager", eager), ("map", got)):
        expected = average_precision_score(truth[:, kept], logits[:, kept], average="macro")
        assert found[metric].value == pytest.approx(100 * expected)
        assert "13 of 14 labels have a positive image" in found[metric].detail
    assert found["map_drop"].value == pytest.approx(found["map_eager"].value - found["map"].value)


def test_a_bootstrap_interval_holds_the_true_loss_and_is_the_same_again(artifacts):
    """The truth is measured on many images; a small set of them is judged."""
    every, labels = scores(20000, 4)
    other = noisy(every, 1.0)
    true = 100 * sum(average_precision_score(labels, x) * sign for x, sign in ((every, 1), (other, -1)))
    held = 0
    for part in range(20):
        rows = slice(part * 1000, part * 1000 + 1000)
        ranked = [average_precision.rankings(labels[rows], x[rows]) for x in (every, other)]
        low, high = average_precision.loss(*ranked).interval(1000)
        held += low <= true <= high
        assert (low, high) == average_precision.loss(*ranked).interval(1000)
        assert high - low < 4
    assert held >= 17


def test_nothing_lost_is_as_unsure_as_nothing_lost_of_top1():
    """Of one label it is Agresti and Min's interval over its positive images; few show little."""
    eager, truth = scores(400, 1)
    ranked = average_precision.rankings(truth, eager)
    assert average_precision.loss(ranked, ranked).interval(400) == pytest.approx(
        drop_interval(0, 0, int(truth.sum())), rel=1e-6
    )


@pytest.mark.parametrize(
    ("count", "size", "verdict"), [(3000, 0.0, "within"), (3000, 1.5, "beyond"), (100, 0.0, "unsure")]
)
def test_a_drop_of_map_is_judged_by_the_rule_of_budgets(count, size, verdict, artifacts):
    eager, truth = scores(count)
    for choice in ("fail", "warn"):
        found = judged(artifacts, eager, noisy(eager, size), truth, max_drop=0.5, when_unsure=choice)["map_drop"]
        assert found.passed == {"within": True, "beyond": False, "unsure": choice != "fail"}[verdict], found
        assert found.unsure == (verdict == "unsure" and choice == "warn")
        assert ("are needed" in found.detail) == (verdict == "unsure")
        assert found.limit == 0.5


def test_the_label_that_lost_most_is_named(artifacts):
    eager, truth = scores()
    got = eager.copy()
    got[:, 5] = -eager[:, 5]
    found = judged(artifacts, eager, got, truth)
    assert found["map_drop"].detail.startswith("worst label class 5,")
    assert "worst label class 5," in found["label_agreement"].detail
    assert "no label lost" in judged(artifacts, eager, eager.copy(), truth)["map_drop"].detail


def test_agreement_is_the_share_of_equal_decisions_with_the_image_as_its_unit(artifacts):
    eager, _ = scores(200, 14)
    got = eager.copy()
    got[:20, 3] = -eager[:20, 3]
    got[:20, 4] = -eager[:20, 4]
    found = judged(artifacts, eager, got)["label_agreement"]
    assert found.value == pytest.approx(100 * (1 - 40 / 2800))
    assert found.samples == pytest.approx([12 / 14] * 20 + [1.0] * 180)
    assert (found.low, found.high) == pytest.approx(
        (proportion(200 - 40 / 14, 200).low, proportion(200 - 40 / 14, 200).high)
    )
    assert found.detail.startswith("2760 of 2800 decisions, 200 images, at threshold 0.5; worst label class 3, 90 %")


def test_decisions_of_an_image_are_not_counted_as_images():
    """All decisions of one image of 50 are others: as far as one lost answer of 50 is known, not one of 700."""
    lost = proportion(49, 50)
    assert lost.low < 90 < lost.high
    half = proportion(49.5, 50)
    assert lost.low < half.low < proportion(50, 50).low


@pytest.mark.parametrize(("threshold", "equal"), [(None, True), (0.5, True), (0.9, False)])
def test_the_threshold_is_a_probability(threshold, equal, artifacts):
    """Logits 2 and 3 are probabilities of 0.88 and 0.95."""
    eager, got = np.full((20, 3), 2, np.float32), np.full((20, 3), 3, np.float32)
    found = judged(artifacts, eager, got, threshold=threshold, min_agreement=50)["label_agreement"]
    assert found.value == (100 if equal else 0)
    assert found.passed == equal


def test_nan_is_no_equal_decision_and_the_worst_rank(artifacts):
    eager, truth = scores(100, 3)
    got = eager.copy()
    got[7] = np.nan
    found = judged(artifacts, eager, got, truth)
    assert found["label_agreement"].value == pytest.approx(99)
    assert found["map_drop"].value > 0
    assert not found["nan_outputs"].passed


def test_a_label_that_eager_never_sees_is_no_error_and_a_stuck_one_is(artifacts):
    eager, _ = scores(200, 6, offset=-6)
    assert not (eager[:, 0] > 0).any()
    healthy = judged(artifacts, eager, noisy(eager, 0.01))
    assert all(finding.passed for finding in healthy.values()), healthy
    stuck = noisy(eager, 0.01)
    stuck[:, 0] = -6.0
    found = judged(artifacts, eager, stuck)
    assert found["label_agreement"].passed, "all decisions of the label are negative"
    assert (found["constant_labels"].value, found["constant_labels"].passed) == (1, False)
    assert "class 0" in found["constant_labels"].detail
    everything = judged(artifacts, eager, np.tile(eager[:1], (200, 1)))
    assert not everything["constant_outputs"].passed
    assert everything["constant_labels"].value == 6


def test_a_label_with_one_score_in_eager_too_is_not_stuck(artifacts):
    eager, _ = scores(200, 6)
    eager[:, 2] = -4.0
    assert judged(artifacts, eager, eager.copy())["constant_labels"].value == 0


def test_a_single_label_has_decisions_and_no_cosine(artifacts):
    eager, truth = scores(200, 1)
    options = Checks(outputs="multilabel")
    found = measure(head(artifacts["onnxruntime", "int8"]), eager, eager.copy(), truth, options)
    assert found["label_agreement"].value == 100
    assert found["map"].value == pytest.approx(100 * average_precision_score(truth, eager))
    assert not {"cosine", "top1_agreement", "relative_error", "top1"} & found.keys()


def test_classes_and_values_are_as_before(artifacts):
    eager, _ = scores(50, 10)
    subject = Subject(artifacts["onnxruntime", "int8"], [])
    for options in (None, Checks(outputs="classes"), Checks(outputs="values")):
        found = measure(subject, eager, eager.copy(), options=options)
        assert not {"label_agreement", "map", "map_drop", "constant_labels"} & found.keys()
        assert ("top1_agreement" in found) == (options is None or options.outputs == "classes")


def test_labels_without_a_positive_image_fail_a_budget_and_else_say_so(artifacts):
    eager, truth = scores(50, 3)
    found = judged(artifacts, eager, eager.copy(), 0 * truth)["map_drop"]
    assert (found.value, found.passed) == (None, True)
    assert "none of 50 images has a label" in found.detail
    assert not judged(artifacts, eager, eager.copy(), 0 * truth, max_drop=1.0)["map_drop"].passed


def test_labels_none_of_which_is_positive_judge_nothing(artifacts):
    eager, truth = scores(3, 3)
    for labels, unsure in ((0 * truth, True), (0 * truth + 1, False)):
        found = judged(artifacts, eager, eager.copy(), labels, data="photographs")
        assert found["label_agreement"].unsure == unsure


# Data


@pytest.fixture
def folder(tmp_path):
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return tmp_path


def read(source, names=NAMES, count=3, multilabel=True):
    samples = open_samples(str(source), RECIPE, names, count, multilabel=multilabel)
    return [row.tolist() for batch in samples.batches(3) for row in batch.labels]


EXPECTED = [[1, 0, 1], [0, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("m.csv", "path,label\n0.png,Edema|Nodule\n1.png,Mass\n2.png,\n"),
        ("m.csv", "image,labels\n0.png,Nodule;Edema\n1.png,Mass\n2.png,\n"),
        ("m.csv", "filename,tags\n0.png,0|2\n1.png,1\n2.png,\n"),
        ("m.tsv", "path\tlabel\n0.png\tEdema | Nodule\n1.png\tMass\n2.png\t\n"),
        ("m.csv", "path,Mass,Edema,Nodule\n0.png,0,1,1\n1.png,1,0,0\n2.png,0,0,0\n"),
        (
            "m.csv",
            "path,Edema,Mass,Nodule,split\n3.png,1,1,1,train\n0.png,1.0,0,1,val\n1.png,0,1,0,val\n2.png,0,0,0,val\n",
        ),
        ("m.csv", "path,0,1,2\n0.png,1,0,1\n1.png,0,1,0\n2.png,0,0,0\n"),
    ],
)
def test_manifests_name_several_labels_in_a_cell_or_have_a_column_for_each(name, text, folder):
    (folder / name).write_text(text)
    assert read(folder / name) == EXPECTED


def test_labels_may_have_names_that_other_columns_have(folder):
    (folder / "m.csv").write_text("path,Tags,Mass,Target\n0.png,1,0,1\n1.png,0,1,0\n2.png,0,0,0\n")
    assert read(folder / "m.csv", ("Tags", "Mass", "Target")) == EXPECTED
    (folder / "m.csv").write_text("path,Edema,Mass,Nodule,set\n0.png,1,0,1,1\n1.png,0,1,0,0\n")
    assert read(f"{folder}/m.csv#1") == EXPECTED[:1]
    with pytest.raises(BadRequest, match="it has the splits 1, 0; take one of them"):
        read(folder / "m.csv")


def test_zero_and_one_of_a_single_label_are_decisions(folder):
    (folder / "m.csv").write_text("path,label\n0.png,1\n1.png,0\n2.png,0\n")
    assert read(folder / "m.csv", ("Edema",), 1) == [[1], [0], [0]]
    (folder / "m.csv").write_text("path,label\n0.png,Edema\n1.png,\n2.png,\n")
    assert read(folder / "m.csv", ("Edema",), 1) == [[1], [0], [0]]
    (folder / "m.csv").write_text("path,label\n0.png,0\n1.png,\n2.png,0\n")
    with pytest.raises(BadRequest, match="line 3 has no label, and others have 0; write 0 or 1 in every row"):
        read(folder / "m.csv", ("Edema",), 1)
    assert read(folder / "m.csv", ("0",), 1) == [[1], [0], [1]], "the label is named 0"


def test_lists_name_several_labels_too(folder):
    (folder / "m.txt").write_text("0.png Edema|Nodule\n1.png Mass\n")
    assert read(folder / "m.txt") == EXPECTED[:2]


def test_a_label_with_a_separator_in_its_name_is_one_label(folder):
    (folder / "m.csv").write_text("path,label\n0.png,tench; Tinca tinca\n1.png,goldfish\n")
    assert read(folder / "m.csv", ("tench; Tinca tinca", "goldfish"), 2) == [[1, 0], [0, 1]]
    assert read(folder / "m.csv", ("tench; Tinca tinca", "goldfish"), 2, multilabel=False) == [0, 1]


def test_arrays_have_a_column_for_each_label(tmp_path):
    images = np.zeros((3, 32, 32, 3), np.uint8)
    for truth in (np.array(EXPECTED), np.array(EXPECTED, bool), np.array(EXPECTED, np.float32)):
        np.savez(tmp_path / "a.npz", images=images, labels=truth)
        assert read(tmp_path / "a.npz") == EXPECTED
    with pytest.raises(BadRequest, match=r"several for an image; .* add --outputs multilabel"):
        read(tmp_path / "a.npz", multilabel=False)
    for truth, said in ((np.arange(3), r"\(3, 3\), 0 or 1"), (2 * np.array(EXPECTED), "labels from 0 to 2")):
        np.savez(tmp_path / "a.npz", images=images, labels=truth)
        with pytest.raises(BadRequest, match=said):
            read(tmp_path / "a.npz")


def test_a_folder_gives_images_without_labels(folder):
    (folder / "Mass").mkdir()
    (folder / "0.png").rename(folder / "Mass" / "0.png")
    assert read(folder) == [-1] * 4


def test_a_column_that_could_be_two_labels_is_refused(folder):
    (folder / "m.csv").write_text("path,crane,tench\n0.png,0,1\n")
    with pytest.raises(BadRequest, match="the column 'crane' names 2 labels of the model; name the columns by number"):
        read(folder / "m.csv", names=("n02012849 crane", "n03126707 crane", "n01440764 tench"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("path,label\n0.png,Edema|Rash\n", "label 'Rash' is none of the model's 3 labels"),
        ("path,label\n0.png,Edema||Mass\n", "line 2 has a label without a name"),
        ("path,label\n0.png,0|3\n1.png,1\n", "label 3, but the model's labels are 0 to 2"),
        ("path,Edema,Mass\n0.png,0,1\n", "no column for the label Nodule; give one for each of the 3 labels"),
        ("path,Edema,Mass,Nodule,Rash\n0.png,0,1,0,0\n", "column 'Rash' is no label of the model"),
        ("path,Edema,Mass,Nodule\n0.png,0,1,\n", "unknown columns Nodule; .* Nodule has '' in line 2"),
        ("path,Edema,Mass,Nodule\n0.png,0,1,0\n1.png,0,-1,0\n", "Mass has '-1' in line 3"),
        ("path,Edema,Edema,Nodule\n0.png,0,1,0\n", "two columns are 'Edema'"),
        ("path,Edema,,Nodule\n0.png,0,1,0\n", "a column of 0 and 1 has no name"),
        ("path,Edema,Mass,Nodul\n0.png,0,1,0\n", "column 'Nodul' is no label of the model; did you mean 'Nodule'"),
        (
            "path,label,Edema,Mass,Nodule\n0.png,Mass,0,1,0\n",
            "in a column of names and in Edema, Mass, Nodule; keep one",
        ),
    ],
)
def test_manifests_that_do_not_say_every_label_are_refused(text, said, folder):
    (folder / "m.csv").write_text(text)
    with pytest.raises(BadRequest, match=said):
        read(folder / "m.csv")


def test_columns_without_names_of_labels_need_numbers(folder):
    (folder / "m.csv").write_text("path,Edema,Mass,Nodule\n0.png,0,1,0\n")
    with pytest.raises(BadRequest, match="no names of its labels: name the columns 0 to 2"):
        read(folder / "m.csv", names=())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("path,label\n0.png,Mass\n1.png,Edema|Mass\n", "line 3 has several labels, Edema|Mass"),
        ("path,label\n0.png,1\n1.png,0;1\n", "line 3 has several labels, 0;1"),
        ("path,Edema,Mass,Nodule\n0.png,0,1,0\n", "columns Edema, Mass, Nodule are several labels for an image"),
    ],
)
def test_several_labels_are_refused_where_outputs_are_classes(text, said, folder):
    (folder / "m.csv").write_text(text)
    with pytest.raises(BadRequest) as refusal:
        read(folder / "m.csv", multilabel=False)
    assert said in str(refusal.value)
    assert "add --outputs multilabel" in str(refusal.value)
    assert "\n" not in str(refusal.value)


# The whole program


@pytest.fixture(scope="module")
def scans(artifacts, tmp_path_factory):
    """Images whose labels the tiny network tells better than chance, as a table with a column for each label."""
    root = tmp_path_factory.mktemp("scans")
    for number in range(COUNT):
        small = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize((PX, PX)).save(root / f"{number}.png")
    made = artifacts["onnxruntime", "fp32"]
    runtime = backends.runtime_of(made)
    samples = open_data(made.sidecar, Checks(data=str(root)))
    with runtime.open(made, runtime.options()) as session:
        batches = [(batch.names, run_batch(session, batch.images, None)[0]) for batch in samples.batches(16)]
    names = [name for batch, _ in batches for name in batch]
    logits = np.concatenate([outputs for _, outputs in batches])
    truth = noisy(logits, 0.3 * logits.std(), 5) > np.quantile(logits, 0.7, axis=0)
    with (root / "scans.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", *made.sidecar.labels])
        rows.writerows([name, *map(int, row)] for name, row in zip(names, truth, strict=True))
    return root / "scans.csv"


def corrupted(made, out):
    """The artifact with a head of other signs."""
    model = onnx.load(made.path)
    for tensor in model.graph.initializer:
        if sorted(tensor.dims) == [LABELS, 48]:
            tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), tensor.name))
    out.mkdir()
    return artifact_files.publish(out / made.path.name, made.sidecar, lambda file: onnx.save(model, file))


def test_a_healthy_artifact_passes_and_a_corrupted_one_fails(artifacts, scans, tmp_path):
    options = VerifyOptions(data=str(scans), outputs="multilabel", max_drop=20.0)
    good = verify(artifacts["onnxruntime", "fp32"], options)
    assert good.passed, [finding for finding in good.findings if not finding.passed]
    assert good.value("map") == pytest.approx(good.value("map_eager"))
    assert 50 < good.value("map") < 100
    bad = verify(corrupted(artifacts["onnxruntime", "fp32"], tmp_path / "bad"), options)
    failed = {finding.metric for finding in bad.findings if not finding.passed}
    assert {"map_drop", "label_agreement"} <= failed


def test_the_program_verifies_compares_and_reports_a_multilabel_head(onnx_copy, scans, run, tmp_path):
    bad = corrupted(onnx_copy, tmp_path / "bad")
    files = [tmp_path / "good.report.json", tmp_path / "bad.report.json"]
    for artifact, file, code in zip((onnx_copy, bad), files, (0, 5), strict=True):
        words = ("verify", artifact.path, "--data", scans, "--outputs", "multilabel", "--threshold", 0.4)
        done = run(*words, "-o", file)
        assert done.code == code, done.err
    loaded = report.load(files[0])
    text = markdown.render([loaded])
    assert f"mAP {loaded.value('map'):.2f} %" in text
    assert f"{loaded.value('label_agreement'):.2f} %" in text
    assert '.multilabel" name="map_drop"' in junit.render([loaded])
    assert "at threshold 0.4" in loaded.find("label_agreement").detail
    compared = run("compare", *files, "--fail-on", "map_drop:1", "-o", tmp_path / "c.json")
    assert compared.code == 6, compared.err
    found = report.load(tmp_path / "c.json").findings[0]
    drop = loaded.value("map") - report.load(files[1]).value("map")
    assert (found.metric, found.passed) == ("map_drop", False)
    assert found.value == pytest.approx(drop)
    assert 0 < found.low < drop < found.high
    assert run("compare", files[0], files[0], "--fail-on", "map_drop:0", "-o", tmp_path / "c.json").code == 0
    both = ("--fail-on", "map_drop:1", "--data", scans, "-o", tmp_path / "c.json")
    assert run("compare", onnx_copy.path, bad.path, *both).code == 6
    kept = artifact_files.read_sidecar(onnx_copy.path).quality
    assert kept["map"] == pytest.approx(loaded.value("map"))


def test_reports_on_other_labels_are_not_compared(onnx_copy, scans, refused, run, tmp_path):
    lines = scans.read_text().splitlines()
    flipped = lines[1][:-1] + str(1 - int(lines[1][-1]))
    other = scans.with_name("other.csv")
    other.write_text("\n".join([lines[0], flipped, *lines[2:]]))
    files = [tmp_path / "a.report.json", tmp_path / "b.report.json"]
    for data, file in zip((scans, other), files, strict=True):
        run("verify", onnx_copy.path, "--data", data, "--outputs", "multilabel", "-o", file)
    assert "different images, or with other classes" in refused(2, "compare", *files, "--fail-on", "map_drop:1")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--threshold", 0.3), "only a multi-label head has a threshold; add --outputs multilabel"),
        (("--threshold", 0.3, "--outputs", "values"), "only a multi-label head has a threshold"),
        (("--threshold", 1, "--outputs", "multilabel"), "expected a number above 0 and below 1"),
        (("--max-drop", 1, "--outputs", "multilabel"), "has no labels to measure a drop on"),
        (("--min-r2", 0.5, "--outputs", "multilabel"), "the outputs are multilabel"),
    ],
)
def test_options_that_would_do_nothing_are_refused(words, said, artifacts, refused):
    assert said in refused(2, "verify", artifacts["onnxruntime", "fp32"].path, *words)


def test_a_head_of_one_label_has_no_cosine_to_limit(artifacts):
    made = head(artifacts["onnxruntime", "fp32"]).artifact
    with pytest.raises(BadRequest, match=r"--min-cosine: .* use --min-agreement"):
        verify(made, VerifyOptions(outputs="multilabel", min_cosine=0.9))


@pytest.mark.parametrize("task", ["embed", "features"])
def test_outputs_without_a_head_are_not_multilabel(task, artifacts):
    made = artifacts["onnxruntime", "fp32"]
    other = type(made)(made.path, replace(made.sidecar, task=task))
    with pytest.raises(BadRequest, match=r"the outputs of task .* are features"):
        verify(other, VerifyOptions(outputs="multilabel"))


def test_a_recipe_with_a_threshold_needs_a_multilabel_head(tiny, refused, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"backend: onnxruntime\nprecision: fp32\nmodel: {{weights: {tiny}}}\nchecks: {{threshold: 0.3}}\n"
    )
    assert "only a multi-label head has a threshold" in refused(2, "run", recipe, "-o", tmp_path, folder=tmp_path)


def test_int8_keeps_the_budget_of_map(tiny, scans, run, tmp_path, monkeypatch):
    from exporter.build.int8 import speed

    monkeypatch.setattr(speed, "SECONDS_EACH", 0.3)
    words = ("onnx", "--int8", "--weights", tiny, "--calib-size", 16, "--data", scans, "--outputs", "multilabel")
    done = run(*words, "--max-drop", 30, "--threshold", 0.4, "-o", tmp_path, "--json")
    assert done.code == 0, done.err
    found = {finding["metric"]: finding for finding in done.json["report"]["findings"]}
    assert found["map_drop"]["limit"] == 30
    assert "at threshold 0.4" in found["label_agreement"]["detail"]
    assert "top1_drop" not in found
    assert json.loads((tmp_path / "custom_int8.onnx.json").read_text())["quality"]["map"] > 0


def test_int8_without_labels_keeps_the_budget_of_decisions(tiny, scans, tmp_path):
    from exporter.build import resolve

    search = importlib.import_module("exporter.build.int8.search")  # the package has a function of this name
    recipe = recipe_of(
        precision="int8", weights=str(tiny), data=str(scans.parent), max_drop=12.0, checks=Checks(outputs="multilabel")
    )
    job = resolve(recipe, tmp_path)
    work = prepared(recipe, tmp_path)
    with search.judging(work, tmp_path, search.open_data(job)) as judge:
        candidate = judge(work, ())
    agreement = candidate.report.find("label_agreement")
    assert agreement.limit == 88
    assert candidate.loss == 100 - agreement.value
