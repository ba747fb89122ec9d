"""The NVIDIA GPU of this machine, and the three parts of one inference on it by its own clock."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

from exporter.errors import Unavailable

if TYPE_CHECKING:
    import torch

PARTS = ("h2d_ms", "compute_ms", "d2h_ms")


def name() -> str:
    """The name of the NVIDIA GPU.

    Raises: Unavailable when torch sees none.
    """
    import torch

    if not torch.cuda.is_available():
        raise Unavailable("no CUDA device, or a CPU build of torch; on a GPU machine: pip install torch")
    return str(torch.cuda.get_device_name())


def parts(
    stream: torch.cuda.Stream,
    upload: Callable[[], object],
    compute: Callable[[], object],
    download: Callable[[], object],
) -> dict[str, float]:
    """Milliseconds of bringing the input to the GPU, of computing, and of bringing the outputs back, one after the
    other on a stream, between CUDA events.

    Args:
        stream: that all of them run on.
        upload, compute, download: enqueue their work and do not wait.
    """
    import torch

    events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        events[0].record()
        for step, event in zip((upload, compute, download), events[1:], strict=True):
            step()
            event.record()
    stream.synchronize()
    return {name: float(a.elapsed_time(b)) for name, (a, b) in zip(PARTS, pairwise(events), strict=True)}
