"""An engine on a GPU. What it was built for is checked before it is opened, because opening an engine runs its code.

An engine has one or more profiles, each a range of batch sizes. Batches are split or padded to fit them.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from exporter import artifact as artifacts
from exporter.artifact import Artifact
from exporter.artifact.disk import cache_folder, write_file
from exporter.backends import Array, Bound, Outputs, _cuda, as_taken
from exporter.backends.tensorrt.builder import listener
from exporter.backends.tensorrt.library import OS, Library
from exporter.errors import BadRequest, ExporterError, Unavailable, some

if TYPE_CHECKING:
    import torch

WARM_UP = 3  # runs before a CUDA graph is taken; the first compiles on TensorRT-RTX


def unable() -> str:
    """Why no plan can run on this machine, or ""."""
    try:
        import torch
    except ImportError:
        return "PyTorch, whose memory it uses, is not installed"
    return "" if torch.cuda.is_available() else "there is no NVIDIA GPU here, or torch is a CPU build"


def check(artifact: Artifact, library: Library) -> None:
    """Refuse a plan of another library, version, system or GPU before anything of it is opened.

    Raises: BadRequest for such a plan; Unavailable without a GPU.
    """
    target = artifact.sidecar.target
    here = {"flavor": library.flavor, "version": library.version, "os": OS}
    for fact, value in here.items():
        built_for = str(target.get(fact, "unknown"))
        later = fact == "version" and target.get("version_compatible") and runs_later(built_for, value)
        if built_for != value and not later:
            raise BadRequest(
                f"{artifact.path}: built for {fact} {built_for}, and this is {value}; build it again "
                "here, or install the library that it was built for"
            )
    if why := unable():
        raise Unavailable(f"{artifact.path}: an engine runs only on a GPU, and {why}")
    import torch

    found = "{}.{}".format(*torch.cuda.get_device_capability())
    ampere = target.get("hardware_compat") == "ampere+" and torch.cuda.get_device_capability() >= (8, 0)
    if found not in target["compute_capability"] and not ampere:
        raise BadRequest(
            f"{artifact.path}: built for compute capability {', '.join(target['compute_capability'])}, and this GPU "
            f"has {found}; build it for this one"
        )


def runs_later(built: str, here: str) -> bool:
    """Whether a version-compatible engine runs on another version of TensorRT.

    It runs on later versions of its major version; those of TensorRT 8 also run on 10, those of 10 on 11
    (docs.nvidia.com/deeplearning/tensorrt/11.4.1/getting-started/support-matrix.html, "Engine Portability").
    """
    try:
        old, new = ([int(part) for part in version.split(".")] for version in (built, here))
    except ValueError:
        return False
    return new >= old and (old[0] == new[0] or (old[0], new[0]) in ((8, 10), (10, 11)))


def refit(engine: Any, artifact: Artifact, library: Library) -> None:
    """Put the weights into an engine that was built without them, from the ONNX graph that it was built from.

    Raises: BadRequest when that graph is missing or changed; ExporterError when TensorRT refuses its weights.
    """
    trt, log, graph = library.module, listener(library), _graph_of(artifact)
    refitter = trt.Refitter(engine, log)
    parser = trt.OnnxParserRefitter(refitter, log)
    if not (parser.refit_from_file(str(graph)) and refitter.refit_cuda_engine()):
        missing = list(refitter.get_missing_weights())
        reason = f"weights are missing: {some(missing)}" if missing else log.errors[-1] if log.errors else "no reason"
        raise ExporterError(f"{artifact.path}: the weights of {graph.name} cannot be put into it: {reason}")


def _graph_of(artifact: Artifact) -> Path:
    """The ONNX graph that an engine was built from, which lies beside it."""
    for path in sorted(artifact.path.parent.glob("*.onnx")):
        with suppress(BadRequest, OSError):
            if artifacts.read_sidecar(path).sha256 in artifact.sidecar.parents:
                return artifacts.load(path).path
    raise BadRequest(
        f"{artifact.path}: built without weights (--strip-weights), and the ONNX graph that has them (sha256 "
        f"{', '.join(parent[:12] for parent in artifact.sidecar.parents)}…) is not beside it, or changed; copy it "
        "there with its sidecar"
    )


class PlanSession:
    """An engine with a context, a stream of its own, and tensors on the device."""

    def __init__(self, artifact: Artifact, library: Library) -> None:
        import torch

        trt, self.recipe = library.module, artifact.sidecar.preprocessing
        target = artifact.sidecar.target
        self.runtime = trt.Runtime(listener(library))
        if target.get("version_compatible"):  # such an engine brings its own runtime; its digest was checked
            self.runtime.engine_host_code_allowed = True
        self.engine = self.runtime.deserialize_cuda_engine(artifact.path.read_bytes())
        if self.engine is None:
            said = listener(library).errors
            raise ExporterError(
                f"{artifact.path}: {library.flavor} cannot load it: {said[-1] if said else 'no reason'}"
            )
        if target.get("strip_weights"):
            refit(self.engine, artifact, library)
        name = f"{artifact.sidecar.sha256}-{torch.cuda.get_device_name()}-{library.version}".replace(" ", "_")
        self.kept = cache_folder() / "kernels" / name
        self.context = self._context(library)
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        modes = {name: self.engine.get_tensor_mode(name) for name in names}
        self.input = next(name for name in names if modes[name] == trt.TensorIOMode.INPUT)
        count = self.engine.num_optimization_profiles
        self.profiles = [self.engine.get_tensor_profile_shape(self.input, index) for index in range(count)]
        self.active = 0
        self.outputs = {tensor.name: tensor.dtype for tensor in artifact.sidecar.outputs}
        self.stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.rtx = library.rtx
        self.streams = 1
        in_tf32 = target.get("tf32") and artifact.sidecar.precision == "fp32"
        self.facts = {
            "device": torch.cuda.get_device_name(),
            "arithmetic": "tf32" if in_tf32 else artifact.sidecar.precision,
        }

    def _context(self, library: Library) -> Any:
        if not library.rtx:
            return self.engine.create_execution_context()
        config = self.engine.create_runtime_config()
        config.cuda_graph_strategy = library.module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self.kernels = config.create_runtime_cache()
        content = _checked(self.kept)
        self.compiled = content is not None and bool(self.kernels.deserialize(content))
        config.set_runtime_cache(self.kernels)
        return self.engine.create_execution_context(config)

    def _keep_kernels(self) -> None:
        """What TensorRT-RTX compiled for this GPU, for whoever opens the plan next; where it cannot be written it is
        compiled again."""
        if self.rtx and not self.compiled:
            content = bytes(self.kernels.serialize())
            with suppress(ExporterError):
                write_file(self.kept, hashlib.sha256(content).digest() + content)

    def __call__(self, images: Array) -> Outputs:
        """Run: images (N, C, H, W) float32 to outputs (N, …) float32, in as many batches as the profiles need.

        A batch smaller than every profile takes is padded with its last image, and its outputs are cut.
        """
        most = max(largest[0] for _, _, largest in self.profiles)
        parts = [self._run(images[start : start + most]) for start in range(0, len(images), most)]
        return parts[0] if len(parts) == 1 else tuple(map(np.concatenate, zip(*parts, strict=True)))

    def _run(self, images: Array) -> Outputs:
        import torch

        count = len(images)
        sizes = (max(least[0], count) for least, _, most in self.profiles if count <= most[0])
        padded = np.concatenate([images, np.repeat(images[-1:], min(sizes) - count, axis=0)])
        held = self._hold(torch.from_numpy(as_taken(padded, self.recipe)).cuda())
        self._enqueue()
        self.stream.synchronize()
        return tuple(output.float().cpu().numpy()[:count] for output in held)

    def bind(self, batches: Sequence[Array]) -> Bound:
        """The batches on the device; a run copies the next one into place there and replays a CUDA graph."""
        import torch

        taken = [torch.from_numpy(as_taken(images, self.recipe)) for images in batches]
        waiting = itertools.cycle([images.cuda() for images in taken])
        given = next(waiting).clone()
        held = self._hold(given)
        for _ in range(WARM_UP):
            self._enqueue()
        self.stream.synchronize()
        self._keep_kernels()
        replay = self._enqueue if self.rtx else self._captured()

        def run() -> None:
            with torch.cuda.stream(self.stream):
                given.copy_(next(waiting))
            replay()
            self.stream.synchronize()

        host = [taken[0].pin_memory(), *(torch.empty_like(output, device="cpu").pin_memory() for output in held)]

        def parts() -> dict[str, float]:
            return _cuda.parts(
                self.stream,
                lambda: given.copy_(host[0], non_blocking=True),
                replay,
                lambda: [to.copy_(output, non_blocking=True) for to, output in zip(host[1:], held, strict=True)],
            )

        return Bound(run, lambda: tuple(output.float().cpu().numpy() for output in held), parts=parts)

    def _captured(self) -> Any:
        import torch

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            self._enqueue()

        def replay() -> None:
            with torch.cuda.stream(self.stream):
                graph.replay()

        return replay

    def _hold(self, given: torch.Tensor) -> list[torch.Tensor]:
        """Tell the context where its input is and its outputs go, in the profile that is tuned for such a batch.

        Raises: BadRequest for a batch outside every profile.
        """
        import torch

        shape = tuple(given.shape)
        profile = self._profile_of(shape)
        if profile != self.active:
            if not self.context.set_optimization_profile_async(profile, self.stream.cuda_stream):
                raise ExporterError(f"the engine refuses its profile {profile}; see the messages of TensorRT with -v")
            self.stream.synchronize()
            self.active = profile
        if not self.context.set_input_shape(self.input, shape):
            raise ExporterError(f"the engine refuses a batch of {shape}; see the messages of TensorRT with -v")
        self.held_input = given  # the context keeps its address only
        self.context.set_tensor_address(self.input, given.data_ptr())
        held = []
        for name, dtype in self.outputs.items():
            shape = tuple(self.context.get_tensor_shape(name))
            output = torch.empty(shape, dtype=getattr(torch, dtype), device="cuda")
            self.context.set_tensor_address(name, output.data_ptr())
            held.append(output)
        torch.cuda.current_stream().synchronize()  # the input may still be on its way
        return held

    def _profile_of(self, shape: tuple[int, ...]) -> int:
        """The number of the profile that takes an input of this shape, tuned for the nearest batch.

        Raises: BadRequest when there is none.
        """
        fits = [
            (abs(best[0] - shape[0]), index)
            for index, (least, best, most) in enumerate(self.profiles)
            if all(low <= side <= high for low, side, high in zip(least, shape, most, strict=True))
        ]
        if not fits:
            ranges = " and ".join(f"{tuple(least)} to {tuple(most)}" for least, _, most in self.profiles)
            batch_fits = any(least[0] <= shape[0] <= most[0] for least, _, most in self.profiles)
            options = "--imgsz dynamic, --min-size and --max-size" if batch_fits else "--min-batch and --max-batch"
            raise BadRequest(f"a batch of {shape}: the engine takes {ranges}; build it with {options}")
        return min(fits)[1]

    def _enqueue(self) -> None:
        if not self.context.execute_async_v3(self.stream.cuda_stream):
            raise ExporterError("the engine could not be run; see the messages of TensorRT with -v")


def _checked(path: Path) -> bytes | None:
    """The content of a file that begins with the sha256 of the rest; None where it does not, or cannot be read."""
    with suppress(OSError):
        digest, content = (whole := path.read_bytes())[:32], whole[32:]
        return content if hashlib.sha256(content).digest() == digest else None
    return None
