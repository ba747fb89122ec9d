"""The steps of a search."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec

from exporter import artifact as artifacts
from exporter import backends, build, machine, verify
from exporter.artifact.outputs import DENSE
from exporter.backends import Session
from exporter.bench import Arm, Opener, Plan
from exporter.build.int8.search import budgeted, compare, judge_of, open_reference, refuse_few, sensitivities
from exporter.build.int8.search import search as search_kept
from exporter.data import calibration
from exporter.data.samples import Samples
from exporter.errors import BadRequest, CheckFailed
from exporter.optimize import race
from exporter.optimize.builds import Build, Builder
from exporter.optimize.candidates import Candidate, Skipped
from exporter.optimize.options import Request
from exporter.optimize.race import EAGER, Race, Runner
from exporter.optimize.result import Result
from exporter.optimize.rows import Rows
from exporter.optimize.store import Store, key_of
from exporter.progress import step
from exporter.report import Report
from exporter.stats import Center
from exporter.verify.outputs import has_classes

FORM_PROCESSES, FORM_SECONDS = 6, 0.4  # at most so many processes, and of each so many seconds for every model
PROCESSES, MOST_PROCESSES = 6, 12
Hint = Literal["latency", "throughput"]


class Search:
    """A search with its state on disk: `store`."""

    def __init__(
        self, request: Request, out: Path, listed: Sequence[Candidate], skipped: Sequence[Skipped], opener: Opener
    ) -> None:
        self.request, self.out, self.opener = request, out, opener
        self.listed, self.skipped = list(listed), list(skipped)
        first = listed[0]
        recipe = request.recipe(first.backend, first.precision, first.form, first.scope)
        job = build.resolve(recipe, out)
        if "pyramid" in job.trace.spec.tasks:
            raise BadRequest(
                "optimize measures accuracy, and maps of --task pyramid have none; build one artifact instead"
            )
        job.checkpoint.state.clear()
        self.job = dataclasses.replace(
            job, recipe=msgspec.structs.replace(recipe, precision="int8", quantization=request.quantization)
        )
        for candidate in listed:
            artifacts.refuse_other_weights(self.file(candidate), job.sidecar.weights)
        self.samples = self._open_samples()
        options = budgeted(self.job, self.samples)
        self.verifying = msgspec.structs.replace(options, device=request.options.device)
        self.store = Store(out / "optimize" / key_of(request))
        self.builder = Builder(request, self.store)
        self.builds: dict[Candidate, Build] = {}
        self.reports: dict[Candidate, Report] = {}
        self.reasons: dict[Candidate, str] = {}
        self.beyond: set[Candidate] = set()
        self.opened: set[str] = set()

    def file(self, candidate: Candidate) -> Path:
        """The artifact of a candidate in the folder of the result."""
        sidecar = msgspec.structs.replace(self.job.sidecar, precision=candidate.precision)
        return self.out / artifacts.file_name(sidecar, backends.target(candidate.backend).suffix)

    def run(self) -> Result:
        """All steps.

        Raises: CheckFailed where no candidate could be built and timed.
        """
        forms = self._race_forms()
        finalists = self._finalists(forms)
        with tempfile.TemporaryDirectory(prefix="convnext-export-optimize-") as folder:
            self._judge(finalists, forms, Path(folder))
        verified = [one for one in finalists if one in self.reports]
        eligible = [one for one in finalists if self._is_eligible(one)]
        self.last = self._race_settings(eligible or verified)
        return Rows(self, forms, self.last).result()

    def not_built_here(self) -> list[str]:
        """The candidates that could not be built because of this machine: the disk is full, or a package is missing."""
        failed = [one for one, built in self.builds.items() if built.failure]
        return [str(one) for one in failed if self.store.read(f"built-{one.name}", Build) is None]

    def _open_samples(self) -> Samples:
        """The images that accuracy is measured on: the user's, or else the calibration images."""
        quantization, sidecar, checks = self.request.quantization, self.job.sidecar, self.request.checks
        if quantization.data is not None:
            data = verify.open_data(sidecar, msgspec.structs.replace(checks, data=quantization.data))
            refuse_few(self.job, data)
            return data
        classes = sidecar.weights.num_classes if has_classes(sidecar, checks.outputs) else None
        opened = calibration.open_calibration(
            quantization.calib, sidecar.preprocessing, classes, quantization.calib_size, quantization.calib_seed,
            dense=sidecar.task in DENSE,
        )  # fmt: skip
        return opened.to_compare.first(checks.samples) if checks.samples else opened.to_compare

    def _race_forms(self) -> Contest:
        """Build fp32 and quantized candidates in every form, and find the fastest form of each group."""
        first = _first_precisions(self.listed)
        tried = [one for one in self.listed if one.scope or one.precision == first.get(one.backend)]
        standing = [one for one in tried if self._is_built(one)]
        if not standing:
            raise CheckFailed(
                "nothing could be built: " + "; ".join(f"{k}: {b.failure}" for k, b in self.builds.items())
            )
        runs = runs_of(standing, [machine_threads(self.request)], ("latency",))
        groups = {run.name: run.candidate.group for run in runs}
        return self.time_runs("forms", runs, groups, FORM_SECONDS, FORM_PROCESSES)

    def _is_built(self, candidate: Candidate) -> bool:
        self.builds[candidate] = self.builder.build(candidate)
        is_built = not self.builds[candidate].failure
        if is_built and candidate.backend not in self.opened:
            self._open(candidate)
        return is_built

    def _open(self, candidate: Candidate) -> None:
        """Open the first artifact of a runtime on a device other than a CPU, before more is built for it.

        Raises: Unavailable for a device that this machine does not have.
        """
        self.opened.add(candidate.backend)
        device = self.request.options.device
        if backends.kind_of(device, backends.runtime(candidate.backend), "the artifact") != "CPU":
            with self.opener(Arm(name="first", path=str(self.builder.artifact(candidate).path), device=device)):
                pass

    def time_runs(
        self,
        name: str,
        runs: Sequence[Run],
        groups: Mapping[str, str],
        seconds: float,
        most: int,
        least: int = race.LEAST,
        keep: int = 1,
    ) -> Contest:
        """Time models in turn until each group has a winner.

        Args:
            name: of what is compared, and of the stored result.
            runs: the models.
            groups: the group of each model, by its name.
            seconds: of each model in one process.
            most, least: numbers of processes.
            keep: so many of a group are timed to the end.
        """
        paths = {run.candidate: str(self.builder.artifact(run.candidate).path) for run in runs}
        device = self.request.options.device
        arms = [
            Arm(name=run.name, path=paths[run.candidate], threads=run.threads, hint=run.hint, device=device)
            for run in runs
        ]
        kind = backends.kind_of(device, backends.runtime(runs[0].candidate.backend), "the artifact")
        eager = Arm(
            name=EAGER, path=arms[0].path, runtime="eager", device="cpu" if kind == "CPU" else "cuda",
            threads=machine_threads(self.request), reference=self.request.model.reference,
        )  # fmt: skip
        plan = Plan(
            arms=(eager, *arms),
            preprocessing=self.job.sidecar.preprocessing,
            batch=self.request.options.batch,
            seconds=seconds * (1 + len(arms)),
            seed=self.request.options.seed,
        )
        step(f"timing {len(arms)} model{'s' if len(arms) > 1 else ''} and eager PyTorch in turn, batch {plan.batch}")
        before = self.store.read(f"race-{name}", Race)
        save = partial(self.store.write, f"race-{name}")
        limit_ms = self.request.options.latency_limit_ms if name == "settings" else None
        runner = Runner(plan, groups, before, save, most, least, keep, limit_ms)
        runner.run(self.opener)
        return Contest(runner, {run.name: run for run in runs})

    def _finalists(self, forms: Contest) -> list[Candidate]:
        """The fastest form of each group, and the other precisions in the form that is fastest in fp32."""
        winners = forms.winners()
        first = _first_precisions(self.listed)
        chosen_forms = {one.backend: one.form for one in winners if one.precision == first.get(one.backend)}
        finalists = [one for one in winners if not self._is_slower_than_fp32(one, winners, forms)]
        for one in self.listed:
            other = one not in self.builds and chosen_forms.get(one.backend) == one.form
            if other and self._is_built(one):
                finalists.append(one)
        if not finalists:
            failures = forms.runner.timing.failures
            raise CheckFailed("nothing could be timed: " + "; ".join(f"{name} {why}" for name, why in failures.items()))
        return [one for one in finalists if self._fits(one)] or finalists

    def _is_slower_than_fp32(self, one: Candidate, winners: Sequence[Candidate], forms: Contest) -> bool:
        """Whether a quantized candidate is slower than fp32 on its runtime, and speed is what is asked for."""
        options = self.request.options
        if not one.scope or options.goal == "size" or options.max_bytes is not None:
            return False
        for other in winners:
            over = forms.over(other, one) if other.backend == one.backend and not other.scope else None
            if over is not None and over.low > 0:
                self.reasons[one] = f"{race.text(over)} slower than {other}"
                return True
        return False

    def _fits(self, candidate: Candidate) -> bool:
        """Whether a candidate is small enough."""
        limit, size = self.request.options.bytes_limit, self.builds[candidate].bytes
        if limit is not None and size > limit:
            self._exclude(candidate, f"{size / 1e6:.3g} MB, limit {limit / 1e6:.3g} MB")
            return False
        return True

    def _exclude(self, candidate: Candidate, reason: str) -> None:
        """Note that a candidate is beyond a budget."""
        self.reasons[candidate] = reason
        self.beyond.add(candidate)

    def _judge(self, finalists: Sequence[Candidate], forms: Contest, folder: Path) -> None:
        """Compare the finalists with PyTorch, which runs once; the fastest first, until slower ones cannot matter."""
        measured = {one: forms.stand_in(one) for one in finalists}
        passed: list[Candidate] = []
        with ExitStack() as stack:
            reference: Session | None = None
            for candidate in sorted(finalists, key=lambda one: -forms.speed(measured[one])):
                if reason := self._is_behind(candidate, passed, forms):
                    self.reasons[candidate] = reason
                    continue
                if self._known_report(candidate) is None:
                    opening = open_reference(self.job, self.verifying, self.store.folder)
                    reference = reference or stack.enter_context(opening)
                    judge = self._judge_quantized if candidate.scope else self._judge_float
                    self.reports[candidate] = judge(candidate, reference, folder)
                    self.store.write(f"verified-{candidate.name}", self.reports[candidate])
                if not self.reports[candidate].passed:
                    self._exclude(candidate, self.reports[candidate].failures or "a check failed")
                else:
                    passed.append(candidate)

    def _is_behind(self, candidate: Candidate, passed: Sequence[Candidate], forms: Contest) -> str:
        """Why a candidate need not be verified, or "": a faster one has passed, and its precision was verified.

        So far each was timed with one batch at once, and each runtime chooses how many it computes at once: for
        throughput only candidates of one runtime are compared.
        """
        goal, verified = self.request.options.goal, {one.precision for one in self.reports}
        if goal == "size" or candidate.precision not in verified:
            return ""
        best = next((one for one in passed if goal == "latency" or one.backend == candidate.backend), None)
        over = forms.over(forms.stand_in(best), forms.stand_in(candidate)) if best is not None else None
        return f"{race.text(over)} slower than {best}; not verified" if over is not None and over.low > 0 else ""

    def _known_report(self, candidate: Candidate) -> Report | None:
        """The stored report of a candidate, if it is of the same bytes."""
        report = self.store.read(f"verified-{candidate.name}", Report)
        if report is None or report.artifact.get("sha256") != self.builder.artifact(candidate).sidecar.sha256:
            return None
        self.reports[candidate] = report
        return report

    def _judge_float(self, candidate: Candidate, reference: Session, folder: Path) -> Report:
        del folder
        artifact, runtime = self.builder.artifact(candidate), backends.runtime(candidate.backend)
        return compare(artifact, self.verifying, self.samples, reference, runtime)

    def _judge_quantized(self, candidate: Candidate, reference: Session, folder: Path) -> Report:
        """Keep as few parts in higher precision as the budget needs."""
        work = self.builder.work(candidate)
        verifying, samples, runtime = self.verifying, self.samples, work.job.runtime
        judge = judge_of(folder, lambda artifact: compare(artifact, verifying, samples, reference, runtime))
        best = search_kept(work, judge, partial(sensitivities, work)).best
        artifact = work.make(best.kept, self.store.artifacts(candidate.name))
        built = Build(file=artifact.path.name, bytes=artifact.sidecar.bytes, kept=best.kept)
        self.builds[candidate] = self.builder.keep(candidate, built)
        return best.report

    def _is_eligible(self, candidate: Candidate) -> bool:
        return candidate not in self.reasons and self._fits(candidate)

    def _race_settings(self, finalists: Sequence[Candidate]) -> Contest:
        """Time the finalists with every number of threads."""
        options = self.request.options
        hints: tuple[Hint, ...] = ("latency", "throughput") if options.goal == "throughput" else ("latency",)
        runs = runs_of(finalists, threads_to_try(self.request), hints)
        groups = {run.name: "all" for run in runs}
        keep = len(runs) if options.goal == "size" else 2
        seconds = options.duration / PROCESSES
        return self.time_runs("settings", runs, groups, seconds, MOST_PROCESSES, PROCESSES, keep)


