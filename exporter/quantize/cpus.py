"""Number formats of int8 for classes of CPUs, and what another class computes with them.

x86 CPUs without VNNI add two products of 8 bits in 16 bits, which saturates where adjacent weights are large. With VNNI
and on Arm sums have 32 bits. Kernels for Arm take activations around zero.
"""

from __future__ import annotations

import platform
from dataclasses import replace

from exporter import machine
from exporter.errors import BadRequest
from exporter.quantize.placement import Placement
from exporter.recipe import CpuClass

ARM = ("aarch64", "arm64")


def of_this_machine() -> CpuClass:
    """The class of this machine's CPU."""
    if platform.machine().lower() in ARM:
        return "arm"
    return "vnni" if any("vnni" in one for one in machine.cpu()[1]) else "portable"


def placement_for(placement: Placement, cpu: CpuClass, backend: str) -> Placement:
    """A placement with the number formats of a class of CPUs.

    Args:
        placement: of a target, for any CPU.
        cpu: the class.
        backend: of the target, for the message.

    Raises: BadRequest for a target without formats for this class.
    """
    cpu = of_this_machine() if cpu == "this" else cpu
    if cpu == "portable":
        return placement
    if not placement.exact_pairs:
        raise BadRequest(f"--cpu {cpu}: int8 for {backend} has one format for all devices; leave --cpu out")
    if cpu == "vnni":
        return replace(placement, exact_pairs=False)
    if not placement.on_arm:
        raise BadRequest(f"--cpu arm: {backend} computes most of int8 in fp16 on Arm; use --fp16, or another runtime")
    return replace(placement, exact_pairs=False, symmetric=True)


def unlike(built_for: str) -> str:
    """Why this machine answers otherwise, or more slowly, than the class of CPUs that an int8 artifact was built for;
    or ""."""
    here = of_this_machine()
    if built_for == "vnni" and here == "portable" and machine.saturates():
        return "built with --cpu vnni, and this CPU has no VNNI: int8 sums can saturate, and answers differ"
    if built_for == "arm" and here != "arm":
        return "built with --cpu arm, and this CPU is no Arm: answers and speed differ from those on one"
    return ""
