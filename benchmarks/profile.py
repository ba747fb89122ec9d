"""Where the time of ConvNeXt-T goes, by kind of operation: our form and the plain network on each runtime.

`python -m benchmarks.profile -o FILE` runs both with the profiler of the runtime, one image in fp32. Products are
compared with the peak of the machine: the fastest product of that runtime, timed in the same process.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from benchmarks.provenance import environment
from exporter import backends
from exporter.artifact import Artifact
from exporter.artifact.disk import write_file
from exporter.artifact.sidecar import Record
from exporter.backends import Array
from exporter.bench import Plan, timing, worker
from exporter.build import build
from exporter.recipe import Export, Model, Recipe

THREADS, RUNS, WARM_UP = 2, 60, 10
PRODUCT, DEPTHWISE, NORM, GELU, REST = "products", "depthwise convolutions", "norms", "GELU", "all else"
KINDS = (PRODUCT, DEPTHWISE, NORM, GELU, REST)
FORMS = ("plain", None)  # None is the runtime's own
Timed = tuple[str, float]
"""The kind of an operation and its milliseconds; a run is a list of them."""


class Row(Record, frozen=True):
    """Median milliseconds of one image by kind, the whole without a profiler, and the share of the peak in percent that
    its products reach."""

    backend: str
    form: str
    ms: dict[str, float]
    whole_ms: float
    products_of_peak_pct: float


class Result(Record, frozen=True):
    """All rows, and the peak of each runtime in GFLOP/s."""

    environment: dict[str, Any]
    rows: tuple[Row, ...]
    peaks_gflops: dict[str, float]


def onnxruntime(path: Path, images: Array) -> list[list[Timed]]:
    """Every run of a model by ONNX Runtime's profiler."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling = THREADS, True
    options.profile_file_prefix = str(path.with_suffix(""))
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    for _ in range(WARM_UP + RUNS):
        session.run(None, {name: images})
    runs, nodes = [], []
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event["name"].endswith("_kernel_time"):
            nodes.append((_kind_of_node(event["args"]), event["dur"] / 1e3))
        elif event["name"] == "model_run":  # which follows its nodes
            runs.append(nodes)
            nodes = []
    return runs


def _kind_of_node(facts: dict[str, Any]) -> str:
    """The kind of a node by its operator; a depthwise convolution has one input channel for each output."""
    operator = facts["op_name"]
    if "Conv" in operator:
        weight = next(iter(facts["input_type_shape"][1].values()))
        return DEPTHWISE if weight[1] == 1 else PRODUCT
    return _kind(
        operator, {PRODUCT: ("MatMul", "Gemm"), NORM: ("LayerNorm", "ReduceMean", "Pow"), GELU: ("Gelu", "Erf")}
    )


def openvino(path: Path, images: Array) -> list[list[Timed]]:
    """Every run of a model by OpenVINO's counters."""
    import openvino as ov

    hints = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": THREADS}
    request = ov.Core().compile_model(path, "CPU", {**hints, "PERF_COUNT": True}).create_infer_request()
    runs = []
    for _ in range(WARM_UP + RUNS):
        request.infer([images])
        runs.append([(_kind_of_layer(one), one.real_time.total_seconds() * 1e3) for one in request.profiling_info])
    return runs


def _kind_of_layer(layer: Any) -> str:
    """The kind of an executed layer; what is fused into it counts with it."""
    if "_dw" in layer.exec_type:
        return DEPTHWISE
    products = ("Convolution", "FullyConnected", "MatMul")
    return _kind(layer.node_type, {PRODUCT: products, NORM: ("MVN", "Norm", "Reduce"), GELU: ("Gelu",)})


def _kind(operator: str, parts_of_names: dict[str, tuple[str, ...]]) -> str:
    return next((kind for kind, parts in parts_of_names.items() if any(part in operator for part in parts)), REST)


