"""From weights to artifacts: `onnx`, `openvino`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from exporter.model import FORMS

SHARED = (
    click.option("--variant", metavar="NAME", help="Which ConvNeXt; by default what the weights are, or tiny."),
    click.option(
        "--weights", metavar="SRC", default="hub", show_default=True,
        help="hub, hf-hub:owner/name, a file or folder in any public layout, or random[:SEED].",
    ),
    click.option("--labels", metavar="FILE", type=click.Path(), help="Class names, one a line."),
    click.option("--task", type=click.Choice(["classify", "features"]), default="classify", show_default=True),
    click.option("--imgsz", metavar="N", help="Input size in pixels, or 'dynamic'; by default the published one."),
    click.option("--batch", metavar="N", default="dynamic", show_default=True, help="Batch size, or 'dynamic'."),
    click.option("--opset", type=int, default=20, show_default=True, help="ONNX operator set, 18 to 23."),
    click.option(
        "--form", type=click.Choice([*FORMS, "auto"]),
        help="How the network is written; by default as the runtime runs it best, or 'auto': measured on this CPU.",
    ),
    click.option(
        "--input", type=click.Choice(["normalized", "float01", "uint8"]), default="normalized", show_default=True,
        help="What the artifact takes: normalised pixels, or 0…1 or 0…255 as they are.",
    ),
    click.option("--simplify/--no-simplify", default=True, show_default=True, help="Run onnxsim, guarded."),
    click.option("-o", "--output", metavar="DIR", type=click.Path(path_type=Path), default=Path("build"),
                 show_default=True, help="Where the artifact goes."),
    click.option("--precision", metavar="NAME", help="The same as the flags, by name."),
    click.option("--json", "as_json", is_flag=True, help="The artifact as JSON on stdout."),
)  # fmt: skip


def shared(command: Callable[..., None]) -> Callable[..., None]:
    """The options that every build verb takes."""
    for option in reversed(SHARED):
        command = option(command)
    return command


@click.command("onnx", short_help="PyTorch → ONNX, simplified; runs on ONNX Runtime.")
@click.option("--fp16", is_flag=True, help="Half the size; statistics stay in fp32.")
@shared
def onnx_command(fp16: bool, **words: Any) -> None:
    """Trace a ConvNeXt to ONNX, simplify it, and write it with a sidecar that says what it is.

    \b
    Examples:
      convnext-export onnx --variant base
      convnext-export onnx --weights my_convnext.pth --imgsz dynamic --task features
    """
    _build("onnxruntime", {"fp16": fp16}, words)


@click.command("openvino", short_help="→ OpenVINO IR.")
@click.option("--fp16", is_flag=True, help="Half the size; on a CPU computed in fp32.")
@click.option("--bf16", is_flag=True, help="Half the size, computed in bf16 where the CPU has it.")
@shared
def openvino_command(fp16: bool, bf16: bool, **words: Any) -> None:
    """Build an OpenVINO IR; the ONNX it is made from is kept beside it.

    \b
    Examples:
      convnext-export openvino --variant tiny --fp16
      convnext-export openvino --weights my_convnext.safetensors --bf16
    """
    _build("openvino", {"fp16": fp16, "bf16": bf16}, words)


def _build(backend: str, flags: dict[str, bool], words: dict[str, Any]) -> None:
    import shlex

    from exporter import pipeline
    from exporter.cli.console import console, drawing, plain, print_json, size
    from exporter.errors import BadRequest
    from exporter.recipe import Recipe, size_or_dynamic

    empty = [word for word, value in words.items() if value == ""]
    if empty:
        raise BadRequest(f"--{empty[0]} is empty; give it a value or leave it out")
    as_json, out = words.pop("as_json"), words.pop("output")
    words["precision"] = _precision(flags, words["precision"])
    for axis in ("imgsz", "batch"):
        words[axis] = size_or_dynamic(f"--{axis}", words[axis])
    with drawing():
        artifact = pipeline.build(Recipe(backend=backend, **words), out)
    if as_json:
        print_json({"artifact": artifact.to_dict()})
        return
    sidecar = artifact.sidecar
    console().print(f"[bold]{plain(artifact.path)}[/]  {sidecar.precision}, {size(sidecar.bytes)}", soft_wrap=True)
    command = f"convnext-export verify {shlex.quote(str(artifact.path))}"
    console().print(f"check it: {plain(command)}", style="dim", soft_wrap=True)


def _precision(flags: dict[str, bool], named: str | None) -> str:
    from exporter.errors import BadRequest

    asked = [name for name, on in flags.items() if on] + ([named] if named else [])
    if len(set(asked)) > 1:
        raise BadRequest(f"one precision at a time, not {' and '.join(asked)}")
    return asked[0] if asked else "fp32"
