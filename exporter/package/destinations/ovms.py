"""A folder for OpenVINO Model Server."""

from __future__ import annotations

import json
from pathlib import Path

from exporter.errors import BadRequest
from exporter.package import folder
from exporter.package.contents import Contents
from exporter.package.destinations import Destination, DestinationOptions
from exporter.package.rendering import render


def check(contents: Contents, options: DestinationOptions) -> None:
    """Raises: BadRequest for an artifact that the server does not open."""
    del options
    if contents.serving.model_server is None:
        raise BadRequest(
            f"{contents.artifact.path}: --for ovms takes IR and ONNX files, and this is for {contents.serving.title}; "
            "package the ONNX file, or use --for triton"
        )


def write(contents: Contents, options: DestinationOptions, out: Path) -> None:
    """Write the folder of the model with its one version, `config.json`, a client and the README."""
    del options
    assert contents.serving.model_server is not None
    for file in contents.files:
        folder.copy(file, out / "models" / contents.name / "1" / file.name)
    config = {
        "name": contents.name,
        "base_path": f"models/{contents.name}",  # relative to config.json
        "target_device": "CPU",
        "plugin_config": contents.serving.model_server(contents.artifact.sidecar),
    }
    folder.write(out / "config.json", json.dumps({"model_config_list": [{"config": config}]}, indent=2) + "\n")
    facts = {"model": contents.name, "program": "client", "port": 8000, "sends_files": False}
    folder.write(out / "client.py", render("client.py", contents, **facts))
    folder.write(out / "requirements.txt", "numpy>=1.26\nPillow>=10.3\n")
    folder.write(out / "README.md", render("ovms.md", contents))


DESTINATION = Destination(
    name="ovms",
    summary="a folder of the OVMS model server, with its config.json",
    check=check,
    write=write,
    segment_answers=("labels", "logits"),
)
