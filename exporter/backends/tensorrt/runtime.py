"""A plan on a GPU. What it was built for is checked first: opening a plan runs what is in it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from exporter.artifact import Artifact
from exporter.artifact.disk import cache_folder, write_file
from exporter.backends import Array, Bound, Outputs, _cuda, as_taken
from exporter.backends.tensorrt.builder import listener
from exporter.backends.tensorrt.library import OS, Library
from exporter.errors import BadRequest, ExporterError, Unavailable

if TYPE_CHECKING:
    import torch

WARM_UP = 3  # runs before a CUDA graph is taken; the first compiles on TensorRT-RTX


def unable() -> str:
    """Why no plan can run on this machine, or ""."""
    import torch

    return "" if torch.cuda.is_available() else "there is no NVIDIA GPU here, or torch is a CPU build"


def check(artifact: Artifact, library: Library) -> None:
    """Refuse a plan of another library, version, system or GPU before anything of it is opened.

    Raises: BadRequest for such a plan; Unavailable without a GPU.
    """
    target = artifact.sidecar.target
    here = {"flavor": library.flavor, "version": library.version, "os": OS}
    for fact, value in here.items():
        if target.get(fact) != value:
            raise BadRequest(
                f"{artifact.path}: built for {fact} {target.get(fact, 'unknown')}, and this is {value}; build it again "
                "here, or install the library that it was built for"
            )
    if why := unable():
        raise Unavailable(f"{artifact.path}: an engine runs only on a GPU, and {why}")
    import torch

    found = "{}.{}".format(*torch.cuda.get_device_capability())
    if found not in target["compute_capability"]:
        raise BadRequest(
            f"{artifact.path}: built for compute capability {', '.join(target['compute_capability'])}, and this GPU "
            f"has {found}; build it for this one"
        )


class PlanSession:
    """A plan with a context, a stream of its own, and tensors on the device."""

    def __init__(self, artifact: Artifact, library: Library) -> None:
        import torch

        trt, self.recipe = library.module, artifact.sidecar.preprocessing
        self.runtime = trt.Runtime(listener(library))
        self.engine = self.runtime.deserialize_cuda_engine(artifact.path.read_bytes())
        if self.engine is None:
            said = listener(library).errors
            raise ExporterError(
                f"{artifact.path}: {library.flavor} cannot load it: {said[-1] if said else 'no reason'}"
            )
        name = f"{artifact.sidecar.sha256}-{torch.cuda.get_device_name()}-{library.version}".replace(" ", "_")
        self.kept = cache_folder() / "kernels" / name
        self.context = self._context(library)
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        modes = {name: self.engine.get_tensor_mode(name) for name in names}
        self.input = next(name for name in names if modes[name] == trt.TensorIOMode.INPUT)
        self.outputs = [tensor.name for tensor in artifact.sidecar.outputs]
        self.stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.rtx = library.rtx
        self.facts = {"device": torch.cuda.get_device_name(), "arithmetic": artifact.sidecar.precision}

    def _context(self, library: Library) -> Any:
        if not library.rtx:
            return self.engine.create_execution_context()
        config = self.engine.create_runtime_config()
        config.cuda_graph_strategy = library.module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self.kernels = config.create_runtime_cache()
        if self.kept.is_file():
            self.kernels.deserialize(self.kept.read_bytes())
        config.set_runtime_cache(self.kernels)
        return self.engine.create_execution_context(config)

    def _keep_kernels(self) -> None:
        """What TensorRT-RTX compiled for this GPU, for whoever opens the plan next; where it cannot be written it is
        compiled again."""
        if self.rtx and not self.kept.is_file():
            with suppress(ExporterError):
                write_file(self.kept, bytes(self.kernels.serialize()))

    def __call__(self, images: Array) -> Outputs:
        """Run: images (N, C, H, W) float32 to outputs (N, …) float32."""
        import torch

        given = torch.from_numpy(as_taken(images, self.recipe)).cuda()
        held = self._hold(given)
        self._enqueue()
        self.stream.synchronize()
        return tuple(output.float().cpu().numpy() for output in held)

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
        """Tell the context where its input is and its outputs go.

        Raises: BadRequest for a batch outside the profile.
        """
        import torch

        if not self.context.set_input_shape(self.input, tuple(given.shape)):
            least, _, most = self.engine.get_tensor_profile_shape(self.input, 0)
            raise BadRequest(
                f"a batch of {tuple(given.shape)}: the engine takes {tuple(least)} to {tuple(most)}; build it with "
                "--max-batch"
            )
        self.context.set_tensor_address(self.input, given.data_ptr())
        held = []
        for name in self.outputs:
            output = torch.empty(tuple(self.context.get_tensor_shape(name)), dtype=torch.float32, device="cuda")
            self.context.set_tensor_address(name, output.data_ptr())
            held.append(output)
        torch.cuda.current_stream().synchronize()  # the input may still be on its way
        return held

    def _enqueue(self) -> None:
        if not self.context.execute_async_v3(self.stream.cuda_stream):
            raise ExporterError("the engine could not be run; see the messages of TensorRT with -v")
