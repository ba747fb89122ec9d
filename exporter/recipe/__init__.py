"""A recipe: one build and its checks, as a nested frozen record.

The command line, the YAML reader, the JSON schema and docs/recipes.md are derived from these fields: a field, its
default, its bounds and its help stand here and nowhere else.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from exporter.artifact.sidecar import Answer, Crop, Interpolation, Record
from exporter.recipe.checks import SEARCHED as SEARCHED
from exporter.recipe.checks import Checks as Checks
from exporter.recipe.fields import about
from exporter.recipe.types import SYNTHETIC as SYNTHETIC
from exporter.recipe.types import TASKS as TASKS
from exporter.recipe.types import BatchSize as BatchSize
from exporter.recipe.types import BiasCorrection as BiasCorrection
from exporter.recipe.types import CalibMethod as CalibMethod
from exporter.recipe.types import Count as Count
from exporter.recipe.types import CpuClass as CpuClass
from exporter.recipe.types import Device as Device
from exporter.recipe.types import Form as Form
from exporter.recipe.types import MovedWeights as MovedWeights
from exporter.recipe.types import OutputKind as OutputKind
from exporter.recipe.types import ReduceZeroLabel as ReduceZeroLabel
from exporter.recipe.types import Reference as Reference
from exporter.recipe.types import RuntimeThreads as RuntimeThreads
from exporter.recipe.types import Seconds as Seconds
from exporter.recipe.types import Side as Side
from exporter.recipe.types import Tasks as Tasks
from exporter.recipe.types import Threads as Threads
from exporter.recipe.types import WhenUnsure as WhenUnsure


class Model(Record, frozen=True):
    """The network, its weights and its outputs."""

    variant: Annotated[
        str | None, about("ConvNeXt variant; by default the variant of the weights, or tiny.", metavar="NAME")
    ] = None
    weights: Annotated[
        str,
        about(
            "hub, hf-hub:owner/name, a file or folder in any public key layout, or random[:SEED].",
            metavar="SRC",
            path=True,
        ),
    ] = "hub"
    labels: Annotated[
        str | None,
        about("Class names: text, one a line, with or without numbers; JSON; or CSV.", metavar="FILE", path=True),
    ] = None
    task: Annotated[
        Tasks | None,
        about(
            "Outputs: of the heads (classify), one feature vector an image (embed), the feature vector and one token "
            "for each position of the last map (tokens), the map of each stage (features), the class of each pixel "
            "(segment, of UPerNet), or the maps of a detector's FPN (pyramid); several as in classify,embed.",
            metavar="TASK,…",
            default="segment for UPerNet, pyramid for an FPN, classify, or embed for weights without a classifier",
        ),
    ] = None
    prefix: Annotated[
        str | None, about("Prefix of the network's keys, where a file holds several networks.", metavar="NAME")
    ] = None
    head: Annotated[
        str | None,
        about(
            "Name of the classifier module; A+B: one after the other; A,B: an output for each; none leaves it out.",
            metavar="NAME",
        ),
    ] = None
    head_act: Annotated[
        str | None,
        about(
            "Activation between two linear layers of a head, which weights do not show: gelu, gelu_tanh, relu, silu, "
            "tanh or none; ACT,ACT for several places.",
            metavar="ACT",
        ),
    ] = None
    reference: Annotated[
        Reference | None,
        about(
            "The model that artifacts are compared with: module:callable, or timm, transformers or torchvision.",
            metavar="NAME",
            default="this tool's own network",
        ),
    ] = None
    norm: Annotated[Literal["rms", "simple"] | None, about("Kind of norm of weights whose norms have no bias.")] = None


_SCALE = "pixels are from 0 to 1 here: divide by 255"


class PreprocessingOptions(Record, frozen=True):
    """Preprocessing that replaces what the weights come with; None keeps that."""

    mean: Annotated[
        tuple[Annotated[float, Meta(ge=0, le=1, title=f"a number from 0 to 1 ({_SCALE})")], ...] | None,
        about("Mean of each channel, of pixels from 0 to 1.", metavar="R,G,B", commas=True, repeats=True),
    ] = None
    std: Annotated[
        tuple[Annotated[float, Meta(gt=0, le=1, title=f"a number above 0, at most 1 ({_SCALE})")], ...] | None,
        about("Standard deviation of each channel, of pixels from 0 to 1.", metavar="R,G,B", commas=True, repeats=True),
    ] = None
    resize: Annotated[
        Annotated[int, Meta(ge=1, le=8192)] | None,
        about("Side in pixels that images are resized to before the crop.", metavar="N"),
    ] = None
    crop_pct: Annotated[
        Annotated[float, Meta(gt=0, le=1)] | None,
        about("Input size as a share of the side that images are resized to, in place of --resize.", metavar="X"),
    ] = None
    crop_mode: Annotated[
        Crop | None,
        about("Resize the short side (center), both sides (squash), or the long side and fill up (border)."),
    ] = None
    interpolation: Annotated[Interpolation | None, about("Filter that images are resized with.")] = None


class Export(Record, frozen=True):
    """The graph: input size, batch, opset, form."""

    imgsz: Annotated[
        Side | Annotated[tuple[Side, ...], Meta(min_length=2, max_length=2)] | Literal["dynamic"] | None,
        about(
            "Input size in pixels, height and width, or 'dynamic'; by default that of the preprocessing.",
            metavar="N|H,W",
        ),
    ] = None
    batch: Annotated[
        Annotated[int, Meta(ge=1, le=1024)] | Literal["dynamic"], about("Batch size, or 'dynamic'.", metavar="N")
    ] = "dynamic"
    opset: Annotated[Annotated[int, Meta(ge=13, le=23)], about("ONNX operator set.", metavar="N")] = 20
    ir_version: Annotated[
        Annotated[int, Meta(ge=7, le=13)] | None,
        about("Version of the ONNX file format; by default the oldest with this opset.", metavar="N"),
    ] = None
    simplify: Annotated[bool, about("Simplify with onnxsim; the result is kept only if it is equivalent.")] = True
    form: Annotated[
        Form | Literal["auto"] | None,
        about(
            "How the network is written; by default as this backend is fastest on CPUs, 'auto' measures on this CPU."
        ),
    ] = None
    input: Annotated[
        Literal["normalized", "float01", "uint8", "image"],
        about(
            "Input of the artifact: normalized pixels, pixels from 0 to 1 (float01), bytes (uint8), or an image of any "
            "size in bytes, which the artifact resizes (image)."
        ),
    ] = "normalized"
    layout: Annotated[
        Literal["nchw", "nhwc"],
        about("Axes of the artifact's input: channels first, or last as cameras and PIL have; not for --input image."),
    ] = "nchw"
    color: Annotated[
        Literal["rgb", "bgr"], about("Order of the input's channels: red first, or blue first as OpenCV has.")
    ] = "rgb"
    keep: Annotated[
        tuple[str, ...] | None,
        about(
            "Parts that stay in higher precision than the artifact, as in stages.2.3,head.",
            metavar="PART,…",
            commas=True,
        ),
    ] = None

    output: Annotated[
        Answer,
        about(
            "Output of each head: logits, their softmax or sigmoid, or the numbers and probabilities of the "
            "five most probable classes (top5). Of --task segment: logits of each pixel, before they are resized to "
            "the input (logits4), or the class of each pixel in a byte (labels), and its probability (scores)."
        ),
    ] = "logits"
    l2: Annotated[bool, about("Scale the feature vectors of --task embed to unit length.")] = False
    io: Annotated[
        Literal["fp32", "fp16"], about("Type of inputs and outputs; uint8 inputs and numbers of classes keep theirs.")
    ] = "fp32"

    def __post_init__(self) -> None:
        """Write equal sides as one number."""
        if isinstance(self.imgsz, tuple) and len(self.imgsz) == 2 and len(set(self.imgsz)) == 1:
            msgspec.structs.force_setattr(self, "imgsz", self.imgsz[0])


class Quantization(Record, frozen=True):
    """Calibration and quantization of int8 and fp8, and the accuracy that may be lost."""

    calib: Annotated[
        str,
        about(
            "Calibration images: a manifest, a folder, an .npz file, a bundled set, or synthetic.",
            metavar="SRC",
            path=True,
        ),
    ] = SYNTHETIC
    calib_size: Annotated[
        Count | None,
        about("Number of images; by default all of a manifest or 256 (synthetic 128, segment 16).", metavar="N"),
    ] = None
    calib_seed: Annotated[int, about("Seed of the draw from a folder.", metavar="N")] = 0
    calib_method: Annotated[CalibMethod, about("How ranges are chosen.")] = "minmax"
    smoothing: Annotated[
        Annotated[float, Meta(ge=0, le=1)],
        about("Share of the activations' spread that moves into the weights; 0 is none.", metavar="SHARE"),
    ] = 0.5
    bias_correction: Annotated[
        BiasCorrection,
        about("Correct biases for the error of quantized weights (fast), or layer by layer with images (full)."),
    ] = "fast"
    int8_scope: Annotated[
        str | None,
        about(
            "Layers to quantize: pointwise, also downsampling and the convolutions of UPerNet's head, all, or weights "
            "alone.",
            metavar="SCOPE",
        ),
    ] = None
    cpu: Annotated[
        CpuClass,
        about(
            "Class of CPUs that int8 is built for: portable is exact on all CPUs; vnni (x86 with VNNI) and arm use "
            "all 8 bits of weights; this is the class of this machine."
        ),
    ] = "portable"
    even_if_slower: Annotated[
        bool,
        about(
            "Skip the speed test before calibration, which stops the build where int8 is slower on this machine than "
            "fp32, bf16 or fp16."
        ),
    ] = False
    max_drop: Annotated[
        Annotated[float, Meta(ge=0, le=100)] | None,
        about(
            "Largest loss of top-1 (multi-label: mAP; masks: mIoU) on --data; without labels, of agreement with "
            "PyTorch; of feature vectors, of agreement of the nearest neighbours.",
            metavar="POINTS",
            default="0.5 where real images are given",
        ),
    ] = None
    data: Annotated[
        str | None,
        about("Images to measure the loss on; by default the calibration images.", metavar="SRC", path=True),
    ] = None


class TimingOptions(Record, frozen=True):
    """How artifacts are timed, in `bench` and `compare`."""

    batch: Annotated[
        tuple[BatchSize, ...] | None,
        about("Batch sizes, as in 1,8.", metavar="N,…", commas=True, default="the artifact's own batch, or 1"),
    ] = None
    threads: Annotated[Threads | None, about("Threads; by default one for each physical core.", metavar="N")] = None
    hint: Annotated[
        Literal["latency", "throughput"],
        about("latency: one batch at a time; throughput: several at once, as many as the runtime has streams."),
    ] = "latency"
    device: Device = None
    duration: Annotated[
        Seconds,
        about("Seconds of timing for each batch size, all models together.", metavar="SECONDS"),
    ] = 10.0
    seed: Annotated[int, about("Seed of the order in which models are timed.", metavar="N")] = 0


class Bench(TimingOptions, frozen=True):
    """How an artifact is timed beside PyTorch, and limits of its latency. Limits hold for each batch size."""

    until: Annotated[
        Annotated[float, Meta(ge=0.05, le=100)] | None,
        about(
            "Go on until the speed-up is known to ± so many percent, at most ten times the duration.",
            metavar="PCT",
            percent=True,
        ),
    ] = None
    also: Annotated[
        tuple[Literal["torch.compile", "tf32", "fp16", "bf16"], ...],
        about("Also time PyTorch this way; tf32, fp16 and bf16 (channels last) on a GPU."),
    ] = ()
    cache_dir: Annotated[
        str | None,
        about("Folder where the runtime caches compiled models; only loading uses it.", metavar="DIR", path=True),
    ] = None
    min_speedup: Annotated[
        Annotated[float, Meta(ge=0)] | None, about("Smallest speed-up over PyTorch.", metavar="X")
    ] = None
    max_p50_ms: Annotated[
        Annotated[float, Meta(ge=0)] | None, about("Largest median latency in milliseconds.", metavar="MS")
    ] = None


class Recipe(Record, frozen=True):
    """One build and its checks.

    `quantization` is for int8 and fp8, and None for other precisions; `target` has the options of the backend's
    target, by the names of its own record; an artifact is not timed where `bench` is None.
    """

    backend: str
    precision: str
    schema: Literal[1] = 1
    model: Model = Model()
    preprocessing: PreprocessingOptions = PreprocessingOptions()
    export: Export = Export()
    quantization: Quantization | None = None
    target: dict[str, Any] = msgspec.field(default_factory=dict)
    checks: Checks = Checks()
    bench: Bench | None = Bench()

    def of_build(self) -> dict[str, Any]:
        """What determines the artifact, as builtins: all but checks, bench and the budget of quantization."""
        fields: dict[str, Any] = msgspec.to_builtins(self)
        for name in ("schema", "checks", "bench"):
            del fields[name]
        if fields["quantization"] is not None:
            for name in ("even_if_slower", "max_drop", "data"):
                del fields["quantization"][name]
        return fields

    @property
    def has_further_checks(self) -> bool:
        """Whether `checks` says more than the search of int8 and fp8 judges its candidates by."""
        searched = {name: getattr(Checks(), name) for name in SEARCHED}
        return msgspec.structs.replace(self.checks, **searched) != Checks()

    @property
    def verified_on(self) -> str:
        """The images of the verification: `checks.data`, or where that is synthetic `quantization.data`, so that build
        and verification report on the same images."""
        chosen_on = self.quantization.data if self.quantization is not None else None
        return chosen_on or SYNTHETIC if self.checks.data == SYNTHETIC else self.checks.data

    @property
    def fixed_batch(self) -> int | None:
        """The batch size of the artifact, or None for any. Pictures of any size run one at a time."""
        if self.export.input == "image":
            return 1
        return self.export.batch if isinstance(self.export.batch, int) else None
