"""`make bench-peers`: make, time and write what is not there yet; print the tables."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec

from benchmarks.peers import BATCHES, ROOT, VARIANTS, table, timing
from exporter.artifact.disk import write_file
from exporter.errors import ExporterError, first_line


def main() -> None:
    """Case by case; what was written stays."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, help="Folder for one JSON file a case.")
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--batch", nargs="+", type=int, choices=BATCHES, default=BATCHES)
    parser.add_argument("--seconds", type=float, default=60.0, help="Of timing, for each case.")
    arguments = parser.parse_args()
    for variant in arguments.variant:
        for batch in arguments.batch:
            path = arguments.output / f"{variant}-b{batch}.json"
            if not path.exists():
                print(f"{variant}, batch {batch}", file=sys.stderr, flush=True)
                try:
                    case = timing.time_case(variant, batch, Path(ROOT), arguments.seconds)
                except (ExporterError, OSError, RuntimeError, ValueError) as error:
                    # The cases after it are timed, and the tables of those before it printed.
                    print(f"{variant}, batch {batch}: {first_line(error)}", file=sys.stderr, flush=True)
                    continue
                write_file(path, msgspec.json.encode(case))
    for case in table.load(arguments.output):
        print(f"\n{case.variant}, batch {case.batch}\n\n{table.case_table(case)}")
    print(table.summary(table.load(arguments.output)))


if __name__ == "__main__":
    main()
