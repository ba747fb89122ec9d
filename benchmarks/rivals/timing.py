"""All networks timed in turn: first the ways of each network alone, then the plain and the fastest ways in one race."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import exp
from pathlib import Path

from benchmarks import racing
from benchmarks.provenance import environment
from benchmarks.rivals import EAGER, NETWORKS, ROOT, SIZE, THREADS, WAYS, Network, Race, Row, Way, files
from exporter import machine
from exporter.artifact import Artifact
from exporter.backends import Session
from exporter.backends.eager import EagerSession
from exporter.bench import Arm, Cold, Plan, Timing, latency, supervisor, worker
from exporter.errors import first_line
from exporter.stats import center

Key = tuple[str, Way]
HEAT_PROCESSES, HEAT_SECONDS = 2, 1.0  # enough to tell which way of a network is the fastest


@dataclass
class Field:
    """The files of all networks, by network and way, and the reasons of those that are not there."""

    artifacts: dict[Key, Artifact] = field(default_factory=dict)
    failures: dict[Key, str] = field(default_factory=dict)


@contextmanager
def open_rival(arm: Arm) -> Iterator[Session]:
    """The session of an arm: a network of timm in eager PyTorch, or an artifact."""
    rival = next((one for one in NETWORKS if arm.name == eager_name(one)), None)
    if rival is None:
        with worker.open_arm(arm) as session:
            yield session
        return
    import torch

    torch.set_num_threads(arm.threads or THREADS)
    with torch.inference_mode():
        yield EagerSession(files.network(rival), "cpu")


def eager_name(rival: Network) -> str:
    """The name of the arm of a network in eager PyTorch."""
    return f"{EAGER}, {rival.name}"


def arm_name(rival: Network, way: Way) -> str:
    """The name of the arm of a network in one way."""
    return f"{rival.name}, {way.name}, {way.runtime} {way.precision}"


def peak_name(runtime: str, precision: str) -> str:
    """The name of the arm of a runtime's fastest matrix product."""
    return f"peak {runtime} {precision}"


def ways() -> list[Way]:
    """The ways that this CPU computes: without bf16 where it has no instructions for it."""
    return [way for way in WAYS if way.precision != "bf16" or machine.has_bf16()]


def prepare(networks: Sequence[Network], batch: int) -> Field:
    """Make every file of a batch size."""
    made, folder = Field(), Path(ROOT)
    for rival in networks:
        for way in ways():
            print(f"{arm_name(rival, way)}, batch {batch}", file=sys.stderr, flush=True)
            try:
                made.artifacts[rival.name, way] = files.make(rival, way, batch, SIZE, folder)
            except Exception as error:  # noqa: BLE001  (of other tools, each with errors of its own)
                made.failures[rival.name, way] = first_line(error)
    return made


def time_race(networks: Sequence[Network], batch: int, seconds: float) -> Race:
    """Time the plain ways of all networks, and the fastest way of each on each runtime and at each precision."""
    made = prepare(networks, batch)
    chosen = [key for rival in networks for key in _chosen(rival, batch, made)]
    rivals = {rival.name: rival for rival in networks}
    arms = [_arm(rivals[name], way, made.artifacts[name, way]) for name, way in chosen]
    path = arms[0].path
    arms += [Arm(name=eager_name(rival), path=path, runtime="eager", threads=THREADS) for rival in networks]
    arms += _peaks(made)
    recipe = files.preprocessing(SIZE)
    timing = racing.race(arms, recipe, batch, seconds, open_rival)
    gmacs = {rival.name: files.gmacs(rival) for rival in networks}
    cold = {key: _cold(_arm(rivals[key[0]], key[1], made.artifacts[key]), timing.plan) for key in chosen}
    rows = [_row(rivals[key[0]], key[1], timing, gmacs[key[0]], cold[key]) for key in chosen]
    rows += [_failed(name, way, reason) for (name, way), reason in made.failures.items()]
    return Race(
        batch=batch,
        rows=tuple(rows),
        eager={rival.name: racing.samples(timing, eager_name(rival)) for rival in networks},
        gmacs=gmacs,
        environment=environment(THREADS),
    )


def _arm(rival: Network, way: Way, artifact: Artifact) -> Arm:
    return Arm(name=arm_name(rival, way), path=str(artifact.path), threads=THREADS)


def _peaks(made: Field) -> list[Arm]:
    """One product for each runtime and precision, with an artifact of ours that names them."""
    paths = {(way.runtime, way.precision): str(one.path) for (_, way), one in made.artifacts.items() if _is_ours(way)}
    return [Arm(name=peak_name(*kind), path=path, runtime="peak", threads=THREADS) for kind, path in paths.items()]


def _is_ours(way: Way) -> bool:
    return way.name == "ours"


def _chosen(rival: Network, batch: int, made: Field) -> list[Key]:
    """The plain ways of a network, and the fastest way for each runtime and precision, by a short race."""
    mine = [way for name, way in made.artifacts if name == rival.name]
    arms = [_arm(rival, way, made.artifacts[rival.name, way]) for way in mine]
    timing = Timing(Plan(arms=tuple(arms), preprocessing=files.preprocessing(SIZE), batch=batch, seconds=HEAT_SECONDS))
    supervisor.measure(timing, worker.open_arm, HEAT_PROCESSES)
    for way in mine:
        if reason := timing.failures.get(arm_name(rival, way)):
            made.failures[rival.name, way] = reason
    standing = [way for way in mine if arm_name(rival, way) not in timing.failures]

    def median(way: Way) -> float:
        return racing.typical(racing.samples(timing, arm_name(rival, way)))

    kinds = dict.fromkeys((way.runtime, way.precision) for way in standing)
    best = [min((way for way in standing if (way.runtime, way.precision) == kind), key=median) for kind in kinds]
    return [(rival.name, way) for way in standing if way.plain or way in best]


def _cold(arm: Arm, plan: Plan) -> Cold | str:
    return supervisor.measure_cold(arm, plan)


def _row(rival: Network, way: Way, timing: Timing, gmacs: float, cold: Cold | str) -> Row:
    name = arm_name(rival, way)
    if reason := timing.failures.get(name):
        return _failed(rival.name, way, reason)
    plain = next(one for one in WAYS if one.plain and one.runtime == way.runtime and one.precision == "fp32")
    peak = peak_name(way.runtime, way.precision)
    macs = round(gmacs * 1e9) * timing.plan.batch
    shares = latency.shares_of_peak(timing, name, peak, macs)
    return Row(
        network=rival.name,
        way=way.name,
        runtime=way.runtime,
        precision=way.precision,
        plain=way.plain,
        milliseconds=racing.samples(timing, name),
        over_plain=_over(timing, name, arm_name(rival, plain)),
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
