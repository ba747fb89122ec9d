"""Measure the memory in the result of a race again, after a change of how it is measured."""

from __future__ import annotations

import sys
from pathlib import Path

from msgspec.structs import replace

from benchmarks.provenance import commit
from benchmarks.rivals import NETWORKS, ROOT, SIZE, WAYS, Race, Row, files, timing
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


def measured_again(race: Race) -> Race:
    """A race with the memory of each row measured again; its times stay."""
    rows = tuple(measured(row, race.batch) for row in race.rows)
    return replace(race, rows=rows, memory_commit=commit())
