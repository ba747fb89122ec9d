"""What TensorRT-RTX builds of each network on a machine without a GPU, where its engines cannot be timed."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from msgspec.structs import replace

from benchmarks.provenance import environment
from benchmarks.rivals import PLAIN, SIZE, Network, Way, files
from exporter import artifact as artifacts
from exporter.artifact import Artifact
from exporter.artifact.sidecar import Record
from exporter.backends import tensorrt
from exporter.backends.tensorrt import library, plan
from exporter.build import build
from exporter.errors import first_line
from exporter.recipe import Export, Model, Recipe

FLAVOR: library.Flavor = "tensorrt-rtx"
CAPABILITY = "8.9"  # one kind of GPU: each further one takes as long again
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


class Engine(Record, frozen=True):
    """One network in one way at one precision: the bytes and kernels of its engine, or why there is none."""

    network: str
    way: str
    precision: str
    bytes: int = 0
    kernels: int = 0
    failure: str = ""


class Engines(Record, frozen=True):
    """All engines, for one image of one size."""

    rows: tuple[Engine, ...]
    environment: dict[str, object]
    capability: str = CAPABILITY
    schema: int = 1


def build_all(networks: Sequence[Network]) -> Engines:
    """Build the default export of each network, and this tool's of each ConvNeXt.

    Raises: Unavailable where TensorRT-RTX is not installed.
    """
    library.find(FLAVOR)
    rows = [
        _built(network, way, precision)
        for network in networks
        for way in (PLAIN, *(["ours"] if network.variant else []))
        for precision in DTYPES
    ]
    return Engines(rows=tuple(rows), environment=environment())


def _built(network: Network, way: str, precision: str) -> Engine:
    print(f"{network.name}, {way}, {precision}, TensorRT-RTX", file=sys.stderr, flush=True)
    row = Engine(network=network.name, way=way, precision=precision)
    with tempfile.TemporaryDirectory() as folder:
        try:
            engine = (_ours if way == "ours" else _exported)(network, precision, Path(folder))
            return replace(row, bytes=engine.path.stat().st_size, kernels=len(plan.read(engine)))
        except Exception as error:  # noqa: BLE001  (of other tools, each with errors of its own)
            return replace(row, failure=first_line(error))


def _ours(network: Network, precision: str, folder: Path) -> Artifact:
    recipe = Recipe(
        backend="tensorrt",
        precision=precision,
        model=Model(variant=network.variant, weights="random:0"),
        export=Export(batch=1, imgsz=SIZE),
        target={"flavor": FLAVOR, "compute_capability": [CAPABILITY]},
    )
    return build(recipe, folder).artifact


def _exported(network: Network, precision: str, folder: Path) -> Artifact:
    about = files.sidecar(network, Way(PLAIN, "onnxruntime", precision, plain=True), 1, SIZE)
    graph = artifacts.publish(
        folder / "export.onnx", about, lambda path: files.export(network, 1, SIZE, path, dtype=DTYPES[precision])
    )
    options = library.TensorRtOptions(flavor=FLAVOR, compute_capability=(CAPABILITY,))
    return tensorrt.build(graph, precision, folder, options)


def table(result: Engines) -> str:
    """Markdown: a row for each engine."""
    lines = ["| network | precision | way | engine, MB | kernels |", "|---|---|---|--:|--:|"]
    for row in result.rows:
        cells = [row.failure, ""] if row.failure else [f"{row.bytes / 1e6:.0f}", str(row.kernels)]
        lines.append(f"| {' | '.join([row.network, row.precision, row.way, *cells])} |")
    return "\n".join(lines) + "\n"
