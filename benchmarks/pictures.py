"""Artifacts that take pictures of any size (`--input image`), compared with Pillow on photographs.

    python -m benchmarks.pictures WEIGHTS FOLDER -o FILE [--imgsz 112 --resize 128]

For each interpolation and runtime: the pixels after the resize, and the class of each photograph; PyTorch gets Pillow's
pixels.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from benchmarks.provenance import environment
from exporter import backends
from exporter.artifact import Artifact
from exporter.artifact.disk import write_file
from exporter.artifact.sidecar import Preprocessing, Record
from exporter.backends import Session
from exporter.build import build
from exporter.data import images
from exporter.data.samples import open_samples
from exporter.graph import files
from exporter.model.structure import PICTURE
from exporter.recipe import Export, Model, PreprocessingOptions, Recipe

INTERPOLATIONS = ("bilinear", "bicubic", "hamming", "lanczos")
TIMED, REPETITIONS = 100, 5
RUNTIMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
Pixels = NDArray[Any]


class Row(Record, frozen=True):
    """One interpolation on one runtime: the largest difference in levels of 255, the values that differ and all values
    after the resize; the photographs with the class of PyTorch; and milliseconds of the preprocessing by Pillow and of
    the resize by the artifact, both in one thread."""

    interpolation: str
    runtime: str
    largest: int
    differing: int
    values: int
    equal: int
    pillow_ms: float
    artifact_ms: float


class Result(Record, frozen=True):
    """The rows, and what was measured."""

    environment: dict[str, Any]
    weights: str
    images: int
    rows: tuple[Row, ...]
    schema: int = 1

    def table(self) -> str:
        """A row for each interpolation and runtime."""
        lines = [
            f"| interpolation | runtime | largest difference | values that differ | top-1 equal, of {self.images:,} "
            "| Pillow | artifact |",
            "|---|---|--:|--:|--:|--:|--:|",
        ]
        for row in self.rows:
            share, equal = 100 * row.differing / row.values, 100 * row.equal / self.images
            lines.append(
                f"| {row.interpolation} | {RUNTIMES[row.runtime]} | {row.largest} of 255 | {share:.4f} % "
                f"| {equal:.2f} % | {row.pillow_ms:.1f} ms | {row.artifact_ms:.1f} ms |"
            )
        return "\n".join(lines) + "\n"


@contextmanager
def resize_of(graph: Artifact, runtime: str) -> Iterator[Callable[[Pixels], Pixels]]:
    """The part of an ONNX graph that resizes, on a runtime in one thread: (H, W, 3) to (3, height, width)."""
    import onnx_ir as ir

    model = ir.load(graph.path)
    last = [node for node in model.graph if node.metadata_props.get("module") == PICTURE][-1]
    model.graph.outputs[:] = last.outputs
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.onnx"
        files.save(model, path, {})
        opener = backends.runtime(runtime)
        with opener.open(Artifact(path, graph.sidecar), opener.options(threads=1)) as session:
            yield lambda picture: session(picture[None])[0][0]


def classes_of(session: Session, photographs: list[Pixels]) -> list[int]:
    """The class of each photograph."""
    return [int(session(picture[None])[0].argmax()) for picture in photographs]


def by_pillow(picture: Pixels, preprocessing: Preprocessing) -> Pixels:
    """The pixels of the network's input as whole numbers (3, height, width)."""
    mean, std = (np.array(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    pixels: Pixels = np.rint((images.preprocess_pictures(picture[None], preprocessing)[0] * std + mean) * 255)
    return pixels


def timed(ways: Sequence[Callable[[Pixels], object]], photographs: list[Pixels]) -> list[float]:
    """The milliseconds of each way, which take turns: the least of `REPETITIONS` for a photograph, and the median of
    the first photographs."""
    least: list[list[float]] = [[] for _ in ways]
    for picture in photographs[:TIMED]:
        times = np.zeros((REPETITIONS, len(ways)))
        for turn, number in itertools.product(range(REPETITIONS), range(len(ways))):
            start = time.perf_counter()
            ways[number](picture)
            times[turn, number] = 1000 * (time.perf_counter() - start)
        for number, value in enumerate(times.min(axis=0)):
            least[number].append(float(value))
    return [median(values) for values in least]


def measured(artifact: Artifact, graph: Artifact, expected: list[int], photographs: list[Pixels]) -> Row:
    """Run all photographs; `expected` are their classes."""
    runtime, preprocessing = backends.runtime_of(artifact), artifact.sidecar.preprocessing
    with runtime.open(artifact, runtime.options(threads=1)) as session:
        classes = classes_of(session, photographs)
    with resize_of(graph, runtime.name) as resize:
        errors = [np.abs(resize(picture) - by_pillow(picture, preprocessing)) for picture in photographs]
        preprocess = partial(images.preprocess_pictures, recipe=preprocessing)
        pillow_ms, artifact_ms = timed([lambda picture: preprocess(picture[None]), resize], photographs)
    return Row(
        interpolation=preprocessing.interpolation,
        runtime=runtime.name,
        largest=max(int(error.max()) for error in errors),
        differing=sum(int((error > 0).sum()) for error in errors),
        values=sum(error.size for error in errors),
        equal=sum(ours == own for ours, own in zip(expected, classes, strict=True)),
        pillow_ms=pillow_ms,
        artifact_ms=artifact_ms,
    )


def built(interpolation: str, runtime: str, options: argparse.Namespace, out: Path) -> Artifact:
    """An fp32 artifact that takes pictures."""
    preprocessing = msgspec.convert({"resize": options.resize, "interpolation": interpolation}, PreprocessingOptions)
    model, export = Model(weights=str(options.weights)), Export(imgsz=options.imgsz, input="image")
    recipe = Recipe(backend=runtime, precision="fp32", model=model, preprocessing=preprocessing, export=export)
    return build(recipe, out).artifact


def measure(options: argparse.Namespace) -> Result:
    """Every interpolation on every runtime."""
    rows: list[Row] = []
    photographs: list[Pixels] = []
    eager = backends.runtime("eager")
    for interpolation in INTERPOLATIONS:
        with tempfile.TemporaryDirectory() as folder:
            artifacts = [built(interpolation, runtime, options, Path(folder) / runtime) for runtime in RUNTIMES]
            graph = artifacts[0]
            if not photographs:
                opened = open_samples(str(options.folder), graph.sidecar.preprocessing, (), None, options.samples)
                photographs = [batch.images[0] for batch in opened.batches(1)]
            with eager.open(graph, eager.options(threads=1)) as reference:
                expected = classes_of(reference, photographs)
            for artifact in artifacts:
                rows.append(measured(artifact, graph, expected, photographs))
                print(rows[-1], file=sys.stderr, flush=True)
    return Result(environment=environment(), weights=options.weights.stem, images=len(photographs), rows=tuple(rows))


def main() -> None:
    """Measure, write the result, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", type=Path, default=Path("build/pictures.json"))
    parser.add_argument("--imgsz", type=int, default=224)
    parser.add_argument("--resize", type=int, default=256)
    parser.add_argument("--samples", type=int)
    options = parser.parse_args()
    result = measure(options)
    write_file(options.o, msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    print(result.table())


if __name__ == "__main__":
    main()
