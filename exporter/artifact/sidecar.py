"""Sidecars: the facts about an artifact, written as sealed JSON."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from exporter.artifact.outputs import PROBABILITIES as PROBABILITIES
from exporter.artifact.outputs import Answer as Answer
from exporter.artifact.outputs import Content as Content
from exporter.artifact.outputs import OutputSpec as OutputSpec
from exporter.artifact.outputs import Task as Task
from exporter.errors import BadRequest

SCHEMA = 7
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
"""Paths at the time of the build; digests identify the content."""


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A frozen fact that is written as JSON; an unknown key in a file is an error."""


Interpolation = Literal["bicubic", "bilinear", "nearest", "lanczos", "box", "hamming"]
Crop = Literal["center", "squash", "border"]
# A union with tuple[int, int] crashes in a garbage collection (msgspec 0.22).
Size = int | Annotated[tuple[int, ...], msgspec.Meta(min_length=2, max_length=2)]
"""Height and width in pixels; one number where they are equal."""
PerChannel = Annotated[tuple[float, ...], msgspec.Meta(min_length=1)]
COLORS = {1: "L", 3: "RGB", 4: "RGBA"}
"""How Pillow calls images of so many channels."""


def sides(size: Size) -> tuple[int, int]:
    """Height and width of a size."""
    height, width = size if isinstance(size, tuple) else (size, size)
    return height, width


def as_size(height: int, width: int) -> Size:
    """The size of a height and a width."""
    return height if height == width else (height, width)


def size_text(size: Size) -> str:
    """A size in words: `224`, or `320×256` (height × width)."""
    return str(size) if isinstance(size, int) else f"{size[0]}×{size[1]}"


