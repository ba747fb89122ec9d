"""Traces PyTorch models to ONNX graphs, with nodes and weights named as in the model."""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from exporter.artifact.outputs import DENSE
from exporter.artifact.sidecar import Content, OutputSpec, Record, Size, sides
from exporter.graph.opset import TRACED
from exporter.model import structure

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

INPUT = "images"


class TraceOptions(Record, frozen=True):
    """Options of a trace: the outputs, the strides of the stages, the input size and batch (None for a dynamic axis),
    the type of the input, its channels, whether these are its last axis, the names of heads where there are several,
    whether outputs are in fp16, and whether the input is one picture of any size, as bytes (H, W, C)."""

    spec: OutputSpec
    strides: tuple[int, ...]
    imgsz: Size | None
    batch: int | None
    dtype: Literal["float32", "float16", "uint8"] = "float32"
    channels: int = 3
    channels_last: bool = False
    heads: tuple[str, ...] = ()
    half_outputs: bool = False
    picture: bool = False

    @property
    def has_any_size(self) -> bool:
        """Whether a dynamic height and width need not be multiples of the last stride."""
        return not set(DENSE).isdisjoint(self.spec.tasks)

    @property
    def outputs(self) -> dict[str, Content]:
        """The name of each output, with what it holds."""
        return self.spec.named(self.heads, self.strides)


def trace(model: torch.nn.Module, options: TraceOptions) -> ir.Model:
    """Trace the network to an ONNX graph of opset `TRACED`. Its tensors share memory with the model.

    Args:
        model: in eval mode; its outputs are those of the options.
        options: within the bounds of a recipe. A dynamic height and width are multiples of the last stride, of
            segmentation and of a pyramid any.

    Returns: a graph from `images` (N, C, H, W) or (N, H, W, C), or one picture (H, W, C), to the outputs of `options`.
    """
    import torch

    example = torch.zeros(*_example_shape(options), dtype=getattr(torch, options.dtype))
    # Entries of the cache of fake tensors hold for one size only; for open sizes, making them takes half of the time.
    uses_cache = options.imgsz is not None and not options.picture
    with torch.no_grad(), _quiet(), torch._dynamo.config.patch(fake_tensor_cache_enabled=uses_cache):
        exported = torch.export.export(
            model,
            (example,),
            dynamic_shapes=(_dynamic_axes(options),),
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=options.has_any_size,  # sizes of any remainder have guards
        )
        program = _converted(exported, options)
    graph_model = _taken(program.model)
    _name_axes(graph_model, options)
    _name_after_modules(graph_model, options)
    return graph_model


def _example_shape(options: TraceOptions) -> tuple[int, ...]:
    """A shape of the input in which no dynamic axis would be taken for a constant: a batch of one, or a side of one
    stride or of the input of the network."""
    if options.picture:
        return 611, 823, options.channels
    size = options.imgsz or (2 * options.strides[-1] if not options.has_any_size else _odd_size(options))
    shape = (*sides(size), options.channels) if options.channels_last else (options.channels, *sides(size))
    return options.batch or 2, *shape


def _odd_size(options: TraceOptions) -> Size:
    """Height and width that no stride divides, with two positions or more in the last map."""
    return 2 * options.strides[-1] + 11, 3 * options.strides[-1] + 11


def _converted(exported: torch.export.ExportedProgram, options: TraceOptions) -> torch.onnx.ONNXProgram:
    """Convert a program as it is, or decomposed where an operator of it has no ONNX function.

    PyTorch's exporter calls `run_decompositions` for every program, which traces the network again and takes half of
    the time. So this method first returns the program unchanged; if the conversion fails, the second one decomposes.

    Raises: OnnxExporterError.
    """
    import torch

    def convert() -> torch.onnx.ONNXProgram:
        program = torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=TRACED,
            input_names=[INPUT],
            output_names=list(options.outputs),
            verbose=False,
        )
        assert program is not None
        return program

    decompose = exported.run_decompositions
    exported.run_decompositions = lambda *_: exported
    with _promoting_mixed_types_only():
        try:
            return convert()
        except torch.onnx.OnnxExporterError:
            exported.run_decompositions = decompose
            return convert()


