"""Which form and which settings of ONNX Runtime are fastest on an NVIDIA GPU; ConvNeXt-T with random weights.

    python -m benchmarks.cuda_forms -o benchmarks/results/MACHINE/cuda-forms.json

Products of fp32 graphs are computed in fp32, not TF32. The graphs are timed in turn; input and output stay on the GPU.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import numpy as np

from benchmarks.provenance import commit, environment
from exporter.artifact import Artifact
from exporter.artifact.disk import write_file
from exporter.artifact.sidecar import Record
from exporter.build import build
from exporter.machine import gpu
from exporter.model import FORMS
from exporter.recipe import Export, Model, Recipe

ROUNDS, RUNS = 6, 10
SWITCHES = (False, True)


class Row(Record, frozen=True):
    """One graph with one choice of settings: the median latency of a batch."""

    form: str
    precision: str
    batch: int
    nhwc: bool
    cuda_graph: bool
    median_ms: float


class Result(Record, frozen=True):
    """All rows, the machine, its GPU, and the commit."""

    commit: str
    gpu: dict[str, str]
    environment: dict[str, Any]
    variant: str
    rows: tuple[Row, ...]


def runner(graph: Artifact, batch: int, nhwc: bool, cuda_graph: bool) -> Callable[[], None]:
    """A function that runs the graph once and waits for the GPU."""
    import onnxruntime as ort
    import torch  # noqa: F401  loads CUDA and cuDNN

    settings = {"use_tf32": "0", "prefer_nhwc": str(int(nhwc)), "enable_cuda_graph": str(int(cuda_graph))}
    session = ort.InferenceSession(graph.path, providers=[("CUDAExecutionProvider", settings)])
    images = np.random.default_rng(0).normal(size=(batch, 3, 224, 224)).astype(np.float32)
    binding = session.io_binding()
    binding.bind_ortvalue_input("images", ort.OrtValue.ortvalue_from_numpy(images, "cuda", 0))
    logits = ort.OrtValue.ortvalue_from_shape_and_type([batch, 1000], np.float32, "cuda", 0)  # a fixed address
    binding.bind_ortvalue_output(session.get_outputs()[0].name, logits)

    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return run


def time_batch(graphs: dict[tuple[str, str], Artifact], batch: int) -> Iterator[Row]:
    """Time every graph with every choice of settings, in turn."""
    cases = list(itertools.product(graphs, SWITCHES, SWITCHES))
    runs = {case: runner(graphs[case[0]], batch, *case[1:]) for case in cases}
    times: dict[Any, list[float]] = {case: [] for case in cases}
    for run in runs.values():
        for _ in range(RUNS):
            run()
    for _, case in itertools.product(range(ROUNDS), cases):
        runs[case]()
        begin = time.perf_counter()
        for _ in range(RUNS):
            runs[case]()
        times[case].append(1e3 * (time.perf_counter() - begin) / RUNS)
    for (form, precision), nhwc, cuda_graph in cases:
        value = round(median(times[(form, precision), nhwc, cuda_graph]), 3)
        yield Row(form=form, precision=precision, batch=batch, nhwc=nhwc, cuda_graph=cuda_graph, median_ms=value)


def form_table(result: Result) -> str:
    """Markdown: a row for each precision and batch size, a column for each form; with a CUDA graph in parentheses."""
    lines = [
        "| model | batch | precision | " + " | ".join(f"{form}, ms" for form in FORMS) + " |",
        "|---|--:|---|" + "--:|" * len(FORMS),
    ]
    rows = [row for row in result.rows if not row.nhwc]
    for batch, precision in sorted({(row.batch, row.precision) for row in rows}):
        here = [row for row in rows if (row.batch, row.precision) == (batch, precision)]
        fastest = min(row.median_ms for row in here)
        cells = []
        for form in FORMS:
            times = [row.median_ms for row in sorted(here, key=lambda row: row.cuda_graph) if row.form == form]
            cell = "{:.2f} ({:.2f})".format(*times) if times else ""
            cells.append(f"**{cell}**" if fastest in times else cell)
        lines.append(f"| {result.variant} | {batch} | {precision} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Build, time and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    facts = gpu()
    if facts is None:
        sys.exit("no NVIDIA GPU here")
    with tempfile.TemporaryDirectory() as folder:
        graphs = {}
        for form, precision in itertools.product(FORMS, ("fp32", "fp16")):
            recipe = Recipe(
                backend="onnxruntime",
                precision=precision,
                model=Model(weights="random:0"),
                export=Export(form=form),  # type: ignore[arg-type]
            )
            graphs[form, precision] = build(recipe, Path(folder) / form).artifact
        rows = [row for batch in (1, 8) for row in time_batch(graphs, batch)]
    result = Result(commit=commit(), gpu=facts, environment=environment(), variant="tiny", rows=tuple(rows))
    write_file(options.output, msgspec.json.format(msgspec.json.encode(result)))


if __name__ == "__main__":
    main()
