"""The search for the best artifact for this machine: built, timed in turn, verified, and the best one written.

1. Every runtime × form is built, in fp32 and in int8, and timed; each runtime and precision keeps its fastest form.
2. Other precisions are built in the form that was fastest in fp32.
3. Each is compared with PyTorch on the images; int8 keeps parts in higher precision where it must.
4. Those within the budgets are timed against each other with every number of threads, and the best one is written.

Results are stored after every step, so that an interrupted search goes on there.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from exporter import artifact as artifacts
from exporter.artifact.disk import locked
from exporter.bench import Opener, worker
from exporter.errors import BadRequest
from exporter.optimize import candidates, publish, store
from exporter.optimize.options import Goal as Goal
from exporter.optimize.options import OptimizeOptions as OptimizeOptions
from exporter.optimize.options import Request as Request
from exporter.optimize.result import Result as Result
from exporter.optimize.search import Search
from exporter.progress import note
from exporter.report import Report


@dataclass(frozen=True)
class Outcome:
    """The result of a search, and the report of the artifact that it chose."""

    result: Result
    report: Report


def optimize(request: Request, out: Path, opener: Opener = worker.open_arm) -> Outcome:
    """Find the best artifact for this machine, and write it with its report and its recipe.

    Args:
        request: the model, the images, the budgets and the goal.
        out: the folder for the artifact. What was measured is kept in its folder `optimize`.
        opener: opens a model in the timing process.

    Returns: the result. If nothing beats eager PyTorch within the budgets, it has not passed, and the artifact is the
        one that comes nearest.

    Raises: BadRequest for a request that cannot be met; CheckFailed where no candidate could be built and timed.
    """
    begin = time.monotonic()
    listed, skipped = candidates.find(request)
    search = Search(request, out, listed, skipped, opener)
    try:
        (out / "optimize").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadRequest(f"{out}: cannot be written ({error.strerror}); choose another folder with -o") from None
    with locked(out / "optimize", f"another search runs in {out}; waiting until it is done"):
        if (known := _known(search, out)) is not None:
            note(f"{known.result.artifact} is already there, from the same search")
            return known
        result = search.run()
        outcome = Outcome(*publish.publish(search, result, out, time.monotonic() - begin))
        if not search.not_built_here():
            search.store.drop_artifacts()
        return outcome


def _known(search: Search, out: Path) -> Outcome | None:
    """The outcome of the same search, if its artifact is still there as it was written."""
    result, report = search.store.read("result", Result), search.store.read("report", Report)
    if result is None or report is None:
        return None
    try:
        artifact = artifacts.load(out / Path(result.artifact).name)
    except BadRequest:
        return None
    if artifact.sidecar.sha256 != result.sha256:
        return None
    # The folder may have been moved.
    result = replace(result, artifact=str(artifact.path), recipe=str(out / Path(result.recipe).name))
    report = replace(report, artifact={**report.artifact, "path": str(artifact.path)})
    publish.write_about(search, result, report, artifact)
    return Outcome(result, report)


__all__ = ["Goal", "OptimizeOptions", "Outcome", "Request", "Result", "optimize", "store"]