class Preprocessing(Record, frozen=True):
    """How an image becomes the input: resized, cropped to `size`, scaled to 0…1, normalised per channel.

    `center` resizes the short side to `resize` pixels and cuts the centre. `squash` resizes both sides to `resize` and
    cuts the centre, which is everything where `resize` is `size`, as published for inputs of 384 pixels and more.
    `border` resizes the long side to `resize` and fills up with the mean colour. `crop_pct` is size / resize where the
    source states that ratio. `offset` is how half a pixel beside the crop is rounded: to even (torchvision, timm) or
    down (transformers). `input` is the type of pixels that the artifact takes: `normalized`, `float01` (0…1), `uint8`
    (0…255), or `image`, one decoded picture (H, W, C) of any size in bytes; the artifact contains the remaining steps.

    `size` and `resize` are one number, or height and width. Where `resize` is both, `center` resizes the image, with
    its ratio of sides, to the smallest size that covers them. `mean` and `std` have one value for each input channel.
    Images are read as grey (ITU-R 601-2 luma), RGB or RGBA for 1, 3 or 4 channels, else as `bands`.

    `layout` and `color` are those of the artifact's input: channels first or last, and RGB or BGR. `mean` and `std` are
    in the order of the network, which takes RGB. `dtype` is the type of an input that is not `uint8`.
    """

    size: Size = 224
    resize: Size = 256
    crop: Crop = "center"
    crop_pct: float | None = None
    offset: Literal["round", "floor"] = "round"
    interpolation: Interpolation = "bicubic"
    mean: PerChannel = (0.485, 0.456, 0.406)
    std: PerChannel = (0.229, 0.224, 0.225)
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    color: Literal["RGB", "BGR", "L", "RGBA", "bands"] = "RGB"
    input: Literal["normalized", "float01", "uint8", "image"] = "normalized"
    dtype: Literal["float32", "float16"] = "float32"

    def __post_init__(self) -> None:
        """Write equal sides as one number, and name the colours.

        Raises: ValueError for means and deviations of different numbers of channels.
        """
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} values, std has {len(self.std)}")
        for name in ("size", "resize"):
            msgspec.structs.force_setattr(self, name, as_size(*sides(getattr(self, name))))
        if self.color != "BGR" or self.channels != 3:
            msgspec.structs.force_setattr(self, "color", COLORS.get(self.channels, "bands"))

    @property
    def height(self) -> int:
        """Rows of the input, in pixels."""
        return sides(self.size)[0]

    @property
    def width(self) -> int:
        """Columns of the input, in pixels."""
        return sides(self.size)[1]

    @property
    def channels(self) -> int:
        """Channels of the input."""
        return len(self.mean)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one input: channels, height, width."""
        return self.channels, self.height, self.width

    @property
    def is_stretched(self) -> bool:
        """Whether the input is the whole image, with its sides changed to those of the input."""
        return self.crop == "squash" and self.resize == self.size

    @property
    def share(self) -> float:
        """The input size as a share of the size that images are resized to."""
        return self.crop_pct or self.height / sides(self.resize)[0]

    @property
    def is_of_network(self) -> bool:
        """Whether the artifact takes what the network takes: normalized, in fp32, channels first, not BGR."""
        return self == self.of_network()

    def of_network(self) -> Preprocessing:
        """The same preprocessing for the input of the network itself."""
        color: Any = "RGB" if self.color == "BGR" else self.color
        return msgspec.structs.replace(self, input="normalized", dtype="float32", layout="NCHW", color=color)

    def at(self, size: Size) -> Preprocessing:
        """The same preprocessing for another input size in pixels, with the same ratio of crop to resize."""
        if size == self.size:
            return self
        sizes = zip(sides(size), sides(self.resize), sides(self.size), strict=True)
        share = self.crop_pct
        resize = as_size(*(int(new / share) if share else round(new * resized / old) for new, resized, old in sizes))
        return msgspec.structs.replace(self, size=size, resize=resize)

    def of_channels(self, count: int) -> Preprocessing:
        """The same preprocessing for another number of channels: three values become their average for each, and one
        value is repeated.

        Raises: BadRequest for other numbers of values, which say nothing about these channels.
        """
        if count == self.channels:
            return self
        if self.channels not in (1, 3):
            raise BadRequest(f"mean and std have {self.channels} values, and the network takes {count} channels")
        mean, std = (sum(values) / len(values) for values in (self.mean, self.std))
        return msgspec.structs.replace(self, mean=(mean,) * count, std=(std,) * count)


class Tensor(Record, frozen=True):
    """An input or output: name, shape (a word stands for a dynamic axis), element type, and what an output holds."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str = "float32"
    holds: Content = ""


