"""onnxsim with checks: simplification can make a graph larger and slower, so the result is compared with the input."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from exporter.errors import first_line
from exporter.graph import files

if TYPE_CHECKING:
    import onnx_ir as ir

# These turn every pointwise MatMul + Add into Reshape, Gemm, Reshape (with dynamic axes Shape, Slice, Concat too):
# 36 more nodes or 234 in ConvNeXt-T, and ONNX Runtime runs it 1.5 times slower.
_HARMFUL_PASSES = ["fuse_matmul_add_bias_into_gemm", "fuse_matmul_add_bias_into_gemm_batched"]


def simplify(model: ir.Model) -> tuple[ir.Model, str]:
    """Simplify a graph, or keep it and give the reason.

    Large weights stay out of onnxsim, so a model above 2 GB takes no more memory than a small one.

    Returns: the simplified model and "", or the same model and the reason, "" where there is nothing to simplify. The
        caller, which has a runtime, compares the outputs.
    """
    import onnx_ir as ir
    import onnxsim

    skeleton = files.without_weights(model)
    try:
        proto, _ = onnxsim.simplify(skeleton, skipped_optimizers=_HARMFUL_PASSES)
        candidate = ir.serde.deserialize_model(proto)
        _put_back(candidate, model)
    except Exception as error:  # noqa: BLE001  (onnxsim raises anything; what it cannot do is told, not hidden)
        return model, f"onnxsim failed ({type(error).__name__}: {first_line(error)[:120]})"
    reason = _worse(candidate, model)
    same = _operators(candidate) == _operators(model)
    return (model, reason) if reason or same else (candidate, "")


def _put_back(candidate: ir.Model, model: ir.Model) -> None:
    """Restore large weights and module names in the simplified graph."""
    for value in list(candidate.graph.inputs):
        original = model.graph.initializers.get(value.name or "")
        if original is not None:
            candidate.graph.inputs.remove(value)
            value.const_value = original.const_value
            candidate.graph.register_initializer(value)
    modules = {node.name: node.metadata_props.get("module", "") for node in model.graph}
    for node in candidate.graph:
        node.metadata_props["module"] = modules.get(node.name, (node.name or "").rpartition("/")[0])
    candidate.metadata_props.update(model.metadata_props)
    candidate.producer_name = model.producer_name


def _worse(candidate: ir.Model, model: ir.Model) -> str:
    before, after = len(model.graph), len(candidate.graph)
    if after > before:
        return f"{after} nodes instead of {before}"
    for old, new in zip(
        [*model.graph.inputs, *model.graph.outputs],
        [*candidate.graph.inputs, *candidate.graph.outputs],
        strict=True,
    ):
        if old.name != new.name or str(old.shape) != str(new.shape):
            return f"{old.name} was {old.shape} and became {new.name} {new.shape}"
    return ""


def _operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)
