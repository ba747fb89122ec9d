"""UPerNet on ConvNeXt-T: this tool's graphs compared with PyTorch's own export of transformers' model in fp32.

    python -m benchmarks.segmentation -o benchmarks/results/MACHINE/segmentation.json

Weights are random, with the widths of the published network (hidden size 512, 150 classes). The graphs of a runtime
take turns in a process of their own; peak memory is that of a fresh process for each graph. Graphs stay in `--folder`,
and every repetition is written at once: a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec
import numpy as np

from benchmarks.provenance import environment
from exporter import machine
from exporter.artifact import read_sidecar
from exporter.artifact.disk import write_file
from exporter.artifact.sidecar import Record
from exporter.bench import Arm, worker
from exporter.build import build, resolve
from exporter.build.int8.work import prepare
from exporter.recipe import Export, Model, Quantization, Recipe

THREADS, SIZE, TURNS, REPETITIONS = 2, 512, 3, 7
PRODUCT_RUNS = 20  # the shortest counts, as the first runs after a graph are slow
RUNTIMES = ("onnxruntime", "openvino")
CALIBRATION_IMAGES = 16
EXPORT, PLAIN, LABELS, BF16, INT8 = "torch export", "plain", "labels", "bf16", "int8"
GRAPHS = {
    EXPORT: "transformers, `torch.onnx.export`, logits",
    PLAIN: "`--form plain`, logits",
    "own": "logits",
    LABELS: "`--output labels`",
    BF16: "`--output labels --bf16`",
    INT8: "`--output labels --int8`",
}
OPTIONS = {
    PLAIN: {"form": "plain"},
    LABELS: {"output": "labels"},
    BF16: {"output": "labels"},
    INT8: {"output": "labels"},
}
Array = np.ndarray[Any, Any]
Run = Callable[[Array], Any]


class Repetition(Record, frozen=True):
    """Of one runtime: milliseconds of each graph turn by turn, its peak of resident memory in bytes, the load of the
    machine before (the average over a minute), and turn by turn the share of the speed that the runtime's fastest
    product reached at that precision, which is empty in results of earlier versions."""

    runtime: str
    ms: dict[str, list[float]]
    peak_bytes: dict[str, int]
    load: float
    share_of_peak: dict[str, list[float]] = msgspec.field(default_factory=dict)


class Result(Record, frozen=True):
    """All repetitions, and the machine they ran on."""

    environment: dict[str, Any]
    size: int
    repetitions: tuple[Repetition, ...] = ()
    schema: int = 1

    def table(self) -> str:
        """Markdown: a row for each graph on each runtime; ratios are medians over pairs of the same turn."""
        titles = ("ms", "speed-up", *(["of peak"] if self._has_peak() else []), "peak memory", "share")
        lines = [f"| runtime | graph | {' | '.join(titles)} |", f"|---|---|{'--:|' * len(titles)}"]
        for runtime in RUNTIMES:
            rows = [one for one in self.repetitions if one.runtime == runtime]
            for name in rows[0].ms if rows else ():
                ms = median(value for row in rows for value in row.ms[name])
                pairs = [b / a for row in rows for a, b in zip(row.ms[name], row.ms[EXPORT], strict=True)]
                peak = median(row.peak_bytes[name] for row in rows)
                share = median(row.peak_bytes[name] / row.peak_bytes[EXPORT] for row in rows)
                cells = [f"{ms:.0f}", f"{median(pairs):.2f} × ({min(pairs):.2f}–{max(pairs):.2f})"]
                if self._has_peak():
                    cells.append(f"{100 * median(value for row in rows for value in row.share_of_peak[name]):.0f} %")
                cells += [f"{peak / 1e6:,.0f} MB", f"{share:.2f}"]
                lines.append(f"| {runtime} | {GRAPHS[name]} | {' | '.join(cells)} |")
        over_fp32 = [self._over_fp32(runtime, name) for runtime in RUNTIMES for name in (BF16, INT8)]
        return "\n".join([*lines, "", *filter(None, over_fp32)]) + "\n"

    def _has_peak(self) -> bool:
        return any(row.share_of_peak for row in self.repetitions)

    def _over_fp32(self, runtime: str, name: str) -> str:
        """Markdown: how many times as fast bf16 or int8 is as fp32 with the same output, or ""."""
        rows = [one for one in self.repetitions if one.runtime == runtime and name in one.ms]
        pairs = [b / a for row in rows for a, b in zip(row.ms[name], row.ms[LABELS], strict=True)]
        if not pairs:
            return ""
        interval = f"{min(pairs):.2f}–{max(pairs):.2f}"
        return f"* {runtime}: {name} is {median(pairs):.2f} × ({interval}) as fast as fp32 labels."


def transformers_model() -> Any:
    """UPerNet on ConvNeXt-T, as transformers publishes it, with random weights."""
    from benchmarks import libraries

    transformers = libraries.library("transformers")
    stages = [f"stage{number}" for number in range(1, 5)]
    backbone = transformers.ConvNextConfig(depths=[3, 3, 9, 3], hidden_sizes=[96, 192, 384, 768], out_features=stages)
    config = transformers.UperNetConfig(backbone_config=backbone, num_labels=150, use_auxiliary_head=False)
    return libraries.randomize(transformers.UperNetForSemanticSegmentation(config))


def write_export(folder: Path, size: int) -> Path:
    """The graph of `torch.onnx.export` for one image of a fixed size, and the weights for this tool."""
    import json

    import torch

    from benchmarks import libraries

    file = folder / "export" / "model.onnx"
    if not file.exists():
        model = transformers_model()
        config = json.loads(model.config.to_json_string()) | {"architectures": [type(model).__name__]}
        libraries.save(folder / "weights", model, config)
        file.parent.mkdir(parents=True, exist_ok=True)
        images, partial = torch.zeros(1, 3, size, size), file.with_name("partial.onnx")
        with torch.no_grad():
            torch.onnx.export(model, (images,), partial, dynamo=True, input_names=["images"], verbose=False)
        partial.rename(file)  # its weights keep their name, which the graph has
    return file


def graphs(folder: Path, size: int) -> dict[str, dict[str, Path]]:
    """The file of each graph for each runtime; OpenVINO reads PyTorch's export as it is."""
    export, files = write_export(folder, size), {}
    for runtime in RUNTIMES:
        files[runtime] = {EXPORT: export}
        for name in GRAPHS:
            if name != EXPORT and (name != BF16 or (runtime == "openvino" and machine.has_bf16())):
                recipe = Recipe(
                    backend=runtime, precision=name if name in (BF16, INT8) else "fp32",
                    model=Model(weights=str(folder / "weights")),
                    export=msgspec.convert({"imgsz": size, "batch": 1, **OPTIONS.get(name, {})}, Export),
                    quantization=Quantization(calib_size=CALIBRATION_IMAGES) if name == INT8 else None,
                )  # fmt: skip
                files[runtime][name] = _built(recipe, folder / runtime / name)
    return files


