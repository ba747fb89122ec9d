"""The reference evaluator of the onnx package: slow, and installed wherever this tool is.

It is the worked example of `docs/new-runtime.md`: a whole runtime, and a target that is built for it, in one file.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from exporter.artifact import Artifact, file_name, publish
from exporter.artifact.sidecar import Preprocessing
from exporter.backends import Array, Bound, Layer, Options, Outputs, Runtime, Target, TargetOptions, require
from exporter.data.inputs import as_fp32, as_taken
from exporter.errors import BadRequest, ExporterError, first_line
from exporter.graph import files


def probe() -> str:
    """The version of onnx."""
    return require("onnx", "cpu")


class NullSession:
    """An ONNX graph in the reference evaluator, which runs it in numpy, node by node."""

    def __init__(self, evaluator: Any, preprocessing: Preprocessing) -> None:
        self.evaluator, self.preprocessing = evaluator, preprocessing
        self.input = evaluator.input_names[0]
        self.facts, self.streams = {"device": "cpu", "arithmetic": "fp32"}, 1

    def __call__(self, images: Array) -> Outputs:
        """Run: images (N, C, H, W) float32 to outputs (N, …) float32."""
        return as_fp32(self.evaluator.run(None, {self.input: as_taken(images, self.preprocessing)}))

    def bind(self, batches: Sequence[Array]) -> Bound:
        """A run takes the next of the batches; numpy has no device that they could be moved to."""
        turn = itertools.cycle(batches)
        last: Outputs = ()

        def run() -> None:
            nonlocal last
            last = self(next(turn))

        return Bound(run, lambda: last)


@contextmanager
def session(artifact: Artifact, options: Options) -> Iterator[NullSession]:
    """Open a graph. The number of threads is numpy's own choice.

    Raises: BadRequest for another device than the CPU; ExporterError for a graph that it cannot run.
    """
    from onnx.reference import ReferenceEvaluator

    if options.device not in RUNTIME.devices:
        raise BadRequest(f"--device {options.device}: null runs on the cpu only")
    try:
        evaluator = ReferenceEvaluator(str(artifact.path))
    except Exception as error:
        raise ExporterError(f"{artifact.path}: the reference evaluator cannot load it: {first_line(error)}") from error
    yield NullSession(evaluator, artifact.sidecar.preprocessing)


def build(artifact: Artifact, precision: str, out: Path, options: TargetOptions) -> Artifact:
    """The graph under a name and a sidecar of its own."""
    import onnx_ir as ir

    del options  # this target has none
    sidecar = artifact.sidecar.derived(backend="null", precision=precision, tools={"onnx": probe()})
    target = out / file_name(sidecar, TARGET.suffix)
    return publish(target, sidecar, lambda file: files.save(ir.load(artifact.path), file, sidecar.facts()))


def layers(artifact: Artifact, options: Options) -> list[Layer]:
    """The nodes of the graph, each with the module that it was traced in."""
    import onnx_ir as ir

    del options
    return [
        Layer(
            name=node.name or "", module=node.metadata_props.get("module", ""), operator=node.op_type, precision="fp32"
        )
        for node in ir.load(artifact.path).graph
    ]


def form(precision: str, batch: int | None) -> str:
    """The network as the paper writes it: no other form is faster in numpy."""
    del precision, batch
    return "plain"


RUNTIME = Runtime(name="null", options=Options, probe=probe, open=session, distributions=("onnx",), layers=layers)

TARGET = Target(
    name="null",
    command="null",
    summary="→ ONNX for its own reference evaluator, in numpy: slow.",
    description=(
        "Build an ONNX graph that the reference evaluator of the onnx package runs, operator by operator in numpy; to "
        "tell an error of a runtime from one of the graph."
    ),
    examples=("null --variant atto", "null --weights my_convnext.pth --batch 1"),
    suffix=".null.onnx",
    precisions={"fp32": "As the weights are."},
    form=form,
    build=build,
)
