"""`make rivals`: make, time and write what is not there yet; print the tables and draw the pictures."""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec

from benchmarks.rivals import BATCHES, NETWORKS, Race, engines, memory, pictures, sizes, table, timing
from exporter.artifact.disk import write_file

ALL = sorted({*sizes.SIZES, *sizes.OF_WINDOWS})


def main() -> None:
    """One batch size after the other, then the input sizes, then engines; what was written stays."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, help="Folder for the JSON files.")
    names = [network.name for network in NETWORKS]
    parser.add_argument("--network", nargs="+", choices=names, default=names)
    parser.add_argument("--batch", nargs="*", type=int, default=BATCHES)
    parser.add_argument("--size", nargs="*", type=int, choices=ALL, default=ALL, help="Input sizes; by default all.")
    parser.add_argument("--no-engines", action="store_true", help="Skip the engines of TensorRT-RTX.")
    parser.add_argument("--memory", action="store_true", help="Measure the memory again, and no times.")
    parser.add_argument(
        "--seconds",
        type=float,
        default=120.0,
        help="Of timing for each batch size; each input size takes a quarter of it.",
    )
    arguments = parser.parse_args()
    networks = [network for network in NETWORKS if network.name in arguments.network]
    for batch in arguments.batch:
        path = arguments.output / f"batch-{batch}.json"
        if arguments.memory:
            if not path.exists():
                parser.error(f"--memory: {path} is missing; time the race first")
            race = msgspec.json.decode(path.read_bytes(), type=Race)
            write_file(path, msgspec.json.encode(memory.measured_again(race)))
        elif not path.exists():
            write_file(path, msgspec.json.encode(timing.time_race(networks, batch, arguments.seconds)))
        race = msgspec.json.decode(path.read_bytes(), type=Race)
        write_file(path.with_suffix(".svg"), pictures.accuracy(race).encode())
        print(table.races(race), *([table.control(race)] if batch == 1 else []), sep="\n", flush=True)
    path = arguments.output / "sizes.json"
    if not path.exists() and arguments.size:
        write_file(path, msgspec.json.encode(sizes.time_sizes(networks, arguments.seconds / 4, arguments.size)))
    if path.exists():
        result = msgspec.json.decode(path.read_bytes(), type=sizes.Sizes)
        write_file(path.with_suffix(".svg"), pictures.latency_by_size(result).encode())
        print(table.by_size(result))
    path = arguments.output / "engines.json"
    if not path.exists() and not arguments.no_engines:
        write_file(path, msgspec.json.encode(engines.build_all(networks)))
    if path.exists():
        print(engines.table(msgspec.json.decode(path.read_bytes(), type=engines.Engines)))


if __name__ == "__main__":
    main()
