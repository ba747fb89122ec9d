"""All peers of a case timed in turn, in fresh processes; what cannot be timed is a row with its reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import exp
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
from exporter.backends import Session
from exporter.backends.eager import EagerSession
from exporter.bench import Arm, Timing, latency, worker
from exporter.errors import first_line
from exporter.stats import center

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
        runtime = backends.runtime(peer.runtime)
        with runtime.open(_foreign(arm, peer), _options(runtime, arm)) as session:
            yield session


def _options(runtime: backends.Runtime[backends.Options], arm: Arm) -> backends.Options:
    return runtime.options(device=arm.device, threads=arm.threads, hint=arm.hint)


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
    return as_case(timing, variant, failures, first.macs or 0)


def as_case(timing: Timing, variant: str, failures: Mapping[str, str], macs: int) -> Case:
    """What was measured: a row for each peer, and the peaks that could be timed."""
    batch = timing.plan.batch
    rows = tuple(_row(peer, timing, failures, batch * macs) for peer in PEERS)
    names = [peak_name(kind) for kind in PEAKS]
    rates = {name: latency.peak_gflops(timing, name)[0] for name in names if _was_timed(timing, name)}
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
        except Exception as error:  # noqa: BLE001  (of any tool: its row has the reason)
            failures[peer.name] = str(error) if isinstance(error, build.Cannot) else first_line(error)
    return paths, failures


def _arm(peer: Peer, path: Path, ours: Mapping[tuple[str, str], Artifact]) -> Arm:
    runtime: Any = peer.runtime if peer.maker.startswith("torch") else "artifact"
    beside = None if peer.maker in ("ours", "torch", "torch channels_last") else str(ours["onnxruntime", "fp32"].path)
    return Arm(name=peer.name, path=str(path), runtime=runtime, threads=THREADS, weights=beside)


def peak_name(kind: tuple[str, str]) -> str:
    """What a runtime's matrix product is called."""
    return f"peak {kind[0]} {kind[1]}"


def _was_timed(timing: Timing, *names: str) -> bool:
    """Whether these were timed in a process together."""
    return any(set(names) <= launch.blocks.keys() for launch in timing.launches)


def _row(peer: Peer, timing: Timing, failures: Mapping[str, str], macs: int) -> Row:
    failure = failures.get(peer.name) or timing.failures.get(peer.name, "")
    if failure or not _was_timed(timing, peer.name):
        return Row(name=peer.name, failure=failure or "was never timed")

    def over(other: str) -> racing.Ratio | None:
        return racing.ratio(timing, peer.name, other) if other and _was_timed(timing, peer.name, other) else None

    shares = latency.shares_of_peak(timing, peer.name, peak_name((peer.runtime, peer.precision)), macs)
    return Row(
        name=peer.name,
        launches=tuple(samples for samples in racing.samples(timing, peer.name) if samples),
        over_eager=over(PEERS[0].name),
        over_ours=over(peer.ours),
        peak_pct=100 * exp(center(shares).value) if shares else None,
        cosine=min(launch.cosine[peer.name] for launch in timing.launches if peer.name in launch.cosine),
    )
