"""A verification in shards: ranges of the images that any process can measure, and one report of all of them.

Shards begin at full batches, so their batches are those of `verify`, and a report of all shards has the same bytes.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import replace as with_
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec.structs import replace

from exporter import backends, machine
from exporter.artifact import Artifact
from exporter.artifact.sidecar import Record
from exporter.artifact.tensors import Tensor, tensor_of
from exporter.backends import Layer
from exporter.data.fingerprint import fingerprint
from exporter.data.samples import Samples
from exporter.errors import BadRequest, first_line, some
from exporter.report import Finding, Report
from exporter.verify import (
    VerifyOptions,
    checks,
    findings_of,
    layers_of,
    open_pair,
    open_runnable,
    prepared,
    reference,
    report_of,
)
from exporter.verify.batches import MeasuredBatch, Pair, Tally, size_of
from exporter.verify.checks.structure import other_cpu
from exporter.verify.page_images import page_images
from exporter.verify.slide import windows_of
from exporter.verify.thumbnails import drop_unused_thumbnails

IMAGES = 512
"""Of a shard, where no number is given: about half a minute of ConvNeXt-T on two cores."""
MAX_IMAGES = 2**15  # of a shard: two feature vectors of the widest network for each are half of `MAX_BYTES`
MAX_BYTES = 2**30  # of an unpacked shard


class Schedule(Record, frozen=True):
    """What all shards of a verification have in common.

    artifact, sha256: the path at the time of scheduling, and the digest of its graph. images_digest: of the names and
    sizes of the files. size: images of a shard, the last one may have fewer. versions: of this tool and of the
    libraries that compute.
    """

    artifact: str
    sha256: str
    options: VerifyOptions
    images_digest: str
    total: Annotated[int, msgspec.Meta(ge=1, le=10**9)]
    size: Annotated[int, msgspec.Meta(ge=1)]
    versions: dict[str, str]
    schema: int = 1

    @property
    def count(self) -> int:
        """The number of shards."""
        return -(-self.total // self.size)

    @property
    def key(self) -> bytes:
        """A digest of the whole schedule."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).digest()

    def images_of(self, number: int) -> str:
        """The images of a shard, in words."""
        return f"images {number * self.size:,} to {min((number + 1) * self.size, self.total) - 1:,}"


class StoredBatch(Record, frozen=True):
    """A `MeasuredBatch`. Names of files may be no UTF-8."""

    names: tuple[bytes, ...]
    lines: tuple[bytes, ...]
    rows: dict[str, dict[str, Tensor]]


class Shard(Record, frozen=True):
    """What was measured on the images of a shard.

    arithmetic: the class of the processor (`machine.arithmetic`), or the GPU. environment: of the process. facts: of
    its session. layers: of the artifact. skipped: images that cannot be read. findings: of this machine: that the
    ONNX graph ran in place of the engine, that the CPU is of another class.
    """

    number: int
    arithmetic: str
    environment: dict[str, Any]
    facts: dict[str, str]
    layers: tuple[Layer, ...]
    skipped: tuple[str, ...]
    findings: tuple[Finding, ...]
    batches: tuple[StoredBatch, ...]


