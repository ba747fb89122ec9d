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
    # With a dynamic height and width, PyTorch never uses an entry of its cache of fake tensors again, and making the
    # entries takes half of the trace.
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
    """Skip the exporter's pass that inserts type promotions in networks that need none. The pass runs the whole network
    again on fake tensors, which takes a third of the time of a trace."""
    import torch

    try:
        from torch.onnx._internal.exporter import _fx_passes
        from torch.onnx._internal.fx.passes import type_promotion

        promote, rules = _fx_passes.insert_type_promotion_nodes, type_promotion.TypePromotionTable()
        rule_of = type_promotion.get_type_promotion_rule
    except (ImportError, AttributeError):  # a version of PyTorch with other internals: the pass runs
        yield
        return

    def promote_mixed(graph_module: torch.fx.GraphModule) -> None:
        parts = [part for part in graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
        nodes = (node for part in parts for node in part.graph.nodes if node.op == "call_function")
        if any(rule_of(node, rules) and _mixes_types(node) for node in nodes):
            promote(graph_module)

    _fx_passes.insert_type_promotion_nodes = promote_mixed
    try:
        yield
    finally:
        _fx_passes.insert_type_promotion_nodes = promote


def _mixes_types(node: torch.fx.Node) -> bool:
    """Whether the arguments of an operator are tensors of several types, a tensor and a number that the graph computes,
    or whole numbers and a fraction; or whether whole numbers give fractions."""
    import torch

    values = [argument.meta.get("val") for argument in node.all_input_nodes]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    types = {tensor.dtype for tensor in tensors}
    if node.target == torch.ops.aten.where.self:
        types.discard(torch.bool)  # of the condition
    if len(types) != 1 or len(tensors) < len(values):
        return True
    (only,), result = types, node.meta.get("val")
    has_fraction = any(isinstance(argument, float) for argument in node.args)
    return only != torch.float32 and (has_fraction or getattr(result, "dtype", None) not in (only, torch.bool))


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
