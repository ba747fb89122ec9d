"""All peers of a case timed in turn, in one process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch

from benchmarks import racing
from benchmarks.peers import PEERS, Case, Peer, Row, build
from benchmarks.provenance import environment
from exporter import artifact as artifacts
from exporter import backends, machine
from exporter.artifact import Artifact
from exporter.backends import PEAK_MACS, Session
from exporter.backends.eager import EagerSession
from exporter.bench import Arm, Timing, worker

THREADS = 2
PEAKS = tuple((peer.runtime, peer.precision) for peer in PEERS if peer.maker == "ours")


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
        with backends.runtime(peer.runtime).open(_foreign(arm, peer), _options(arm)) as session:
            yield session


def _options(arm: Arm) -> backends.Options:
    return backends.Options(device=arm.device, threads=arm.threads, hint=arm.hint)


def _foreign(arm: Arm, peer: Peer) -> Artifact:
    """Another's file with the facts of ours, so that our backend opens it. What NNCF leaves in floating point runs in
    bf16, as OpenVINO does it unless it is set otherwise."""
    ours = artifacts.load(Path(arm.weights or ""))
    precision = peer.precision
    if precision == "int8":
        precision = "bf16" if peer.runtime == "openvino" and machine.has_bf16() else "fp32"
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
    timing = racing.race([*arms, *peaks], first.preprocessing, batch, seconds, open_peer)
    rows = tuple(_row(peer, timing, failures, batch * (first.macs or 0)) for peer in PEERS)
    names = [peak_name(kind) for kind in PEAKS]
    rates = {name: 2e-6 * PEAK_MACS / racing.typical(racing.samples(timing, name)) for name in names}
    return Case(
        variant=variant,
        batch=batch,
        threads=THREADS,
        rows=rows,
        environment=environment(THREADS),
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


def _row(peer: Peer, timing: Timing, failures: dict[str, str], macs: int) -> Row:
    failure = failures.get(peer.name) or timing.failures.get(peer.name, "")
    if failure:
        return Row(name=peer.name, failure=failure)
    peak = peak_name((peer.runtime, peer.precision))
    share = racing.ratio(timing, peer.name, peak) if peak in timing.launches[0].blocks else None
    return Row(
        name=peer.name,
        launches=racing.samples(timing, peer.name),
        over_eager=racing.ratio(timing, peer.name, PEERS[0].name),
        over_ours=racing.ratio(timing, peer.name, peer.ours) if peer.ours else None,
        peak_pct=100 * macs / PEAK_MACS * share[0] if share else None,
        cosine=min(launch.cosine[peer.name] for launch in timing.launches),
    )
