"""The files that the ways run: networks of timm with random weights, exported for one batch size and one input size.

Each file is written as an artifact of this tool, with a sidecar, so that the tool's own sessions time it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxsim
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.libraries import library
from benchmarks.peers import build as peers
from benchmarks.rivals import PLAIN, SIZE, Network, Way
from exporter import artifact as artifacts
from exporter.artifact import Artifact
from exporter.artifact.sidecar import Preprocessing, Sidecar, Tensor, Weights
from exporter.bench import Plan, worker
from exporter.build import build, resolve
from exporter.build.int8.work import prepare
from exporter.machine import has_bf16
from exporter.recipe import Export, Model, Quantization, Recipe

CALIBRATION = 16  # speed is compared, not accuracy
SUFFIXES = {"onnxruntime": ".onnx", "openvino": ".xml"}
NEWEST_OPSET = 23  # the first with an operator for attention
Cannot = peers.Cannot


def create(network: Network, size: int = SIZE) -> torch.nn.Module:
    """A network of timm with random weights, for one input size: ViT has as many positions as the size needs."""
    timm = library("timm")
    torch.manual_seed(0)
    of_size = {"img_size": size} if network.timm.startswith(("swin", "deit")) else {}
    model: torch.nn.Module = timm.create_model(network.timm, **of_size).eval()
    return model


def gmacs(network: Network, size: int = SIZE) -> float:
    """Multiply-accumulates of one image in 10⁹, as PyTorch counts them, products of attention included."""
    set_fused_attn = library("timm").layers.set_fused_attn
    set_fused_attn(False)  # the counter does not know the fused product of a CPU
    try:
        model = create(network, size)
    finally:
        set_fused_attn(True)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros(1, 3, size, size))
    return float(counter.get_total_flops()) / 2e9


def preprocessing(size: int) -> Preprocessing:
    """Images of one input size."""
    return Preprocessing(size=size, resize=round(size / 0.875))


def make(network: Network, way: Way, batch: int, size: int, folder: Path) -> Artifact:
    """The artifact of a network in one way; made once.

    Raises: Cannot where the way has nothing for this network, with the reason.
    """
    out = folder / f"{network.timm}-b{batch}-{size}"
    if way.name == "ours":
        return ours(network, way, batch, size, out / "ours")
    words = f"{way.name}_{way.precision}".replace(" ", "-")
    target = out / f"{words}{SUFFIXES[way.runtime]}"
    if target.exists():
        return artifacts.load(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    return artifacts.publish(target, sidecar(network, way, batch, size), lambda path: _write(network, way, out, path))


def _write(network: Network, way: Way, folder: Path, path: Path) -> None:
    """Write the file of a way; `folder` keeps what several ways begin with."""
    if way.runtime == "openvino":
        _write_openvino(network, way, folder, path)
    else:
        WRITERS[way.name](network, folder, path)


def sidecar(network: Network, way: Way, batch: int, size: int) -> Sidecar:
    """The sidecar of an artifact: images (batch, 3, size, size), logits (batch, 1000)."""
    name, precision = network.timm, way.precision
    if precision == "int8":  # what it leaves in floating point runs in bf16, as OpenVINO does it unless it is set
        precision = "bf16" if way.runtime == "openvino" and has_bf16() else "fp32"
    return Sidecar(
        backend=way.runtime,
        precision=precision,
        variant=name,
        task="classify",
        weights=Weights(source=f"timm {name}, random", digest=name, layout="timm", num_classes=1000),
        inputs=(Tensor(name="images", shape=(batch, 3, size, size)),),
        outputs=(Tensor(name="logits", shape=(batch, 1000)),),
        preprocessing=preprocessing(size),
    )


def images(batch: int, size: int, count: int = 1) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Batches of preprocessed images, (count, batch, 3, size, size)."""
    some = worker.inputs(Plan(arms=(), preprocessing=preprocessing(size), batch=batch))
    return np.stack([np.roll(some[turn % len(some)], turn, axis=-1) for turn in range(count)])


def _dimensions(folder: Path) -> tuple[int, int]:
    """Batch size and input size that a folder is for."""
    _, batch, size = folder.name.rsplit("-", 2)
    return int(batch.removeprefix("b")), int(size)


def plain(network: Network, folder: Path, opset: int | None = None) -> Path:
    """PyTorch's export of a network, made once for each opset."""
    path = folder / f"export-{opset or 'default'}.graph"
    if not path.exists():
        export(network, *_dimensions(folder), path.with_suffix(".new"), opset)
        path.with_suffix(".new").replace(path)
    return path


