"""Facts about the machine: processor, memory, versions, and its load during timing."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache, lru_cache
from importlib import metadata
from math import ceil
from pathlib import Path
from statistics import median

from exporter.artifact.sidecar import Record
from exporter.progress import note

# In the order in which they matter to a ConvNeXt.
_ISA = (
    "amx_int8",
    "amx_bf16",
    "avx512_fp16",
    "avx512_bf16",
    "avx512_vnni",
    "avx512f",
    "avx_vnni",
    "avx2",
    "i8mm",
    "asimddp",
    "asimd",
)
_ARITHMETIC = {
    "amx": {"amx_int8"},
    "vnni": {"avx512_vnni", "avx_vnni"},
    "avx512": {"avx512f"},
    "avx2": {"avx2"},
    "i8mm": {"i8mm"},
    "dotprod": {"asimddp"},
    "neon": {"asimd"},
}
"""Classes of int8 arithmetic by the instruction sets that they need; the first one that a processor has counts."""
TOOLS = ("convnext-export", "torch", "onnx", "onnxscript", "onnxsim", "numpy")


@lru_cache(maxsize=1)
def cpu() -> tuple[str, list[str]]:
    """The processor's name, and which of the instruction sets that matter it has."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set((facts.get("flags") or facts.get("Features") or "").split())
    name = facts.get("model name") or _arm_name(facts) or platform.processor() or platform.machine()
    return name, [isa for isa in _ISA if isa in flags]


def _arm_name(facts: Mapping[str, str]) -> str:
    """What ARM processors have instead of a model name: the maker and the part on Linux, a brand on macOS."""
    if "CPU part" in facts:
        return f"ARM {facts.get('CPU implementer', '')} {facts['CPU part']}"
    if platform.system() != "Darwin":
        return ""
    words = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
    with suppress(OSError):
        return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    return ""


def arithmetic() -> str:
    """The class of this processor's int8 arithmetic; processors of one class use the same kind of
    int8 instructions."""
    isa = set(cpu()[1])
    return next((name for name, needed in _ARITHMETIC.items() if needed & isa), platform.machine() or "unknown")


def has_bf16() -> bool:
    """Whether this processor computes in bf16."""
    return bool({"avx512_bf16", "amx_bf16"} & set(cpu()[1]))


def saturates() -> bool:
    """Whether int8 sums can saturate on this CPU: it has AVX2 and no VNNI. False where its flags cannot be read."""
    isa = cpu()[1]
    return "avx2" in isa and not any("vnni" in one for one in isa)


CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
PROCESSORS = Path("/sys/devices/system/cpu")