class Weights(Record, frozen=True):
    """Source and digest of the weights.

    `digest` is the sha256 of the tensors in the layout of this tool, so the same weights have one digest in every
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
    """One file of an artifact."""

    name: str
    bytes: int
    sha256: str


class Quantization(Record, frozen=True):
    """The quantization of an artifact: calibration set and digest, method, and the quantized layers, each with its
    multiply-accumulates for one image. `kept` are the parts in higher precision, `cpu` is the class of CPUs whose
    number formats it has (`--cpu`)."""

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
    cpu: str = "portable"


class Sidecar(Record, frozen=True):
    """The facts about an artifact. The runtime opens the first of `files`.

    `task` is one or more of `Task`, joined by commas; `architecture` are the fields of
    `exporter.model.variants.Architecture`; `reference` names the model that the network was compared with; `macs` are
    the multiply-accumulates of one image of `preprocessing.size`; `beyond_fp16` are the modules whose activations
    exceed fp16; `target` has the hardware and versions that the artifact is restricted to; `origins` says for each
    value of preprocessing, labels and architecture where it comes from: a file, an option, a published preprocessing.
    """

    backend: str
    precision: str
    variant: str
    task: str
    weights: Weights
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    preprocessing: Preprocessing
    architecture: dict[str, Any] = {}
    reference: str = ""
    macs: int | None = None
    beyond_fp16: tuple[str, ...] = ()
    quantization: Quantization | None = None
    labels: tuple[str, ...] = ()
    origins: dict[str, str] = {}
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

    @property
    def spec(self) -> OutputSpec:
        """The outputs of the network."""
        export = self.recipe.get("export", {})
        tasks: Any = tuple(self.task.split(","))
        return OutputSpec(tasks=tasks, answer=export.get("output", "logits"), l2=export.get("l2", False))

    @property
    def batch(self) -> int | None:
        """The number of images that a run takes: a fixed one, which is 1 for pictures of any size, or None for any."""
        first = self.inputs[0].shape[0]
        return 1 if self.preprocessing.input == "image" else first if isinstance(first, int) else None

    @property
    def assumed_preprocessing(self) -> str:
        """How images are prepared, where the weights and the options state only their size or nothing, as for a file of
        tensors alone; else "". Also "" for random weights (no training) and weights of the Hub (which states it)."""
        places = [self.origins.get(name, "") for name in ("resize", "crop", "mean", "std")]
        is_assumed = all(place == "default" or place.startswith("published ") for place in places)
        if not is_assumed or self.weights.layout == "random" or self.weights.source.startswith("hf-hub:"):
            return ""
        recipe = self.preprocessing
        first = "squashed" if recipe.crop == "squash" else f"resized to {size_text(recipe.resize)}, cut"
        return f"{first} to {size_text(recipe.size)} ({places[0]})"

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

    def keeping(self, parts: Sequence[str]) -> Sidecar:
        """The facts of an artifact that keeps these parts in higher precision."""
        export = {**self.recipe.get("export", {}), "keep": list(parts) or None}
        return msgspec.structs.replace(self, recipe={**self.recipe, "export": export})

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
            target: hardware and versions that it is restricted to.
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
    """The sealed content of a sidecar file."""
    sealed = msgspec.structs.replace(sidecar, seal=_seal(sidecar))
    return msgspec.json.format(msgspec.json.encode(sealed), indent=2) + b"\n"


def schema_of(record: type[Record], title: str) -> dict[str, Any]:
    """The JSON schema of a record."""
    schema = msgspec.json.schema(record)
    fields = schema["$defs"][record.__name__]
    fields["properties"]["schema"] = {"const": fields["properties"]["schema"]["default"]}
    fields["required"] = [*fields["required"], "schema"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title, **schema}


def schema() -> dict[str, Any]:
    """The JSON schema of a sidecar."""
    return schema_of(Sidecar, "convnext-export sidecar")


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
        remedy = "it was built by a later version of convnext-export: pip install --upgrade convnext-export"
    else:
        variant = "" if head.variant == "custom" else f" --variant {head.variant}"
        source = shlex.quote(str(head.weights.get("source", "SRC")))
        options = f"{variant} --weights {source} --precision {head.precision} -o {shlex.quote(str(path.parent))}"
        remedy = f"build the artifact again: convnext-export {_COMMANDS.get(head.backend, head.backend)}{options}"
    raise BadRequest(f"{path}: sidecar schema {head.schema}, this version reads schema {SCHEMA}; {remedy}")


def decode(path: Path) -> Sidecar:
    """Decode and check the content of a sidecar file.

    Raises: BadRequest when it is damaged, too large, of another schema, or was changed after it was sealed.
    """
    remedy = "build the artifact again"
    if path.stat().st_size > MAX_SIDECAR_BYTES:
        raise BadRequest(f"{path}: {path.stat().st_size} bytes, more than a sidecar of this tool has; {remedy}")
    content = path.read_bytes()
    try:
        _refuse_other_schema(path, msgspec.json.decode(content, type=_Head))
        sidecar = msgspec.json.decode(content, type=Sidecar)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"{path}: the sidecar cannot be read ({error}); {remedy}") from None
    if sidecar.seal != _seal(sidecar):
        raise BadRequest(f"{path}: the sidecar was changed after it was written; {remedy}")
    return sidecar