def _built(recipe: Recipe, folder: Path) -> Path:
    """The artifact of a recipe; in int8 without the search and the timing, for weights are random."""
    if recipe.precision != "int8":
        return build(recipe, folder).artifact.path
    with tempfile.TemporaryDirectory() as traced:
        return prepare(resolve(recipe, folder), Path(traced)).make((), folder).path


def opened(runtime: str, file: Path, arithmetic: str = "f32") -> Run:
    """A session of a stock runtime on `THREADS` threads. Layers that are not int8 are computed in `arithmetic`, which
    ONNX Runtime takes from the graph."""
    if runtime == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        return lambda images: session.run(None, {"images": images})
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": arithmetic, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": THREADS}
    compiled = openvino.Core().compile_model(file, "CPU", settings)
    return lambda images: compiled([images])


class Turns(NamedTuple):
    """Milliseconds of each graph and product, turn by turn; the multiply-accumulates of each product; and the peak of
    the process's resident memory in bytes."""

    ms: dict[str, list[float]]
    macs: dict[str, int]
    peak_bytes: int


def take_turns(runtime: str, files: Mapping[str, Path], size: int, products: Mapping[str, Path]) -> Turns:
    """Run the graphs in turn, and with them the runtime's fastest product at the precision of each artifact of
    `products`."""
    images = np.random.default_rng(0).standard_normal((1, 3, size, size), np.float32)
    runs: dict[str, Callable[[], Any]] = {
        name: partial(opened(runtime, file, BF16 if name == BF16 else "f32"), images) for name, file in files.items()
    }
    macs: dict[str, int] = {}
    with ExitStack() as stack:
        for name, file in products.items():
            arm = Arm(name=name, path=str(file), runtime="peak", threads=THREADS)
            session = stack.enter_context(worker.open_arm(arm))
            runs[name], macs[name] = session.bind([images]).run, int(session.facts["macs"])
        ms = {name: list[float]() for name in runs}
        for turn in range(TURNS + 1):
            for name, run in runs.items():
                taken = min(_milliseconds(run) for _ in range(PRODUCT_RUNS if name in products else 1))
                if turn:  # the first warms up
                    ms[name].append(taken)
    return Turns(ms, macs, machine.peak_memory_bytes())


