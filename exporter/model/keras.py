"""Weights of keras.applications' ConvNeXt, from `.keras`, `.weights.h5` and the older `.h5`, in the names of the paper.

The files hold arrays by layer. A layer's own name, as in `convnext_tiny_stage_0_block_1_depthwise_conv`, says what it
is; it is an attribute of the layer's group (Keras 3) or part of the path (Keras 2). Kernels are (height, width, in,
out) and Dense kernels (in, out).
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.errors import BadRequest, Unavailable, first_line, some

if TYPE_CHECKING:
    from torch import Tensor

_MOST_CONFIG_BYTES = 2**25
_DEEPEST = 12
_WEIGHTS = "model.weights.h5"
# What `include_preprocessing` puts in front, on images of 0…255; a Normalization that was not adapted saves no arrays.
_PUBLISHED = {
    "mean": [0.485 * 255, 0.456 * 255, 0.406 * 255],
    "variance": [(0.229 * 255) ** 2, (0.224 * 255) ** 2, (0.225 * 255) ** 2],
}
_MODULES = (
    (r"stem_conv", r"downsample_layers.0.0"),
    (r"stem_layernorm", r"downsample_layers.0.1"),
    (r"downsampling_layernorm_(\d+)", r"downsample_layers.+\1.0"),
    (r"downsampling_conv_(\d+)", r"downsample_layers.+\1.1"),
    (r"stage_(\d+)_block_(\d+)_depthwise_conv", r"stages.\1.\2.dwconv"),
    (r"stage_(\d+)_block_(\d+)_layernorm", r"stages.\1.\2.norm"),
    (r"stage_(\d+)_block_(\d+)_pointwise_conv_([12])", r"stages.\1.\2.pwconv\3"),
    (r"stage_(\d+)_block_(\d+)_layer_scale", r"stages.\1.\2"),
    (r"head_layernorm", r"norm"),
    (r"head_dense", r"head"),
)
SOFTMAX = "Keras puts a softmax behind the classifier; here the outputs are the logits before it"


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], tuple[str, ...]]:
    """Read the weights, what lies beside them (`keras`: mean and variance of its Normalization), and notes.

    Raises: BadRequest for a file that is damaged or of another network; Unavailable without h5py.
    """
    try:
        import h5py
    except ImportError:
        raise Unavailable(f"{path}: needs h5py; pip install 'convnext-export[keras]'") from None
    try:
        with _weights_file(path) as (source, size), h5py.File(source, "r") as file:
            layers: set[str] = set()
            arrays = dict(_arrays(path, file, size, layers))
            config = file.attrs.get("model_config", "")
        normalization = _normalization(arrays, layers, _config(path) or config)
    except (
        OSError,
        ValueError,
        LookupError,
        RuntimeError,
        TypeError,
        zipfile.BadZipFile,
        MemoryError,
        AttributeError,
    ) as error:
        raise BadRequest(f"{path}: truncated or no Keras file ({first_line(error)}); fetch it again") from None
    tensors: dict[str, Tensor] = {}
    other = []
    for name, values in arrays.items():
        if "prestem_normalization" in name:
            continue
        key = _key(name)
        if key is None or key in tensors:
            other.append(name)
        else:
            tensors[key] = _converted(key, values)
    if other or not tensors:
        raise BadRequest(
            f"{path}: not a ConvNeXt of keras.applications: {len(other)} arrays of other layers ({some(other)}); "
            "save the backbone alone, or give its weights as .safetensors"
        )
    beside = {"keras": normalization} if normalization else {}
    return tensors, beside, (f"{path.name}: {SOFTMAX}",) if "head.weight" in tensors else ()


@contextlib.contextmanager
def _weights_file(path: Path) -> Iterator[tuple[Any, int]]:
    """The HDF5 file and its size; a `.keras` archive holds it uncompressed or deflated."""
    if path.suffix != ".keras":
        yield path, path.stat().st_size
        return
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(_WEIGHTS)
        if entry.file_size > 8 * path.stat().st_size:
            raise BadRequest(f"{path}: refused, its weights unpack to {entry.file_size} bytes; save them uncompressed")
        yield io.BytesIO(archive.read(entry)), entry.file_size


def _arrays(path: Path, file: Any, size: int, layers: set[str]) -> Iterator[tuple[str, Any]]:
    """Each array with the name of its layer and its own, `stem_conv/kernel`; `layers` gets the names of all layers.

    Raises: BadRequest for links, which may lead to other files, and for arrays that are larger than the file.
    """
    import h5py

    waiting = [("", file, 0)]
    total = 0
    while waiting:
        name, group, depth = waiting.pop()
        for key in group:
            if not isinstance(group.get(key, getlink=True), h5py.HardLink) or depth > _DEEPEST:
                raise BadRequest(f"{path}: refused, {key[:60]} is a link to elsewhere; save them again")
            one = group[key]
            if isinstance(one, h5py.Group):
                layer = str(one.attrs.get("name", "")) if key == "vars" else key
                layers.add(layer)
                if key not in ("optimizer", "optimizer_weights", "seed_generator"):
                    waiting.append((layer or name, one, depth + 1))
                continue
            if one.external is not None or one.is_virtual or one.dtype.kind not in "fiu":
                raise BadRequest(f"{path}: refused, {key[:60]} holds no numbers of this file; save them again")
            total += one.size * one.dtype.itemsize
            if total > size:
                raise BadRequest(f"{path}: refused, {size} bytes that unpack to more; save them uncompressed")
            if one.size:
                yield f"{name}/{key.partition(':')[0]}", one[()]


def _key(name: str) -> str | None:
    layer, _, array = name.rpartition("/")
    for pattern, module in _MODULES:
        if found := re.search(rf"(?:^|_|/){pattern}(?:_\d+)?$", layer):
            key = re.sub(r"\+(\d+)", lambda number: str(int(number[1]) + 1), found.expand(module))
            if pattern.endswith("layer_scale"):
                return f"{key}.gamma"
            return {"0": f"{key}.weight", "1": f"{key}.bias", "kernel": f"{key}.weight", "gamma": f"{key}.weight",
                    "bias": f"{key}.bias", "beta": f"{key}.bias"}.get(array)  # fmt: skip
    return None


def _converted(key: str, values: Any) -> Tensor:
    """An array in the order of PyTorch's axes: kernels out first, Dense (out, in)."""
    import numpy as np
    import torch

    if values.ndim == 4:  # (height, width, channels, 1) in a DepthwiseConv2D, (height, width, 1, channels) with groups
        depthwise = key.endswith("dwconv.weight") and values.shape[2] > 1
        values = values.transpose(2, 3, 0, 1) if depthwise else values.transpose(3, 2, 0, 1)
    elif values.ndim == 2:
        values = values.T
    return torch.from_numpy(np.ascontiguousarray(values, np.float32))


