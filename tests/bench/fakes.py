"""Sessions that do what a test wants, opened by the timing process: the name of the arm says how they behave.

They move a clock of their own, which replaces that of the timing process: how long a run takes does not depend on what
else the machine does.
"""

import contextlib
import os
import random
import signal
import sys
import time
import weakref

import numpy as np

from exporter.backends import Bound
from exporter.bench import worker


class Clock:
    """Nanoseconds that pass when a run says so, and one microsecond at each look."""

    def __init__(self):
        self.now, self.noise = 0, random.Random(0)

    def __call__(self):
        self.now += 1000
        return self.now

    def take(self, ms):
        """Let some milliseconds pass, two percent more or less."""
        self.now += int(ms * 1e6 * self.noise.gauss(1, 0.02))


CLOCK = Clock()
OPENED = []
SESSIONS = []


class Fake:
    """Gives the sum of each image, after some milliseconds."""

    def __init__(self, name):
        if worker.CLOCK is not CLOCK:
            CLOCK.now, worker.CLOCK = worker.CLOCK(), CLOCK
        OPENED.append(name)
        self.name, self.facts = name, {"device": "cpu", "arithmetic": "fp32"}
        self.facts |= {"process": str(os.getpid()), "parent": str(os.getppid()), "opened": str(len(OPENED))}
        self.facts["imported"] = ", ".join({"torch", "onnxruntime", "openvino"} & set(sys.modules))
        self.facts["loaded"] = f"imported: {self.facts['imported']}"
        self.ms = float(name.partition("@")[2] or 1)

    def __call__(self, images):
        return (self.answer(images),)

    def answer(self, images):
        summed = images.reshape(len(images), 3, -1).sum(-1)
        if self.name.startswith("wrong"):
            return summed[:, ::-1] * [1, -1, 1]
        return np.full_like(summed, np.nan) if self.name.startswith("nan") else summed

    def bind(self, batches):
        runs = 0

        def run():
            nonlocal runs
            runs += 1
            CLOCK.take(self.ms)
            if runs == 25:  # after the shortest warm-up, of 20 runs
                misbehave(self.name)

        return Bound(run, lambda: (self.answer(batches[runs % len(batches)]),))


def misbehave(name):
    if name.startswith("crash"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if name.startswith("hang"):
        time.sleep(3600)
    if name.startswith("raise"):
        raise RuntimeError("out of\nmemory")
    if name.startswith("exit"):
        os._exit(7)


@contextlib.contextmanager
def opened(arm):
    if arm.name.startswith("closed"):
        raise ValueError("no such device")
    yield Fake(arm.name)


@contextlib.contextmanager
def alone_in_memory(arm):
    """Refused while a session that was opened before is in memory."""
    if any(session() is not None for session in SESSIONS):
        raise ValueError("another session is in memory")
    session = Fake(arm.name)
    SESSIONS.append(weakref.ref(session))
    yield session


@contextlib.contextmanager
def choosing(arm):
    """A product, which each process would choose by itself."""
    session = Fake(arm.name)
    session.facts["product"] = arm.product or f"of process {os.getpid()}"
    yield session


@contextlib.contextmanager
def slower_head(arm):
    """Two milliseconds, and 40 % more for the head of a comparison."""
    yield Fake(f"{arm.name}@{2.8 if arm.name == 'head' else 2.0}")


@contextlib.contextmanager
def same(arm):
    """Two milliseconds each."""
    yield Fake(f"{arm.name}@2")


@contextlib.contextmanager
def crashing_head(arm):
    """The head brings its process down."""
    yield Fake("crash@0.1" if arm.name == "head" else f"{arm.name}@0.1")


@contextlib.contextmanager
def nan_head(arm):
    """The head is faster, and gives no numbers."""
    yield Fake("nan@1" if arm.name == "head" else f"{arm.name}@2")


def by_form(arm, **behaviours):
    """What the form in an artifact's path is said to do; the others take two milliseconds."""
    words = [word for form, word in behaviours.items() if f"/{form}/" in arm.path and arm.runtime == "artifact"]
    return Fake(words[0] if words else "any@2")


@contextlib.contextmanager
def nchw_is_faster(arm):
    """Twice as fast in one form."""
    yield by_form(arm, nchw="any@1")


@contextlib.contextmanager
def nchw_is_wrong(arm):
    """Twice as fast in one form, with other answers."""
    yield by_form(arm, nchw="wrong@1")


@contextlib.contextmanager
def nchw_crashes(arm):
    """Fast in one form, until it crashes."""
    yield by_form(arm, nchw="crash@0.2")


@contextlib.contextmanager
def plain_is_closed(arm):
    """The form that the others are held against cannot be opened."""
    if "/plain/" in arm.path and arm.runtime == "artifact":
        raise ValueError("no such device")
    yield by_form(arm)


@contextlib.contextmanager
def int8_is_slower(arm):
    """Three milliseconds in int8, two in other precisions."""
    yield Fake("any@3" if "int8" in arm.path.rpartition("/")[2] else "any@2")


@contextlib.contextmanager
def int8_is_faster(arm):
    """One millisecond in int8, two in other precisions."""
    yield Fake("any@1" if "int8" in arm.path.rpartition("/")[2] else "any@2")


@contextlib.contextmanager
def int8_is_alike(arm):
    """Two milliseconds in every precision."""
    yield Fake("any@2")


@contextlib.contextmanager
def int8_is_closed(arm):
    """Int8 cannot be opened."""
    if "int8" in arm.path.rpartition("/")[2]:
        raise ValueError("no such kernel")
    yield Fake("any@2")
