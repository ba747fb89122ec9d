"""The names of OpenVINO's devices, and what a compiled model says of itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from exporter.artifact import Artifact
from exporter.errors import BadRequest, Unavailable

GROUPS = ("AUTO", "MULTI", "HETERO")
"""Names of OpenVINO for a group of devices: AUTO takes the best one, MULTI spreads batches, HETERO splits the graph."""


def computed_in(precision: str, devices: Sequence[str]) -> str:
    """The element type that OpenVINO computes in."""
    if precision == "fp16":
        return "f32" if set(devices) == {"CPU"} else "f16"
    # What an int8 IR does not round stays fp32: bf16 there is faster and flips more answers.
    return "bf16" if precision == "bf16" else "f32"


def group_of(device: str) -> str:
    """AUTO, MULTI or HETERO of `AUTO:GPU,CPU`; "" of a single device."""
    name = device.partition(":")[0]
    return name if name in GROUPS else ""


def members(device: str, available: Sequence[str]) -> tuple[str, list[str]]:
    """The name of a device or group as OpenVINO takes it, and the devices that it stands for.

    Raises: Unavailable for a device that is not here; BadRequest for a group that names no device.
    """
    group, _, listed = device.partition(":")
    if not group_of(device):
        _check_here(device, available)
        return device, [device]
    names = list(dict.fromkeys(name.strip() for name in listed.split(",") if name.strip()))
    left_out = [name[1:].strip() for name in names if name.startswith("-")]
    for name in (name.removeprefix("-").strip() for name in names):
        _check_here(name, available)
    if left_out and (group != "AUTO" or len(left_out) < len(names)):
        raise BadRequest(f"--device {device.lower()}: a minus is for auto alone, in front of every device")
    devices = names
    if group == "AUTO" and len(left_out) == len(names):  # OpenVINO takes an NPU only where it is named
        devices = [name for name in available if not any(_is(name, other) for other in (*left_out, "NPU"))]
    if not devices:
        raise BadRequest(f"--device {device.lower()}: no device is left; name some, as in {group.lower()}:gpu,cpu")
    return ":".join(filter(None, (group, ",".join(names)))), devices


def _is(available: str, name: str) -> bool:
    """Whether a name means a device that is here: GPU is each of GPU.0 and GPU.1, and a single GPU is GPU.0 too."""
    return name in (available, available.partition(".")[0], f"{available}.0")


def _check_here(name: str, available: Sequence[str]) -> None:
    """Raises: Unavailable."""
    if not any(_is(other, name) for other in available):
        raise Unavailable(f"OpenVINO sees {', '.join(available)} here, and no {name or 'device without a name'}")


def arithmetic_of(artifact: Artifact, device: str, devices: Sequence[str]) -> str:
    """The element type that OpenVINO computes in.

    Raises: Unavailable for an artifact that takes pictures, where this is not f32.
    """
    arithmetic = computed_in(artifact.sidecar.precision, devices)
    if artifact.sidecar.preprocessing.input == "image" and arithmetic != "f32":
        raise Unavailable(
            f"{artifact.path}: pictures are resized in fp32, and {device} computes all of it in {arithmetic}; use "
            "--device cpu, or build it with --input uint8"
        )
    return arithmetic


def no_pictures(precision: str) -> str:
    """Why an IR of a precision cannot take pictures: bf16 is the precision of every layer."""
    return "OpenVINO would resize in bf16 too, whose 8 bits do not hold every level" if precision == "bf16" else ""


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
