"""Findings of a timing that need no statistics: work, cold start, and the state of the machine."""

from __future__ import annotations

from statistics import median

import msgspec

from exporter.artifact import Artifact
from exporter.artifact.sidecar import size_text
from exporter.backends import _cuda
from exporter.bench import Cold, Timing
from exporter.data import synthetic
from exporter.report import Finding

COLD = "new process, file not in memory, to the first answer; runtime imported"


def work(artifact: Artifact) -> list[Finding]:
    """The multiply-accumulates of one image, where they are known."""
    macs = artifact.sidecar.macs
    if macs is None:
        return []
    preprocessing = artifact.sidecar.preprocessing
    detail = f"multiply-accumulates of one image of {size_text(preprocessing.size)} pixels"
    if preprocessing.input == "image":
        detail += f"; artifacts also resize it, from {size_text(synthetic.picture_size(1))}, and PyTorch does not"
    return [Finding(check="latency", metric="gmacs", value=macs / 1e9, unit="GMAC", detail=detail)]


def cold(times: Cold | str, setting: str) -> list[Finding]:
    """The times of a cold start and the memory of its process, or the reason of a failure."""
    if isinstance(times, str):
        failed = Finding(check="latency", metric="cold_ms", value=None, unit="ms", passed=False, detail=times)
        return [msgspec.structs.replace(failed, setting=setting)]
    values = (
        ("cold_ms", times.cold_ms, "ms", _with_cache(COLD, times.cold_from)),
        ("load_ms", times.load_ms, "ms", _with_cache("loaded again", times.load_from)),
        ("first_ms", times.first_ms, "ms", "first inference after that"),
        ("peak_bytes", float(times.peak_bytes), "bytes", "of the process that ran it alone"),
    )
    return [
        Finding(check="latency", metric=metric, value=value, unit=unit, detail=text, setting=setting)
        for metric, value, unit, text in values
    ]


def _with_cache(text: str, loaded: str) -> str:
    """With where the model came from, if the runtime had a folder of compiled models."""
    return f"{text}; {loaded}" if loaded else text


def circumstances(timings: list[Timing]) -> dict[str, object]:
    """The state of the machine during the timing: medians over the processes."""
    seen = [msgspec.to_builtins(launch.conditions) for timing in timings for launch in timing.launches]
    dropped = sum(launch.dropped for timing in timings for launch in timing.launches)
    fields = seen[0] if seen else {}
    known = {key: [one[key] for one in seen if one[key] is not None] for key in fields}
    disturbed = sum(timing.disturbed for timing in timings)
    return {"launches": len(seen), "measured_again": disturbed, "dropped_rounds": dropped} | {
        k: median(v) for k, v in known.items() if v
    }


def parts(timing: Timing, name: str, case: str) -> list[Finding]:
    """Upload, computation and download separately, where a GPU measured them."""
    launches = [launch.parts[name] for launch in timing.launches if name in launch.parts]
    return [
        Finding(
            check="latency", metric=part, case=case, value=median(one[part] for one in launches), unit="ms",
            detail="by the GPU's clock, one after the other", samples=tuple(one[part] for one in launches),
            setting=timing.setting(name),
        )
        for part in (_cuda.PARTS if launches else ())
    ]  # fmt: skip
