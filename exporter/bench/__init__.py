"""Times any number of models (arms) in turn, in one fresh process after another, which this process supervises.

`worker` runs in a timing process, `supervisor` starts them and handles their crashes, `latency` creates the findings.
An arm that crashes or hangs is removed, and timing continues with the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from exporter import backends, machine
from exporter.artifact import Artifact
from exporter.artifact.sidecar import Preprocessing, Record
from exporter.backends import Session
from exporter.errors import BadRequest
from exporter.machine import Conditions
from exporter.progress import note
from exporter.quantize.cpus import unlike
from exporter.recipe import TimingOptions


class Arm(Record, frozen=True):
    """One model to time: an artifact; the PyTorch network it was built from, eager, compiled, or on a GPU in TF32 or
    fp16; or the fastest product of the artifact's runtime, `peak`.

    `path` is the artifact in every case; `weights` is the path of the network's weights, if they were moved;
    `reference` names the model that runs in place of this tool's own network; `cache_dir` is the runtime's folder of
    compiled models; `product` is the text of the fastest product, where a process before chose it.
    """

    name: str
    path: str
    runtime: Literal["artifact", "eager", "torch.compile", "tf32", "fp16", "bf16", "peak"] = "artifact"
    weights: str | None = None
    reference: str | None = None
    device: str = "cpu"
    threads: int | None = None
    hint: Literal["latency", "throughput"] = "latency"
    cache_dir: str | None = None
    product: str = ""

    @property
    def setting(self) -> str:
        """Device, threads of the CPU, and hint, as tables say them."""
        threads = f", {self.threads} thread{'s' if self.threads != 1 else ''}" if self.threads else ""
        return f"{self.device}{threads if self.device == 'cpu' else ''}, {self.hint}"


def batches_of(options: TimingOptions, artifacts: Sequence[Artifact]) -> tuple[int, ...]:
    """The batch sizes to time: those of the options; else the fixed one of the artifacts, or the smallest that all run.

    Raises: BadRequest for batch sizes that an artifact cannot run.
    """
    fixed = {made.path: size for made in artifacts if (size := made.sidecar.batch) is not None}
    batches = options.batch or tuple(fixed.values())[:1] or (_smallest(artifacts),)
    for path, size in fixed.items():
        if set(batches) != {size}:
            other = (
                f"--batch {','.join(map(str, batches))}"
                if options.batch
                else f"another artifact batches of {batches[0]}"
            )
            raise BadRequest(f"{path}: runs batches of {size} only, {other}; use --batch {size}, or bench it alone")
    return batches


def _smallest(artifacts: Sequence[Artifact]) -> int:
    """The smallest batch that all artifacts run: 1, unless the profiles of an engine begin above it."""
    profiles = [made.sidecar.target.get("profiles") for made in artifacts]
    return max((min(least for least, _, _ in ranges) for ranges in profiles if ranges), default=1)


def check_devices(artifacts: Sequence[Artifact], device: str | None) -> None:
    """Refuse artifacts that would run on different kinds of devices; note int8 that was built for other CPUs.

    Raises: BadRequest for those, and for a device that a runtime does not take.
    """
    for artifact in artifacts:
        quantization = artifact.sidecar.quantization
        if quantization is not None and (reason := unlike(quantization.cpu)):
            note(f"{artifact.path}: {reason}")
    first = artifacts[0]
    kind = backends.device_kind(first, device)
    for artifact in artifacts[1:]:
        other = backends.device_kind(artifact, device)
        if other != kind:
            raise BadRequest(
                f"{artifact.path} would run on {_article(other)} and {first.path} on {_article(kind)}; name one device "
                "with --device, or time them separately"
            )


def _article(kind: str) -> str:
    return f"an {kind}" if kind[:1] in "NI" else f"a {kind}"


Opener = Callable[[Arm], AbstractContextManager[Session]]


class Plan(Record, frozen=True):
    """The schedule of a timing.

    `seconds` is the duration of the timing in one process, without loading and warm-up. `compared` says whether the
    outputs of the other arms are compared with those of the first one.
    """

    arms: tuple[Arm, ...]
    preprocessing: Preprocessing
    batch: int = 1
    seconds: float = 1.0
    seed: int = 0
    compared: bool = True


class Launch(Record, frozen=True):
    """All arms timed in one fresh process: for each arm a list of blocks of milliseconds (one block a round), the
    cosine of its outputs to those of the first arm (if they are compared), the number of batches it runs at once, the
    state of the machine, and, if the arm reports them, milliseconds of the parts of a run."""

    blocks: dict[str, list[list[float]]]
    cosine: dict[str, float]
    streams: dict[str, int]
    facts: dict[str, dict[str, str]]
    settled: dict[str, bool]
    dropped: int
    conditions: Conditions
    parts: dict[str, dict[str, float]] = msgspec.field(default_factory=dict)


@dataclass
class Timing:
    """The processes of a plan, the reason of each failed arm, by its name, and the number of processes that were
    measured again because other processes disturbed them."""

    plan: Plan
    launches: list[Launch] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    disturbed: int = 0

    def setting(self, name: str) -> str:
        """Device, threads and hint of an arm."""
        return self.arm(name).setting

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.plan.arms if arm.name == name)

    def standing(self) -> list[Arm]:
        """The arms that have not failed."""
        return [arm for arm in self.plan.arms if arm.name not in self.failures]

    def disturbances(self) -> list[str]:
        """How other processes, the hypervisor or heat stretched the timing, in words."""
        return machine.disturbances([launch.conditions for launch in self.launches])


class Cold(Record, frozen=True):
    """Cold start of an arm alone in a new process.

    cold_ms: milliseconds from the start of the process to the first output, with the import of the runtime.
    load_ms: milliseconds to load it a second time.
    first_ms: milliseconds of the first inference after that.
    peak_bytes: the peak of resident memory.
    cold_from, load_from: with a folder of compiled models, whether the model was compiled or read from it.
    """

    cold_ms: float
    load_ms: float
    first_ms: float
    peak_bytes: int
    cold_from: str = ""
    load_from: str = ""


def flat(blocks: Sequence[Sequence[float]]) -> list[float]:
    """All the samples of the blocks, in order."""
    return [sample for block in blocks for sample in block]