@dataclass(frozen=True)
class Run:
    """A candidate with the number of threads and the hint that it is timed with."""

    candidate: Candidate
    threads: int
    hint: Hint

    @property
    def name(self) -> str:
        """All of it, in words."""
        hint = ", throughput" if self.hint == "throughput" else ""
        return f"{self.candidate}, {self.threads} thread{'s' if self.threads > 1 else ''}{hint}"


def runs_of(listed: Sequence[Candidate], threads: Sequence[int], hints: Sequence[Hint]) -> list[Run]:
    """Each candidate with each number of threads and each hint."""
    return [Run(one, count, hint) for one in listed for count in threads for hint in hints]


@dataclass(frozen=True)
class Contest:
    """A race that was run, with its models by name."""

    runner: Runner
    runs: Mapping[str, Run]

    def winners(self) -> list[Candidate]:
        """The fastest candidate of each group."""
        groups = dict.fromkeys(self.runner.groups.values())
        return [self.runs[names[0]].candidate for group in groups if (names := self.runner.standing(group))]

    def stand_in(self, candidate: Candidate) -> Candidate:
        """The candidate itself if it was timed, else the timed one of the same runtime and form."""
        timed = [run.candidate for run in self.runs.values()]
        alike = [one for one in timed if (one.backend, one.form, one.scope) == (candidate.backend, candidate.form, "")]
        return candidate if candidate in timed else alike[0]

    def speed(self, candidate: Candidate) -> float:
        """The logarithm of the speed-up of a timed candidate."""
        return self.runner.speed(next(name for name, run in self.runs.items() if run.candidate == candidate))

    def over(self, one: Candidate, other: Candidate) -> Center | None:
        """The logarithm of how many times faster a candidate is than another; None for too few processes of both."""
        names = {run.candidate: name for name, run in self.runs.items()}
        return self.runner.over(names[one], names[other])


def _first_precisions(listed: Sequence[Candidate]) -> dict[str, str]:
    """The first precision of each runtime that needs no calibration: its forms are timed."""
    first: dict[str, str] = {}
    for candidate in listed:
        if not candidate.scope:
            first.setdefault(candidate.backend, candidate.precision)
    return first


def machine_threads(request: Request) -> int:
    """The number of threads where it is not what is compared."""
    return request.options.threads or machine.default_threads()


def threads_to_try(request: Request) -> list[int]:
    """The user's number, or each power of two up to all physical cores; on a device other than a CPU only those."""
    most = machine_threads(request)
    if request.options.threads is not None or request.options.device.lower() != "cpu":
        return [most]
    return sorted({2**power for power in range(most.bit_length()) if 2**power <= most} | {most})
