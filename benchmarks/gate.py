"""Does the gate cry wolf, and does it bite? One artifact against itself, with and without a slow-down put in.

`python -m benchmarks.gate ARTIFACT -o benchmarks/results/MACHINE/gate.json` makes, in random order:

* A/A: 200 comparisons of the artifact with itself, half of them with a load generator on one core: no alarm is true;
* A/B: 60 with every run of the head made 10 % longer, 60 with 5 %; no silence is.

Beside each stands what a plain threshold says: medians of two separate processes, 10 runs to warm up and 100 timed,
the later against the one before it under the same load. It goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.provenance import environment
from exporter import artifact as artifacts
from exporter.artifact import Artifact
from exporter.artifact.disk import write_file
from exporter.artifact.sidecar import Record
from exporter.backends import Array, Bound, Session
from exporter.bench import Arm, Plan, supervisor, worker
from exporter.compare import parse_limits
from exporter.compare.artifacts import HEAD, CompareOptions, Pair, compare_times
from exporter.stats import proportion

SLOWER = (0.0, 5.0, 10.0)


class Kind(Record, frozen=True):
    """One kind of trial: percent put in, the gate's limit in percent, and whether the other core is kept busy."""

    name: str
    slower_pct: float
    limit_pct: float
    loaded: bool
    count: int


KINDS = (
    Kind(name="A/A", slower_pct=0, limit_pct=2, loaded=False, count=100),
    Kind(name="A/A, one core loaded", slower_pct=0, limit_pct=2, loaded=True, count=100),
    Kind(name="A/B 10 %", slower_pct=10, limit_pct=5, loaded=False, count=60),
    Kind(name="A/B 5 %", slower_pct=5, limit_pct=2, loaded=False, count=60),
)


class Trial(Record, frozen=True):
    """One comparison: what the gate saw and said, the median in ms of a plain run of the head, and the commit of the
    code, "" for that of the environment."""

    kind: str
    seconds: float
    change_pct: float
    low_pct: float
    high_pct: float
    alarm: bool
    again: bool
    detail: str
    plain_ms: float
    commit: str = ""


class Experiment(Record, frozen=True):
    """All trials, and the machine they were made on."""

    environment: dict[str, object]
    artifact: dict[str, object]
    kinds: tuple[Kind, ...]
    trials: tuple[Trial, ...]
    schema: int = 1


class Slower:
    """A session whose every run takes longer by a fixed share of itself."""

    def __init__(self, session: Session, share: float) -> None:
        self.session, self.share, self.facts, self.streams = session, share, session.facts, session.streams

    def __call__(self, images: Array) -> tuple[Array, ...]:
        """Run, no slower."""
        return self.session(images)

    def bind(self, batches: Sequence[Array]) -> Bound:
        """The session's own, and then waiting, awake."""
        bound = self.session.bind(batches)
        clock = time.perf_counter_ns

        def run() -> None:
            begin = clock()
            bound.run()
            until = begin + int((clock() - begin) * (1 + self.share))
            while clock() < until:
                pass

        return Bound(run, bound.outputs, bound.streams)


@contextlib.contextmanager
def _open(arm: Arm, slower_pct: float) -> Iterator[Session]:
    with worker.open_arm(arm) as session:
        yield Slower(session, slower_pct / 100) if arm.name == HEAD and slower_pct else session


def open_0(arm: Arm) -> contextlib.AbstractContextManager[Session]:
    """Nothing put in."""
    return _open(arm, 0)


def open_5(arm: Arm) -> contextlib.AbstractContextManager[Session]:
    """5 % put into the head."""
    return _open(arm, 5)


def open_10(arm: Arm) -> contextlib.AbstractContextManager[Session]:
    """10 % put into the head."""
    return _open(arm, 10)


OPENERS = {0.0: open_0, 5.0: open_5, 10.0: open_10}


@contextlib.contextmanager
def load(wanted: bool) -> Iterator[None]:
    """Within, another process keeps one core busy."""
    if not wanted:
        yield
        return
    code = "import os, numpy as np\na, p = np.ones((256, 256), 'f4'), os.getppid()\nwhile os.getppid() == p: a @ a"
    one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    generator = subprocess.Popen([sys.executable, "-c", code], env=one)
    try:
        yield
    finally:
        generator.kill()
        generator.wait()


