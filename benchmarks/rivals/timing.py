"""All networks timed in turn: first the ways of each network alone, then the plain and the fastest ways of all networks
in groups that fit into memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import exp
from pathlib import Path

from benchmarks import racing
from benchmarks.provenance import environment
from benchmarks.rivals import COMPILED, EAGER, NETWORKS, ROOT, SIZE, THREADS, WAYS, Network, Race, Row, Way, files
from exporter import machine
from exporter.artifact import Artifact
from exporter.backends import Session
from exporter.backends.eager import EagerSession
from exporter.bench import Arm, Plan, Timing, latency, supervisor, worker
from exporter.errors import first_line
from exporter.stats import center

Key = tuple[str, Way]
HEAT_PROCESSES, HEAT_SECONDS = 2, 1.0  # enough to tell which way of a network is the fastest
MOST_BYTES = 4_000_000_000  # of the files that one process opens, which takes about three times as much memory


@dataclass
class Candidates:
    """The files of all networks, by network and way, and the reasons of those that are not there."""

    artifacts: dict[Key, Artifact] = field(default_factory=dict)
    failures: dict[Key, str] = field(default_factory=dict)


@contextmanager
def open_network(arm: Arm) -> Iterator[Session]:
    """The session of an arm: a network of timm in PyTorch, or an artifact."""
    way, _, name = arm.name.partition(", ")
    network = next((one for one in NETWORKS if way in (EAGER, COMPILED) and name == one.name), None)
    if network is None:
        with worker.open_arm(arm) as session:
            yield session
        return
    import torch

    torch.set_num_threads(arm.threads or THREADS)
    model = files.create(network)
    with torch.inference_mode():
        if way == COMPILED:
            # All networks of a process would count against one limit of recompilations, beyond which they run eagerly.
            model.compile(isolate_recompiles=True)
            with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
                model(torch.zeros(1, 3, SIZE, SIZE))  # compiles it, which takes longer than the warm-up
        yield EagerSession(model, "cpu")


def in_pytorch(way: str, network: Network) -> str:
    """The name of the arm of a network in PyTorch, eager or compiled."""
    return f"{way}, {network.name}"


def arm_name(network: Network, way: Way) -> str:
    """The name of the arm of a network in one way."""
    return f"{network.name}, {way.name}, {way.runtime} {way.precision}"


def peak_name(runtime: str, precision: str) -> str:
    """The name of the arm of a runtime's fastest matrix product or 1×1 convolution."""
    return f"peak {runtime} {precision}"


def ways() -> list[Way]:
    """The ways that this CPU computes: without bf16 where it has no instructions for it."""
    return [way for way in WAYS if way.precision != "bf16" or machine.has_bf16()]


def prepare(networks: Sequence[Network], batch: int) -> Candidates:
    """Make every file of a batch size."""
    candidates, folder = Candidates(), Path(ROOT)
    for network in networks:
        for way in ways():
            print(f"{arm_name(network, way)}, batch {batch}", file=sys.stderr, flush=True)
            try:
                candidates.artifacts[network.name, way] = files.make(network, way, batch, SIZE, folder)
            except Exception as error:  # noqa: BLE001  (of other tools, each with errors of its own)
                candidates.failures[network.name, way] = first_line(error)
    return candidates


def time_race(networks: Sequence[Network], batch: int, seconds: float) -> Race:
    """Time the plain ways of all networks, and the fastest way of each on each runtime and at each precision."""
    candidates = prepare(networks, batch)
    chosen = {network.name: _chosen(network, batch, candidates) for network in networks}
    pytorch = (EAGER, COMPILED) if batch == 1 else (EAGER,)  # those of timm, to compare with, are of one image
    timings: dict[str, Timing] = {}
    for group in _groups(networks, chosen, candidates):
        arms = [arm for network in group for arm in _arms(network, chosen[network.name], candidates, pytorch)]
        share = seconds / supervisor.PROCESSES * len(group) / len(networks)
        plan = plan_of((*arms, *_peaks(candidates)), batch, share)
        timings |= dict.fromkeys((network.name for network in group), Timing(plan))
    groups = [*{id(timing): timing for timing in timings.values()}.values()]
    racing.race_in_turn(groups, Path(ROOT) / f"race-b{batch}", open_network)
    gmacs = {network.name: files.gmacs(network) for network in networks}
    rows = [
        _row(network, way, timings[network.name], gmacs[network.name], candidates)
        for network in networks
        for _, way in chosen[network.name]
    ]
    rows += [_failed(name, way, reason) for (name, way), reason in candidates.failures.items()]
    samples = {
        way: {one.name: racing.samples(timings[one.name], in_pytorch(way, one)) for one in networks} for way in pytorch
    }
    return Race(
        batch=batch,
        rows=tuple(rows),
        eager=samples[EAGER],
        compiled=samples.get(COMPILED, {}),
        gmacs=gmacs,
        environment=environment(THREADS),
    )


