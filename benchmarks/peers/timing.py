"""All peers of a case timed in turn, in one process."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import exp
from pathlib import Path
from typing import Any

import msgspec
import torch

from benchmarks.peers import PEERS, Case, Peer, Row, build
from exporter import artifact as artifacts
from exporter import backends
from exporter.artifact import Artifact
from exporter.backends import PEAK_MACS, Session
from exporter.backends.eager import EagerSession
from exporter.bench import Arm, Launch, Plan, Timing, flat, latency, supervisor, worker
from exporter.measure import machine
from exporter.measure.stats import center
from exporter.progress import track

THREADS, LAUNCHES = 2, 8
PEAKS = (("onnxruntime", "fp32"), ("openvino", "fp32"), ("openvino", "bf16"))


@contextmanager
def open_peer(arm: Arm) -> Iterator[Session]:
    """The session of a peer, with the same settings as ours of that runtime and precision."""
    peer = next((peer for peer in PEERS if peer.name == arm.name), None)
    if peer is None or peer.maker in ("ours", "torch"):
        with worker.open_arm(arm) as session:
            yield session
    elif peer.maker == "torch channels_last":
        with worker.open_arm(arm) as session:
            assert isinstance(session, EagerSession)
            network = session.model.to(memory_format=torch.channels_last)
            session.model = lambda images: network(images.contiguous(memory_format=torch.channels_last))
            yield session
    else:
        with backends.get(peer.runtime).session(_foreign(arm, peer), _options(arm)) as session:
            yield session


def _options(arm: Arm) -> backends.Options:
    return backends.Options(device=arm.device, threads=arm.threads, hint=arm.hint)


def _foreign(arm: Arm, peer: Peer) -> Artifact:
    """Another's file with the facts of ours, so that our backend opens it. What NNCF leaves in floating point runs in
    bf16, as OpenVINO does it unless told otherwise."""
    ours = artifacts.load(Path(arm.weights or ""))
    precision = peer.precision if peer.precision != "int8" else "bf16" if machine.has_bf16() else "fp32"
    return Artifact(Path(arm.path), msgspec.structs.replace(ours.sidecar, precision=precision))


def time_case(variant: str, batch: int, root: Path, seconds: float) -> Case:
    """Make every artifact of a case, and time them."""
    folder = root / f"{variant}-b{batch}"
    folder.mkdir(parents=True, exist_ok=True)
    ours = build.ours(folder, variant)
    paths, failures = _make(folder, ours)
    arms = [_arm(peer, paths[peer.name], ours) for peer in PEERS if peer.name in paths]
    peaks = [Arm(name=peak_name(kind), path=str(ours[kind].path), runtime="peak", threads=THREADS) for kind in PEAKS]
    first = ours["onnxruntime", "fp32"].sidecar
    plan = Plan(arms=(*arms, *peaks), preprocessing=first.preprocessing, batch=batch, seconds=seconds / LAUNCHES)
    timing = Timing(plan)
    for _ in track(supervisor.launches(timing, open_peer), LAUNCHES, "launches", lambda _: 1):
        if len(timing.launches) >= LAUNCHES:
            break
    rows = tuple(_row(peer, timing, failures, batch * (first.macs or 0)) for peer in PEERS)
    rates = {peak_name(kind): 2e-6 * PEAK_MACS / statistics.median(_samples(timing, peak_name(kind))) for kind in PEAKS}
    return Case(
        variant=variant,
        batch=batch,
        threads=THREADS,
        rows=rows,
        environment=machine.environment(),
        peers={name: build.versions(name) for name in dict.fromkeys(build.ENVIRONMENTS.values())},
        peaks_gflops=rates,
    )


def _make(folder: Path, ours: Mapping[tuple[str, str], Artifact]) -> tuple[dict[str, Path], dict[str, str]]:
    """Where each peer's file lies, and why those that are not there are not."""
    paths: dict[str, Path] = {}
    failures: dict[str, str] = {}
    graph = ours["onnxruntime", "fp32"]
    for peer in PEERS:
        try:
            if peer.maker == "ours":
                paths[peer.name] = ours[peer.runtime, peer.precision].path
            elif peer.maker in build.MAKERS:
                paths[peer.name] = build.MAKERS[peer.maker](folder, graph)
            else:
                paths[peer.name] = graph.path
        except build.Cannot as error:
            failures[peer.name] = str(error)
    return paths, failures


def _arm(peer: Peer, path: Path, ours: Mapping[tuple[str, str], Artifact]) -> Arm:
    runtime: Any = peer.runtime if peer.maker.startswith("torch") else "artifact"
    beside = None if peer.maker in ("ours", "torch", "torch channels_last") else str(ours["onnxruntime", "fp32"].path)
    return Arm(name=peer.name, path=str(path), runtime=runtime, threads=THREADS, weights=beside)


def peak_name(kind: tuple[str, str]) -> str:
    """What a runtime's matrix product is called."""
    return f"peak {kind[0]} {kind[1]}"


def _samples(timing: Timing, name: str) -> list[float]:
    return [sample for launch in timing.launches for sample in flat(launch.blocks.get(name, []))]


def _row(peer: Peer, timing: Timing, failures: dict[str, str], macs: int) -> Row:
    failure = failures.get(peer.name) or timing.failures.get(peer.name, "")
    if failure:
        return Row(name=peer.name, failure=failure)
    peak = peak_name((peer.runtime, peer.precision))
    share = _ratio(timing, peer.name, peak) if peak in timing.launches[0].blocks else None
    return Row(
        name=peer.name,
        launches=tuple(tuple(round(s, 4) for s in flat(_blocks(launch, peer.name))) for launch in timing.launches),
        over_eager=_ratio(timing, peer.name, PEERS[0].name),
        over_ours=_ratio(timing, peer.name, peer.ours) if peer.ours else None,
        peak_pct=100 * macs / PEAK_MACS * share[0] if share else None,
        cosine=min(launch.cosine[peer.name] for launch in timing.launches),
    )


def _blocks(launch: Launch, name: str) -> list[list[float]]:
    return launch.blocks.get(name, [])


def _ratio(timing: Timing, name: str, over: str) -> tuple[float, float, float]:
    """How many times as fast as another, in pairs of the same rounds, with the 95 % interval over launches."""
    found = center(latency.speedups(timing, name, over))
    return exp(found.value), exp(found.low), exp(found.high)
