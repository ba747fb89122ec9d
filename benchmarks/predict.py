"""How fast `predict` is from JPEG files: beside decoding alone, inference alone, and the loop that people write.

    python -m benchmarks.predict ARTIFACT FOLDER -o FILE

The four take turns, in processes of their own, with all cores each.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import numpy as np

from benchmarks.provenance import environment
from exporter import artifact as artifacts
from exporter import backends, predict
from exporter.artifact.disk import write_file
from exporter.artifact.sidecar import Record
from exporter.data import images
from exporter.data.folders import images_in
from exporter.data.samples import THREADS
from exporter.predict import PredictOptions, predictor

REPETITIONS = 7


class Result(Record, frozen=True):
    """Images a second of each way, once for each repetition, and the peak of resident memory of `predict` in bytes."""

    environment: dict[str, Any]
    artifact: str
    images: int
    rates: dict[str, list[float]]
    peak_bytes: int
    schema: int = 1

    def table(self) -> str:
        """A row for each way, with the median ratio of `predict` to it and the range of the ratios."""
        lines = ["| way | images a second | `predict` is |", "|---|--:|--:|"]
        for way, values in self.rates.items():
            ratios = sorted(own / other for own, other in zip(self.rates["predict"], values, strict=True))
            ratio = "" if way == "predict" else f"{median(ratios):.2f} × ({ratios[0]:.2f}–{ratios[-1]:.2f})"
            lines.append(f"| {NAMES[way]} | {median(values):.0f} | {ratio} |")
        return "\n".join(lines) + "\n"


NAMES = {
    "predict": "`predict -o answers.csv`",
    "loop": "the plain loop: an image at a time with PIL, NumPy and ONNX Runtime",
    "decoding": "decoding and preprocessing alone, all cores",
    "inference": "inference alone, batches of 16, all cores",
}


def by_predict(path: Path, folder: Path) -> None:
    """`predict.predict` to a CSV file."""
    with tempfile.TemporaryDirectory() as out:
        predict.predict(artifacts.load(path), [str(folder)], PredictOptions(), Path(out) / "a.csv")


def by_loop(path: Path, folder: Path) -> None:
    """One image at a time through ONNX Runtime."""
    import onnxruntime

    recipe = artifacts.load(path).sidecar.preprocessing
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (name,) = (one.name for one in session.get_inputs())
    for file in images_in(folder):
        session.run(None, {name: images.read(folder / file, recipe)[None]})[0].argmax()


def by_decoding(path: Path, folder: Path) -> None:
    """Decoding in as many threads as `predict` has."""
    recipe = artifacts.load(path).sidecar.preprocessing
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(lambda name: images.read(folder / name, recipe), images_in(folder)):
            pass


def by_inference(path: Path, folder: Path) -> None:
    """As many batches as the images fill, of one image."""
    artifact, files = artifacts.load(path), images_in(folder)
    batch = np.repeat(images.read(folder / files[0], artifact.sidecar.preprocessing)[None], predictor.BATCH, axis=0)
    runtime = backends.runtime_of(artifact)
    with runtime.open(artifact, runtime.options()) as session:
        for _ in range(0, len(files), predictor.BATCH):
            session(batch)


WAYS: dict[str, Callable[[Path, Path], None]] = {
    "predict": by_predict, "loop": by_loop, "decoding": by_decoding, "inference": by_inference,
}  # fmt: skip


def seconds(way: str, path: Path, folder: Path, results: Any) -> None:
    """Run one way, and put the seconds and the peak of resident memory in bytes into a queue."""
    import resource

    os.environ.pop("OMP_NUM_THREADS", None)
    begin = time.perf_counter()
    WAYS[way](path, folder)
    results.put((time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def measure(path: Path, folder: Path, repetitions: int) -> Result:
    """All ways in turn."""
    count, rates, peak = len(images_in(folder)), {way: list[float]() for way in WAYS}, 0
    fresh = multiprocessing.get_context("spawn")
    for repetition in range(repetitions):
        for way in WAYS:
            results = fresh.Queue()
            process = fresh.Process(target=seconds, args=(way, path, folder, results))
            process.start()
            took, memory = results.get()
            process.join()
            rates[way].append(count / took)
            peak = max(peak, memory if way == "predict" else 0)
            print(f"{repetition + 1}: {way} {count / took:.1f} a second", file=sys.stderr, flush=True)
    return Result(environment=environment(), artifact=path.name, images=count, rates=rates, peak_bytes=peak)


def main() -> None:
    """Measure, write the result, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", type=Path, default=Path("build/predict.json"))
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    options = parser.parse_args()
    result = measure(options.artifact, options.folder, options.repetitions)
    write_file(options.o, msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    print(result.table())


if __name__ == "__main__":
    main()
