"""What is known of an artifact: the facts of its sidecar, and how they are written, sealed and read."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import msgspec

from exporter.errors import BadRequest

SCHEMA = 4
MAX_SIDECAR_BYTES = 32 * 2**20  # 21,841 labels take 1 MB

PLACES = {"weights": {"source"}, "recipe": {"weights", "labels", "calib", "variant"}, "quantization": {"calib"}}
"""Words of sections that say where something lay when an artifact was built; digests say what it was."""


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A frozen fact that is written as JSON; an unknown key in a file is an error."""


class Preprocessing(Record, frozen=True):
    """How an image becomes the input: resized, cropped to `size`, scaled to 0…1, normalised per channel.

    `center` resizes the short side to `resize` pixels and cuts the centre; `squash` resizes both sides to
    `size` and cuts nothing, as published for inputs of 384 pixels and more. `input` says how far to go: an artifact
    takes `normalized` pixels, or `float01` (0…1) or `uint8` (0…255) and does the rest itself.
    """

    size: int = 224
    resize: int = 256
    crop: Literal["center", "squash"] = "center"
    interpolation: Literal["bicubic", "bilinear", "nearest", "lanczos"] = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    layout: Literal["NCHW"] = "NCHW"
    color: Literal["RGB"] = "RGB"
    input: Literal["normalized", "float01", "uint8"] = "normalized"

    def at(self, size: int) -> Preprocessing:
        """The same recipe for another input size in pixels, keeping the share that the crop leaves."""
        return msgspec.structs.replace(self, size=size, resize=round(size * self.resize / self.size))


class Tensor(Record, frozen=True):
    """An input or output: name, shape (a word stands for a dynamic axis) and element type."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str = "float32"


class Weights(Record, frozen=True):
    """Where the weights came from and what they are.

    `digest` is the sha256 of the tensors in our own layout, so the same weights have one digest in every
    file format; `file_sha256` is that of the file they were read from; `license` is that of weights from the Hub, as
    their model card has it (`apache-2.0`), None where it is not known.
    """

    source: str
    digest: str
    layout: str
    num_classes: int
    file_sha256: str | None = None
    license: str | None = None


class File(Record, frozen=True):
    """One file of an artifact, beside the others."""

    name: str
    bytes: int
    sha256: str


class Quantization(Record, frozen=True):
    """How an artifact came to eight bits: the calibration set and its digest, how ranges were chosen, and the layers
    that were rounded, each with its multiply-accumulates for one image. `kept` are the parts that were kept back."""

    calib: str
    digest: str
    images: int
    synthetic: bool
    method: str
    smoothing: float
    bias_correction: str
    scope: str
    layers: dict[str, int] = {}
    kept: tuple[str, ...] = ()


class Sidecar(Record, frozen=True):
    """All that is known of an artifact. The first of `files` is the one a runtime opens; `macs` are the
    multiply-accumulates of one image of `preprocessing.size`; `beyond_fp16` the modules whose activations fp16 cannot
    hold; `target` is what it was built for, where it runs on nothing else."""

    backend: str
    precision: str
    variant: str
    task: str
    weights: Weights
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    preprocessing: Preprocessing
    macs: int | None = None
    beyond_fp16: tuple[str, ...] = ()
    quantization: Quantization | None = None
    labels: tuple[str, ...] = ()
    parents: tuple[str, ...] = ()
    versions: dict[str, str] = {}
    recipe: dict[str, Any] = {}
    target: dict[str, Any] = {}
    quality: dict[str, float | str] = {}
    files: tuple[File, ...] = ()
    sha256: str = ""
    bytes: int = 0
    schema: int = SCHEMA
    seal: str = ""

    def facts(self) -> dict[str, str]:
        """What the model file carries in its own metadata: every fact that is known before it is written, but for
        where something lay, so that the same build gives the same bytes in any folder."""
        late = {"files", "sha256", "bytes", "quality", "seal", "schema"}
        fields = msgspec.to_builtins(self)
        for section, words in PLACES.items():
            told = fields[section]
            fields[section] = told and {word: value for word, value in told.items() if word not in words}
        return {key: msgspec.json.encode(fields[key]).decode() for key in sorted(fields) if key not in late}


def _seal(sidecar: Sidecar) -> str:
    fields = msgspec.to_builtins(msgspec.structs.replace(sidecar, seal=""))
    return hashlib.sha256(msgspec.json.encode(fields, order="deterministic")).hexdigest()


def encode(sidecar: Sidecar) -> bytes:
    """As the file beside an artifact, sealed."""
    sealed = msgspec.structs.replace(sidecar, seal=_seal(sidecar))
    return msgspec.json.format(msgspec.json.encode(sealed), indent=2) + b"\n"


def decode(path: Path) -> Sidecar:
    """A sidecar from its file.

    Raises: BadRequest when it is damaged, too large, of another schema, or was changed after it was sealed.
    """
    mend = "build the artifact again"
    if path.stat().st_size > MAX_SIDECAR_BYTES:
        raise BadRequest(f"{path}: {path.stat().st_size} bytes is no sidecar of ours; {mend}")
    try:
        sidecar = msgspec.json.decode(path.read_bytes(), type=Sidecar)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"{path}: the sidecar cannot be read ({error}); {mend}") from None
    if sidecar.schema != SCHEMA:
        raise BadRequest(f"{path}: sidecar of schema {sidecar.schema}, this version reads {SCHEMA}; {mend}")
    if sidecar.seal != _seal(sidecar):
        raise BadRequest(f"{path}: the sidecar was changed after it was written; {mend}")
    return sidecar
