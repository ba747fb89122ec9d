"""UPerNet on ConvNeXt-T at sizes other than the traced one: this tool's graph, PyTorch's dynamic export, and optimum's.

    python -m benchmarks.any_size -o benchmarks/results/MACHINE/any-size.json

Each exporter traces one graph at 512 pixels for any height and width. It runs at several sizes on each runtime and is
compared with transformers' own forward in fp64: the share of pixels with another class, and the largest difference of
logits as a share of their standard deviation. Transformers' forward in fp32 is compared with it too, because rounding
alone gives differences. Weights are random, with the widths of the published network.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from benchmarks.peers import build as peers
from benchmarks.provenance import environment
from benchmarks.segmentation import RUNTIMES, SIZE, THREADS, Run, opened, transformers_model, write_export
from exporter.artifact.disk import write_file
from exporter.artifact.sidecar import Preprocessing, Record
from exporter.build import build
from exporter.data import images, synthetic
from exporter.errors import first_line, last_line
from exporter.recipe import Export, Model, Recipe

SIZES = ((512, 512), (640, 640), (512, 768), (96, 160), (224, 224), (352, 480), (300, 451))
EAGER, OURS, TORCH, OPTIMUM = (
    "transformers, no export",
    "this tool",
    "`torch.onnx.export`, dynamic",
    "`optimum-cli export`",
)
LABELS = {"eager": "PyTorch, fp32", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
BOLD_FROM_PCT = 0.1  # of pixels; rounding changes fewer, and a larger share is in bold
Array = np.ndarray[Any, Any]
Expected = Mapping[tuple[int, int], Array]


class Row(Record, frozen=True):
    """One graph on one runtime at one height and width: the percentage of pixels with another class, and the largest
    difference of logits as a share of their standard deviation; or why there are none."""

    export: str
    runtime: str
    size: tuple[int, int]
    other_class_pct: float | None = None
    error: float | None = None
    failure: str = ""


class Result(Record, frozen=True):
    """All rows, and the machine."""

    environment: dict[str, Any]
    rows: tuple[Row, ...]
    schema: int = 1

    def table(self) -> str:
        """Markdown: a row for each graph on each runtime, a column for each size; failures below it, numbered."""
        head = "| graph | runtime | " + " | ".join(f"{h} × {w}" for h, w in SIZES) + " |"
        lines, notes = [head, "|---|---|" + "--:|" * len(SIZES)], list[str]()
        for export, runtime in dict.fromkeys((row.export, row.runtime) for row in self.rows):
            by_size = {row.size: row for row in self.rows if (row.export, row.runtime) == (export, runtime)}
            cells = [_cell(by_size[size], notes) for size in SIZES]
            lines.append(f"| {export} | {LABELS[runtime]} | {' | '.join(cells)} |")
        below = "".join(f"\n{number}. {note}" for number, note in enumerate(notes, 1))
        return "\n".join(lines) + "\n" + (f"{below}\n" if notes else "")


def _cell(row: Row, notes: list[str]) -> str:
    if row.failure:
        if row.failure not in notes:
            notes.append(row.failure)
        return f"fails ({notes.index(row.failure) + 1})"
    assert row.other_class_pct is not None
    assert row.error is not None
    share = f"{row.other_class_pct:.2g} %"
    return f"{share if row.other_class_pct < BOLD_FROM_PCT else f'**{share}**'}, {row.error:.1e}"


def export_dynamic(folder: Path) -> Path:
    """`torch.onnx.export` of transformers' model for any batch size, height and width."""
    file = folder / "dynamic" / "model.onnx"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        axis, partial = torch.export.Dim.DYNAMIC, file.with_name("partial.onnx")
        with torch.no_grad():
            torch.onnx.export(
                transformers_model(), (torch.zeros(2, 3, SIZE, SIZE),), partial, dynamo=True, verbose=False,
                input_names=["images"], dynamic_shapes=({0: axis, 2: axis, 3: axis},),
            )  # fmt: skip
        partial.rename(file)
    return file