def plan_of(arms: Sequence[Arm], batch: int, seconds: float) -> Plan:
    """How arms are timed. Their outputs are not compared, as those of different networks differ."""
    return Plan(arms=tuple(arms), preprocessing=files.preprocessing(SIZE), batch=batch, seconds=seconds, compared=False)


def _groups(
    networks: Sequence[Network], chosen: Mapping[str, Sequence[Key]], candidates: Candidates
) -> list[list[Network]]:
    """The networks in their order, in groups whose files have at most `MOST_BYTES` together, or of one network."""
    groups: list[list[Network]] = []
    free = 0
    for network in networks:
        size = sum(candidates.artifacts[key].sidecar.bytes for key in chosen[network.name])
        if not groups or size > free:
            groups.append([])
            free = MOST_BYTES
        groups[-1].append(network)
        free -= size
    return groups


def _arms(network: Network, chosen: Sequence[Key], candidates: Candidates, pytorch: Sequence[str]) -> list[Arm]:
    """The chosen files of a network, and the network in PyTorch."""
    arms = [arm_of(network, way, candidates.artifacts[name, way]) for name, way in chosen]
    path = arms[0].path
    return arms + [Arm(name=in_pytorch(way, network), path=path, runtime="eager", threads=THREADS) for way in pytorch]


def arm_of(network: Network, way: Way, artifact: Artifact) -> Arm:
    """How a file is timed."""
    return Arm(name=arm_name(network, way), path=str(artifact.path), threads=THREADS)


def _peaks(candidates: Candidates) -> list[Arm]:
    """One product for each runtime and precision, with an artifact of ours that names them."""
    paths = {
        (way.runtime, way.precision): str(one.path) for (_, way), one in candidates.artifacts.items() if _is_ours(way)
    }
    return [Arm(name=peak_name(*kind), path=path, runtime="peak", threads=THREADS) for kind, path in paths.items()]


def _is_ours(way: Way) -> bool:
    return way.name == "ours"


def _chosen(network: Network, batch: int, candidates: Candidates) -> list[Key]:
    """The plain ways of a network, and the fastest way for each runtime and precision, by a short race."""
    mine = [way for name, way in candidates.artifacts if name == network.name]
    arms = [arm_of(network, way, candidates.artifacts[network.name, way]) for way in mine]
    timing = Timing(plan_of(arms, batch, HEAT_SECONDS))
    path = Path(ROOT) / f"choice-b{batch}" / f"{network.timm}.json"
    racing.resume(timing, path)
    if len(timing.launches) < HEAT_PROCESSES:
        supervisor.measure(timing, worker.open_arm, HEAT_PROCESSES)
        racing.keep(timing, path)
    for way in mine:
        if reason := timing.failures.get(arm_name(network, way)):
            candidates.failures[network.name, way] = reason
    standing = [way for way in mine if arm_name(network, way) not in timing.failures]

    def median(way: Way) -> float:
        return racing.typical(racing.samples(timing, arm_name(network, way)))

    kinds = dict.fromkeys((way.runtime, way.precision) for way in standing)
    best = [min((way for way in standing if (way.runtime, way.precision) == kind), key=median) for kind in kinds]
    return [(network.name, way) for way in standing if way.plain or way in best]


def _row(network: Network, way: Way, timing: Timing, gmacs: float, candidates: Candidates) -> Row:
    name = arm_name(network, way)
    cold = supervisor.measure_cold(arm_of(network, way, candidates.artifacts[network.name, way]), timing.plan)
    if reason := timing.failures.get(name):
        return _failed(network.name, way, reason)
    plain = next(one for one in WAYS if one.plain and one.runtime == way.runtime and one.precision == "fp32")
    peak = peak_name(way.runtime, way.precision)
    macs = round(gmacs * 1e9) * timing.plan.batch
    shares = latency.shares_of_peak(timing, name, peak, macs)
    return Row(
        network=network.name,
        way=way.name,
        runtime=way.runtime,
        precision=way.precision,
        plain=way.plain,
        milliseconds=racing.samples(timing, name),
        over_plain=_over(timing, name, arm_name(network, plain)),
        peak_pct=100 * exp(center(shares).value) if shares else None,
        peak_bytes=None if isinstance(cold, str) else cold.peak_bytes,
    )


def _over(timing: Timing, name: str, other: str) -> racing.Ratio | None:
    both = any({name, other} <= launch.blocks.keys() for launch in timing.launches)
    return racing.ratio(timing, name, other) if both else None


def _failed(name: str, way: Way, reason: str) -> Row:
    return Row(
        network=name, way=way.name, runtime=way.runtime, precision=way.precision, plain=way.plain, failure=reason
    )
