"""Which form is fastest where: every form on every runtime and precision, timed in turn; and what settings change.

`python -m benchmarks.forms -o benchmarks/results/MACHINE/forms.json` is the measurement that the backends' own forms
and settings were chosen by; `docs/forms.md` is rendered from it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from benchmarks import racing
from benchmarks.provenance import environment
from exporter import artifact as artifacts
from exporter import backends
from exporter.artifact import Artifact
from exporter.artifact.disk import write_file
from exporter.artifact.sidecar import Record
from exporter.backends import Session
from exporter.backends.onnxruntime import OrtSession
from exporter.backends.openvino import OpenVinoSession
from exporter.bench import Arm, Timing, worker
from exporter.build import build
from exporter.machine import has_bf16
from exporter.model import FORMS
from exporter.recipe import Export, Model, Recipe

THREADS = 2
FP16_CASE = ("tiny", 1)  # computed in fp32 on CPUs: one case says it
CASES = (("atto", 1), ("atto", 8), ("tiny", 1), ("tiny", 8), ("base", 1), ("v2_tiny", 1), ("v2_tiny", 8))
KINDS = (
    ("onnxruntime", "fp32"),
    ("onnxruntime", "fp16"),
    ("openvino", "fp32"),
    ("openvino", "fp16"),
    ("openvino", "bf16"),
)
Samples = tuple[tuple[float, ...], ...]


class Row(Record, frozen=True):
    """One model on one runtime: milliseconds of `plain` launch by launch, and how many times as fast each form is."""

    variant: str
    batch: int
    backend: str
    precision: str
    own: str
    plain: Samples
    gains: dict[str, racing.Ratio]


class Setting(Record, frozen=True):
    """How many times as fast a session of ConvNeXt-T in one image becomes by a setting of the runtime's."""

    backend: str
    name: str
    gain: racing.Ratio


class Result(Record, frozen=True):
    """All of it."""

    environment: dict[str, object]
    rows: tuple[Row, ...]
    settings: tuple[Setting, ...]
    threads: int = THREADS
    schema: int = 1


def time_forms(variant: str, batch: int, seconds: float) -> list[Row]:
    """All forms of one model on all runtimes, in one race."""
    kinds = [kind for kind in KINDS if kind[1] != "bf16" or has_bf16()]
    kinds = [kind for kind in kinds if kind[1] != "fp16" or (variant, batch) == FP16_CASE]
    model = Model(variant=variant, weights="random:0")
    with tempfile.TemporaryDirectory() as folder:
        arms = []
        for backend, precision in kinds:
            for form in FORMS:
                export = Export(batch=batch, form=form)  # type: ignore[arg-type]
                recipe = Recipe(backend=backend, precision=precision, model=model, export=export)
                made = build(recipe, Path(folder) / form).artifact
                arms.append(Arm(name=_name(backend, precision, form), path=str(made.path), threads=THREADS))
        timing = racing.race(arms, made.sidecar.preprocessing, batch, seconds)
    return [_row(timing, variant, batch, backend, precision) for backend, precision in kinds]


def _name(backend: str, precision: str, form: str) -> str:
    return f"{backend} {precision} {form}"


def _row(timing: Timing, variant: str, batch: int, backend: str, precision: str) -> Row:
    plain = _name(backend, precision, "plain")
    return Row(
        variant=variant,
        batch=batch,
        backend=backend,
        precision=precision,
        own=backends.target(backend).form(precision, batch),
        plain=racing.samples(timing, plain),
        gains={f: racing.ratio(timing, _name(backend, precision, f), plain) for f in FORMS if f != "plain"},
    )


ORT_SETTINGS: dict[str, dict[str, str]] = {
    "threads go on spinning between runs": {"session.force_spinning_stop": "0"},
    "threads never spin": {"session.intra_op.allow_spinning": "0"},
    "denormals are zero": {"session.set_denormal_as_zero": "1"},
    "work dealt out in smaller pieces": {"session.dynamic_block_base": "4"},
    "no operators fused, no layout of its own": {"level": "basic"},
}
OV_SETTINGS: dict[str, dict[str, Any]] = {
    "threads are not pinned": {"ENABLE_CPU_PINNING": False},
    "denormals are zero": {"CPU_DENORMALS_OPTIMIZATION": True},
    "reshaped to one image": {"shape": True},
}