def export_with_optimum(folder: Path) -> Path:
    """The graph of optimum. Raises: Cannot with its reason."""
    write_export(folder, SIZE)  # with the weights
    file = folder / "optimum" / "model.onnx"
    if not file.exists():
        program = peers.environment("optimum-onnx") / "optimum-cli"
        task = ("--task", "semantic-segmentation")
        peers.run(program, "export", "onnx", "--model", folder / "weights", *task, file.parent)
    return file


def graphs(folder: Path) -> dict[str, dict[str, Path | str]]:
    """The file of each graph for each runtime, or why there is none."""
    write_export(folder, SIZE)
    found: dict[str, dict[str, Path | str]] = {OURS: {}}
    for runtime in RUNTIMES:
        model, export = Model(weights=str(folder / "weights")), Export(imgsz="dynamic")
        recipe = Recipe(backend=runtime, precision="fp32", model=model, export=export)
        found[OURS][runtime] = build(recipe, folder / runtime / "dynamic").artifact.path
        gc.collect()
    for name, write in ((TORCH, export_dynamic), (OPTIMUM, export_with_optimum)):
        file: Path | str
        try:
            file = write(folder)
        except Exception as error:  # noqa: BLE001  (of other tools, each with errors of its own)
            file = _reason(error)
        found[name] = dict.fromkeys(RUNTIMES, file)
    return found


def measure(export: str, runtime: str, run: Run | str, expected: Expected) -> list[Row]:
    """Run a graph at every size; or rows of the reason why there is none."""
    if isinstance(run, str):
        return [Row(export=export, runtime=runtime, size=size, failure=run) for size in expected]
    rows = []
    for size, expected_logits in expected.items():
        print(f"{export}, {runtime}, {size[0]} × {size[1]}", file=sys.stderr, flush=True)
        row = Row(export=export, runtime=runtime, size=size)
        try:
            logits = run(picture(size))[0]
        except Exception as error:  # noqa: BLE001  (of the runtime)
            rows.append(msgspec.structs.replace(row, failure=_reason(error)))
            continue
        other = 100 * float((logits.argmax(1) != expected_logits.argmax(1)).mean())
        difference = float(np.abs(logits - expected_logits).max() / expected_logits.std())
        rows.append(msgspec.structs.replace(row, other_class_pct=other, error=difference))
    return rows


def in_pytorch() -> tuple[Expected, list[Row]]:
    """The logits of transformers' model in fp64, and the rows of its logits in fp32."""
    model = transformers_model().eval()
    with torch.inference_mode():
        fp32 = {size: model(torch.from_numpy(picture(size))).logits.numpy() for size in SIZES}
        model.double()
        expected = {size: model(torch.from_numpy(picture(size)).double()).logits.numpy() for size in SIZES}
    by_shape = {(height, width): [fp32[height, width]] for height, width in SIZES}
    return expected, measure(EAGER, "eager", lambda images: by_shape[images.shape[2:]], expected)


def _reason(error: Exception) -> str:
    """The part of an error that says why: its first sentence, or its last line where the first only says where."""
    text = last_line(error) if str(error).startswith("Exception from") else first_line(error)
    return text.partition(". ")[0].partition(", but no custom")[0]


def picture(size: tuple[int, int]) -> Array:
    """A drawn picture as the network takes it, (1, 3, height, width)."""
    return images.normalise(synthetic.dead_leaves(size, 0, 3), Preprocessing())[None]


def main() -> None:
    """Measure everything, write it and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("build/segmentation"), help="For the graphs.")
    options = parser.parse_args()
    every = graphs(options.folder / str(SIZE))
    expected, rows = in_pytorch()
    for name, files in every.items():
        for runtime, file in files.items():
            run = file if isinstance(file, str) else opened(runtime, file)
            rows += measure(name, runtime, run, expected)
    result = Result(environment=environment(THREADS), rows=tuple(rows))
    write_file(options.o, msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    print(result.table())


if __name__ == "__main__":
    main()