def cores() -> int:
    """Processor cores this process may use: those of its affinity, but no more than its container's quota, rounded
    up."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return own if quota is None else max(1, min(own, ceil(quota)))


def cpu_quota() -> float | None:
    """Cores' worth of time that the control groups of this process allow it, of version 2 (`cpu.max`) or 1
    (`cpu.cfs_quota_us`): the least from its own group to the root. None where there is no limit."""
    quotas: list[float] = []
    for folder in _cgroups():
        with suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = (folder / "cpu.max").read_text().split()
            quotas += [int(quota) / int(period)] if quota != "max" else []
        with suppress(OSError, ValueError, ZeroDivisionError):
            limit = int((folder / "cpu.cfs_quota_us").read_text())
            quotas += [limit / int((folder / "cpu.cfs_period_us").read_text())] if limit > 0 else []
    return min(quotas, default=None)


def _cgroups() -> list[Path]:
    """The folders of this process's control groups of the CPU, each with those above it. In a container a group may be
    mounted as the root, and its own path may not exist there."""
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return []
    folders: list[Path] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for root in [CGROUPS / controllers, CGROUPS / "cpu"] if controllers else [CGROUPS, CGROUPS / "unified"]:
            group = root / path.lstrip("/")
            folders += [group, *(one for one in group.parents if one.is_relative_to(root))]
    return list(dict.fromkeys(folders))


def default_threads() -> int:
    """Threads of every timed model where no number was named: one for each physical core that this process may use."""
    return min(cores(), _physical_cores())


def _physical_cores() -> int:
    """Physical cores that this process may run on; where that is not known, those of the machine."""
    try:
        threads = os.sched_getaffinity(0)
        return len({(PROCESSORS / f"cpu{one}" / "topology" / "thread_siblings_list").read_text() for one in threads})
    except (AttributeError, OSError):  # not Linux, or a container without the list
        import psutil

        return psutil.cpu_count(logical=False) or cores()


def memory_gib() -> float:
    """Physical memory."""
    import psutil

    return float(psutil.virtual_memory().total) / 2**30


def peak_memory_bytes() -> int:
    """The most physical memory that this process has had. Linux counts its parent's into `ru_maxrss` when it starts a
    program, and not into `VmHWM`."""
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.M)):
        return int(found[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def versions(runtimes: Iterable[str] = ()) -> dict[str, str]:
    """The versions of the tools, and of these distributions of runtimes, as far as they are installed."""
    return {tool: version for tool in (*TOOLS, *runtimes) if (version := installed(tool)) is not None}


def installed(distribution: str) -> str | None:
    """The version of an installed distribution, without importing it."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def environment(runtimes: Iterable[str] = ()) -> dict[str, object]:
    """All of it, for a report."""
    name, isa = cpu()
    return {
        "cpu": name,
        "isa": isa,
        "cores": cores(),
        "governor": governor(),
        "memory_gib": round(memory_gib(), 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions(runtimes),
        **({"commit": commit} if (commit := ci_commit()) else {}),
    }


COMMIT_VARIABLES = ("GITHUB_SHA", "CI_COMMIT_SHA")


def ci_commit() -> str | None:
    """The commit that a CI runs for."""
    return next((os.environ[key] for key in COMMIT_VARIABLES if os.environ.get(key)), None)


BUSY_PCT, STEAL_PCT, WAITED_PCT = 10.0, 2.0, 5.0


class Conditions(Record, frozen=True):
    """How the machine was while something was timed. Shares are of all its cores, in percent; None is unknown.

    `waited_pct` is the share of this process's own time that its threads were ready to run and waited for a core.
    """

    load: float
    others_pct: float
    steal_pct: float
    throttled: int | None
    mhz: float | None
    waited_pct: float | None = None


def disturbances(conditions: Sequence[Conditions]) -> list[str]:
    """How other processes stretched what was timed, in words: medians over the stretches of timing."""
    reasons: list[str] = []
    if not conditions:
        return reasons
    if (others := median(one.others_pct for one in conditions)) > BUSY_PCT:
        reasons.append(f"other processes used {others:.0f} % of the machine")
    if (steal := median(one.steal_pct for one in conditions)) > STEAL_PCT:
        reasons.append(f"the hypervisor took {steal:.0f} %")
    waits = [one.waited_pct for one in conditions if one.waited_pct is not None]
    if waits and (waited := median(waits)) > WAITED_PCT:
        reasons.append(f"its threads waited for a core {waited:.0f} % of the time")
    if any(one.throttled for one in conditions):
        reasons.append("cores were slowed for heat")
    return reasons


class Watch:
    """Looks at the machine once before and once after a stretch of timing, never meanwhile."""

    def __init__(self) -> None:
        self.before, self.throttles, self.scheduled = _counters(), _throttles(), _scheduled()

    def conditions(self) -> Conditions:
        """What the machine was like since this watch was made."""
        import psutil

        before, now = self.before, _counters()
        passed = {key: now[key] - before[key] for key in now}
        capacity = max(passed["total"], 1e-9)
        others = passed["busy"] - passed["own"]
        throttles, scheduled = _throttles(), _scheduled()
        waited = None
        if scheduled is not None and self.scheduled is not None:
            ran, stood = (now - then for now, then in zip(scheduled, self.scheduled, strict=True))
            waited = round(100 * max(stood, 0) / max(ran + stood, 1), 2)
        return Conditions(
            load=round(psutil.getloadavg()[0], 2),
            others_pct=round(100 * max(others, 0.0) / capacity, 2),
            steal_pct=round(100 * passed["steal"] / capacity, 2),
            throttled=None if throttles is None or self.throttles is None else throttles - self.throttles,
            mhz=_mhz(),
            waited_pct=waited,
        )


def _counters() -> dict[str, float]:
    """Seconds of all cores since boot: total, busy and stolen by the hypervisor; and of this process."""
    import psutil

    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    steal = getattr(times, "steal", 0.0)
    guest = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # counted in user already
    total = sum(times) - guest
    return {"total": total, "busy": total - idle - steal, "steal": steal, "own": sum(os.times()[:2])}


def _scheduled() -> tuple[int, int] | None:
    """Nanoseconds that the threads of this process ran, and were ready to run and waited for a core; None where the
    kernel does not count them."""
    ran = waited = 0
    try:
        for path in Path("/proc/self/task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
                fields = (path / "schedstat").read_text().split()
                ran, waited = ran + int(fields[0]), waited + int(fields[1])
    except (OSError, ValueError, IndexError):
        return None
    return (ran, waited) if ran else None


def _throttles() -> int | None:
    """How often the cores were slowed for heat since boot, as far as the kernel tells."""
    found = list(Path("/sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/core_throttle_count"))
    return sum(int(path.read_text()) for path in found) if found else None


def _mhz() -> float | None:
    import psutil

    try:
        frequency = psutil.cpu_freq()
    except (OSError, RuntimeError):  # a virtual machine that hides it
        return None
    return round(frequency.current, 0) if frequency else None


def governor() -> str | None:
    """Which rule sets the clock of the first core, where the kernel tells."""
    path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return path.read_text().strip() if path.exists() else None


def gpu() -> dict[str, str] | None:
    """Clocks, temperature and driver of the first NVIDIA GPU that CUDA may use, asked once; None where there is none.

    A number in `CUDA_VISIBLE_DEVICES` is taken as nvidia-smi's, which CUDA shares with `CUDA_DEVICE_ORDER=PCI_BUS_ID`.
    """
    import shutil

    fields = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw")
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if shutil.which("nvidia-smi") is None or first in ("", "-1"):
        return None
    for number in dict.fromkeys((first, "0")):  # it does not take every name that CUDA takes, as of a part of a GPU
        words = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", number]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
        except subprocess.TimeoutExpired:  # it waits for a driver that hangs
            note(
                "nvidia-smi gave no answer within 30 s, so this machine counts as one without a GPU; restart its driver"
            )
            return None
        if done.returncode == 0:
            return dict(zip(fields, done.stdout.strip().split(", "), strict=False))
    return None


def identity() -> list[object]:
    """What results of this machine depend on, for cache keys: its processor, instruction sets, cores and GPU."""
    name, isa = cpu()
    graphics = gpu()
    return [name, isa, cores(), *([graphics["name"]] if graphics else [])]


@cache
def may_begin_with_columns() -> bool:
    """Whether the Pillow of this machine resizes columns first where the height shrinks, and by more than twice as many
    pixels as the width. Pillow 13.0 does, other versions begin with rows."""
    import numpy as np
    from PIL import Image

    noise = Image.fromarray((np.arange(64 * 16).reshape(64, 16) ** 2 % 251).astype(np.uint8))
    bicubic = Image.Resampling.BICUBIC
    rows_first = noise.resize((9, 64), bicubic).resize((9, 11), bicubic)
    return noise.resize((9, 11), bicubic).tobytes() != rows_first.tobytes()