def plain_run(path: Path, slower_pct: float) -> float:
    """Median milliseconds of 100 runs after 10, in a process of its own: what the neighbours do."""
    words = [sys.executable, "-m", "benchmarks.gate", str(path), "--plain", str(slower_pct)]
    return float(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def plain(path: Path, slower_pct: float) -> float:
    """The body of that process."""
    name = HEAD
    arm = Arm(name=name, path=str(path), threads=1)
    plan = Plan(arms=(arm,), preprocessing=artifacts.load(path).sidecar.preprocessing)
    taken = []
    with OPENERS[slower_pct](arm) as session:
        run = session.bind(worker.inputs(plan)).run
        for _ in range(10):
            run()
        for _ in range(100):
            begin = time.perf_counter_ns()
            run()
            taken.append((time.perf_counter_ns() - begin) / 1e6)
    return float(np.median(taken))


def trial(made: Artifact, kind: Kind, seed: int, commit: str) -> Trial:
    """One comparison and one plain run."""
    with load(kind.loaded):
        begin = time.perf_counter()
        limits = parse_limits([f"p50_ms:{kind.limit_pct:g}%"])
        options = CompareOptions(seed=seed)
        (finding,) = compare_times(Pair(made, made), limits, options, OPENERS[kind.slower_pct])
        seconds = time.perf_counter() - begin
        plain_ms = plain_run(made.path, kind.slower_pct)
    assert finding.value is not None
    assert finding.low is not None
    assert finding.high is not None
    return Trial(
        kind=kind.name,
        seconds=round(seconds, 1),
        change_pct=round(finding.value, 2),
        low_pct=round(finding.low, 2),
        high_pct=round(finding.high, 2),
        alarm=not finding.passed,
        again=len(finding.samples) > supervisor.PROCESSES,
        detail=finding.detail,
        plain_ms=round(plain_ms, 4),
        commit=commit,
    )


def commits(experiment: Experiment) -> str:
    """The commits of the trials; an experiment that was stopped may go on with later code."""
    first = str(experiment.environment.get("commit", ""))
    return ", ".join(dict.fromkeys(filter(None, (first, *(one.commit for one in experiment.trials)))))


def plain_alarms(experiment: Experiment, kind: Kind) -> list[bool]:
    """What the plain threshold says of each trial: against a run with nothing put in, the one before it."""
    calm = next(other for other in experiment.kinds if not other.slower_pct and other.loaded == kind.loaded)
    base: float | None = None
    found = []
    for one in experiment.trials:
        if one.kind == kind.name and base is not None:
            found.append(one.plain_ms > base * (1 + kind.limit_pct / 100))
        if one.kind == calm.name:
            base = one.plain_ms
    return found


def table(experiment: Experiment) -> str:
    """Markdown: a row for each kind of trial."""
    lines = [
        "| comparison | limit | alarms of the gate | alarms of a plain threshold | seconds (median, longest) |",
        "|---|--:|--:|--:|--:|",
    ]
    for kind in experiment.kinds:
        trials = [one for one in experiment.trials if one.kind == kind.name]
        if not trials:
            continue
        seconds = sorted(one.seconds for one in trials)
        ours, theirs = (_share(alarms) for alarms in ([t.alarm for t in trials], plain_alarms(experiment, kind)))
        spent = f"{seconds[len(seconds) // 2]:.1f}, {seconds[-1]:.1f}"
        lines.append(f"| {kind.name} | {kind.limit_pct:g} % | {ours} | {theirs} | {spent} |")
    return "\n".join(lines) + "\n"


def _share(alarms: list[bool]) -> str:
    if not alarms:
        return "–"
    found = proportion(sum(alarms), len(alarms))
    return f"{sum(alarms)} of {len(alarms)} ({found.low:.1f}–{found.high:.1f} %)"


def main() -> None:
    """Make the trials that are still missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--plain", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plain is not None:
        print(plain(arguments.artifact, arguments.plain))
        return
    made = artifacts.load(arguments.artifact)
    order = list(itertools.chain.from_iterable([kind] * kind.count for kind in KINDS))
    random.Random(0).shuffle(order)
    facts: dict[str, object] = {"variant": made.sidecar.variant, "sha256": made.sidecar.sha256, "name": made.path.name}
    here = environment(threads=1)
    experiment = Experiment(environment=here, artifact=facts, kinds=KINDS, trials=())
    if arguments.output.exists():
        experiment = msgspec.json.decode(arguments.output.read_bytes(), type=Experiment)
    for index in range(len(experiment.trials), len(order)):
        done = (*experiment.trials, trial(made, order[index], index, str(here["commit"])))
        experiment = msgspec.structs.replace(experiment, trials=done)
        write_file(arguments.output, msgspec.json.format(msgspec.json.encode(experiment), indent=1) + b"\n")
        print(f"{index + 1} of {len(order)}: {done[-1].kind}: {done[-1].detail}", file=sys.stderr, flush=True)
    print(table(experiment))


if __name__ == "__main__":
    main()
