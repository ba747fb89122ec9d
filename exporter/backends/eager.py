"""Eager PyTorch: the model that every artifact is compared with."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np

from exporter import machine
from exporter.artifact import Artifact
from exporter.artifact.sidecar import Preprocessing
from exporter.backends import (
    Array,
    Blocks,
    Bound,
    Layer,
    Options,
    Outputs,
    Runtime,
    _cuda,
    as_network_takes,
    require,
)
from exporter.backends._peak import PeakProduct, Product, fastest_product
from exporter.errors import BadRequest, Unavailable
from exporter.model.structure import last_operators

if TYPE_CHECKING:
    import torch

    from exporter.model.weights import Checkpoint

ARITHMETIC = ("ATEN_", "DNNL_", "MKL_", "ONEDNN_")
"""Prefixes of environment variables that choose the kernels of torch."""


class EagerOptions(Options, frozen=True):
    """Options of PyTorch.

    weights: path of the checkpoint if it was moved; None for the path in the sidecar.
    reference: another model to run in place of this tool's own network; see `exporter.model.reference`.
    compiled: run through torch.compile.
    arithmetic: on a GPU, `tf32` rounds the inputs of products to 10 bits of mantissa; `fp16` and `bf16` run
        everything in that type with channels last.
    """

    weights: str | None = None
    reference: str | None = None
    compiled: bool = False
    arithmetic: Literal["fp32", "tf32", "fp16", "bf16"] = "fp32"


class EagerSession:
    """The PyTorch network an artifact was made from.

    `identity` returns everything beside the pixels that determines the bits of its outputs, or None where that is
    unknown.
    """

    def __init__(
        self,
        model: Any,
        device: str,
        arithmetic: str = "fp32",
        recipe: Preprocessing | None = None,
        identity: Callable[[], dict[str, Any] | None] = lambda: None,
    ) -> None:
        self.model, self.device, self.arithmetic, self.identity = model, device, arithmetic, identity
        self.recipe, self.streams = recipe or Preprocessing(), 1
        self.facts = {"device": device, "arithmetic": arithmetic}

    def __call__(self, images: Array) -> Outputs:
        """Run: images (N, C, H, W) float32, or a picture that Pillow resizes, to outputs (N, …) float32."""
        import torch

        images = as_network_takes(images, self.recipe)
        outputs = self._forward(self._placed(torch.from_numpy(np.ascontiguousarray(images))))
        return tuple(output.float().cpu().numpy() for output in outputs)

    def bind(self, batches: Sequence[Array]) -> Bound:
        """The images on the device, and one run of the model over a batch; pictures, which are resized in each run as
        the artifact does, stay in memory."""
        import torch

        if self.recipe.input == "image":
            return self._bind_pictures(batches)
        held = [self._placed(torch.from_numpy(np.ascontiguousarray(images))) for images in batches]
        turn = itertools.cycle(held)
        last: tuple[torch.Tensor, ...] = ()

        def run() -> None:
            nonlocal last
            last = self._forward(next(turn))
            if held[0].is_cuda:
                torch.cuda.synchronize()

        parts = partial(self._parts, batches[0]) if held[0].is_cuda else None
        return Bound(run, lambda: tuple(output.float().cpu().numpy() for output in last), parts=parts)

    def _bind_pictures(self, batches: Sequence[Array]) -> Bound:
        turn = itertools.cycle(batches)
        last: Outputs = ()

        def run() -> None:
            nonlocal last
            last = self(next(turn))

        return Bound(run, lambda: last)

    def _parts(self, images: Array) -> dict[str, float]:
        """Milliseconds of upload, computing and download, from and to pinned memory."""
        import torch

        host = torch.from_numpy(np.ascontiguousarray(images)).pin_memory()
        made: dict[str, Any] = {}
        return _cuda.parts(
            torch.cuda.current_stream(),
            lambda: made.update(given=self._placed(host)),
            lambda: made.update(outputs=self._forward(made["given"])),
            lambda: made.update(back=[output.to("cpu", non_blocking=True) for output in made["outputs"]]),
        )

    def _placed(self, images: torch.Tensor) -> Any:
        """Images on the device, as the network takes them."""
        return _narrowed(images.to(self.device, non_blocking=True), self.arithmetic)

    def _forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        import torch

        if images.is_cuda:  # the settings are the process's, and other arms want others
            tf32 = self.arithmetic == "tf32"
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32, tf32
        with torch.inference_mode():
            outputs = self.model(images)
        return outputs if isinstance(outputs, tuple) else (outputs,)


def probe() -> str:
    """The version of torch."""
    return require("torch", "cpu")


@contextmanager
def session(artifact: Artifact, options: EagerOptions) -> Iterator[EagerSession]:
    """The network that an artifact was made from, found through its sidecar.

    Raises: BadRequest when the weights are others now; Unavailable when they or the device are not there.
    """
    import torch

    from exporter.model import weights

    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise Unavailable("torch sees no CUDA device here; use --device cpu")
    if options.arithmetic != "fp32" and not options.device.startswith("cuda"):
        raise BadRequest(f"eager PyTorch in {options.arithmetic} is for a GPU; use --device cuda")
    with _threads(options.threads):
        checkpoint = weights.reload(artifact, options.weights)
        model = _network(artifact, checkpoint, options).to(options.device)
        model = _narrowed(model, options.arithmetic)
        model = torch.compile(model) if options.compiled else model
        identity = partial(_identity, artifact, checkpoint, options)
        yield EagerSession(model, options.device, options.arithmetic, artifact.sidecar.preprocessing, identity)


def _narrowed(model_or_images: Any, arithmetic: str) -> Any:
    """A model or images in fp16 or bf16, channels last; unchanged for other arithmetic."""
    import torch

    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(arithmetic)
    return model_or_images if dtype is None else model_or_images.to(dtype).to(memory_format=torch.channels_last)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Run with a number of threads. Torch has one number for the whole process, so the former one is restored."""
    import torch

    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count:
            torch.set_num_threads(before)


