"""Openers of models that take as long as a test says; timing processes import this module and little else."""

from __future__ import annotations

import contextlib
from pathlib import Path

from tests.bench.fakes import Fake

EAGER_MS = 8.0
SLOW = {"form": {"plain": 4.0, "linear": 3.0, "conv": 2.0, "nchw": 3.5}, "precision": {"fp32": 1.0, "fp16": 1.0}}


@contextlib.contextmanager
def opened(arm):
    """int8 is twice as fast, `conv` the best form of ONNX Runtime and `nchw` of OpenVINO, two threads help by half."""
    yield Fake(f"{arm.name}@{milliseconds(arm)}")


def words(arm):
    """Runtime, precision and form of an artifact, by its folder."""
    return arm.path.rsplit("/", 2)[1].split("-")[:3]


def is_int8(arm):
    return arm.runtime == "artifact" and "int8" in words(arm)


def milliseconds(arm):
    if arm.runtime == "eager":
        return EAGER_MS
    backend, precision, form = words(arm)
    ms = SLOW["form"][form] if backend == "onnxruntime" else 7.0 - SLOW["form"][form]
    return ms * (0.5 if precision == "int8" else 1.0) * (1.0 if (arm.threads or 2) > 1 else 1.5)


@contextlib.contextmanager
def slow_int8(arm):
    """int8 is slower than fp32, as on a CPU without its instructions."""
    yield Fake(f"{arm.name}@{milliseconds(arm) * (4 if is_int8(arm) else 1)}")


@contextlib.contextmanager
def slow_everything(arm):
    """Nothing beats eager."""
    yield Fake(f"{arm.name}@{EAGER_MS if arm.runtime == 'eager' else 10 + milliseconds(arm)}")


@contextlib.contextmanager
def crashing_int8(arm):
    """int8 brings its process down."""
    yield Fake(f"crash {arm.name}@0.1" if is_int8(arm) else f"{arm.name}@{milliseconds(arm)}")


@contextlib.contextmanager
def crashing(arm):
    """Every artifact brings its process down."""
    yield Fake(f"eager@{EAGER_MS}" if arm.runtime == "eager" else f"crash {arm.name}@0.1")


@contextlib.contextmanager
def slow_eager_at_first(arm):
    """In every third process eager takes ten times as long: in the first of each comparison, which has all models."""
    if arm.runtime == "eager":
        opened = Path(arm.path).parents[1].with_name("opened")
        before = opened.stat().st_size if opened.exists() else 0
        with opened.open("a") as file:
            file.write("x")
        yield Fake(f"eager@{EAGER_MS * (10 if before % 3 == 0 else 1)}")
    else:
        yield Fake(f"{arm.name}@{milliseconds(arm)}")


@contextlib.contextmanager
def crashing_eager(arm):
    """PyTorch brings its process down."""
    yield Fake("crash eager@0.1" if arm.runtime == "eager" else f"{arm.name}@{milliseconds(arm)}")
