"""int8 of this tool compared with NNCF and ONNX Runtime, calibrated and judged on the same photographs.

    python -m benchmarks.quantizers --weights W.safetensors … --calib photos/train --data photos/val -o FILE

The others quantize the plain export of PyTorch as their documents say: `nncf.quantize` with each setting of its
overflow fix, and `quantize_static` after `quant_pre_process`, with and without `reduce_range`. All are then timed in
turn, batch 1, with eager PyTorch.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import torch

from benchmarks import racing
from benchmarks.peers import build as peers
from benchmarks.provenance import environment
from exporter import artifact as artifacts
from exporter import backends, build, machine
from exporter.artifact import Artifact
from exporter.artifact.disk import write_file
from exporter.artifact.sidecar import Record
from exporter.backends import Array, Session
from exporter.bench import Arm, worker
from exporter.build.int8.work import prepare
from exporter.data.calibration import open_calibration
from exporter.errors import first_line
from exporter.model import weights
from exporter.progress import note
from exporter.recipe import Export, Model, PreprocessingOptions, Quantization, Recipe
from exporter.stats import proportion
from exporter.verify import VerifyOptions, open_data

CALIBRATION = 256
THREADS = 2
NNCF = Path(__file__).parent / "peers" / "nncf_default.py"
Runtime = Literal["onnxruntime", "openvino"]


@dataclass(frozen=True)
class Way:
    """One way to quantize: `make` writes the file (folder, plain export, calibration images) and returns its path."""

    name: str
    runtime: Runtime
    make: Callable[[Path, Path, Array], Path] | None = None


class Row(Record, frozen=True):
    """What one way gave: agreement with eager in percent with its 95 % interval, mean cosine, top-1 in percent, the
    median latency in milliseconds, and how many times as fast as eager it is; or why there is nothing."""

    name: str
    agreement: tuple[float, float, float] | None = None
    cosine: float | None = None
    top1: float | None = None
    ms: float | None = None
    over_eager: racing.Ratio | None = None
    failure: str = ""


class Case(Record, frozen=True):
    """A checkpoint: the accuracy of eager PyTorch, and a row for each way."""

    model: str
    images: int
    eager_top1: float
    rows: tuple[Row, ...]


class Result(Record, frozen=True):
    """All cases on one machine, with the versions of the others' packages."""

    environment: dict[str, Any]
    packages: dict[str, str]
    cases: tuple[Case, ...]
    schema: int = 1


def nncf(overflow_fix: str, folder: Path, plain: Path, images: Array) -> Path:
    """`nncf.quantize` with a setting of its overflow fix, in an environment of its own."""
    path = folder / f"nncf-{overflow_fix}.xml"
    np.save(folder / "images.npy", images)
    peers.run(peers.environment("nncf") / "python", NNCF, plain, folder / "images.npy", path, overflow_fix)
    return path


