"""What is timed is timed alone, on every system."""

import subprocess
import sys
import textwrap

import pytest

from exporter.bench import turns
from tests.conftest import ROOT

AT_WORK = """
    import sys
    if sys.argv[2] == "without":
        sys.modules["fcntl"] = None
    import time
    from pathlib import Path
    from exporter.bench import turns
    with turns.sharing(Path(sys.argv[1])):
        print("at work", flush=True)
        sys.stdin.readline()
        with turns.alone():
            print("alone", time.monotonic(), flush=True)
            time.sleep(0.3)
            print("done", time.monotonic(), flush=True)
"""


@pytest.mark.parametrize("fcntl", ["with", "without"])
def test_of_two_that_time_one_waits_for_the_other(fcntl, tmp_path):
    if fcntl == "with" and turns.fcntl is None:
        pytest.skip("this system has no fcntl")
    (tmp_path / "turn").touch()
    words = [sys.executable, "-c", textwrap.dedent(AT_WORK), tmp_path / "turn", fcntl]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    both = [subprocess.Popen(words, **pipes) for _ in range(2)]
    assert [one.stdout.readline() for one in both] == ["at work\n"] * 2
    both[0].stdin.write("\n")
    both[0].stdin.flush()
    with pytest.raises(subprocess.TimeoutExpired):  # the other is still at work
        both[0].wait(1)
    found = [one.communicate("\n" if one is both[1] else None, timeout=60)[0].split() for one in both[::-1]]
    assert [one.returncode for one in both] == [0, 0]
    spans = sorted((float(begin), float(end)) for _, begin, _, end in found)
    assert spans[0][1] <= spans[1][0]
