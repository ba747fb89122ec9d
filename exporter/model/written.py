"""Weights that this tool writes: in its own layout, with their architecture in the metadata of the file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from exporter.artifact.disk import write_file
from exporter.artifact.sidecar import Preprocessing, Record
from exporter.errors import BadRequest
from exporter.model.fit import Fitted
from exporter.model.processors import checked
from exporter.model.variants import Architecture


class Written(Record, frozen=True):
    """What this tool writes into the metadata of weights: architecture, the layout that they had, and preprocessing if
    it was given."""

    architecture: Architecture
    layout: str
    preprocessing: Preprocessing | None = None


def write(folder: Path, fitted: Fitted, preprocessing: Preprocessing | None, config: Mapping[str, Any]) -> None:
    """Write weights with their architecture, and a config, to a folder that `load` reads.

    Raises: Unavailable when the disk is full; BadRequest when the folder cannot be written.
    """
    from safetensors.torch import save

    written = Written(architecture=fitted.variant.architecture, layout=fitted.layout, preprocessing=preprocessing)
    metadata = {METADATA: msgspec.json.encode(written).decode()}
    tensors = {key: tensor.contiguous() for key, tensor in fitted.state.items()}
    write_file(folder / "model.safetensors", save(tensors, metadata))
    write_file(folder / "config.json", msgspec.json.format(msgspec.json.encode(config), indent=2))


METADATA = "convnext-export"
"""Key of `Written` in the metadata of a file."""


def read(path: Path) -> Written | None:
    """The metadata of weights that this tool wrote; None for other files.

    Raises: BadRequest when it cannot be read.
    """
    if path.suffix != ".safetensors":
        return None
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(METADATA)
    if text is None:
        return None
    try:
        written = msgspec.json.decode(text, type=Written)
        if written.preprocessing is not None:
            checked(**msgspec.structs.asdict(written.preprocessing))
        return written
    except (msgspec.DecodeError, ValueError) as error:
        raise BadRequest(f"{path}: its metadata cannot be read ({error}); write the weights again") from None
