"""Sidecars: the facts about an artifact, and how they are written, sealed and read."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from exporter.errors import BadRequest

SCHEMA = 5
MAX_SIDECAR_BYTES = 32 * 2**20  # 21,841 labels take 1 MB

_COMMANDS = {"onnxruntime": "onnx", "openvino": "openvino", "tensorrt": "trt"}  # that wrote sidecars of schema 1 to 4
LOCATIONS = (
    ("weights", "source"),
    ("quantization", "calib"),
    ("recipe", "model", "variant"),
    ("recipe", "model", "weights"),
    ("recipe", "model", "labels"),
    ("recipe", "quantization", "calib"),
)
"""Facts that say where something was when an artifact was built; digests say what it was."""


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
        """The metadata that the model file carries: every fact known before the file is written, without locations,
        so that the same build gives the same bytes in any folder."""
        late = {"files", "sha256", "bytes", "quality", "seal", "schema"}
        fields = msgspec.to_builtins(self)
        for *sections, name in LOCATIONS:
            section = fields
            for key in sections:
                section = section.get(key) or {}
            section.pop(name, None)
        return {key: msgspec.json.encode(fields[key]).decode() for key in sorted(fields) if key not in late}

    def derived(
        self,
        *,
        backend: str | None = None,
        precision: str | None = None,
        tools: Mapping[str, str] | None = None,
        recipe: Mapping[str, Any] | None = None,
        target: dict[str, Any] | None = None,
    ) -> Sidecar:
        """The facts of an artifact that is built from this one: this file is its parent, and it is not verified yet.

        Args:
            backend, precision: of the new artifact, where they differ.
            tools: versions of the tools that build it, added to those of this artifact.
            recipe: other fields of the recipe that differ.
            target: what it is built for.
        """
        backend, precision = backend or self.backend, precision or self.precision
        return msgspec.structs.replace(
            self,
            backend=backend,
            precision=precision,
            parents=(self.sha256,),
            versions={**self.versions, **(tools or {})},
            recipe={**self.recipe, "backend": backend, "precision": precision, **(recipe or {})},
            target=self.target if target is None else target,
            quality={},
        )


def _seal(sidecar: Sidecar) -> str:
    fields = msgspec.to_builtins(msgspec.structs.replace(sidecar, seal=""))
    return hashlib.sha256(msgspec.json.encode(fields, order="deterministic")).hexdigest()


def encode(sidecar: Sidecar) -> bytes:
    """As the file beside an artifact, sealed."""
    sealed = msgspec.structs.replace(sidecar, seal=_seal(sidecar))
    return msgspec.json.format(msgspec.json.encode(sealed), indent=2) + b"\n"


class _Head(msgspec.Struct):
    """The facts of a sidecar of any schema that say how to build its artifact again."""

    schema: int
    backend: str = ""
    precision: str = ""
    variant: str = ""
    weights: dict[str, Any] = {}


def _refuse_other_schema(path: Path, head: _Head) -> None:
    if head.schema == SCHEMA:
        return
    if head.schema > SCHEMA:
        mend = "it was built by a later version of convnext-export: pip install --upgrade convnext-export"
    else:
        variant = "" if head.variant == "custom" else f" --variant {head.variant}"
        source = shlex.quote(str(head.weights.get("source", "SRC")))
        options = f"{variant} --weights {source} --precision {head.precision} -o {shlex.quote(str(path.parent))}"
        mend = f"build the artifact again: convnext-export {_COMMANDS.get(head.backend, head.backend)}{options}"
    raise BadRequest(f"{path}: sidecar schema {head.schema}, this version reads schema {SCHEMA}; {mend}")


def decode(path: Path) -> Sidecar:
    """A sidecar from its file.

    Raises: BadRequest when it is damaged, too large, of another schema, or was changed after it was sealed.
    """
    mend = "build the artifact again"
    if path.stat().st_size > MAX_SIDECAR_BYTES:
        raise BadRequest(f"{path}: {path.stat().st_size} bytes, more than a sidecar of this tool has; {mend}")
    content = path.read_bytes()
    try:
        _refuse_other_schema(path, msgspec.json.decode(content, type=_Head))
        sidecar = msgspec.json.decode(content, type=Sidecar)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"{path}: the sidecar cannot be read ({error}); {mend}") from None
    if sidecar.seal != _seal(sidecar):
        raise BadRequest(f"{path}: the sidecar was changed after it was written; {mend}")
    return sidecar