@contextmanager
def open_with_setting(arm: Arm) -> Iterator[Session]:
    """An artifact with one setting of its runtime changed; any other arm as ever."""
    made = artifacts.load(Path(arm.path))
    if made.sidecar.backend == "onnxruntime" and arm.name in ORT_SETTINGS:
        yield _onnxruntime(made, dict(ORT_SETTINGS[arm.name]))
    elif made.sidecar.backend == "openvino" and arm.name in OV_SETTINGS:
        yield _openvino(made, dict(OV_SETTINGS[arm.name]))
    else:
        with worker.open_arm(arm) as session:
            yield session


def _onnxruntime(made: Artifact, settings: dict[str, str]) -> OrtSession:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = THREADS, 4
    if settings.pop("level", ""):
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    for key, value in {"session.force_spinning_stop": "1", **settings}.items():
        options.add_session_config_entry(key, value)
    session = ort.InferenceSession(made.path, options, providers=["CPUExecutionProvider"])
    return OrtSession(session, made.sidecar.preprocessing, "cpu", made.sidecar.precision, 1)


def _openvino(made: Artifact, settings: dict[str, Any]) -> OpenVinoSession:
    import openvino as ov

    model = ov.Core().read_model(made.path)
    if settings.pop("shape", False):
        model.reshape([1, *made.sidecar.preprocessing.shape])
    hints = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": THREADS}
    compiled = ov.Core().compile_model(model, "CPU", {**hints, **settings})
    return OpenVinoSession(compiled, made.sidecar.preprocessing, "CPU", "f32", 1)


def time_settings(backend: str, seconds: float) -> list[Setting]:
    """Every setting of a runtime against the backend's own, and the two ways of using the machine."""
    own, many = "the backend's own", "--hint throughput"
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe(backend=backend, precision="fp32", model=Model(variant="tiny", weights="random:0"))
        made = build(recipe, Path(folder)).artifact
        names = [own, *(ORT_SETTINGS if backend == "onnxruntime" else OV_SETTINGS)]
        arms = [Arm(name=name, path=str(made.path), threads=THREADS) for name in names]
        arms.append(Arm(name=many, path=str(made.path), threads=THREADS, hint="throughput"))
        timing = racing.race(arms, made.sidecar.preprocessing, 1, seconds, open_with_setting)
    return [Setting(backend=backend, name=name, gain=racing.ratio(timing, name, own)) for name in [*names[1:], many]]


def form_table(result: Result) -> str:
    """Markdown: a row for each model on each runtime, the backend's own form in bold."""
    lines = ["| model | batch | runtime | plain, ms | " + " | ".join(FORMS[1:]) + " |", "|---|--:|---|--:|--:|--:|--:|"]
    for row in result.rows:
        cells = [row.variant, str(row.batch), f"{row.backend} {row.precision}", f"{racing.typical(row.plain):.4g}"]
        gains = {form: racing.words(row.gains[form]) for form in FORMS[1:]}
        cells += [f"**{gains[form]}**" if form == row.own else gains[form] for form in gains]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def setting_table(result: Result) -> str:
    """Markdown: a row for each setting."""
    lines = ["| runtime | setting | images a second, × the backend's own |", "|---|---|--:|"]
    lines += [f"| {one.backend} | {one.name} | {racing.words(one.gain)} |" for one in result.settings]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=40.0, help="Of timing, for each model.")
    arguments = parser.parse_args()
    rows: list[Row] = []
    for variant, batch in CASES:
        rows += time_forms(variant, batch, arguments.seconds)
        print(f"{variant}, batch {batch}: done", file=sys.stderr, flush=True)
    settings = [one for backend in ("onnxruntime", "openvino") for one in time_settings(backend, arguments.seconds)]
    result = Result(environment=environment(THREADS), rows=tuple(rows), settings=tuple(settings))
    write_file(arguments.output, msgspec.json.encode(result))
    print(form_table(result), setting_table(result), sep="\n")


if __name__ == "__main__":
    main()
