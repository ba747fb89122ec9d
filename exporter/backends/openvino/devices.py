"""The names of OpenVINO's devices, and what a compiled model says of itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from exporter.errors import BadRequest, Unavailable

GROUPS = ("AUTO", "MULTI", "HETERO")
"""Names of OpenVINO for a group of devices: AUTO takes the best one, MULTI spreads batches, HETERO splits the graph."""


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


def properties(device: str, devices: Sequence[str], arithmetic: str, threads: int | None) -> dict[str, Any]:
    """The properties that make a device, or every device of a group, compute in an element type. Only a CPU knows a
    number of threads."""
    of_each: dict[str, dict[str, Any]] = {name: {"INFERENCE_PRECISION_HINT": arithmetic} for name in devices}
    if threads and "CPU" in of_each:
        of_each["CPU"]["INFERENCE_NUM_THREADS"] = threads
    if not (group := group_of(device)):
        return of_each[device]
    chosen: dict[str, Any] = {"DEVICE_PROPERTIES": of_each}
    if group == "AUTO" and set(devices) != {"CPU"}:  # else the CPU may answer, at first or after an error
        chosen |= {"ENABLE_STARTUP_FALLBACK": False, "ENABLE_RUNTIME_FALLBACK": False}
    return chosen


def in_use(compiled: Any, device: str) -> tuple[str, list[str]]:
    """The device, with those of a group that run the model; and the element types that they compute in."""
    if not group_of(device):
        return device, [compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()]
    hints = [of_one["INFERENCE_PRECISION_HINT"] for of_one in compiled.get_property("DEVICE_PROPERTIES").values()]
    running = ", ".join(compiled.get_property("EXECUTION_DEVICES"))
    return f"{device} ({running})", sorted({hint.get_type_name() for hint in hints})


def text(value: Any) -> str:
    """A value of the runtime information as text."""
    return str(getattr(value, "value", value))