def _config(path: Path) -> str:
    """The configuration of the model in a `.keras` archive, as JSON."""
    if path.suffix != ".keras":
        return ""
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo("config.json")
        if entry.file_size > _MOST_CONFIG_BYTES:
            raise ValueError("a configuration that is too large")
        return archive.read(entry).decode()


def _normalization(arrays: dict[str, Any], layers: set[str], config: str | bytes) -> dict[str, Any] | None:
    """Mean and variance of the Normalization in front: from its arrays, the configuration, or as published."""
    if not any("prestem_normalization" in layer for layer in layers):
        return None
    adapted = {name.rpartition("/")[2]: values for name, values in arrays.items() if "prestem_normalization" in name}
    for mean, variance in (("0", "1"), ("mean", "variance")):
        if mean in adapted and variance in adapted:
            return {"mean": adapted[mean].ravel().tolist(), "variance": adapted[variance].ravel().tolist()}
    for layer in json.loads(config)["config"]["layers"] if config else ():
        inner = layer["config"]
        if layer["class_name"] == "Normalization" and inner.get("mean") is not None:
            return {key: [float(value) for value in _flat(inner[key])] for key in ("mean", "variance")}
    return _PUBLISHED


def _flat(value: Any) -> list[Any]:
    while isinstance(value, list) and value and isinstance(value[0], list):
        value = value[0]
    return value if isinstance(value, list) else [value]