def _milliseconds(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - begin)


def fresh(
    runtime: str, files: Mapping[str, Path], size: int, products: Mapping[str, Path] = MappingProxyType({})
) -> Turns:
    """`take_turns` in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(take_turns, runtime, files, size, dict(products)).result()


def product_of(name: str) -> str:
    """The name of the product at the precision of a graph."""
    return f"product in {name if name in (BF16, INT8) else 'fp32'}"


def measure(runtime: str, files: Mapping[str, Path], size: int) -> Repetition:
    """One repetition on one runtime."""
    load = os.getloadavg()[0]
    artifacts = {name: file for name, file in files.items() if name != EXPORT}
    turns = fresh(runtime, files, size, {product_of(name): file for name, file in artifacts.items()})
    macs = {name: read_sidecar(file).macs or 0 for name, file in artifacts.items()}
    macs[EXPORT] = macs[PLAIN]  # the same layers

    def shares(name: str) -> list[float]:
        product = product_of(name)
        rates = (turns.macs[product] / ms for ms in turns.ms[product])
        return [macs[name] / ms / rate for ms, rate in zip(turns.ms[name], rates, strict=True)]

    return Repetition(
        runtime=runtime,
        ms={name: turns.ms[name] for name in files},
        peak_bytes={name: fresh(runtime, {name: file}, size).peak_bytes for name, file in files.items()},
        load=load,
        share_of_peak={name: shares(name) for name in files},
    )


def main() -> None:
    """Measure what is missing in the result, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("build/segmentation"), help="For the graphs.")
    parser.add_argument("--repetitions", type=int, default=REPETITIONS)
    parser.add_argument("--size", type=int, default=SIZE, help="Height and width of the image.")
    options = parser.parse_args()
    result = Result(environment=environment(THREADS), size=options.size)
    if options.o.exists():
        result = msgspec.json.decode(options.o.read_bytes(), type=Result)
        if (result.size, result.environment["cpu"]) != (options.size, environment()["cpu"]):
            parser.error(f"{options.o}: of {result.size} pixels on {result.environment['cpu']}; give another file")
    files = graphs(options.folder / str(result.size), result.size)
    for number in range(len(result.repetitions), options.repetitions * len(RUNTIMES)):
        runtime = RUNTIMES[number % len(RUNTIMES)]
        one = measure(runtime, files[runtime], result.size)
        result = msgspec.structs.replace(result, repetitions=(*result.repetitions, one))
        write_file(options.o, msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
        print(f"{number + 1}: {runtime}, load {one.load:.1f}", file=sys.stderr, flush=True)
    print(result.table())


if __name__ == "__main__":
    main()
