"""Compare a runtime's int8 sums with exact sums: `python -m tests.quantize.kernels RUNTIME`.

Prints the number of cases and the names of those in which a runtime's sums differ. `--any-weights` disables the
bound on adjacent weights. It is a program of its own, so that qemu can run it.
"""

import sys

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from exporter.quantize.rounding import round_weights

MATMULS = ((4, 3), (37, 16), (96, 384), (385, 33), (386, 8), (768, 32), (770, 8))
CONVS = ((4, 3), (24, 32), (40, 80), (97, 33), (384, 96))
RANDOM_SHAPES = 12
KINDS = ("random", "one sign", "outliers", "alternating")
ZERO_POINTS = (0, 128, 131)


def weights(kind: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """Weights (out, in, …) of one of `KINDS`."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=shape).astype(np.float32)
    if kind == "one sign":
        return np.sign(weight[:, :1]) * (1 + 0.01 * weight)
    if kind == "outliers":
        return np.where(rng.random(shape) < 0.1, 20 * np.sign(weight), weight).astype(np.float32)
    if kind == "alternating":  # opposite signs within a pair (2k, 2k + 1), equal signs between pairs
        sign = np.where(np.arange(shape[1]) % 4 < 2, 1, -1) * np.where(np.arange(shape[1]) % 2, 1, -1)
        return np.abs(weight) * sign.reshape(1, -1, *[1] * (len(shape) - 2)).astype(np.float32)
    return weight


def adversarial(whole: NDArray[np.int8], rows: int) -> NDArray[np.int64]:
    """Inputs (rows, in, …): even rows maximize one output channel's sum, odd rows minimize it; the last is random."""
    chosen = whole[np.arange(rows) // 2 % len(whole)]
    signs = np.where(np.arange(rows) % 2, -1, 1).reshape(-1, *[1] * (whole.ndim - 1))
    inputs = np.where(signs * chosen > 0, 255, 0)
    if rows > 2:
        inputs[-1] = np.random.default_rng(0).integers(0, 256, inputs[-1].shape)
    return inputs


def model(whole: NDArray[np.int8], zero_point: int) -> onnx.ModelProto:
    """Q and DQ with scales of 1 around a MatMul for weights (out, in), or around a Conv whose stride is its kernel."""
    conv = whole.ndim == 4
    stored = whole if conv else np.ascontiguousarray(whole.T)
    arrays = {
        "one": np.float32(1),
        "zero": np.uint8(zero_point),
        "stored": stored,
        "ones": np.ones(len(whole), np.float32),
        "zeros": np.zeros(len(whole), np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "one", "zero"], ["dq"]),
        helper.make_node("DequantizeLinear", ["stored", "ones", "zeros"], ["weight"], axis=0 if conv else 1),
        helper.make_node("Conv", ["dq", "weight"], ["y"], strides=list(whole.shape[2:]))
        if conv
        else helper.make_node("MatMul", ["dq", "weight"], ["y"]),
    ]
    shape = ["n", *whole.shape[1:]]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in arrays.items()]
    graph = helper.make_graph(nodes, "product", [x], [y], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(runtime: str, made: onnx.ModelProto, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Run the model on the CPU: x (n, in, …) to its output."""
    if runtime == "onnxruntime":
        import onnxruntime

        session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
        return session.run(None, {"x": x})[0]
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(made.SerializeToString()), "CPU", settings)
    return compiled(x)[0]


def shapes(convolutions: bool) -> list[tuple[int, tuple[int, ...]]]:
    """Numbers of rows, and shapes of weights (out, in) or (out, in, side, side): chosen ones and random ones."""
    chosen: list[tuple[int, tuple[int, ...]]] = [(rows, (o, i)) for rows in (1, 5, 49) for i, o in MATMULS]
    if convolutions:
        chosen += [(6, (o, i, side, side)) for i, o in CONVS for side in (1, 2)]
    rng = np.random.default_rng(0)
    for _ in range(RANDOM_SHAPES):
        side = int(rng.integers(0, 3)) if convolutions else 0
        shape = (int(rng.integers(1, 130)), int(rng.integers(2, 600)), *[side] * (2 if side else 0))
        chosen.append((int(rng.integers(1, 60)), shape))
    return chosen


def rounding(whole: NDArray[np.int8], zero_point: int, exact: NDArray[np.int64]) -> NDArray[np.float32]:
    """How far each sum may be off: not at all below 2²⁴, the whole numbers of fp32. With AMX, OpenVINO converts the sum
    to fp32 before it subtracts the part of the zero point."""
    with_zero_point = exact + zero_point * whole.astype(np.int64).sum(tuple(range(1, whole.ndim)))
    largest = np.maximum(np.abs(exact), np.abs(with_zero_point))
    return np.where(largest > 2**24, np.spacing(largest.astype(np.float32)), np.float32(0))


def differing(runtime: str, exact_pairs: bool) -> tuple[int, list[str]]:
    """The number of cases, and those in which a runtime's sums are not exact."""
    # ONNX Runtime is given no int8 convolutions.
    cases = [(*case, kind) for case in shapes(convolutions=runtime == "openvino") for kind in KINDS]
    if not exact_pairs:  # it is enough to see that many saturate
        cases = cases[::4]
    wrong = []
    for seed, (rows, shape, kind) in enumerate(cases):
        whole, _ = round_weights(weights(kind, shape, seed), 0, exact_pairs=exact_pairs)
        zero_point = ZERO_POINTS[seed % len(ZERO_POINTS)]
        inputs = adversarial(whole, rows)
        exact = np.tensordot(inputs - zero_point, whole.astype(np.int64), [range(1, whole.ndim)] * 2)
        got = run(runtime, model(whole, zero_point), (inputs - zero_point).astype(np.float32)).reshape(exact.shape)
        if (np.abs(got.astype(np.float64) - exact) > rounding(whole, zero_point, exact)).any():
            wrong.append(f"{kind} {rows} × {shape}, zero point {zero_point}")
    return len(cases), wrong


if __name__ == "__main__":
    count, wrong = differing(sys.argv[1], "--any-weights" not in sys.argv)
    print(f"{count} cases, {len(wrong)} differ", *wrong, sep="\n")