def quantize_static(reduce_range: bool, folder: Path, plain: Path, images: Array) -> Path:
    """`quantize_static` of ONNX Runtime on the preprocessed graph, with its other settings as they are."""
    from onnxruntime.quantization import CalibrationDataReader, quant_pre_process
    from onnxruntime.quantization import quantize_static as quantize

    class Images(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(images)

        def get_next(self) -> dict[str, Array] | None:
            batch = next(self.left, None)
            return None if batch is None else {"images": batch}

    ready, path = folder / "ready.onnx", folder / f"static-{reduce_range}.onnx"
    try:
        quant_pre_process(plain, ready)
    except TypeError:  # its symbolic shapes know no ReduceMean without axes, as in Global Response Normalization
        quant_pre_process(plain, ready, skip_symbolic_shape=True)
    quantize(ready, path, Images(), reduce_range=reduce_range)
    return path


OURS = "convnext-export"
WAYS = (
    Way(f"{OURS}, ONNX Runtime", "onnxruntime"),
    Way("quantize_static", "onnxruntime", partial(quantize_static, False)),
    Way("quantize_static, reduce_range", "onnxruntime", partial(quantize_static, True)),
    Way(f"{OURS}, OpenVINO", "openvino"),
    Way("NNCF, overflow fix of the first layer (default)", "openvino", partial(nncf, "first_layer_only")),
    Way("NNCF, overflow fix everywhere", "openvino", partial(nncf, "enable")),
    Way("NNCF, no overflow fix", "openvino", partial(nncf, "disable")),
)


@contextmanager
def open_way(arm: Arm) -> Iterator[Session]:
    """The session of a way, with the settings of ours on the same runtime; `arm.weights` names the artifact of ours
    whose facts it takes. What NNCF leaves in floating point runs in bf16 where the CPU has it, which is OpenVINO's
    default."""
    way = next((way for way in WAYS if way.name == arm.name), None)
    if way is None or way.make is None:
        with worker.open_arm(arm) as session:
            yield session
        return
    ours = artifacts.load(Path(arm.weights or ""))
    precision = "bf16" if way.runtime == "openvino" and machine.has_bf16() else "fp32"
    foreign = Artifact(Path(arm.path), msgspec.structs.replace(ours.sidecar, precision=precision))
    runtime = backends.runtime(way.runtime)
    options = runtime.options(device=arm.device, threads=arm.threads, hint=arm.hint)
    with runtime.open(foreign, options) as session:
        yield session


def compare(source: Path, calib: str, data: str, sizes: tuple[int, int], seconds: float) -> Case:
    """Quantize a checkpoint in every way, compare the outputs with eager PyTorch, and time all."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        ours = {runtime: _ours(runtime, source, calib, sizes, folder) for runtime in ("onnxruntime", "openvino")}
        first = ours["onnxruntime"]
        images, labels = _photographs(first, data)
        network = weights.reload(first).model()
        with torch.inference_mode():
            expected = torch.cat([network(torch.from_numpy(images[i : i + 50])) for i in range(0, len(images), 50)])
        paths, failures = _make(first, calib, folder, {runtime: one.path for runtime, one in ours.items()}, network)
        arms = [
            Arm(name=name, path=str(path), threads=THREADS, weights=str(first.path)) for name, path in paths.items()
        ]
        arms = [arm if _is_foreign(arm.name) else msgspec.structs.replace(arm, weights=None) for arm in arms]
        rows = {arm.name: _judge(arm, images, expected.numpy(), labels) for arm in arms}
        eager = Arm(name="eager", path=str(first.path), runtime="eager", threads=THREADS)
        timing = racing.race([eager, *arms], first.sidecar.preprocessing, 1, seconds, open_way)
    failures |= timing.failures
    for arm in (arm for arm in arms if arm.name not in failures):
        ms = racing.typical(racing.samples(timing, arm.name))
        timed = {"ms": ms, "over_eager": racing.ratio(timing, arm.name, "eager")}
        rows[arm.name] = msgspec.structs.replace(rows[arm.name], **timed)
    rows |= {name: Row(name=name, failure=reason) for name, reason in failures.items()}
    top1 = 100 * float(np.mean(expected.numpy().argmax(1) == labels))
    return Case(model=source.stem, images=len(images), eager_top1=top1, rows=tuple(rows[way.name] for way in WAYS))


def _is_foreign(name: str) -> bool:
    return not name.startswith(OURS)


def _ours(runtime: str, source: Path, calib: str, sizes: tuple[int, int], folder: Path) -> Artifact:
    """Our artifact, with every layer quantized that can be."""
    recipe = Recipe(
        backend=runtime,
        precision="int8",
        model=Model(weights=str(source)),
        preprocessing=PreprocessingOptions(resize=sizes[1]),
        export=Export(imgsz=sizes[0], batch=1),
        quantization=Quantization(calib=calib, calib_size=CALIBRATION),
    )
    with tempfile.TemporaryDirectory() as temporary:
        return prepare(build.resolve(recipe, folder), Path(temporary)).make((), folder / runtime)


def _photographs(made: Artifact, data: str) -> tuple[Array, Array]:
    """Preprocessed images (N, 3, H, W), and their labels (N,)."""
    samples = open_data(made.sidecar, VerifyOptions(data=data))
    batches = list(samples.batches(50))
    labels = np.concatenate([np.asarray(batch.labels) for batch in batches])
    return np.concatenate([batch.images for batch in batches]), labels


def _make(
    made: Artifact, calib: str, folder: Path, ours: dict[str, Path], network: torch.nn.Module
) -> tuple[dict[str, Path], dict[str, str]]:
    """The file of each way, and the reasons of those that failed."""
    images = open_calibration(calib, made.sidecar.preprocessing, None, CALIBRATION, 0)
    batches = np.concatenate([batch.images for batch in images.batches(1)])[:, None]
    plain = folder / "plain.onnx"
    torch.onnx.export(
        network, (torch.from_numpy(batches[0]),), plain, input_names=["images"], dynamo=True, external_data=False
    )
    paths: dict[str, Path] = {}
    failures: dict[str, str] = {}
    for way in WAYS:
        try:
            paths[way.name] = ours[way.runtime] if way.make is None else way.make(folder, plain, batches)
        except Exception as error:  # noqa: BLE001  (whatever the other tools raise)
            failures[way.name] = first_line(error).replace("|", "/")
            note(f"{way.name}: {failures[way.name]}")
    return paths, failures


def _judge(arm: Arm, images: Array, expected: Array, labels: Array) -> Row:
    """Agreement, cosine and top-1 of a way on all images."""
    with open_way(arm) as session:
        outputs = np.concatenate([session(images[i : i + 1])[0] for i in range(len(images))])
    agreed = outputs.argmax(1) == expected.argmax(1)
    share = proportion(float(agreed.sum()), len(agreed))
    lengths = np.linalg.norm(outputs, axis=1) * np.linalg.norm(expected, axis=1)
    return Row(
        name=arm.name,
        agreement=(share.value, share.low, share.high),
        cosine=float(((outputs * expected).sum(1) / lengths).mean()),
        top1=100 * float(np.mean(outputs.argmax(1) == labels)),
    )


def table(result: Result) -> str:
    """A table for each checkpoint."""
    head = "| int8 | agreement with eager | cosine | top-1 | ms | × eager |\n|---|--:|--:|--:|--:|--:|"
    parts = []
    for case in result.cases:
        parts.append(f"**{case.model}**, {case.images:,} images, top-1 of eager {case.eager_top1:.2f} %:\n\n{head}")
        parts.append("\n".join(map(_line, case.rows)) + "\n")
    return "\n".join(parts)


def _line(row: Row) -> str:
    if row.agreement is None or row.ms is None or row.over_eager is None:
        return f"| {row.name} | cannot: {row.failure} | | | | |"
    value, low, high = row.agreement
    bold = "" if _is_foreign(row.name) else "**"
    return (
        f"| {bold}{row.name}{bold} | {value:.2f} % ({low:.2f}–{high:.2f}) | {row.cosine:.6f} | {row.top1:.2f} % | "
        f"{row.ms:.2f} | {racing.words(row.over_eager)} |"
    )


def main() -> None:
    """Compare the checkpoints, write the result after each, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, nargs="+", required=True)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--imgsz", type=int, default=112)
    parser.add_argument("--resize", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=60.0, help="Of timing, for each checkpoint.")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    sizes, cases = (arguments.imgsz, arguments.resize), list[Case]()
    for source in arguments.weights:
        cases.append(compare(source, arguments.calib, arguments.data, sizes, arguments.seconds))
        result = Result(environment=environment(THREADS), packages=peers.versions("nncf"), cases=tuple(cases))
        write_file(arguments.output, msgspec.json.format(msgspec.json.encode(result)))
    print(table(result))


if __name__ == "__main__":
    main()