@contextlib.contextmanager
def _promoting_mixed_types_only() -> Iterator[None]:
    """Skip the exporter's pass that inserts type promotions where every operator gets only fp32 tensors, and none is
    needed. The pass runs the whole network again on fake tensors, which takes a third of the time of a trace."""
    from torch.onnx._internal.exporter import _fx_passes

    promote = getattr(_fx_passes, "insert_type_promotion_nodes", None)
    if promote is None:  # in another version of PyTorch
        yield
        return

    def promote_mixed(graph_module: torch.fx.GraphModule) -> None:
        if not _is_fp32(graph_module):
            promote(graph_module)

    _fx_passes.insert_type_promotion_nodes = promote_mixed
    try:
        yield
    finally:
        _fx_passes.insert_type_promotion_nodes = promote


def _is_fp32(graph_module: torch.fx.GraphModule) -> bool:
    """Whether every tensor that an operator gets is in fp32."""
    import torch

    return all(
        argument.meta["val"].dtype == torch.float32
        for node in graph_module.graph.nodes
        if node.op == "call_function"
        for argument in node.all_input_nodes
        if isinstance(argument.meta.get("val"), torch.Tensor)
    )


def _taken(model: ir.Model) -> ir.Model:
    """Move the weights to a copy of the graph, because the exporter's rewriter keeps a reference to the original."""
    copy = model.clone()
    for value in model.graph.initializers.values():
        value.const_value = None
    return copy


def _dynamic_axes(options: TraceOptions) -> dict[int, Any]:
    import torch

    axes: dict[int, Any] = {}
    if options.picture:
        return {0: torch.export.Dim("height"), 1: torch.export.Dim("width")}
    if options.batch is None:
        axes[0] = torch.export.Dim("batch")
    if options.imgsz is None:
        first, last = 1 if options.channels_last else 2, options.strides[-1]
        if options.has_any_size:
            # PyTorch takes a map of one position for a special case; the graph has none.
            axes[first], axes[first + 1] = (torch.export.Dim(name, min=2 * last) for name in ("height", "width"))
        else:
            axes[first], axes[first + 1] = (last * torch.export.Dim(name) for name in ("rows", "columns"))
    return axes


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's messages about torchvision operators and internals."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _name_axes(model: ir.Model, options: TraceOptions) -> None:
    """Name the dynamic axes: batch, height, width, and height/4 … of a feature map; tokens."""
    import onnx_ir as ir

    maps = dict(zip((name for name, holds in options.outputs.items() if holds == "map"), options.strides, strict=False))
    for value in [*model.graph.inputs, *model.graph.outputs]:
        assert value.shape is not None
        holds = options.outputs.get(value.name or "", "")
        stride = maps.get(value.name or "", 1)
        if holds == "pixel_logits" and options.spec.answer == "logits4":
            stride = options.strides[0]
        over = f"/{stride}" if stride > 1 else ""
        of_pixels = holds in ("labels", "pixel_scores")
        first = 1 if (options.channels_last and value.name == INPUT) or of_pixels else 2
        first = 0 if options.picture and value.name == INPUT else first
        words = {0: "batch"} | {first: f"height{over}", first + 1: f"width{over}"}
        words |= {1: "tokens"} if holds == "tokens" else {}
        dims = [words[axis] if isinstance(dim, ir.SymbolicDim) else int(dim) for axis, dim in enumerate(value.shape)]
        value.shape = ir.Shape(dims)


def _name_after_modules(model: ir.Model, options: TraceOptions) -> None:
    """Name every node and weight as in the PyTorch model, and drop the exporter's other metadata."""
    used: Counter[str] = Counter()
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "['', '']"))
        module = scopes[-2] if len(scopes) > 1 else ""
        if module.startswith("_empty_nn_module_stack"):  # the size of the input
            module = structure.PICTURE if options.picture else ""
        node.metadata_props.clear()
        node.metadata_props["module"] = module
        node.doc_string = None
        stem = f"{module}/{node.op_type}" if module else node.op_type
        used[stem] += 1
        node.name = stem if used[stem] == 1 else f"{stem}_{used[stem]}"
        _name_weight(model, node, module)
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.producer_name, model.producer_version = "convnext-export", None


def _name_weight(model: ir.Model, node: ir.Node, module: str) -> None:
    """Name the transposed weights of a Linear after their module; the exporter names them val_7."""
    if node.op_type != "MatMul" or node.inputs[1] is None or not node.inputs[1].is_initializer():
        return
    weight, name = node.inputs[1], f"{module}.weight"
    if name not in model.graph.initializers:
        weight.name = name
