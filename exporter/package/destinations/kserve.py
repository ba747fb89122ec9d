"""A folder for MLServer, which answers the KServe v2 protocol over HTTP and gRPC."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from exporter.artifact.sidecar import Tensor
from exporter.errors import BadRequest
from exporter.package import folder
from exporter.package.contents import Contents
from exporter.package.destinations import Destination, DestinationOptions
from exporter.package.rendering import render

MLSERVER = "1.7.1"
LARGEST_BATCH = 8  # images of a request, where the artifact takes any number
BYTES_A_VALUE = 24  # at most, of a number in JSON
SPARE_BYTES = 1 << 16  # of a request, around its numbers
DATATYPES = {"float32": "FP32", "uint8": "UINT8"}


def check(contents: Contents, options: DestinationOptions) -> None:
    """Raises: BadRequest for a runtime that has no code, and for types of values that the server does not check."""
    del options
    if contents.serving.code is None:
        raise BadRequest(
            f"{contents.artifact.path}: --for kserve has no code for {contents.serving.title}; package the ONNX file, "
            "or use --for triton"
        )
    unknown = {tensor.dtype for tensor in (contents.input, *contents.tensors)} - set(DATATYPES)
    if unknown:
        remedies = {"int64": "--output softmax in place of top5", "float16": "--io fp32"}
        changes = " and ".join(remedies[dtype] for dtype in sorted(unknown & remedies.keys())) or "another type"
        raise BadRequest(
            f"{contents.artifact.path}: inputs or outputs of {', '.join(sorted(unknown))}, and --for kserve takes "
            f"{', '.join(DATATYPES)}; export it with {changes}"
        )


def write(contents: Contents, options: DestinationOptions, out: Path) -> None:
    """Write the server, its settings, the client, and the model in a folder of its name."""
    del options
    assert contents.serving.code is not None
    batch = contents.batch or LARGEST_BATCH
    body = batch * prod(contents.preprocessing.shape) * BYTES_A_VALUE + SPARE_BYTES
    facts = {"largest_batch": batch, "largest_body": body, "mlserver": MLSERVER}
    model = out / contents.name
    for file in contents.files:
        folder.copy(file, model / file.name)
    imports, _, code = contents.serving.code(contents.artifact.sidecar).partition("\n\n\n")
    folder.write(model / "runtime.py", render("kserve/runtime.py", contents, imports=imports, code=code.rstrip()))
    folder.write(model / "model-settings.json", _json(_model_settings(contents, batch)))
    folder.write(out / "settings.json", _json({"debug": False, "parallel_workers": 0, "host": "127.0.0.1"}))
    folder.write(out / "serve.py", render("kserve/serve.py", contents, **facts))
    folder.write(out / "client.py", render("kserve/client.py", contents, program="client"))
    needed = f"mlserver=={MLSERVER}\nnumpy>=1.26\nPillow>=10.3\n{contents.serving.requirement}\n"
    folder.write(out / "requirements.txt", needed)
    folder.write(out / "README.md", render("kserve/README.md", contents, **facts))


def _json(settings: dict[str, Any]) -> str:
    return json.dumps(settings, indent=2, ensure_ascii=False) + "\n"


def _model_settings(contents: Contents, batch: int) -> dict[str, Any]:
    """The settings of the model: its name, the tensors of the protocol, and the largest batch."""
    return {
        "name": contents.name,
        "implementation": "runtime.ConvNeXt",
        "platform": contents.serving.title,
        "inputs": [_tensor(contents.input, (contents.batch or -1, *contents.sides))],
        "outputs": [_tensor(tensor, tensor.shape) for tensor in contents.tensors],
        "parameters": {"version": contents.artifact.sidecar.sha256[:12], "extra": {"largest_batch": batch}},
    }


def _tensor(tensor: Tensor, shape: Sequence[int | str]) -> dict[str, Any]:
    """A tensor as the protocol names it; -1 stands for any size."""
    sizes = [side if isinstance(side, int) else -1 for side in shape]
    return {"name": tensor.name, "datatype": DATATYPES[tensor.dtype], "shape": sizes}


DESTINATION = Destination(
    name="kserve",
    summary="a folder for MLServer, with limits and checks of requests",
    check=check,
    write=write,
)
