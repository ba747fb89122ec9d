"""The commands that list and show: `variants`, `doctor`, `recipes`, `inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from exporter.cli.console import WithSchema, schema_option
from exporter.errors import printable

if TYPE_CHECKING:
    from exporter.artifact import Artifact
    from exporter.artifact.sidecar import Quantization, Sidecar, Tensor
    from exporter.backends import Layer
    from exporter.model.variants import Variant

JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")


@click.command("variants", short_help="Every ConvNeXt known: size, cost, published accuracy, weights.")
@JSON
def variants_command(as_json: bool) -> None:
    """Print all known ConvNeXt variants, with parameters, GMACs, published top-1, default weights and their license.

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
    """Print what this machine can build, run and measure, and the commands that install the rest.

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
        print_table(("", "what", "found", "what to do"), [(f.mark, f.what, f.found, f.remedy) for f in facts])


@click.command("recipes", cls=WithSchema, short_help="List the bundled recipes.")
@schema_option("recipes, for editors", "exporter.build")
@JSON
def recipes_command(as_json: bool) -> None:
    """Print the bundled recipes, one line each; `run` takes them by name.

    \b
    Examples:
      convnext-export recipes
      convnext-export recipes --schema > recipe.schema.json
    """
    from exporter import build
    from exporter.cli.console import console, plain, print_json, print_table
    from exporter.recipe import bundled

    recipes = {name: build.read(path) for name, path in bundled.recipes().items()}
    if as_json:
        print_json(
            {name: {"path": str(bundled.find_recipe(name)), "recipe": recipe} for name, recipe in recipes.items()}
        )
        return
    columns = ("recipe", "variant", "task", "backend", "precision")
    rows = [(name, r.model.variant or "", r.model.task or "", r.backend, r.precision) for name, r in recipes.items()]
    print_table(columns, rows)
    folder = plain(bundled.folder("recipes"))
    console().print(f"folder: {folder}; copy a recipe, or run it by name", style="dim", soft_wrap=True)


@click.command(
    "inspect", cls=WithSchema, short_help="Show an artifact: inputs, outputs, precision of each layer, origin."
)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--layers", "all_layers", is_flag=True, help="Print every layer instead of a line per block.")
@click.option("--picture", metavar="FILE.svg", type=click.Path(path_type=Path),
              help="Also draw the network, a cell for each layer, coloured by its precision.")  # fmt: skip
@schema_option("sidecars", "exporter.artifact.sidecar")
@JSON
def inspect_command(artifact: Path, all_layers: bool, picture: Path | None, as_json: bool) -> None:
    """Print inputs, outputs, precision of each layer, preprocessing, labels and parents of an artifact; for a TensorRT
    engine, also its fused layers and the kernels that quantization added.

    \b
    Examples:
      convnext-export inspect build/tiny_fp16.xml
      convnext-export inspect build/tiny_int8.plan --picture engine.svg
      convnext-export inspect --schema > sidecar.schema.json
    """
    from exporter import artifact as artifacts
    from exporter.cli.console import print_findings, print_json
    from exporter.errors import BadRequest
    from exporter.verify.inspect import inspect

    if picture:
        if picture.suffix.lower() != ".svg":
            raise BadRequest(f"--picture {picture}: drawn as SVG alone; give a name that ends in .svg")
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
        click.echo(printable(f"note: its layers are not known: {inspection.reason}"), err=True)


def _draw(layers: list[Layer], picture: Path) -> None:
    from exporter.artifact.disk import write_file
    from exporter.report import charts

    columns: dict[str, list[tuple[str, str]]] = {}
    for layer in layers:
        columns.setdefault(_group(layer), []).append((layer.operator, layer.precision))
    svg = charts.network(columns)
    write_file(picture, svg.replace("<svg ", '<svg style="color:black;background:white" ', 1).encode())
    click.echo(printable(f"the picture is {picture}"), err=True)


_INPUTS = {
    "normalized": "",
    "float01": ", applied inside the artifact; it takes pixels from 0 to 1",
    "uint8": ", applied inside the artifact; it takes uint8 pixels from 0 to 255",
    "image": "; resized and normalized inside the artifact, which takes a picture of any size as uint8",
}


def _origins(origins: dict[str, str]) -> list[tuple[str, str]]:
    """Where values come from, those of one place in a row."""
    places: dict[str, list[str]] = {}
    for name, place in origins.items():
        places.setdefault(place, []).append(name)
    rows = [f"{', '.join(names)}: {place}" for place, names in places.items()]
    return [("origins" if row is rows[0] else "", row) for row in rows]


def _print_facts(artifact: Artifact) -> None:
    from exporter.artifact.sidecar import size_text
    from exporter.cli.console import number, print_table, size

    sidecar, preprocessing = artifact.sidecar, artifact.sidecar.preprocessing
    labels = ", ".join(sidecar.labels[:4]) + (" …" if len(sidecar.labels) > 4 else "")
    rows = [
        ("file", f"{artifact.path} ({size(sidecar.bytes)} in {', '.join(f.name for f in sidecar.files)})"),
        ("sha256", sidecar.sha256),
        ("built from", ", ".join(sidecar.parents) or f"{sidecar.weights.layout} weights"),
        ("model", f"{sidecar.variant}, {sidecar.task}, {sidecar.precision}, for {sidecar.backend}"),
        ("form", str(sidecar.recipe.get("export", {}).get("form", "plain"))),
        *_quantization(sidecar.quantization),
        ("compute", f"{sidecar.macs / 1e9:.3g} GMAC an image" if sidecar.macs else "unknown"),
        ("weights", f"{sidecar.weights.source} (digest {sidecar.weights.digest})"),
        ("license", f"{sidecar.weights.license or 'not known'} (of the weights)"),
        *(("input", f"{t.name} {_shape(t.shape)} {t.dtype}") for t in sidecar.inputs),
        *(("output", f"{t.name} {_shape(t.shape)} {t.dtype}, {_content(sidecar, t)}") for t in sidecar.outputs),
        (
            "preprocessing",
            f"{preprocessing.interpolation} to {size_text(preprocessing.resize)}, {preprocessing.crop} "
            f"{size_text(preprocessing.size)}, {preprocessing.color}, {preprocessing.layout}",
        ),
        ("", f"mean {_numbers(preprocessing.mean)}, std {_numbers(preprocessing.std)}{_INPUTS[preprocessing.input]}"),
        ("labels", f"{len(sidecar.labels)}: {labels}" if labels else "none"),
        *_origins(sidecar.origins),
        ("reference", sidecar.reference),
        ("versions", ", ".join(f"{tool} {version}" for tool, version in sidecar.versions.items())),
        ("verified", ", ".join(f"{k} {number(k, v)}" for k, v in sidecar.quality.items()) or "not yet"),
    ]
    print_table(("fact", "value"), rows)


def _quantization(quantization: Quantization | None) -> list[tuple[str, str]]:
    if quantization is None:
        return []
    images = f"{quantization.images} images of {quantization.calib}"
    images += " (made from seeds, no photographs)" if quantization.synthetic else ""
    smoothing, bias = quantization.smoothing, quantization.bias_correction
    method = f"{quantization.scope}, {quantization.method}, smoothing {smoothing:g}, bias correction {bias}"
    kept = ", ".join(quantization.kept) or "nothing"
    return [
        ("calibrated on", f"{images} (digest {quantization.digest})"),
        ("quantized", f"{len(quantization.layers)} layers; {method}; kept in higher precision: {kept}"),
        *([("built for", f"CPUs of the class {quantization.cpu}")] if quantization.cpu != "portable" else []),
    ]


def _content(sidecar: Sidecar, output: Tensor) -> str:
    """What an output holds, in words."""
    if sidecar.task == "pyramid":
        return f"level {output.name[1:]} of the feature pyramid"
    if output.holds == "map":
        stages = [tensor.name for tensor in sidecar.outputs if tensor.holds == "map"]
        has_norm = stages.index(output.name) in sidecar.architecture["stage_norms"]
        return "the map through the norm of its stage" if has_norm else "the map of its stage, without a norm"
    length = " of unit length" if sidecar.spec.l2 else ""
    words: dict[str, str] = {
        "logits": "logits",
        "softmax": "softmax of the logits",
        "sigmoid": "sigmoid of the logits",
        "classes": "numbers of the most probable classes",
        "top5": "their probabilities",
        "embedding": f"feature vector{length}",
        "tokens": "feature vector, then a token for each position of the last map",
        "pixel_logits": "logits of each pixel",
        "labels": "class of each pixel",
        "pixel_scores": "its probability",
    }
    return words[output.holds]


def _numbers(values: tuple[float, ...]) -> str:
    """Numbers in parentheses with 7 digits, which hides the rounding of divisions by 255."""
    return f"({', '.join(f'{value:.7g}' for value in values)})"


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
