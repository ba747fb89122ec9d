"""What tasks on a cluster need of a machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from exporter import backends, machine
from exporter.artifact import Artifact


@dataclass(frozen=True)
class Need:
    """What a task needs of a machine: cores, GPUs and bytes of memory."""

    cpus: float = 1
    gpus: int = 0
    memory: int = 0

    def within(self, machines: Sequence[Mapping[str, float]]) -> Need:
        """What a task needs, but no more than one machine has, or it would wait forever: the one that comes nearest in
        GPUs, then in memory, then in cores. `machines` are the resources of each, by Ray's names."""
        lowered = [
            replace(
                self,
                cpus=min(self.cpus, resources.get("CPU", 1)),
                gpus=min(self.gpus, int(resources.get("GPU", 0))),
                memory=min(self.memory, int(resources.get("memory", 0))),
            )
            for resources in [one for one in machines if one.get("CPU")] or machines  # without "CPU" none runs there
        ]
        return max(lowered, key=lambda one: (one.gpus, one.memory, one.cpus))

    def options(self) -> dict[str, Any]:
        """As Ray takes it. Tasks are not repeated by Ray: `Cluster` counts their tries."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, "memory": self.memory or None, "max_retries": 0}


def need_of(artifact: Artifact, device: str | None, threads: int | None) -> Need:
    """What a task with both models open needs."""
    is_gpu = backends.device_kind(artifact, device) == "NVIDIA GPU"
    return Need(cpus=threads or machine.default_threads(), gpus=1 if is_gpu else 0)
