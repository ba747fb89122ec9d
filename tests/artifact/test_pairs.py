"""A graph and the weights beside it are replaced together: a stock reader never sees a mixture, at whatever moment."""

import multiprocessing
from collections import Counter
from contextlib import suppress

import numpy as np
import pytest

from exporter import artifact
from exporter.artifact import readers, sidecar_path

CONTEXT = multiprocessing.get_context("spawn")
SIZE = 50_000


def value_of(path):
    """What a stock OpenVINO reads: the number in the graph's name, and the number in its weights; None for no file."""
    import openvino as ov

    try:
        model = ov.Core().read_model(path)
    except RuntimeError as error:
        # OpenVINO looks for the file first and opens it later; it may be gone at either time.
        absent = ("file_exists(path)", "Could not open the file", "ir_model != nullptr")
        if any(text in str(error) for text in absent):
            return None
        raise
    (weights,) = (op.data for op in model.get_ops() if op.get_type_name() == "Constant")
    return int(model.get_friendly_name()), int(weights.reshape(-1)[0])


def write(path, number):
    import openvino as ov
    from openvino import opset13 as ops

    given = ops.parameter([SIZE], np.float32)
    total = ops.add(given, ops.constant(np.full(SIZE, number, np.float32)))
    ov.save_model(ov.Model([total], [given], str(number)), path, compress_to_fp16=False)


def read_on(path, stop, answers):
    """Read until `stop`; put the count of each answer."""
    seen = Counter()
    while not stop.is_set():
        try:
            seen[value_of(path)] += 1
        except RuntimeError as error:
            seen[str(error)] += 1
    answers.put(seen)


@pytest.fixture
def target(onnx_copy):
    """The path of an artifact of two files, and its sidecar."""
    return onnx_copy.path.with_name("m.xml"), onnx_copy.sidecar


def publish(target, number):
    path, sidecar = target
    artifact.publish(path, sidecar, lambda file: write(file, number))


def test_a_stock_reader_of_an_artifact_that_is_built_on_and_on_never_sees_a_mixture(target):
    publish(target, 0)
    stop, answers = CONTEXT.Event(), CONTEXT.Queue()
    reader = CONTEXT.Process(target=read_on, args=(str(target[0]), stop, answers))
    reader.start()
    try:
        for number in range(1, 151):
            publish(target, number)
    finally:
        stop.set()
        seen = answers.get(timeout=60)
        reader.join()
    whole = {key: count for key, count in seen.items() if key is not None}
    assert len(whole) > 20, "it read while models were replaced"
    assert not {key: count for key, count in whole.items() if isinstance(key, str) or key[0] != key[1]}


class Killed(BaseException):
    """In place of SIGKILL: nothing is cleaned up after it."""


@pytest.mark.parametrize("last", range(8))
def test_at_no_step_of_a_replacement_is_there_a_mixture(last, target, monkeypatch):
    publish(target, 1)
    steps = []

    def counted(action):
        def step(*arguments, **options):
            if len(steps) == last:
                raise Killed
            steps.append(action)
            return action(*arguments, **options)

        return step

    with monkeypatch.context() as patch:
        for name in ("replace", "unlink", "rmdir"):
            patch.setattr(artifact.Path, name, counted(getattr(artifact.Path, name)))
        patch.setattr(artifact.disk.shutil, "rmtree", lambda *_, **__: None)
        with suppress(Killed):
            publish(target, 2)
    assert value_of(target[0]) in (None, (1, 1), (2, 2))
    artifact.load(target[0])  # completes it
    assert value_of(target[0]) in ((1, 1), (2, 2))
    assert not [path.name for path in target[0].parent.iterdir() if path.suffix in (".old", ".commit")]


def test_a_reader_that_has_opened_the_old_graph_still_finds_its_weights(target, monkeypatch):
    publish(target, 1)
    seen = []
    real = readers._is_closed

    def look(handle):
        seen.append((target[0].exists(), value_of_weights(target[0])))
        if len(seen) == 3:
            reader.close()
        return real(handle)

    reader = target[0].open("rb")
    monkeypatch.setattr(readers, "_is_closed", look)
    publish(target, 2)
    assert seen[:3] == [(False, 1)] * 3, "the old weights stay while the old graph is open"
    assert value_of(target[0]) == (2, 2)


def value_of_weights(path):
    return int(np.fromfile(path.with_suffix(".bin"), np.float32)[0])


def test_weights_that_do_not_change_leave_the_graph_where_it_is(target, monkeypatch):
    publish(target, 1)
    monkeypatch.setattr(
        artifact, "wait_until_closed", lambda path: pytest.fail("taken away") if path.exists() else None
    )
    publish(target, 1)
    assert sidecar_path(target[0]).is_file()
