"""What there is: `variants`, `doctor`, `recipes`, `inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from exporter.artifact import Artifact
    from exporter.artifact.sidecar import Quantization
    from exporter.backends import Layer
    from exporter.model.variants import Variant

JSON = click.option("--json", "as_json", is_flag=True, help="Machine output on stdout.")


@click.command("variants", short_help="Every ConvNeXt known: size, cost, published accuracy, weights.")
@JSON
def variants_command(as_json: bool) -> None:
    """Print every ConvNeXt known, with parameters, GMACs, published top-1, default weights and their license.

    \b
    Example:
      convnext-export variants
    """
    from exporter.cli.console import print_json, print_table
    from exporter.model.variants import VARIANTS

    rows = [_variant_row(variant) for variant in VARIANTS.values()]
    if as_json:
        print_json(rows)
        return
    cells = [
        (
            str(row["name"]),
            f"{row['params_m']:.1f}",
            f"{row['gmacs']:.2f}",
            str(row["size"]),
            "–" if row["top1"] is None else f"{row['top1']:.1f}",
            str(row["license"] or "–"),
            str(row["weights"] or "none published on the Hub"),
        )
        for row in rows
    ]
    columns = ("variant", "params (M)", "GMACs", "size", "top-1 (%)", "license", "default weights")
    print_table(columns, cells, right=columns[1:5])


def _variant_row(variant: Variant) -> dict[str, object]:
    return {
        "name": variant.name,
        "params": variant.params,
        "params_m": variant.params / 1e6,
        "gmacs": variant.gmacs,
        "size": variant.preprocessing.size,
        "top1": variant.top1,
        "weights": variant.hub and f"hf-hub:{variant.hub}",
        "license": variant.license,
        "depths": variant.architecture.depths,
        "dims": variant.architecture.dims,
    }


@click.command("doctor", short_help="What this machine can build, run and measure.")
@JSON
def doctor_command(as_json: bool) -> None:
    """Print what this machine can build, run and measure, and the line that changes what it cannot.

    \b
    Example:
      convnext-export doctor
    """
    from exporter.cli.console import print_json, print_table
    from exporter.doctor import examine

    facts = examine()
    if as_json:
        print_json(facts)
    else:
        print_table(("", "what", "found", "what to do"), [(f.mark, f.what, f.found, f.mend) for f in facts])


@click.command("recipes", short_help="The recipes that ship.")
@click.option("--schema", is_flag=True, help="The JSON schema of a recipe instead, for editors.")
@JSON
def recipes_command(schema: bool, as_json: bool) -> None:
    """Print the recipes that ship, one line each; `run` takes them by name.

    \b
    Examples:
      convnext-export recipes
      convnext-export recipes --schema > recipe.schema.json
    """
    from exporter import build
    from exporter.cli.console import console, plain, print_json, print_table
    from exporter.recipe import bundled

    if schema:
        print_json(build.schema())
        return
    recipes = {name: build.read(path) for name, path in bundled.recipes().items()}
    if as_json:
        print_json(
            {name: {"path": str(bundled.find_recipe(name)), "recipe": recipe} for name, recipe in recipes.items()}
        )
        return
    columns = ("recipe", "variant", "task", "backend", "precision")
    rows = [(name, r.model.variant or "", r.model.task, r.backend, r.precision) for name, r in recipes.items()]
    print_table(columns, rows)
    folder = plain(bundled.folder("recipes"))
    console().print(f"folder: {folder}; copy a recipe, or run it by name", style="dim", soft_wrap=True)


@click.command("inspect", short_help="What an artifact is: inputs, outputs, precision layer by layer, origin.")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--layers", "all_layers", is_flag=True, help="Every layer, not only a line per block.")
@click.option("--picture", metavar="FILE.svg", type=click.Path(path_type=Path),
              help="Draw the network too, a cell for each layer, coloured by its precision.")  # fmt: skip
@JSON
def inspect_command(artifact: Path, all_layers: bool, picture: Path | None, as_json: bool) -> None:
    """Print what an artifact is: inputs, outputs, precision layer by layer, preprocessing, labels, parents; of a
    TensorRT plan, what was fused and which kernels crept in.

    \b
    Examples:
      convnext-export inspect build/tiny_fp16.xml
      convnext-export inspect build/tiny_int8.plan --picture plan.svg
    """
    from exporter import artifact as artifacts
    from exporter.cli.console import print_findings, print_json
    from exporter.verify.inspect import inspect

    if picture:
        artifacts.check_output(picture)
    opened = artifacts.load(artifact)
    inspection = inspect(opened)
    layers, findings = inspection.layers, inspection.findings
    if as_json:
        print_json({"artifact": opened.to_dict(), "layers": layers, "findings": findings})
    else:
        _print_facts(opened)
        if findings:
            print_findings(findings)
        _print_layers(layers, all_layers)
    if picture and layers:
        _draw(layers, picture)
    if inspection.reason:
        click.echo(f"note: its layers are unknown here: {inspection.reason}", err=True)


def _draw(layers: list[Layer], picture: Path) -> None:
    from exporter.artifact.disk import write_file
    from exporter.report import charts

    columns: dict[str, list[tuple[str, str]]] = {}
    for layer in layers:
        columns.setdefault(_group(layer), []).append((layer.operator, layer.precision))
    svg = charts.network(columns)
    write_file(picture, svg.replace("<svg ", '<svg style="color:black;background:white" ', 1).encode())
    click.echo(f"the picture is {picture}", err=True)


_INPUTS = {
    "normalized": "",
    "float01": ": done inside; it takes pixels from 0 to 1",
    "uint8": ": done inside; it takes pixels from 0 to 255, as bytes",
}


def _print_facts(artifact: Artifact) -> None:
    from exporter.cli.console import print_table, size

    sidecar, recipe = artifact.sidecar, artifact.sidecar.preprocessing
    labels = ", ".join(sidecar.labels[:4]) + (" …" if len(sidecar.labels) > 4 else "")
    rows = [
        ("file", f"{artifact.path} ({size(sidecar.bytes)} in {', '.join(f.name for f in sidecar.files)})"),
        ("sha256", sidecar.sha256),
        ("made from", ", ".join(sidecar.parents) or f"{sidecar.weights.layout} weights"),
        ("model", f"{sidecar.variant}, {sidecar.task}, {sidecar.precision}, for {sidecar.backend}"),
        ("form", str(sidecar.recipe.get("export", {}).get("form", "plain"))),
        *_quantization(sidecar.quantization),
        ("work", f"{sidecar.macs / 1e9:.3g} GMAC an image" if sidecar.macs else "unknown"),
        ("weights", f"{sidecar.weights.source} (digest {sidecar.weights.digest})"),
        ("license", f"{sidecar.weights.license or 'not known'} (of the weights)"),
        *(("input", f"{t.name} {_shape(t.shape)} {t.dtype}") for t in sidecar.inputs),
        *(("output", f"{t.name} {_shape(t.shape)} {t.dtype}") for t in sidecar.outputs),
        (
            "preprocessing",
            f"{recipe.interpolation} to {recipe.resize}, {recipe.crop} {recipe.size}, {recipe.color}",
        ),
        ("", f"mean {recipe.mean}, std {recipe.std}{_INPUTS[recipe.input]}"),
        ("labels", f"{len(sidecar.labels)}: {labels}" if labels else "none"),
        ("versions", ", ".join(f"{tool} {version}" for tool, version in sidecar.versions.items())),
        ("verified", ", ".join(f"{k} {v}" for k, v in sidecar.quality.items()) or "not yet"),
    ]
    print_table(("fact", "value"), rows)


def _quantization(told: Quantization | None) -> list[tuple[str, str]]:
    if told is None:
        return []
    what = f"{told.images} images of {told.calib}" + (" (made from seeds, no photographs)" if told.synthetic else "")
    how = f"{told.scope}, {told.method}, smoothing {told.smoothing:g}, bias correction {told.bias_correction}"
    kept = ", ".join(told.kept) or "nothing"
    return [
        ("calibrated on", f"{what} (digest {told.digest})"),
        ("rounded", f"{len(told.layers)} layers; {how}; kept back: {kept}"),
    ]


def _shape(shape: tuple[int | str, ...]) -> str:
    return f"({', '.join(map(str, shape))})"


def _print_layers(layers: list[Layer], every: bool) -> None:
    from collections import Counter

    from exporter.cli.console import print_table

    if every:
        rows = [(layer.name, layer.module, layer.operator, layer.precision) for layer in layers]
        print_table(("layer", "module", "operator", "precision"), rows)
        return
    blocks: dict[str, list[Layer]] = {}
    for layer in layers:
        blocks.setdefault(_group(layer), []).append(layer)
    rows2 = [
        (
            block,
            str(len(group)),
            _count(Counter(x.precision for x in group)),
            _count(Counter(x.operator for x in group)),
        )
        for block, group in blocks.items()
    ]
    print_table(("block", "layers", "precision", "operators"), rows2, right=("layers",))


def _group(layer: Layer) -> str:
    from exporter.model.structure import group

    return group(layer.module) or "inputs and outputs"


def _count(counter: object) -> str:
    return ", ".join(f"{count} {name}" for name, count in counter.most_common())  # type: ignore[attr-defined]
