"""Does `optimize` choose the best? Its choice, again and again, beside a long measurement of everything it built.

    python -m benchmarks.optimize --weights W.safetensors --data photos/val --calib photos/train -o optimize.json

The first search is timed as a whole. Then everything that it built is timed in turn, with every number of threads and
without dropping anything. Then the search is repeated, with the artifacts and their verification kept and every timing
done anew, and its choice is compared with the best of the long measurement. With `--repetitions 0` there is only the
first search.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import exp
from pathlib import Path
from unittest import mock

import msgspec

from benchmarks.provenance import environment
from exporter import optimize
from exporter.artifact.disk import write_file
from exporter.artifact.sidecar import Record
from exporter.bench import worker
from exporter.cli.console import drawing
from exporter.optimize import Request, candidates, tables
from exporter.optimize.result import Result as Search
from exporter.optimize.result import Row
from exporter.optimize.search import Search as Searcher
from exporter.optimize.search import runs_of, threads_to_try
from exporter.optimize.store import Store
from exporter.recipe import Export, Model, PreprocessingOptions, Quantization

PROCESSES = 12
WITHIN = 1.03


class Choice(Record, frozen=True):
    """What one repetition chose, and how many times slower that is than the best of the long measurement."""

    chosen: str
    slower: float
    seconds: float


class Result(Record, frozen=True):
    """The first search, the speed-ups over eager of the long measurement, and the repetitions."""

    environment: dict[str, object]
    model: str
    search: Search
    speedups: dict[str, float]
    choices: tuple[Choice, ...] = ()


def tried_table(result: Result) -> str:
    """The artifacts that were verified, the chosen one first, and the sentence of the command."""
    whole = tables.tried(result.search)
    keep = [index for index, column in enumerate(whole.columns) if column != "reason"]
    rows = [row for row in whole.rows if row[0] and row[whole.columns.index(whole.right[-1])] != "–"]
    lines = [
        f"| {' | '.join(whole.columns[index] or 'state' for index in keep)} |",
        f"|{'|'.join('--:' if whole.columns[index] in whole.right else '---' for index in keep)}|",
        *(f"| {' | '.join(row[index] for index in keep)} |" for row in rows),
    ]
    return "\n".join(lines) + f"\n\n{tables.sentence(result.search)}.\n"


def picture(result: Result) -> str:
    """The chart of a search as a file of its own, on white."""
    return on_white(tables.chart(result.search))


def on_white(chart: str) -> str:
    """A chart of the report page as a file of its own, on white."""
    svg = chart.replace("currentColor", "#1c1e21").replace("var(--faint)", "#d5d8dc")
    namespace = "" if "xmlns=" in svg else 'xmlns="http://www.w3.org/2000/svg" '
    return svg.replace("<svg ", f'<svg style="background: #fff" {namespace}', 1) + "\n"


def table(results: Sequence[Result]) -> str:
    """How long the first search of each model took, and how good the choices of its repetitions were."""
    lines = [
        "| model | first search | repetitions | choice within 3 % of the best | worst choice |",
        "|---|--:|--:|--:|--:|",
    ]
    for result in results:
        cells = [result.model, f"{result.search.seconds / 60:.1f} min", "–", "–", "–"]
        if result.choices:
            good, count = sum(choice.slower <= WITHIN for choice in result.choices), len(result.choices)
            worst = max(choice.slower for choice in result.choices)
            cells[2:] = [str(count), f"{good} of {count}", f"{100 * (worst - 1):.1f} % slower"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def name_of(row: Row) -> str:
    """The name of a row as races have it."""
    candidate = candidates.Candidate(backend=row.backend, precision=row.precision, form=row.form, scope=row.scope)
    (run,) = runs_of([candidate], [row.threads or 1], (row.hint or "latency",))
    return run.name


def exhaustive(request: Request, out: Path) -> dict[str, float]:
    """The speed-up over eager of everything that a search built, timed without dropping anything."""
    listed, skipped = candidates.find(request)
    search = Searcher(request, out, listed, skipped, worker.open_arm)
    built = [one for one in listed if search.store.read(f"built-{one.name}", msgspec.Raw) is not None]
    search.builds = {one: search.builder.build(one) for one in built}
    runs = runs_of(built, threads_to_try(request), ("latency",))
    groups = {run.name: "all" for run in runs}
    contest = search.time_runs("everything", runs, groups, 0.4, PROCESSES, PROCESSES, len(runs))
    return {name: exp(contest.runner.speed(name)) for name in contest.runner.standing("all")}


@contextmanager
def kept_artifacts() -> Iterator[None]:
    """Inside this block, searches keep what they built."""
    with mock.patch.object(Store, "drop_artifacts"):
        yield


def repetition(request: Request, out: Path, speedups: dict[str, float]) -> Choice:
    """The choice of a search whose timing is done anew."""
    for path in (out / "optimize").rglob("*.json"):
        if path.name.startswith("race-") or path.name in ("result.json", "report.json"):
            path.unlink()
    begin = time.monotonic()
    chosen = name_of(optimize.optimize(request, out).result.winner)
    slower = max(speedups.values()) / speedups[chosen]
    return Choice(chosen=chosen, slower=slower, seconds=round(time.monotonic() - begin, 1))


def main() -> None:
    """Run everything; the result is written after each repetition."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="random:0")
    parser.add_argument("--variant")
    parser.add_argument("--data")
    parser.add_argument("--calib", default="synthetic")
    parser.add_argument("--imgsz", type=int)
    parser.add_argument("--resize", type=int)
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("-o", type=Path, default=Path("build/optimize.json"))
    arguments = parser.parse_args()
    request = Request(
        model=Model(weights=arguments.weights, variant=arguments.variant),
        export=Export(imgsz=arguments.imgsz),
        preprocessing=PreprocessingOptions(resize=arguments.resize),
        quantization=Quantization(calib=arguments.calib, data=arguments.data),
    )
    with tempfile.TemporaryDirectory() as folder, kept_artifacts(), drawing():
        out = Path(folder)
        first = optimize.optimize(request, out).result
        model = (
            Path(arguments.weights).stem if arguments.variant is None else f"{arguments.variant}, {arguments.weights}"
        )
        speedups = exhaustive(request, out) if arguments.repetitions else {}
        result = Result(environment=environment(), model=model, search=first, speedups=speedups)
        for number in range(1, arguments.repetitions + 1):
            choice = repetition(request, out, result.speedups)
            result = msgspec.structs.replace(result, choices=(*result.choices, choice))
            write_file(arguments.o, msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
            print(f"{number}: {choice.chosen}, {choice.slower:.3f} × slower than the best", file=sys.stderr)
        write_file(arguments.o, msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    print(table([result]))


if __name__ == "__main__":
    main()
