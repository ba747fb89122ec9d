"""From weights to artifacts: `onnx`, `openvino`, `trt`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.model import FORMS

if TYPE_CHECKING:
    from exporter.build.int8 import Budget
    from exporter.recipe import Recipe

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
    click.option("--save-config", metavar="FILE", type=click.Path(path_type=Path),
                 help="Write this build as a recipe too, for `run`."),
    click.option("--dry-run", is_flag=True, help="Say whether it would be built, and build nothing."),
    click.option("--json", "as_json", is_flag=True, help="The artifact as JSON on stdout."),
)  # fmt: skip


def shared(command: Callable[..., None]) -> Callable[..., None]:
    """The options that every build verb takes."""
    for option in reversed(SHARED):
        command = option(command)
    return command


QUANTIZING = (
    click.option("--int8", is_flag=True, help="8 bits, where they are faster and lose nothing that matters."),
    click.option("--calib", metavar="SRC", default="synthetic", show_default=True,
                 help="int8: images to calibrate with; a manifest, folder, .npz file, bundled set, or synthetic."),
    click.option("--calib-size", metavar="N", type=click.IntRange(1),
                 help="int8: how many; by default all of a manifest, else 256."),
    click.option("--calib-seed", metavar="N", type=int, default=0, show_default=True,
                 help="int8: of the draw from a folder."),
    click.option("--calib-method", type=click.Choice(["minmax", "entropy", "percentile", "mse"]), default="minmax",
                 show_default=True, help="int8: how ranges are chosen."),
    click.option("--smoothing", metavar="SHARE", type=float, default=0.5, show_default=True,
                 help="int8: how much of the activations' spread the weights take over; 0 is none."),
    click.option("--bias-correction", type=click.Choice(["none", "fast", "full"]), default="fast", show_default=True,
                 help="int8: from the weights' rounding alone, or layer by layer with images."),
    click.option("--max-drop", metavar="POINTS", type=float,
                 help="int8: the most it may lose, of top-1 on --data; without labels, of agreement with eager.  "
                 "[default: 0.5 where real images are given]"),
    click.option("--data", metavar="SRC", help="int8: images to judge by; by default those it is calibrated with."),
)  # fmt: skip


EIGHT_BIT = (
    click.option("--fp8", is_flag=True, help="8 bits with an exponent (E4M3), for GPUs of 8.9 and above."),
    click.option("--int8-scope", type=click.Choice(["linear", "linear+conv", "all", "weights"]),
                 help="int8: what is rounded: pointwise layers, downsampling too, all, or weights alone.  "
                 "[default: linear]"),
)  # fmt: skip


CALIBRATING = (
    "int8_scope", "calib", "calib_size", "calib_seed", "calib_method", "smoothing", "bias_correction", "max_drop",
    "data",
)  # fmt: skip


def quantizing(command: Callable[..., None]) -> Callable[..., None]:
    """The options of verbs that build int8."""
    for option in reversed(QUANTIZING):
        command = option(command)
    return command


@click.command("onnx", short_help="PyTorch → ONNX, simplified; runs on ONNX Runtime.")
@click.option("--fp16", is_flag=True, help="Half the size; statistics stay in fp32.")
@quantizing
@shared
def onnx_command(fp16: bool, int8: bool, **words: Any) -> None:
    """Trace a ConvNeXt to ONNX, simplify it, and write it with a sidecar that says what it is.

    \b
    Examples:
      convnext-export onnx --variant base
      convnext-export onnx --weights my_convnext.pth --imgsz dynamic --task features
      convnext-export onnx --int8 --calib calibration/mine.tsv --data imagenet/val
    """
    _build("onnxruntime", {"fp16": fp16, "int8": int8}, words)


@click.command("openvino", short_help="→ OpenVINO IR.")
@click.option("--fp16", is_flag=True, help="Half the size; on a CPU computed in fp32.")
@click.option("--bf16", is_flag=True, help="Half the size, computed in bf16 where the CPU has it.")
@quantizing
@shared
def openvino_command(fp16: bool, bf16: bool, int8: bool, **words: Any) -> None:
    """Build an OpenVINO IR; the ONNX it is made from is kept beside it.

    \b
    Examples:
      convnext-export openvino --variant tiny --fp16
      convnext-export openvino --weights my_convnext.safetensors --bf16
      convnext-export openvino --int8 --calib my_images --data imagenet/val --max-drop 0.3
    """
    _build("openvino", {"fp16": fp16, "bf16": bf16, "int8": int8}, words)


PLANNING = (
    click.option("--flavor", type=click.Choice(["tensorrt", "tensorrt-rtx"]),
                 help="Which library; by default what is installed."),
    click.option("--min-batch", metavar="N", type=int, multiple=True,
                 help="Least batch of a profile; given again, of another one.  [default: 1]"),
    click.option("--opt-batch", metavar="N", type=int, multiple=True,
                 help="Batch that a profile is tuned for.  [default: the least]"),
    click.option("--max-batch", metavar="N", type=int, multiple=True,
                 help="Largest batch of a profile.  [default: 16, or the tuned one if larger]"),
    click.option("--compute-capability", metavar="X.Y", multiple=True,
                 help="tensorrt-rtx: GPUs to build for, like 8.9; may be given again.  [default: 8.0 and above]"),
    click.option("--workspace", metavar="GIB", type=float, help="Memory that kernels may use between them."),
    click.option("--opt-level", metavar="N", type=int, help="0 builds fastest, 5 runs fastest.  [default: 3]"),
    click.option("--timing-cache", metavar="FILE",
                 help="tensorrt: what kernels took in earlier builds, read and written; the next build is faster."),
    click.option("--tf32", is_flag=True, help="Let fp32 products round to 10 bits of mantissa."),
    click.option("--version-compatible", is_flag=True, help="tensorrt: runs on later versions of TensorRT too."),
    click.option("--hardware-compat", type=click.Choice(["none", "ampere+", "same"]), default="none",
                 show_default=True, help="tensorrt: runs on other GPUs too, more slowly."),
    click.option("--strip-weights", is_flag=True, help="tensorrt: a plan without its weights, to be refitted."),
)  # fmt: skip


def planning(command: Callable[..., None]) -> Callable[..., None]:
    """The options of what a plan is built for."""
    for option in reversed((*EIGHT_BIT, *PLANNING)):
        command = option(command)
    return command


@click.command("trt", short_help="→ TensorRT plan.")
@click.option("--fp16", is_flag=True, help="Half the size, computed in fp16; statistics stay in fp32.")
@click.option("--bf16", is_flag=True, help="Half the size, computed in bf16; statistics stay in fp32.")
@quantizing
@planning
@shared
def trt_command(fp16: bool, bf16: bool, int8: bool, fp8: bool, **words: Any) -> None:
    """Build a TensorRT plan, and say which kernels it is made of; with TensorRT-RTX on a machine without a GPU too.

    \b
    Examples:
      convnext-export trt --fp16 --max-batch 32
      convnext-export trt --int8 --calib my_images --data imagenet/val
      convnext-export trt --flavor tensorrt-rtx --compute-capability 8.9 --compute-capability 12.0
    """
    words["target"] = _target(words)
    _build("tensorrt", {"fp16": fp16, "bf16": bf16, "int8": int8, "fp8": fp8}, words)


def _target(words: dict[str, Any]) -> dict[str, Any]:
    """The options of `PLANNING` in the words of the backend's record, taken out of all that was typed.

    Raises: BadRequest for profiles that do not pair up.
    """
    from exporter.errors import BadRequest

    batches = [words.pop(f"{end}_batch") for end in ("min", "opt", "max")]
    count = max(map(len, batches))
    if any(len(given) not in (0, count) for given in batches):
        said = "{} of --min-batch, {} of --opt-batch and {} of --max-batch".format(*map(len, batches))
        raise BadRequest(f"{said}: give each of them once for every profile, or leave it out")
    profiles = []
    for index in range(count):
        least, best, most = (given[index] if given else None for given in batches)
        least = 1 if least is None else least
        best = least if best is None else best
        profiles.append([least, best, max(16, best) if most is None else most])
    own = ("flavor", "compute_capability", "workspace", "opt_level", "timing_cache", "tf32", "version_compatible",
           "hardware_compat", "strip_weights")  # fmt: skip
    return {"profiles": profiles, **{word: words.pop(word) for word in own}}


def _build(backend: str, flags: dict[str, bool], words: dict[str, Any]) -> None:
    import shlex

    from exporter import backends, recipe_file
    from exporter.build import int8, pipeline
    from exporter.cli.console import console, drawing, plain, print_findings, print_json, size
    from exporter.errors import BadRequest
    from exporter.recipe import EIGHT_BITS, Recipe, size_or_dynamic

    empty = [word for word, value in words.items() if value == ""]
    if empty:
        raise BadRequest(f"--{empty[0]} is empty; give it a value or leave it out")
    as_json, out = words.pop("as_json"), words.pop("output")
    save, dry_run = words.pop("save_config"), words.pop("dry_run")
    words["precision"] = _precision(flags, words["precision"])
    for axis in ("imgsz", "batch"):
        words[axis] = size_or_dynamic(f"--{axis}", words[axis])
    budget = int8.Budget(**{word: words.pop(word) for word in ("max_drop", "data")})
    recipe = Recipe(backend=backend, **words)
    if recipe.precision not in EIGHT_BITS:
        _refuse_calibration()
    asked = recipe_file.of(recipe, budget)
    if save:
        recipe_file.save(asked, save)
        click.echo(f"the recipe is {save}", err=True)
    if dry_run:
        recipe_file.check(asked)
        click.echo(f"{_words(recipe)} would go into {out}; nothing was built", err=as_json)
        if as_json:
            print_json({"recipe": asked})
        return
    if recipe.precision in EIGHT_BITS:
        _build_int8(recipe, budget, out, as_json)
        return
    with drawing():
        artifact = pipeline.build(recipe, out)
    findings = backends.get(backend).findings(artifact, None)
    if as_json:
        print_json({"artifact": artifact.to_dict(), **({"findings": findings} if findings else {})})
        return
    if findings:
        print_findings(findings)
    sidecar = artifact.sidecar
    console().print(f"[bold]{plain(artifact.path)}[/]  {sidecar.precision}, {size(sidecar.bytes)}", soft_wrap=True)
    command = f"convnext-export verify {shlex.quote(str(artifact.path))}"
    console().print(f"check it: {plain(command)}", style="dim", soft_wrap=True)


def _words(recipe: Recipe) -> str:
    what = recipe.variant or f"the model of {recipe.weights}"
    return f"{what}, {recipe.task}, in {recipe.precision} for {recipe.backend}"


def _refuse_calibration() -> None:
    """Words about int8 without int8 would be passed over in silence."""
    from exporter.errors import BadRequest

    context = click.get_current_context()
    for param in context.command.params:
        source = context.get_parameter_source(str(param.name))
        if param.name in CALIBRATING and source is click.core.ParameterSource.COMMANDLINE:
            raise BadRequest(f"{param.opts[0]} is for int8; add --int8, or leave it out")


def _build_int8(recipe: Recipe, budget: Budget, out: Path, as_json: bool) -> None:
    import msgspec

    from exporter import report
    from exporter.build import int8
    from exporter.cli.console import console, drawing, plain, print_findings, print_json, size

    with drawing():
        artifact, made = int8.build(recipe, out, budget)
    path = artifact.path.with_name(f"{artifact.path.name}.report.json")
    report.save(made, path)
    if as_json:
        print_json({"artifact": artifact.to_dict(), "report": msgspec.to_builtins(made)})
    else:
        print_findings(made.findings)
        sidecar = artifact.sidecar
        console().print(f"[bold]{plain(artifact.path)}[/]  {sidecar.precision}, {size(sidecar.bytes)}", soft_wrap=True)
        verdict = "[green]holds[/] what it must" if made.passed else "[red]DOES NOT HOLD[/]: the best that was found"
        console().print(f"{verdict}; the report is {plain(path)}", soft_wrap=True)
    if not made.passed:
        raise click.exceptions.Exit(5)


def _precision(flags: dict[str, bool], named: str | None) -> str:
    from exporter.errors import BadRequest

    asked = [name for name, on in flags.items() if on] + ([named] if named else [])
    if len(set(asked)) > 1:
        raise BadRequest(f"one precision at a time, not {' and '.join(asked)}")
    return asked[0] if asked else "fp32"
