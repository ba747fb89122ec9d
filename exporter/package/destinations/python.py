"""The artifact, and one readable file that predicts with numpy, Pillow and the runtime."""

from __future__ import annotations

from pathlib import Path

from exporter.errors import BadRequest
from exporter.package import folder
from exporter.package.contents import Contents
from exporter.package.destinations import Destination, DestinationOptions
from exporter.package.rendering import render


def check(contents: Contents, options: DestinationOptions) -> None:
    """Raises: BadRequest for a runtime that has no code."""
    del options
    if contents.serving.code is None:
        raise BadRequest(
            f"{contents.artifact.path}: --for python has no code for {contents.serving.title}; package the ONNX file, "
            "or use --for triton"
        )


def write(contents: Contents, options: DestinationOptions, out: Path) -> None:
    """Write the artifact with its sidecar, `predict.py`, requirements and README."""
    del options
    assert contents.serving.code is not None
    for file in contents.files:
        folder.copy(file, out / file.name)
    imports, _, code = contents.serving.code(contents.artifact.sidecar).partition("\n\n\n")
    text = render("predict.py", contents, program="predict", imports=imports, code=code.rstrip())
    folder.write(out / "predict.py", text)
    folder.write(out / "requirements.txt", f"numpy>=1.26\nPillow>=10.3\n{contents.serving.requirement}\n")
    folder.write(out / "README.md", render("python.md", contents))


DESTINATION = Destination(
    name="python",
    summary="the artifact and a predict.py of numpy, Pillow and the runtime",
    check=check,
    write=write,
    program="predict",
    segment_answers=("labels", "logits"),
)
