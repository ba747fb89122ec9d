"""Measure the memory in the results of races again, for a change of how it is measured; times stay as they are.

python -m benchmarks.rivals.memory benchmarks/results/MACHINE/rivals/batch-8.json

Files that are missing below `build/rivals` are made again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec
from msgspec.structs import replace

from benchmarks.provenance import commit
from benchmarks.rivals import NETWORKS, ROOT, SIZE, WAYS, Race, Row, files, timing
from exporter.artifact.disk import write_file
from exporter.bench import supervisor


def measured(row: Row, batch: int) -> Row:
    """A row with the memory of a fresh process; None where the process fails."""
    if row.failure:
        return row
    network = next(one for one in NETWORKS if one.name == row.network)
    kind = (row.way, row.runtime, row.precision)
    way = next(one for one in WAYS if (one.name, one.runtime, one.precision) == kind)
    arm = timing.arm_of(network, way, files.make(network, way, batch, SIZE, Path(ROOT)))
    cold = supervisor.measure_cold(arm, timing.plan_of([arm], batch, seconds=0))
    peak_bytes = None if isinstance(cold, str) else cold.peak_bytes
    print(f"{arm.name}: {row.peak_bytes} → {peak_bytes}", file=sys.stderr, flush=True)
    return replace(row, peak_bytes=peak_bytes)


def main() -> None:
    """Each file is written when all of its rows are measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    for path in parser.parse_args().results:
        race = msgspec.json.decode(path.read_bytes(), type=Race)
        rows = tuple(measured(row, race.batch) for row in race.rows)
        write_file(path, msgspec.json.encode(replace(race, rows=rows, memory_commit=commit())))


if __name__ == "__main__":
    main()
