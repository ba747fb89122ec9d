"""onnxsim, guarded: simplification can make a graph bigger and slower, so the result has to earn its place."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from exporter.graph import files

if TYPE_CHECKING:
    import onnx_ir as ir

# These turn every pointwise MatMul + Add into Reshape, Gemm, Reshape (with dynamic axes Shape, Slice, Concat too):
# 36 more nodes or 234 in ConvNeXt-T, and ONNX Runtime runs it 1.5 times slower.
_HARMFUL_PASSES = ["fuse_matmul_add_bias_into_gemm", "fuse_matmul_add_bias_into_gemm_batched"]


def simplify(model: ir.Model) -> tuple[ir.Model, str]:
    """The simplified graph, or the graph as it was with the reason for keeping it.

    Large weights stay out of onnxsim, so a model above 2 GB takes no more memory than a small one.

    Returns: (model, ""), or (the same model, why it was kept). Whether the numbers are still the same is for
        the caller to see, who has a runtime.
    """
    import onnx_ir as ir
    import onnxsim

    skeleton = files.without_weights(model)
    try:
        proto, _ = onnxsim.simplify(skeleton, skipped_optimizers=_HARMFUL_PASSES)
        candidate = ir.serde.deserialize_model(proto)
        _put_back(candidate, model)
    except Exception as error:  # noqa: BLE001  (onnxsim raises anything; what it cannot do is told, not hidden)
        return model, f"onnxsim failed ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
    reason = _worse(candidate, model)
    return (model, reason) if reason else (candidate, "")


def _put_back(candidate: ir.Model, model: ir.Model) -> None:
    """Give the simplified graph its large weights, and the modules its nodes came from."""
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
    if _operators(candidate) == _operators(model):
        return f"nothing to simplify in {before} nodes"
    return ""


def _operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)