def schedule(artifact: Artifact, options: VerifyOptions, size: int | None = None) -> Schedule:
    """The schedule of a verification.

    Args:
        artifact: what to verify.
        options: as for `verify`.
        size: images of a shard, rounded up to full batches.

    Raises: as `verify` does; BadRequest for `blocks`, and for shards of more than `MAX_IMAGES`.
    """
    if size is not None and not 1 <= size <= MAX_IMAGES:
        raise BadRequest(f"--shard-size {size}: expected 1 to {MAX_IMAGES:,} images")
    if options.blocks:
        raise BadRequest("--blocks: compares the first images in one process; leave it out, or leave --on out")
    _, samples = prepared(artifact, options)
    batch = size_of(artifact.sidecar, windows_of(artifact.sidecar, options))
    return Schedule(
        artifact=str(artifact.path),
        sha256=artifact.sidecar.sha256,
        options=options,
        images_digest=fingerprint(options.data, times=False),
        total=samples.total,
        size=-(-(size or IMAGES) // batch) * batch,
        versions=backends.computing_versions(backends.runtime_of(artifact)),
    )


def refuse_others(schedule: Schedule, artifact: Artifact, data: str | None = None) -> None:
    """Refuse another artifact, other versions and other images than the schedule's.

    Raises: BadRequest for another artifact, and where this process has other versions or other images.
    """
    if artifact.sidecar.sha256 != schedule.sha256:
        raise BadRequest(f"{artifact.path}: another artifact than the schedule's; give that one")
    backends.refuse_other_versions(schedule.versions)
    source = schedule.options.data if data is None else data
    if fingerprint(source, times=False) != schedule.images_digest:
        raise BadRequest(f"{source}: other images than those of the schedule; restore them, or schedule again")


@dataclass(frozen=True)
class Worker:
    """Measures shards with both models open."""

    schedule: Schedule
    pair: Pair
    samples: Samples
    layers: tuple[Layer, ...]
    findings: tuple[Finding, ...]

    def batches(self, number: int) -> tuple[Samples, Iterator[MeasuredBatch]]:
        """The images of a shard, and its batches, which are measured as they are taken."""
        samples = self.samples.between(number * self.schedule.size, (number + 1) * self.schedule.size)
        return samples, self.pair.measured(samples)

    def shard(self, number: int, batches: Sequence[MeasuredBatch], skipped: Sequence[str]) -> Shard:
        """The record of a shard."""
        artifact, kept = self.pair.artifact, drop_unused_thumbnails([batch.rows for batch in batches])
        on_cpu = self.findings or backends.device_kind(artifact, self.schedule.options.device) == "CPU"
        where = machine.arithmetic() if on_cpu else (machine.gpu() or {}).get("name", "GPU")
        return Shard(
            number=number,
            arithmetic=" ".join(filter(None, [where, "simulated" if self.findings else ""])),
            environment=backends.environment(),
            facts=self.pair.candidate.facts,
            layers=self.layers,
            skipped=tuple(skipped),
            findings=(*self.findings, *other_cpu(artifact.sidecar.quantization)),
            batches=tuple(_stored(with_(batch, rows=rows)) for batch, rows in zip(batches, kept, strict=True)),
        )

    def measure(self, number: int) -> Shard:
        """Measure a shard."""
        samples, batches = self.batches(number)
        measured = list(batches)
        return self.shard(number, measured, samples.skipped)


@contextmanager
def open_worker(
    schedule: Schedule, artifact: Artifact, data: str | None = None, weights: str | None = None
) -> Iterator[Worker]:
    """Both models and the images of a schedule, opened.

    Args:
        schedule: of the whole verification.
        artifact: the one of the schedule; it may be a copy.
        data, weights: where images and weights are here, if not where they were when it was scheduled.

    Raises: BadRequest for another artifact, other versions or other images than those of the schedule; otherwise as
        `verify` does.
    """
    refuse_others(schedule, artifact, data)
    options = replace(
        schedule.options,
        data=schedule.options.data if data is None else data,
        weights=schedule.options.weights if weights is None else weights,
    )
    runtime, samples = prepared(artifact, options)
    batch = size_of(artifact.sidecar, windows_of(artifact.sidecar, options))
    if samples.total != schedule.total or schedule.size % batch:
        raise BadRequest(
            f"the schedule has {schedule.total:,} images in shards of {schedule.size}, and {options.data} has "
            f"{samples.total:,} in batches of {batch}; schedule again"
        )
    layers = layers_of(artifact, runtime, options)
    with open_runnable(artifact, runtime) as runnable:
        meters = checks.start_all(options, checks.Subject(artifact, layers))
        first = Artifact(Path(schedule.artifact), artifact.sidecar)  # the path of the weights is relative to its path
        with reference(first, options) as original, open_pair(artifact, runnable, options, meters, original) as pair:
            yield Worker(schedule, pair, samples, tuple(layers), runnable.findings)


def merged(schedule: Schedule, artifact: Artifact, read: Callable[[int], Shard]) -> Report:
    """The report of all shards. int8 answers of processors of different classes are findings of their own.

    Args:
        schedule: of the shards.
        artifact: the one of the schedule; it may be a copy.
        read: a shard by its number.

    Raises: BadRequest where no image could be read.
    """
    first = read(0)
    quantized = artifact.sidecar.quantization is not None
    subject = checks.Subject(artifact, first.layers)
    every = Tally({})
    tallies: dict[str, Tally] = {}
    machines, others = dict[str, list[int]](), dict[str, tuple[Finding, ...]]()
    for number in range(schedule.count):
        shard = read(number)
        machines.setdefault(_machine(shard), []).append(number)
        name = shard.arithmetic if quantized or shard.findings else ""
        others.setdefault(name, shard.findings)
        tally = tallies.setdefault(name, Tally(checks.start_all(schedule.options, subject)))
        try:
            for batch in map(_measured, shard.batches):
                tally.add(batch)
                every.add(with_(batch, rows={}))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise BadRequest(
                f"shard {number} is not one of this schedule ({first_line(error)}); measure it again"
            ) from None
        tally.skipped += shard.skipped
    tallies = _readable(tallies)
    windows = windows_of(artifact.sidecar, schedule.options)
    findings = {
        name: findings_of(tally, schedule.options.data, windows, others[name]) for name, tally in tallies.items()
    }
    return report_of(
        Artifact(Path(schedule.artifact), artifact.sidecar),
        schedule.options,
        [*_apart(findings), *_machines(machines)],
        {**first.environment, "session": first.facts},
        every.digest.hexdigest(),
        page_images(list(tallies.values())),
    )


def _readable(tallies: dict[str, Tally]) -> dict[str, Tally]:
    """The tallies with images; the first one takes over the skipped images of the others."""
    some_read = {name: tally for name, tally in tallies.items() if tally.count} or dict([next(iter(tallies.items()))])
    first = next(iter(some_read.values()))
    others = [
        reason for tally in tallies.values() if not tally.count and tally is not first for reason in tally.skipped
    ]
    first.skipped += others
    return some_read


def _apart(findings: dict[str, list[Finding]]) -> list[Finding]:
    """The findings of each class of processors, and in which metrics the classes differ: their intervals do not
    overlap."""
    if len(findings) == 1:
        return next(iter(findings.values()))
    intervals: dict[str, dict[str, tuple[float, float]]] = {}
    for name, listed in findings.items():
        for finding in listed:
            if finding.interval is not None:
                intervals.setdefault(finding.metric, {})[name] = finding.interval
    differing = [
        f"{metric} ({', '.join(f'{name} {low:.4g} to {high:.4g}' for name, (low, high) in of_classes.items())})"
        for metric, of_classes in intervals.items()
        if max(low for low, _ in of_classes.values()) > min(high for _, high in of_classes.values())
    ]
    detail = (
        f"their intervals do not overlap in {'; '.join(differing)}"
        if differing
        else "the intervals of all metrics overlap"
    )
    return [
        *(
            replace(finding, case=" ".join(filter(None, [finding.case, name])))
            for name, listed in findings.items()
            for finding in listed
        ),
        Finding(check="data", metric="unlike_classes", value=len(differing), unit="metrics", detail=detail),
    ]


def _machine(shard: Shard) -> str:
    facts = shard.environment
    return f"{facts.get('cpu')}, {facts.get('cores')} cores, {shard.arithmetic}"


def _machines(numbers: dict[str, list[int]]) -> list[Finding]:
    """Which machines measured which shards, where there was more than one."""
    if len(numbers) == 1:
        return []
    detail = "; ".join(f"{name}: shards {some(map(str, listed))}" for name, listed in numbers.items())
    return [Finding(check="data", metric="machines", value=len(numbers), detail=detail)]


def encode(shard: Shard) -> bytes:
    """A shard as bytes."""
    return zlib.compress(msgspec.msgpack.encode(shard))


def decode(content: bytes) -> Shard:
    """A shard from its bytes.

    Raises: BadRequest for bytes that are no shard.
    """
    unpacker = zlib.decompressobj()
    try:
        packed = unpacker.decompress(content, MAX_BYTES)
        if not unpacker.eof:
            raise BadRequest(f"a shard of more than {MAX_BYTES >> 20} MiB, or a truncated one; measure it again")
        return msgspec.msgpack.decode(packed, type=Shard)
    except (zlib.error, msgspec.DecodeError) as error:
        raise BadRequest(f"not a shard of this version ({error}); measure it again") from None


def _stored(batch: MeasuredBatch) -> StoredBatch:
    return StoredBatch(
        names=tuple(name.encode("utf-8", "surrogateescape") for name in batch.names),
        lines=tuple(line.encode("utf-8", "surrogateescape") for line in batch.lines),
        rows={check: {name: tensor_of(array) for name, array in rows.items()} for check, rows in batch.rows.items()},
    )


def _measured(batch: StoredBatch) -> MeasuredBatch:
    return MeasuredBatch(
        names=tuple(name.decode("utf-8", "surrogateescape") for name in batch.names),
        lines=tuple(line.decode("utf-8", "surrogateescape") for line in batch.lines),
        rows={check: {name: row.array() for name, row in rows.items()} for check, rows in batch.rows.items()},
    )