PROFILERS: dict[str, Callable[[Path, Array], list[list[Timed]]]] = {"onnxruntime": onnxruntime, "openvino": openvino}


def profile(backend: str, form: str | None, peak_gflops: float, folder: Path) -> Row:
    """One form on one runtime."""
    artifact = _build(backend, form, folder)
    images = worker.inputs(Plan(arms=(), preprocessing=artifact.sidecar.preprocessing, batch=1))[0]
    runtime = backends.runtime(backend)
    with runtime.open(artifact, runtime.options(threads=THREADS)) as session:
        run = session.bind([images]).run
        timing.settle(run, 0.5, 5.0)
        whole = median(_ms(run) for _ in range(RUNS))
    sums: dict[str, list[float]] = defaultdict(list)
    for operations in PROFILERS[backend](artifact.path, images)[WARM_UP:]:
        ms_of_kind = dict.fromkeys(KINDS, 0.0)
        for kind, taken in operations:
            ms_of_kind[kind] += taken
        for kind, taken in ms_of_kind.items():
            sums[kind].append(taken)
    ms = {kind: median(values) for kind, values in sums.items()}
    macs = artifact.sidecar.macs or 0
    return Row(
        backend=backend, form=artifact.sidecar.recipe["export"]["form"], ms=ms, whole_ms=whole,
        products_of_peak_pct=100 * 2e-6 * (macs - _depthwise_macs()) / ms[PRODUCT] / peak_gflops,
    )  # fmt: skip


def _build(backend: str, form: str | None, folder: Path) -> Artifact:
    export = Export(batch=1, form=form)  # type: ignore[arg-type]
    recipe = Recipe(backend=backend, precision="fp32", model=Model(variant="tiny", weights="random:0"), export=export)
    return build(recipe, folder / f"{backend}-{form}").artifact


def _depthwise_macs() -> int:
    """Multiply-accumulates of the 7 × 7 depthwise convolutions of ConvNeXt-T at 224 pixels."""
    return sum(
        blocks * 49 * width * side**2
        for blocks, width, side in zip((3, 3, 9, 3), (96, 192, 384, 768), (56, 28, 14, 7), strict=True)
    )


def _ms(run: Callable[[], None]) -> float:
    begin = worker.CLOCK()
    run()
    return (worker.CLOCK() - begin) / 1e6


def peak(backend: str, folder: Path) -> float:
    """The fastest product of a runtime in GFLOP/s."""
    artifact, runtime = _build(backend, None, folder), backends.runtime(backend)
    assert runtime.peak is not None
    with runtime.peak(artifact, runtime.options(threads=THREADS), "") as session:
        images = worker.inputs(Plan(arms=(), preprocessing=artifact.sidecar.preprocessing, batch=1))
        run = session.bind(images).run
        timing.settle(run, 0.5, 5.0)
        return float(2e-6 * int(session.facts["macs"]) / median(_ms(run) for _ in range(RUNS)))


def table(result: Result) -> str:
    """Markdown: a row for each form on each runtime."""
    lines = [
        f"| runtime | form | ms | {' | '.join(KINDS)} | products, of peak |",
        f"|---|---|--:{'|--:' * (len(KINDS) + 1)}|",
    ]
    for row in result.rows:
        parts = " | ".join(f"{row.ms[kind]:.1f}" for kind in KINDS)
        lines.append(
            f"| {row.backend} | `{row.form}` | {row.whole_ms:.1f} | {parts} | {row.products_of_peak_pct:.0f} % |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        peaks = {backend: peak(backend, folder) for backend in PROFILERS}
        rows = [profile(backend, form, peaks[backend], folder) for backend in PROFILERS for form in FORMS]
    result = Result(environment=environment(THREADS), rows=tuple(rows), peaks_gflops=peaks)
    write_file(arguments.output, msgspec.json.encode(result))
    print(table(result))


if __name__ == "__main__":
    main()
