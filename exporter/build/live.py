"""From a live PyTorch module to an artifact that is compared with this module."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import replace

from exporter.artifact import Artifact, read_sidecar
from exporter.artifact.sidecar import Preprocessing
from exporter.backends import ONNX, eager
from exporter.build import Built, build
from exporter.build.int8.search import JUDGED
from exporter.errors import BadRequest, StoppedAfterBuild, Unavailable, first_line, some
from exporter.model import live, reference, weights, written
from exporter.model.labels import from_mapping
from exporter.progress import note
from exporter.recipe import Recipe
from exporter.verify import VerifyOptions, record_quality, verify

if TYPE_CHECKING:
    from torch import nn

FP32 = Recipe(backend=ONNX, precision="fp32")


def export(
    module: nn.Module,
    out: str | Path = "build",
    recipe: Recipe = FP32,
    *,
    labels: Sequence[str] | Mapping[Any, Any] = (),
    preprocessing: Preprocessing | None = None,
) -> Built:
    """Build an artifact from a live model, and compare it with this model.

    The weights are also written to OUT/NAME.weights, from where `verify` and `bench` read them later. The module is
    unchanged afterwards; on a GPU or in half precision a copy of it is compared.

    Args:
        module: a ConvNeXt of timm, torchvision, transformers or facebookresearch, or a module around one (a
            LightningModule) whose forward returns the outputs.
        out: the folder to write to.
        recipe: backend, precision and everything else; of `recipe.model`, `weights` is not read.
        labels: names of the classes in order, or by number, or numbers by name (`class_to_idx`); by default those that
            the module's config has.
        preprocessing: how its images are made; by default as the module's config says, else the published one.

    Returns: the artifact, with the report of its comparison with the module on the recipe's images.

    Raises:
        BadRequest: for a module that is no ConvNeXt, labels that do not fit it, or fields of the recipe that only mean
            something for a file of weights.
        CheckFailed: when the network, or the artifact's graph, differs from the module; nothing is left on disk.
    """
    out, chosen = Path(out), recipe.model
    _check(module, recipe)
    names = _names(labels)
    with _evaluated(module) as original:
        fitted = live.read(original, chosen.prefix or "", chosen.head or "", chosen.head_act or "")
        if names and fitted.num_classes not in (0, len(names)):
            raise BadRequest(f"labels: {len(names)} names, but the head has {fitted.num_classes} classes")
        folder = out / f"{fitted.variant.name}.weights"
        model = replace(chosen, weights=str(folder), prefix=None, head=None, head_act=None)
        opened = reference.of_module(original)
        with _replaced(folder):
            written.write(folder, fitted, preprocessing, _config(original, names, fitted.num_classes))
            built = build(replace(recipe, model=model), out, reference=opened)
        _note_outdated(built.artifact, folder)
        if built.report is not None and recipe.quantization is not None and not recipe.has_further_checks:
            return built  # verified during the build
        return _verified(built, recipe, opened, folder)


def _verified(built: Built, recipe: Recipe, module: reference.Reference, weights: Path) -> Built:
    """The artifact with the report of its comparison with the module."""
    sidecar, checks = built.artifact.sidecar, replace(recipe.checks, data=recipe.verified_on)
    session = eager.EagerSession(module.with_outputs(sidecar.spec), "cpu", recipe=sidecar.preprocessing)
    options = VerifyOptions(weights=str(weights), **msgspec.structs.asdict(checks))
    try:
        report = verify(built.artifact, options, reference_session=session)
    except Unavailable as error:  # an engine in bf16, for which this machine has no GPU
        if built.report is None:
            raise
        note(f"not compared with the module: {first_line(error)}")
        return built
    record_quality(built.artifact, report)
    if built.report is not None:  # also of the layers of an engine, or of the search of int8
        quantized = recipe.quantization is not None
        of_build = [finding for finding in built.report.findings if not quantized or finding.check not in JUDGED]
        passed, findings = report.passed and built.report.passed, (*report.findings, *of_build)
        report = replace(report, passed=passed, findings=findings)
    return Built(built.artifact, report)


def _note_outdated(built: Artifact, replaced: Path) -> None:
    """Name the other artifacts of the folder that were made from the weights that the export replaced."""
    others = (built.path.with_name(file.name.removesuffix(".json")) for file in built.path.parent.glob("*.json"))
    outdated = []
    for path in sorted(path for path in others if path.is_file()):
        with suppress(BadRequest):  # no sidecar of an artifact
            made_from = read_sidecar(path).weights
            source = Path(weights.absolute(made_from.source, path.parent))
            if source == replaced.resolve() and made_from.digest != built.sidecar.weights.digest:
                outdated.append(path.name)
    if outdated:
        note(
            f"made from the earlier weights in {replaced.name}: {some(outdated)}; `verify` and `bench` cannot compare "
            "them with PyTorch any more, so export them again too"
        )


@contextmanager
def _replaced(folder: Path) -> Iterator[None]:
    """Replace a folder within the block. After an error the old folder is put back; so it is after an export that was
    killed, whose old folder is `NAME.before`."""
    before = folder.with_name(f"{folder.name}.before")
    if before.exists():  # of an export that was killed
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        folder.rename(before)
    try:
        yield
    except StoppedAfterBuild:
        _discard(before)
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        if before.exists():
            before.rename(folder)
        raise
    _discard(before)


def _discard(before: Path) -> None:
    """Remove the folder of before. In one step it gets another name, so that one named `before` is always whole."""
    if before.exists():
        old = before.with_name(f".{before.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        before.rename(old)
        shutil.rmtree(old, ignore_errors=True)


def _check(module: object, recipe: Recipe) -> None:
    """Refuse what is no live module, and fields of a recipe that are for files.

    Raises: BadRequest.
    """
    import torch

    if not isinstance(module, torch.nn.Module):
        raise BadRequest(f"export: expected a torch.nn.Module, got {type(module).__name__}; load it into its model")
    if isinstance(module, torch.jit.ScriptModule | torch.fx.GraphModule):
        raise BadRequest(f"export: {type(module).__name__} is a traced program; give the model that it was traced from")
    tensors = [*module.parameters(), *module.buffers()]
    if any(tensor.is_meta or torch.nn.parameter.is_lazy(tensor) for tensor in tensors):
        raise BadRequest("export: the module has parameters without values; load its weights first")
    for name in ("labels", "variant", "reference", "norm"):
        if getattr(recipe.model, name) is not None:
            instead = "the argument labels" if name == "labels" else "the module itself decides it"
            raise BadRequest(f"export: recipe.model.{name} is for files of weights; leave it out: {instead}")


def _names(labels: Sequence[str] | Mapping[Any, Any]) -> list[str]:
    """Labels in the order of the classes.

    Raises: BadRequest for anything but names.
    """
    try:
        names = list(from_mapping(labels) if isinstance(labels, Mapping) else labels)
    except ValueError as error:
        raise BadRequest(f"labels: {error}") from None
    if isinstance(labels, str) or not all(isinstance(name, str) for name in names):
        raise BadRequest(f"labels: expected a list of names or a dictionary, got {labels!r:.60}")
    return names


@contextmanager
def _evaluated(module: nn.Module) -> Iterator[nn.Module]:
    """The module in eval mode, on the CPU and in fp32: a copy where it is not; its modes are restored afterwards."""
    import torch

    tensors = [*module.parameters(), *module.buffers()]
    placed = all(t.device.type == "cpu" and t.dtype in (torch.float32, torch.int64) for t in tensors)
    if not placed:
        module = copy.deepcopy(module).cpu().float()
    training = [part for part in module.modules() if part.training]
    try:
        yield module.eval()
    finally:
        for part in training:
            part.training = True


def _config(module: nn.Module, labels: Sequence[str], classes: int) -> dict[str, Any]:
    """The content of `config.json`: labels, and preprocessing from the module's own config.

    Labels of the module's config that do not fit its head are those of the model that it was trained from.
    """
    config: dict[str, Any] = {}
    for part in module.modules():
        if "pretrained_cfg" not in config and isinstance(cfg := getattr(part, "pretrained_cfg", None), dict):
            plain = (str, int, float, list, tuple, dict)
            config["pretrained_cfg"] = {key: value for key, value in cfg.items() if isinstance(value, plain)}
        names = getattr(getattr(part, "config", None), "id2label", None)
        if "id2label" not in config and isinstance(names, dict) and len(names) == classes:
            config["id2label"] = {str(index): name for index, name in names.items()}
    if labels:
        config.pop("id2label", None)
        config["label_names"] = list(labels)
    return config
