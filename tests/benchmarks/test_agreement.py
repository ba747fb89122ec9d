"""The comparison with other timers leaves no process behind."""

import itertools
import sys
import time

import psutil
import pytest

from benchmarks import agreement


def test_an_interrupt_ends_both_commands(monkeypatch):
    calls, sleep = itertools.count(), time.sleep

    def interrupted(seconds):
        sleep(0.05)
        if next(calls) > 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(agreement.time, "sleep", interrupted)
    words = [sys.executable, "-c", "import time; time.sleep(61)"]
    with pytest.raises(KeyboardInterrupt):
        agreement.alternated(words, words)
    assert not [one for one in psutil.Process().children() if "time.sleep(61)" in " ".join(one.cmdline())]
