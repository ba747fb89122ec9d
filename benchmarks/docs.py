"""`make docs`: writes the generated parts of the documents.

`docs/cli.md` is the help of every command, `docs/results.md` the list of results. The tables between the marks in the
other documents are rendered from `benchmarks/results`. A test compares the files with the output of this module.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import click
import msgspec

from benchmarks import (
    agreement,
    chaos,
    checkpoints,
    coverage,
    cuda_forms,
    forms,
    fuzz,
    gate,
    gpu,
    int8,
    kill,
    messages,
    optimize,
    plans,
    predict,
    profile,
    provenance,
    quantizers,
    readme,
    recipes,
    scale,
)
from benchmarks.any_size import Result as AnySize
from benchmarks.footprint import Footprint, table
from benchmarks.peers import table as peers
from benchmarks.pictures import Result as Pictures
from benchmarks.rivals import Race
from benchmarks.rivals import engines as rival_engines
from benchmarks.rivals import pictures as rival_pictures
from benchmarks.rivals import sizes as rival_sizes
from benchmarks.rivals import table as rivals
from benchmarks.segmentation import Result as Segmentation
from benchmarks.serving import Result as Serving
from exporter import report
from exporter.bisect.parts import TOLERANCES
from exporter.cli import cli, groups
from exporter.precision import PRECISIONS
from exporter.report.formats import markdown
from exporter.report.tables import machine as report_machine

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
GENOA, MILAN = (RESULTS / f"epyc-{name}-2-cores" for name in ("genoa", "milan"))
H100 = RESULTS / "h100"
AMX, XEON = (RESULTS / f"xeon-{name}-2-cores" for name in ("amx", "sapphire-rapids"))
DEMO = ("fp32.onnx", "fp16.onnx", "int8.onnx", "fp32.xml", "fp16.xml", "bf16.xml", "int8.xml", "fp16.plan", "int8.plan")
DOCUMENTS = (
    "README.md",
    "docs/bisect.md",
    "docs/checkpoints.md",
    "docs/cluster.md",
    "docs/demo.md",
    "docs/forms.md",
    "docs/gate.md",
    "docs/inputs.md",
    "docs/int8.md",
    "docs/measure.md",
    "docs/optimize.md",
    "docs/package.md",
    "docs/peers.md",
    "docs/predict.md",
    "docs/recipes.md",
    "docs/rivals.md",
    "docs/security.md",
    "docs/segmentation.md",
    "docs/tensorrt.md",
    "docs/troubleshooting.md",
    "docs/verify.md",
)


def cli_help() -> str:
    """The help of every command, by group."""
    parts = ["# Commands of convnext-export\n\nGenerated from the program by `make docs`.\n"]
    parent = cli.make_context("convnext-export", [], resilient_parsing=True)
    for group, names in groups().items():
        parts.append(f"\n## {group.capitalize()}\n")
        for name in names:
            command = cli.get_command(parent, name)
            assert command is not None
            context = click.Context(command, info_name=name, parent=parent, max_content_width=100, terminal_width=100)
            parts.append(f"\n### {name}\n\n```text\n{command.get_help(context)}\n```\n")
    return "".join(parts)


@cache
def tables() -> dict[str, str]:
    """The tables of the documents by their mark."""
    reports = [report.load(GENOA / "demo" / f"custom_{name}.report.json") for name in DEMO]
    footprint = msgspec.json.decode((GENOA / "footprint.json").read_bytes(), type=Footprint)
    trials = msgspec.json.decode((AMX / "gate.json").read_bytes(), type=gate.Experiment)
    others = msgspec.json.decode((GENOA / "agreement.json").read_bytes(), type=agreement.Result)
    formed = msgspec.json.decode((AMX / "forms.json").read_bytes(), type=forms.Result)
    quantized = msgspec.json.decode((GENOA / "int8.json").read_bytes(), type=int8.Result)
    vnni, avx2 = (
        msgspec.json.decode((XEON / name).read_bytes(), type=int8.Result)
        for name in ("int8.json", "int8-without-vnni.json")
    )
    planned = msgspec.json.decode((AMX / "plans.json").read_bytes(), type=plans.Result)
    optimized, of_tiny = (
        msgspec.json.decode((MILAN / name).read_bytes(), type=optimize.Result)
        for name in ("optimize.json", "optimize-tiny.json")
    )
    profiled = msgspec.json.decode((MILAN / "profile.json").read_bytes(), type=profile.Result)
    predicted = msgspec.json.decode((MILAN / "predict.json").read_bytes(), type=predict.Result)
    answered = msgspec.json.decode((MILAN / "serving.json").read_bytes(), type=Serving)
    segmented = [
        msgspec.json.decode((folder / "segmentation.json").read_bytes(), type=Segmentation) for folder in (AMX, MILAN)
    ]
    any_size = msgspec.json.decode((AMX / "any-size.json").read_bytes(), type=AnySize)
    resized = msgspec.json.decode((MILAN / "pictures.json").read_bytes(), type=Pictures)
    side_by_side = msgspec.json.decode((MILAN / "quantizers.json").read_bytes(), type=quantizers.Result)
    itself = msgspec.json.decode((XEON / "coverage.json").read_bytes(), type=coverage.Experiment)
    gains = msgspec.json.decode((MILAN / "gain.json").read_bytes(), type=coverage.Experiment)
    killed = msgspec.json.decode((GENOA / "kill.json").read_bytes(), type=kill.Result)
    fuzzed = msgspec.json.decode((GENOA / "fuzz.json").read_bytes(), type=fuzz.Result)
    cuda = msgspec.json.decode((H100 / "cuda-forms.json").read_bytes(), type=cuda_forms.Result)
    on_gpu = [
        report.load(H100 / "gpu" / f"batch-{batch}" / f"tiny_{precision}.onnx.report.json")
        for batch in (1, 8)
        for precision in ("fp32", "fp16")
    ]
    cases = peers.load(AMX / "peers")
    typed = msgspec.json.decode((MILAN / "readme.json").read_bytes(), type=readme.Result)
    disturbed = msgspec.json.decode((AMX / "chaos.json").read_bytes(), type=chaos.Result)
    scaled = msgspec.json.decode((AMX / "scale.json").read_bytes(), type=scale.Result)
    raced, raced_by_8 = _race(1), _race(8)
    by_size = _sizes()
    built = msgspec.json.decode((AMX / "rivals" / "engines.json").read_bytes(), type=rival_engines.Engines)
    return {
        "demo": markdown.render(reports),
        "commands": readme.commands(typed) + machine(typed.environment),
        "example": readme.example(reports[DEMO.index("int8.xml")], trials),
        "messages": messages.page(),
        "claims": readme.claims(cases, side_by_side, optimized, trials, planned),
        "footprint": table(footprint) + machine(footprint.environment),
        "gate": gate.table(trials) + machine(trials.environment, gate.commits(trials)),
        "agreement": agreement.table(others) + machine(others.environment),
        "coverage": f"{coverage.summary(itself.repetitions)}\n" + machine(itself.environment, itself.commit),
        "gain": f"{coverage.verdicts(gains.repetitions)}\n" + machine(gains.environment, gains.commit),
        "optimize": optimize.tried_table(optimized) + machine(optimized.environment),
        "optimize-choices": optimize.table([optimized, of_tiny]) + machine(optimized.environment),
        "profile": profile.table(profiled) + machine(profiled.environment),
        "predict": predicted.table() + machine(predicted.environment),
        "scale": scaled.table(),
        "chaos": disturbed.table() + machine(disturbed.environment),
        "scale-driver": scaled.driver_table() + machine(scaled.environment),
        "serving": answered.table() + machine(answered.environment),
        "segmentation": "\n".join(one.table() + machine(one.environment) for one in segmented),
        "any-size": any_size.table() + machine(any_size.environment),
        "pictures": resized.table() + machine(resized.environment),
        "quantizers": quantizers.table(side_by_side) + machine(side_by_side.environment),
        "tolerances": tolerances(),
        "precision-limits": precision_limits(),
        "forms": forms.form_table(formed),
        "forms-machine": machine(formed.environment),
        "cuda-forms": cuda_forms.form_table(cuda),
        "gpu": gpu.table(on_gpu) + f"\n{report_machine(on_gpu[0])}; commit {cuda.commit}.\n",
        "settings": forms.setting_table(formed),
        "int8-cpus": int8.cpu_table(vnni, avx2)
        + machine(vnni.environment, vnni.commit)
        + machine(avx2.environment, avx2.commit),
        "int8-accuracy": int8.accuracy_table(quantized) + machine(quantized.environment, quantized.commit),
        "int8-accuracy-without-vnni": int8.accuracy_table(avx2) + machine(avx2.environment, avx2.commit),
        "int8-settings": int8.setting_table(quantized) + machine(quantized.environment, quantized.commit),
        "int8-memory": int8.memory_table(quantized) + machine(quantized.environment, quantized.commit),
        "layouts": checkpoints.table(msgspec.json.decode((XEON / "checkpoints.json").read_bytes())),
        "recipe-keys": recipes.key_table(),
        "kill": killed.table() + machine(killed.environment),
        "fuzz": fuzzed.table() + machine(fuzzed.environment),
        "plan-targets": plans.target_table(planned),
        "plan-networks": plans.network_table(planned),
        "peers": "".join(f"\n## {one.variant}, batch {one.batch}\n\n{peers.case_table(one)}" for one in cases)
        + machine(cases[0].environment),
        "peers-summary": peers.summary(cases),
        "rivals-1": rivals.races(raced) + machine(raced.environment, raced.commits),
        "rivals-8": rivals.races(raced_by_8) + machine(raced_by_8.environment, raced_by_8.commits),
        "rivals-sizes": rivals.by_size(by_size) + machine(by_size.environment),
        "rivals-control": rivals.control(raced) + machine(raced.environment),
        "rivals-engines": rival_engines.table(built) + machine(built.environment),
    }


def _race(batch: int) -> Race:
    return msgspec.json.decode((AMX / "rivals" / f"batch-{batch}.json").read_bytes(), type=Race)


def _sizes() -> rival_sizes.Sizes:
    return msgspec.json.decode((AMX / "rivals" / "sizes.json").read_bytes(), type=rival_sizes.Sizes)


def tolerances() -> str:
    """The limits of the error of a part in `bisect`, in percent, by precision."""
    rows = [f"| {name} | {100 * a:.4g} % | {100 * b:.4g} % |" for name, (a, b) in TOLERANCES.items()]
    return "\n".join(["| precision | a | b |", "|---|--:|--:|", *rows]) + "\n"


def precision_limits() -> str:
    """The limits of a classifier in `verify`, by precision."""
    rows = [
        f"| {name} | {one.limits.cosine:g} | {one.limits.share:g} | {one.limits.agreement_pct:g} % | "
        f"{one.max_drop_points:g} |"
        for name, one in PRECISIONS.items()
    ]
    head = "| precision | smallest cosine | largest error | agreement | largest loss of top-1, points |"
    return "\n".join([head, "|---|--:|--:|--:|--:|", *rows]) + "\n"


@cache
def pictures() -> dict[str, str]:
    """The pictures of the documents, as SVG, by their path."""
    optimized = msgspec.json.decode((MILAN / "optimize.json").read_bytes(), type=optimize.Result)
    return {
        "docs/pictures/optimize.svg": optimize.picture(optimized),
        "docs/pictures/rivals.svg": rival_pictures.accuracy(_race(1)),
        "docs/pictures/rivals-sizes.svg": rival_pictures.latency_by_size(_sizes()),
    }


def machine(facts: dict[str, Any], commit: str = "") -> str:
    """The machine, the runtimes and the commit of a run, in a line."""
    commit = commit or facts.get("commit", "")
    tools = ", ".join(f"{tool} {facts['versions'][tool]}" for tool in ("torch", "onnxruntime", "openvino"))
    at = f"; commit{'s' if ', ' in commit else ''} {commit}" if commit else ""
    return f"\n{facts['cpu']}, {facts['cores']} cores, {', '.join(facts['isa'])}; {tools}{at}.\n"


def filled(text: str) -> str:
    """A document with its tables as they are now."""
    for mark, content in tables().items():
        before, opening, rest = text.partition(f"<!-- {mark} -->\n")
        if opening:
            _, _, after = rest.partition(f"<!-- /{mark} -->")
            text = f"{before}{opening}{content}<!-- /{mark} -->{after}"
    return text


def main() -> None:
    """Write them all."""
    (ROOT / "docs").mkdir(exist_ok=True)
    (ROOT / "docs" / "cli.md").write_text(cli_help())
    (ROOT / "docs" / "results.md").write_text(provenance.page())
    for name, picture in pictures().items():
        (ROOT / name).parent.mkdir(exist_ok=True)
        (ROOT / name).write_text(picture)
    for name in DOCUMENTS:
        (ROOT / name).write_text(filled((ROOT / name).read_text()))
    recipes.main()


if __name__ == "__main__":
    main()