def export(
    network: Network, batch: int, size: int, path: Path, opset: int | None = None, dtype: torch.dtype = torch.float32
) -> None:
    """Export a network by `torch.onnx.export`, with input `images` (batch, 3, size, size) and weights of `dtype`."""
    words: dict[str, Any] = {"dynamo": True, "verbose": False, "external_data": False, "opset_version": opset}
    model, pixels = create(network, size).to(dtype), torch.from_numpy(images(batch, size)[0]).to(dtype)
    torch.onnx.export(model, (pixels,), path, input_names=["images"], **words)


def _export(network: Network, folder: Path, path: Path) -> None:
    path.write_bytes(plain(network, folder).read_bytes())


def _simplify(network: Network, folder: Path, path: Path) -> None:
    model, _ = onnxsim.simplify(onnx.load(plain(network, folder)))
    onnx.save(model, path)


def _attention(network: Network, folder: Path, path: Path) -> None:
    graph = plain(network, folder, NEWEST_OPSET)
    if not any(node.op_type == "Attention" for node in onnx.load(graph).graph.node):
        raise Cannot("the export has no attention in one operator")
    path.write_bytes(graph.read_bytes())


def _prepared(network: Network, folder: Path) -> Path:
    """The export as the quantizers of ONNX Runtime ask for it: optimized, with the shapes of all values."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = folder / "prepared.graph"
    if not path.exists():
        quant_pre_process(plain(network, folder), path.with_suffix(".new"), skip_symbolic_shape=True)
        path.with_suffix(".new").replace(path)
    return path


def _quantize_static(network: Network, folder: Path, path: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Images(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            batch, size = _dimensions(folder)
            self.left = iter(images(batch, size, max(1, CALIBRATION // batch)))

        def get_next(self) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]] | None:
            some = next(self.left, None)
            return None if some is None else {"images": some}

    quantize_static(_prepared(network, folder), path, Images(), per_channel=True, reduce_range=True)


def _quantize_dynamic(network: Network, folder: Path, path: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    graph = onnx.load(plain(network, folder))
    del graph.graph.value_info[:]  # shapes of the weights before they are transposed, which it refuses
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary) / "whole.onnx"
        onnx.save(graph, whole)
        quantize_dynamic(whole, path, per_channel=True, reduce_range=True)


WRITERS: dict[str, Callable[[Network, Path, Path], None]] = {
    PLAIN: _export,
    "onnxsim": _simplify,
    "Attention of opset 23": _attention,
    "quantize_static": _quantize_static,
    "quantize_dynamic": _quantize_dynamic,
}


def _write_openvino(network: Network, way: Way, folder: Path, path: Path) -> None:
    import openvino as ov

    batch, size = _dimensions(folder)
    if way.name == "NNCF":
        with tempfile.TemporaryDirectory() as temporary:
            calibration = Path(temporary) / "images.npy"
            np.save(calibration, images(batch, size, max(1, CALIBRATION // batch)))
            script = Path(peers.__file__).with_name("nncf_default.py")
            program = peers.environment("optimum-intel") / "python"
            kind = "transformer" if network.timm.startswith(("swin", "deit")) else ""
            peers.run(program, script, plain(network, folder), calibration, path, "", kind)
        return
    if way.name == PLAIN:
        model = ov.convert_model(plain(network, folder))
    else:
        model = ov.convert_model(create(network, size), example_input=torch.zeros(batch, 3, size, size))
        model.reshape([batch, 3, size, size])
    ov.save_model(model, path, compress_to_fp16=False)


def ours(network: Network, way: Way, batch: int, size: int, out: Path) -> Artifact:
    """Our own artifact of a ConvNeXt, built for the batch size as `--batch` does.

    Raises: Cannot for another family.
    """
    if not network.variant:
        raise Cannot("this tool exports ConvNeXt")
    quantization = Quantization(calib_size=CALIBRATION) if way.precision == "int8" else None
    recipe = Recipe(
        backend=way.runtime,
        precision=way.precision,
        model=Model(variant=network.variant, weights="random:0"),
        export=Export(batch=batch, imgsz=size),
        quantization=quantization,
    )
    job = resolve(recipe, out)
    if job.files[-1].exists():
        return artifacts.load(job.files[-1])
    if quantization is None:
        return build(recipe, out).artifact
    with tempfile.TemporaryDirectory() as temporary:
        return prepare(job, Path(temporary)).make((), out)
