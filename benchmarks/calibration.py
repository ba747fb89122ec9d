"""The calibration sets that ship, made anew: `python -m benchmarks.calibration` writes `calibration/*.tsv`."""

from __future__ import annotations

import random
from pathlib import Path

from benchmarks.digits import HELD_OUT, order
from exporter.data import calibration, synthetic
from exporter.data.calibration import Entry, Manifest
from exporter.data.generators import GENERATORS, digits

FOLDER = Path(__file__).parent.parent / "calibration"
COUNT, PIXELS = 256, 224


def digits_256() -> Manifest:
    """As `calibrate --calib-size 256` draws them from a folder with the digits that `make demo` trains with."""
    name, labels, rows = "sklearn.datasets.load_digits", digits()[1], order()[:-HELD_OUT]
    by_class: dict[str, list[str]] = {str(digit): [] for digit in range(10)}
    for index, row in enumerate(rows):
        by_class[str(labels[row])].append(f"{index:04}")
    drawn = calibration.stratified(by_class, COUNT, random.Random(0))
    chosen = [int(rows[int(index)]) for index, _ in sorted(drawn, key=lambda pair: (pair[1], pair[0]))]
    return Manifest(
        generator=name,
        pixels=8,
        source="Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI 1998, doi.org/10.24432/C50P49",
        license="CC BY 4.0; they are in scikit-learn (BSD-3-Clause)",
        rule=f"{COUNT} of {len(rows)} images, equally from 10 classes; grey level round(255 / 16 × value), three times",
        entries=tuple(
            Entry(sha256=GENERATORS[name].digest(row, 8), path=str(row), label=str(labels[row])) for row in chosen
        ),
    )


def synthetic_256(count: int = COUNT) -> Manifest:
    """The images of `--calib synthetic`: the seeds 0 … 255."""
    maker = GENERATORS[synthetic.NAME]
    return Manifest(
        generator=synthetic.NAME,
        pixels=PIXELS,
        source="exporter/data/synthetic.py, after Lee, Mumford and Huang, IJCV 2001",
        license="Apache-2.0",
        rule=f"the seeds from 0 to {COUNT - 1}, drawn at the size of the network's input",
        entries=tuple(Entry(sha256=maker.digest(seed, PIXELS), path=str(seed)) for seed in range(count)),
    )


def main() -> None:
    """Write them."""
    calibration.write(digits_256(), FOLDER / "digits-256.tsv")
    calibration.write(synthetic_256(), FOLDER / "synthetic-256.tsv")


if __name__ == "__main__":
    main()
