"""The names of OpenVINO's devices, and what a compiled model says of itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from exporter.errors import BadRequest, Unavailable

GROUPS = ("AUTO", "MULTI", "HETERO")
"""Names of OpenVINO for a group of devices: AUTO takes the best one, MULTI spreads batches, HETERO splits the graph."""
NO_KERNEL = ("Const", "Input", "Output")


def group_of(device: str) -> str:
    """AUTO, MULTI or HETERO of `AUTO:GPU,CPU`; "" of a single device."""
    name = device.partition(":")[0]
    return name if name in GROUPS else ""


def members(device: str, available: Sequence[str]) -> list[str]:
    """The devices that a name stands for: one, or those of a group.

    Raises: Unavailable for a device that is not here; BadRequest for a group without devices.
    """
    names = [device]
    if group := group_of(device):
        names = [name.strip() for name in device.partition(":")[2].split(",") if name.strip()]
        left_out = {name[1:] for name in names if name.startswith("-")}
        names = [name for name in names if not name.startswith("-")]
        if group == "AUTO" and not names:
            names = [name for name in available if name not in left_out]
        if not names:
            raise BadRequest(f"--device {device.lower()}: name the devices, as in {group.lower()}:gpu,cpu")
    for name in names:
        if name not in available and f"{name}.0" not in available:  # GPU is GPU.0 where there are several
            raise Unavailable(f"OpenVINO sees {', '.join(available)} here, and no {name}")
    return names


def arithmetic_in_use(compiled: Any) -> str:
    """The element type that a compiled model computes in: as the device says, or, where a group does not say it, as the
    names of its kernels end (`jit_avx512_f32`)."""
    try:
        name: str = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    except RuntimeError:
        operators = [
            {key: text(value) for key, value in operator.get_rt_info().items()}
            for operator in compiled.get_runtime_model().get_ordered_ops()
        ]
        kernels = [info["primitiveType"] for info in operators if info["layerType"] not in NO_KERNEL]
        types = {kernel.rpartition("_")[2] for kernel in kernels}
        return next((name for name in ("bf16", "f16") if name in types), "f32")
    return name


def text(value: Any) -> str:
    """A value of the runtime information as text."""
    return str(getattr(value, "value", value))
