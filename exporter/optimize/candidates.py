"""What can be tried here: every runtime, precision, form and scope of quantization that the device takes."""

from __future__ import annotations

from collections.abc import Iterator

from exporter import backends, build, precision
from exporter.artifact.sidecar import Record
from exporter.backends import Target
from exporter.errors import BadRequest, ExporterError, first_line, nearest
from exporter.model import FORMS
from exporter.optimize.options import Request

EXAMPLE = "null"  # the runtime that is the worked example of the docs; it is tried only where it is named


class Candidate(Record, frozen=True):
    """One artifact that can be built; `scope` is that of a quantized one, else ""."""

    backend: str
    precision: str
    form: str
    scope: str = ""

    @property
    def group(self) -> str:
        """Runtime and precision: of these, one form is compared with those of other groups."""
        return f"{self.backend} {self.precision}"

    @property
    def name(self) -> str:
        """All of it, as a word for files: `openvino-int8-nchw`."""
        more = f"-{self.scope}" if self.scope not in ("", _first_scope(self.backend)) else ""
        return f"{self.backend}-{self.precision}-{self.form}{more}"

    def __str__(self) -> str:
        more = f", {self.scope}" if self.scope not in ("", _first_scope(self.backend)) else ""
        return f"{self.group} ({self.form}{more})"


class Skipped(Record, frozen=True):
    """A runtime or a precision of it that is not tried, and why."""

    backend: str
    precision: str
    reason: str


def _first_scope(backend: str) -> str:
    return next(iter(backends.target(backend).placements), "")


def find(request: Request) -> tuple[list[Candidate], list[Skipped]]:
    """Everything that can be tried here, and what cannot.

    Raises: BadRequest for an unknown runtime or precision, and where nothing can be tried.
    """
    options = request.options
    known = [name for name in backends.targets() if name != EXAMPLE or EXAMPLE in (options.backend or ())]
    _check(request, known)
    listed: list[Candidate] = []
    skipped: list[Skipped] = []
    for name in dict.fromkeys(map(backends.name_of, options.backend or known)):
        if reason := _cannot_run(name, options.device):
            skipped.append(Skipped(backend=name, precision="", reason=reason))
        else:
            _add(request, backends.target(name), listed, skipped)
    if not listed:
        reasons = "; ".join(f"{one.backend} {one.precision}".strip() + f": {one.reason}" for one in skipped)
        raise BadRequest(f"nothing can be tried on --device {options.device}: {reasons}")
    return listed, skipped


def _check(request: Request, known: list[str]) -> None:
    """Refuse unknown names, empty lists and limits of 0.

    Raises: BadRequest.
    """
    options = request.options
    for name, words in (("--backend", options.backend), ("--precision", options.precision)):
        if words is not None and not any(words):
            raise BadRequest(f"{name}: no name is given; leave it out to try all")
    for limit, name in ((options.latency_limit_ms, "--max-latency"), (options.bytes_limit, "--max-bytes")):
        if limit == 0:
            raise BadRequest(f"{name} 0: nothing could be within it; give a number above 0")
    for word in options.backend or ():
        if backends.name_of(word) not in known:
            raise BadRequest(f"--backend {word}: no such runtime; {nearest(word, known)}")
    for word in options.precision or ():
        if word not in precision.PRECISIONS:
            raise BadRequest(f"--precision {word}: {nearest(word, precision.PRECISIONS)}")


def _cannot_run(name: str, device: str) -> str:
    """Why a runtime cannot run anything on a device here, or ""."""
    runtime = backends.runtime(name)
    try:
        runtime.probe()
        backends.kind_of(device, runtime, "the artifact")
    except BadRequest:
        return f"runs on {', '.join(runtime.devices)} only"
    except ExporterError as error:
        return first_line(error)
    return runtime.unable()


def _add(request: Request, target: Target, listed: list[Candidate], skipped: list[Skipped]) -> None:
    """Add the candidates of a target, and its precisions that cannot be tried."""
    computed = target.above_int8()
    for word in request.options.precision or ():
        if word not in target.precisions:
            reason = f"{target.name} is built in {', '.join(target.precisions)}"
            skipped.append(Skipped(backend=target.name, precision=word, reason=reason))
    for word in target.precisions:
        if request.options.precision is not None and word not in request.options.precision:
            continue
        if request.options.precision is None and word == "bf16" and computed != "bf16":
            reason = "this CPU does not compute in it"
            skipped.append(Skipped(backend=target.name, precision=word, reason=reason))
            continue
        problems = {candidate: _problem(request, candidate) for candidate in _forms(request, target, word)}
        listed += [candidate for candidate, problem in problems.items() if not problem]
        if (reason := next((text for text in problems.values() if text), "")) and all(problems.values()):
            skipped.append(Skipped(backend=target.name, precision=word, reason=reason))


def _forms(request: Request, target: Target, word: str) -> Iterator[Candidate]:
    """Every form, and of a quantized precision every scope, that a target takes; or the form that was asked for."""
    wanted = request.export.form if request.export.form != "auto" else None
    if precision.get(word).needs_calibration:
        scopes = [request.quantization.int8_scope] if request.quantization.int8_scope else list(target.placements)
        for scope in scopes:
            forms = target.placements[scope].forms if scope in target.placements else ()
            for form in [wanted] if wanted else forms:
                yield Candidate(backend=target.name, precision=word, form=form, scope=scope)
    else:
        for form in [wanted] if wanted else FORMS:
            yield Candidate(backend=target.name, precision=word, form=form)


def _problem(request: Request, candidate: Candidate) -> str:
    """Why a candidate cannot be built, or ""."""
    try:
        build.check(request.recipe(candidate.backend, candidate.precision, candidate.form, candidate.scope))
    except BadRequest as error:
        return first_line(error)
    return ""
