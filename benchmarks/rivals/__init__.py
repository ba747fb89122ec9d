"""ConvNeXt compared with ResNet-50, Swin and ViT, deployed on the same machine and timed in turn.

`python -m benchmarks.rivals -o FOLDER` makes each network's files (`files`), times them all in one race for each batch
size (`timing`), and writes `FOLDER/batch-N.json`; then `FOLDER/sizes.json`, the time and memory of four networks by
input size (`sizes`), and `FOLDER/engines.json`, what TensorRT-RTX builds of them (`engines`). What is already there is
left as it is. `table` and `pictures` render them.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from exporter.artifact.sidecar import Record

ROOT = "build/rivals"
BATCHES = (1, 8)
SIZE = 224
THREADS = 2
RUNTIMES = ("onnxruntime", "openvino")
EAGER, COMPILED = "eager PyTorch", "torch.compile"
Samples = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Network:
    """One network: its name in the tables, its name in timm, and what others have published about it.

    Attributes:
        variant: our name of it, or "" for another family.
        top1: ImageNet accuracy in percent at 224 pixels of weights trained on ImageNet-1k only.
        trained: the recipe of that accuracy.
        a100: images a second on an A100 in TF32, as the paper of ConvNeXt has them; None where it has none.
        timm_ms: milliseconds of one image on a Core i9-10940X, compiled by inductor, from timm's
            `benchmark-infer-fp32-nchw-pt240-cpu-i9_10940x-dynamo.csv`.
    """

    name: str
    timm: str
    top1: float
    trained: str
    timm_ms: float
    variant: str = ""
    a100: float | None = None


NETWORKS = (
    Network("ResNet-50", "resnet50", 80.4, "timm, A1 (600 epochs)", 14.9),
    Network("ConvNeXt-T", "convnext_tiny", 82.1, "ConvNeXt paper", 14.5, "tiny", 1943.5),
    Network("ConvNeXt-S", "convnext_small", 83.1, "ConvNeXt paper", 28.8, "small", 1275.3),
    Network("ConvNeXt-B", "convnext_base", 83.8, "ConvNeXt paper", 41.5, "base", 969.0),
    Network("ConvNeXt V2-T", "convnextv2_tiny", 83.0, "ConvNeXt V2 paper, FCMAE", 16.3, "v2_tiny"),
    Network("Swin-T", "swin_tiny_patch4_window7_224", 81.3, "Swin paper", 21.7, a100=1325.6),
    Network("Swin-S", "swin_small_patch4_window7_224", 83.0, "Swin paper", 41.2, a100=857.3),
    Network("Swin-B", "swin_base_patch4_window7_224", 83.5, "Swin paper", 58.0, a100=662.8),
    Network("ViT-S (DeiT)", "deit_small_patch16_224", 79.8, "DeiT paper, not distilled", 13.1),
    Network("ViT-B (DeiT)", "deit_base_patch16_224", 81.8, "DeiT paper, not distilled", 30.9),
)


@dataclass(frozen=True)
class Way:
    """One way to export a network for a runtime at a precision; `files` writes the graph.

    Attributes:
        name: in the tables.
        plain: whether it is PyTorch's own export, run as it is.
    """

    name: str
    runtime: str
    precision: str
    plain: bool = False


PLAIN = "torch.onnx.export"
WAYS = (
    Way(PLAIN, "onnxruntime", "fp32", plain=True),
    Way("onnxsim", "onnxruntime", "fp32"),
    Way("Attention of opset 23", "onnxruntime", "fp32"),
    Way("ours", "onnxruntime", "fp32"),
    Way("quantize_static", "onnxruntime", "int8"),
    Way("quantize_dynamic", "onnxruntime", "int8"),
    Way("ours", "onnxruntime", "int8"),
    Way(PLAIN, "openvino", "fp32", plain=True),
    Way("openvino.convert_model", "openvino", "fp32"),
    Way("ours", "openvino", "fp32"),
    Way("NNCF", "openvino", "int8"),
    Way("ours", "openvino", "int8"),
    Way(PLAIN, "openvino", "bf16", plain=True),
    Way("openvino.convert_model", "openvino", "bf16"),
    Way("ours", "openvino", "bf16"),
)


class Row(Record, frozen=True):
    """The timing of one network on one runtime at one precision, exported in one way.

    `milliseconds` are those of a batch, process by process; `peak_pct` is the share of the runtime's fastest matrix
    product or 1×1 convolution at that precision; `over_plain` is how many times as fast it is as the plain way in fp32,
    with the 95 % interval. A way that cannot be made or run has a `failure` and no times.
    """

    network: str
    way: str
    runtime: str
    precision: str
    plain: bool = False
    milliseconds: Samples = ()
    over_plain: tuple[float, float, float] | None = None
    peak_pct: float | None = None
    peak_bytes: int | None = None
    failure: str = ""


class Race(Record, frozen=True):
    """All networks at one batch size, timed in one race.

    `eager` and `compiled` are milliseconds in PyTorch by network, the latter for one image only; `gmacs` are those of
    one image, by network. `memory_commit` is the commit at which memory was measured, where it is another one.
    """

    batch: int
    rows: tuple[Row, ...]
    eager: dict[str, Samples]
    gmacs: dict[str, float]
    environment: dict[str, object]
    compiled: dict[str, Samples] = msgspec.field(default_factory=dict)
    threads: int = THREADS
    memory_commit: str = ""
    schema: int = 1

    @property
    def commits(self) -> str:
        """The commits of the times and of the memory, in words."""
        commit = str(self.environment["commit"])
        return f"{commit} (times), {self.memory_commit} (memory)" if self.memory_commit else commit
