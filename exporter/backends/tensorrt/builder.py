"""From an ONNX file to the bytes of a plan, with the builder's own progress, and its list of kernels."""

from __future__ import annotations

import queue
from contextlib import suppress
from functools import cache
from pathlib import Path
from threading import Event, Thread
from typing import Any

from exporter.artifact import check_output
from exporter.artifact.disk import user_path, write_file
from exporter.artifact.sidecar import Sidecar, sides
from exporter.backends.tensorrt.library import Library, Profile, TensorRtOptions, sizes
from exporter.errors import BadRequest, ExporterError
from exporter.progress import note, track

DEFAULT_PROFILE = Profile(1, 1, 16)
GIB = 2**30


@cache
def listener(library: Library) -> Any:
    """The one logger of this process: a library hears only the first that it is given."""
    trt = library.module

    class Listener(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.forget()

        def forget(self) -> None:
            self.warnings: list[str] = []
            self.errors: list[str] = []
            self.listing = ""

        def log(self, severity: Any, message: str) -> None:
            if message.startswith("Layers:"):
                self.listing = message
            elif severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message)
            elif severity == trt.ILogger.Severity.WARNING:
                self.warnings.append(message)

    return Listener()


def profiles(sidecar: Sidecar, target: TensorRtOptions) -> tuple[Profile, ...]:
    """The batch sizes that a plan is built for: of a fixed batch only that."""
    fixed = sidecar.inputs[0].shape[0]
    return (Profile(fixed, fixed, fixed),) if isinstance(fixed, int) else target.profiles or (DEFAULT_PROFILE,)


def image_sizes(sidecar: Sidecar, target: TensorRtOptions) -> tuple[int, int, int]:
    """The heights and widths that a plan is built for, where they are dynamic: smallest, best and largest.

    Raises: BadRequest as `library.sizes` does.
    """
    return sizes(max(sides(sidecar.preprocessing.size)), target)


def build(library: Library, file: Path, sidecar: Sidecar, target: TensorRtOptions) -> tuple[bytes, str]:
    """Parse a graph and build its plan, always strongly typed.

    Returns: the plan, and the builder's list of its kernels ("" when it gave none).

    Raises: ExporterError for a graph that the parser or the builder refuses, with what it said.
    """
    trt, log = library.module, listener(library)
    log.forget()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(file)):
        raise ExporterError(
            f"{file.name}: {library.flavor} {library.version} cannot read it: {_refusals(parser)}; build with another "
            "--opset, or with a later version"
        )
    config = _configured(library, builder, network, sidecar, target)
    plan = _run(library, builder, network, config)
    _keep_timings(config, target)
    for warning in dict.fromkeys(log.warnings):
        note(f"{library.flavor}: {warning.splitlines()[0]}")
    if plan is None:
        said = log.errors[-1].splitlines()[0] if log.errors else "it gave no reason"
        raise ExporterError(f"{file.name}: {library.flavor} cannot build it: {said}")
    return bytes(plan), log.listing


def _refusals(parser: Any) -> str:
    """What the parser refuses, with the module of the network, its operator and the node."""
    found = [parser.get_error(index) for index in range(parser.num_errors)]
    return "; ".join(map(_refusal, found[:3])) or "it gave no reason"


def _refusal(error: Any) -> str:
    module, slash, node = error.node_name().partition("/")
    where = f"{module}, node {node}" if slash else f"node {module}"
    return f"{where} ({error.node_operator()}): {(error.desc().strip() or 'no reason').splitlines()[0]}"


def _use_timings(config: Any, target: TensorRtOptions) -> None:
    """What kernels took in earlier builds. That of another GPU or version counts as nothing.

    Raises: BadRequest for a new file that cannot be written.
    """
    if target.timing_cache is None:
        return
    path = user_path(target.timing_cache)
    if not path.is_file():
        try:
            check_output(path)
        except BadRequest as error:
            raise BadRequest(f"--timing-cache {error}") from None
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if not config.set_timing_cache(cache, False):
        note(f"{path} is of another GPU or version; kernels are timed anew")
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _keep_timings(config: Any, target: TensorRtOptions) -> None:
    """Write the cache; where that fails, the engine is built all the same."""
    if target.timing_cache is not None:
        try:
            write_file(user_path(target.timing_cache), bytes(config.get_timing_cache().serialize()))
        except ExporterError as error:
            note(f"the timing cache is not kept: {error}")


def _configured(library: Library, builder: Any, network: Any, sidecar: Sidecar, target: TensorRtOptions) -> Any:
    trt = library.module
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    (config.set_flag if target.tf32 else config.clear_flag)(trt.BuilderFlag.TF32)
    if target.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(target.workspace * GIB))
    if target.opt_level is not None:
        config.builder_optimization_level = target.opt_level
    if target.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if target.strip_weights:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)  # REFIT may lose biases, and the weights are the same ones
    if target.hardware_compat != "none":
        level = {"ampere+": "AMPERE_PLUS", "same": "SAME_COMPUTE_CAPABILITY"}[target.hardware_compat]
        config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, level)
    if target.compute_capability:
        known = library.capabilities()
        config.num_compute_capabilities = len(target.compute_capability)
        for index, wanted in enumerate(target.compute_capability):
            config.set_compute_capability(known[wanted], index)
    _use_timings(config, target)
    given = network.get_input(0)
    for profile in profiles(sidecar, target):
        shapes = builder.create_optimization_profile()
        shapes.set_shape(given.name, *_shapes(sidecar, profile, target))
        config.add_optimization_profile(shapes)
    return config


def _shapes(sidecar: Sidecar, profile: Profile, target: TensorRtOptions) -> list[tuple[int, ...]]:
    """The least, best and largest input (N, C, H, W) of a profile."""
    of_images, dynamic = sidecar.inputs[0].shape[1:], image_sizes(sidecar, target)
    return [
        (count, *(side if isinstance(side, int) else size for side in of_images))
        for count, size in zip((profile.least, profile.best, profile.most), dynamic, strict=True)
    ]


def _run(library: Library, builder: Any, network: Any, config: Any) -> Any:
    """Build in a thread, so that this one draws the progress and hears Ctrl-C, which stops the builder cleanly."""
    events: queue.Queue[int | None] = queue.Queue()
    stop = Event()
    config.progress_monitor = _monitor(library, events, stop)
    built: list[Any] = []

    def work() -> None:
        try:
            built.append(builder.build_serialized_network(network, config))
        finally:
            events.put(None)

    thread = Thread(target=work, name="tensorrt-builder")
    thread.start()
    try:
        if (total := _next(events)) is not None:  # else it gave up before its first phase
            for _ in track(iter(lambda: _next(events), None), total, "build steps", lambda _: 1):
                pass
    finally:
        stop.set()
        thread.join()
    return built[0] if built else None


def _next(events: queue.Queue[int | None]) -> int | None:
    while True:  # a wait without an end would not hear Ctrl-C
        with suppress(queue.Empty):
            return events.get(timeout=0.2)


def _monitor(library: Library, events: queue.Queue[int | None], stop: Event) -> Any:
    class Monitor(library.module.IProgressMonitor):  # type: ignore[misc, name-defined]
        """The builder's phases: the outermost one's steps are the bar; any step may say no more."""

        def __init__(self) -> None:
            super().__init__()
            self.outermost = ""

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.outermost = phase
                events.put(steps)

        def step_complete(self, phase: str, step: int) -> bool:
            if phase == self.outermost:
                events.put(step)
            return not stop.is_set()

        def phase_finish(self, phase: str) -> None:
            del phase

    return Monitor()