def _network(artifact: Artifact, checkpoint: Checkpoint, options: EagerOptions) -> Any:
    from exporter.model import reference, weights

    spec = artifact.sidecar.spec
    if options.reference is None:
        return checkpoint.model(spec)
    choices = weights.choices_of(artifact.sidecar.recipe["model"])
    return reference.load(options.reference, checkpoint, checkpoint.weights.source, choices).with_outputs(spec)


def _identity(artifact: Artifact, checkpoint: Checkpoint, options: EagerOptions) -> dict[str, Any] | None:
    """Everything that determines the bits of the network's outputs for its pixels: weights, architecture and code of
    the network, versions, settings of torch, and the CPU. None for the user's own module, whose code may change, and on
    a GPU."""
    import torch

    from exporter.model import reference, weights

    if options.device != "cpu" or options.reference not in (None, *reference.LIBRARIES):
        return None
    used: list[Any] = []
    if options.reference:
        files = weights.fingerprint(checkpoint.weights.source)  # a library reads the configuration beside the weights
        if files is None:
            return None
        choices = weights.choices_of(artifact.sidecar.recipe["model"])
        used = [options.reference, files, checkpoint.variant.name, vars(choices)]
    settings = {name: value for name, value in os.environ.items() if name.startswith(ARITHMETIC)}
    return {
        "weights": checkpoint.weights.digest,
        "architecture": msgspec.to_builtins(checkpoint.variant.architecture),
        "spec": msgspec.to_builtins(artifact.sidecar.spec),
        "reference": used,
        "code": _code(),
        "versions": machine.versions(reference.LIBRARIES),
        "options": [options.compiled, options.arithmetic, torch.get_num_threads()],
        "torch": [torch.get_float32_matmul_precision(), torch.backends.mkldnn.enabled, settings],
        "cpu": [*machine.cpu(), torch.backends.cpu.get_cpu_capability()],
    }


@lru_cache(maxsize=1)
def _code() -> str:
    """A digest of the code of this tool's networks, which may change without the version in a development install."""
    from exporter.model import weights

    digest = hashlib.sha256()
    for path in [Path(__file__), *sorted(Path(weights.__file__).parent.glob("*.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def layers(artifact: Artifact, options: EagerOptions) -> list[Layer]:
    """The modules of the network."""
    from exporter.model import weights

    model = weights.reload(artifact, options.weights).model(artifact.sidecar.spec)
    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    return [Layer(name=n, module=n, operator=type(m).__name__, precision="fp32") for n, m in leaves]


@contextmanager
def blocks(artifact: Artifact, options: EagerOptions) -> Iterator[Blocks]:
    """The network with a hook on every block."""
    with session(artifact, options) as opened:
        modules = dict(opened.model.named_modules())
        names = tuple(last_operators(f"{name}/" for name in modules))
        seen: dict[str, Array] = {}
        for name in names:
            modules[name].register_forward_hook(
                lambda module, given, output, name=name: seen.__setitem__(name, output.float().cpu().numpy())
            )

        def run(images: Array) -> Outputs:
            opened(images)
            return tuple(seen[name] for name in names)

        yield Blocks(names, run)


@contextmanager
def peak(artifact: Artifact, options: EagerOptions, known: str = "") -> Iterator[Product]:
    """The fastest product of torch's, or the `known` one."""
    import torch

    del artifact

    @contextmanager
    def open_product(product: PeakProduct) -> Iterator[EagerSession]:
        weight = torch.from_numpy(product.matrix()).to(options.device)
        if product.convolution:
            yield EagerSession(lambda images: torch.nn.functional.conv2d(images, weight), options.device)
        else:
            yield EagerSession(lambda matrix: matrix @ weight, options.device)

    with _threads(options.threads), fastest_product(open_product, "fp32", known) as fastest:
        yield fastest


RUNTIME = Runtime(
    name="eager",
    options=EagerOptions,
    probe=probe,
    open=session,
    distributions=("torch",),
    modules=("torch", "exporter.model.reference"),
    devices={"cpu": "CPU", "cuda": "NVIDIA GPU"},
    devices_here=_cuda.name,
    layers=layers,
    blocks=blocks,
    peak=peak,
)
