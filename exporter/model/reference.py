"""The model that artifacts are compared with: the user's own, or a library's, instead of this tool's network."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.artifact import sha256_file
from exporter.artifact.sidecar import OutputSpec
from exporter.errors import BadRequest, Unavailable, first_line, some
from exporter.model import checkpoint, sources, weights
from exporter.model.layouts import Choices, to_ours
from exporter.model.live import outputs_of, tensors_of
from exporter.model.variants import published_name

if TYPE_CHECKING:
    from torch import Tensor, nn

LIBRARIES = ("timm", "transformers", "torchvision")
OURS = "this tool's own network"


@dataclass(frozen=True)
class Reference:
    """A model by its name and version; `names` are its modules' names by ours, where they are known."""

    name: str
    module: nn.Module
    names: Mapping[str, str]

    def with_outputs(self, spec: OutputSpec) -> nn.Module:
        """A module that returns the outputs of a spec as a tuple."""
        from torch import nn

        from exporter.model.convnext import answers, unit_length
        from exporter.model.upernet import pixel_answers

        def of_task(task: str, tensors: tuple[Tensor, ...], images: Tensor) -> tuple[Tensor, ...]:
            if task == "segment":
                (logits,) = tensors
                return pixel_answers(logits, images.shape[-2:], spec.answer)
            if task == "classify":
                return tuple(output for logits in tensors for output in answers(logits, spec.answer))
            return tuple(map(unit_length, tensors)) if task == "embed" and spec.l2 else tensors

        class Outputs(nn.Module):
            def __init__(self, module: nn.Module) -> None:
                super().__init__()
                self.module = module

            def forward(self, images: Tensor) -> tuple[Tensor, ...]:
                each = [(task, tensors_of(outputs_of(self.module, images, task), task)) for task in spec.tasks]
                return tuple(output for task, tensors in each for output in of_task(task, tensors, images))

        return Outputs(self.module).eval()


def load(spec: str, loaded: weights.Checkpoint, source: str, choices: Choices = Choices()) -> Reference:  # noqa: B008
    """The reference that a spec names.

    Args:
        spec: `module:callable`, a function without arguments that returns the model with its weights, or one of
            `LIBRARIES`, which then builds it from `config.json` or the variant, and loads the same file.
        loaded: the weights as this tool reads them.
        source: where they were read from.
        choices: as for these weights.

    Raises: BadRequest for a spec that names nothing, or a model that cannot load the weights; Unavailable for a
        library that is not installed.
    """
    if spec in LIBRARIES:
        module = _of_library(spec, loaded, source, choices)
    elif ":" in spec:
        module = _of_callable(spec)
    else:
        raise BadRequest(f"--reference {spec}: expected module:callable or one of {', '.join(LIBRARIES)}")
    return of_module(module.cpu().float())


def fingerprint(spec: str | None) -> str:
    """Cache key of a reference; "" for none, and for a module that is not there.

    Of a library it is the version. Of a module of the user it is a digest of the Python files of its package, or of the
    folder that it lies in. What these import from elsewhere does not count.
    """
    if spec is None:
        return ""
    package = spec.partition(":")[0].partition(".")[0]
    with _this_folder():
        module = importlib.util.find_spec(package)
    if module is None:
        return ""
    if spec in LIBRARIES:
        return importlib.metadata.version(package)
    folders = [Path(folder) for folder in module.submodule_search_locations or ()]
    files = [file for folder in folders for file in folder.rglob("*.py")]
    if not folders and module.origin is not None:
        files = list(Path(module.origin).parent.glob("*.py"))
    contents = [sha256_file(file) for file in sorted(files) if file.is_file()]
    return hashlib.sha256("".join(contents).encode()).hexdigest()


@contextlib.contextmanager
def _this_folder() -> Iterator[None]:
    """Within, modules of the working directory are found first."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def of_module(module: nn.Module) -> Reference:
    """A live module as a reference, in eval mode."""
    kind = type(module)
    package = kind.__module__.partition(".")[0]
    version = getattr(sys.modules.get(package), "__version__", "")
    return Reference(f"{kind.__module__}.{kind.__qualname__}" + (f" ({package} {version})" if version else ""),
                     module.eval(), _names(module))  # fmt: skip


def _names(module: nn.Module) -> dict[str, str]:
    """The names of a module's parts by ours, as far as its state dict is one of the layouts."""
    import torch

    try:
        tensors = {key: value for key, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
        tensors = {key: value for key, value in tensors.items() if value.is_floating_point()}
        return to_ours(tensors, Choices(head_act=lambda path, behind: "")).modules  # names need no activation
    except BadRequest:
        return {}


def _of_callable(spec: str) -> nn.Module:
    from torch import nn

    name, _, function = spec.partition(":")
    try:
        with _this_folder():
            if importlib.util.find_spec(name) is None:
                raise BadRequest(f"--reference {spec}: no module {name} in this folder or among the installed ones")
            factory = getattr(importlib.import_module(name), function, None)
            if factory is None:
                raise BadRequest(f"--reference {spec}: {name} has no {function}")
            module = factory()
    except BadRequest:
        raise
    except (Exception, SystemExit) as error:  # noqa: BLE001  (the user's own code)
        raise BadRequest(f"--reference {spec}: it raised {type(error).__name__}: {first_line(error)}") from None
    if not isinstance(module, nn.Module):
        raise BadRequest(f"--reference {spec}: it returned {type(module).__name__}, expected a torch.nn.Module")
    return module


def _of_library(name: str, loaded: weights.Checkpoint, source: str, choices: Choices) -> nn.Module:
    try:
        importlib.import_module(name)
    except ImportError as error:
        if importlib.util.find_spec(name) is None:
            raise Unavailable(f"--reference {name}: not installed; pip install {name}") from None
        raise _broken(name, error) from None
    except Exception as error:  # noqa: BLE001  (a library that is installed and does not work)
        raise _broken(name, error) from None
    path, part = sources.file_of(source)
    config = _config(path.parent)
    try:
        tensors = checkpoint.read(path, part).tensors
        if name == "transformers":
            return _transformers(config, tensors)
        prefix = to_ours(tensors, choices).prefix
        state = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        return _timm(config, loaded, state) if name == "timm" else _torchvision(loaded, state)
    except ImportError as error:
        raise _broken(name, error) from None
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        reason = " ".join(str(error).split())[:200]
        raise BadRequest(
            f"--reference {name}: it cannot load {path} ({reason}); write a function that returns your model, and give "
            "--reference module:function"
        ) from None


def _broken(name: str, error: Exception) -> Unavailable:
    reason = f"{type(error).__name__}: {first_line(error)}"
    if "torchvision::" in f"{reason} {error.__cause__}":  # compiled operators, which another PyTorch does not load
        return Unavailable(
            f"--reference {name}: the installed torchvision was built for another torch ({reason}); install the one "
            f"for torch {importlib.metadata.version('torch')}"
        )
    return Unavailable(f"--reference {name}: it is installed and cannot be imported ({reason}); install it again")


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def _timm(config: Mapping[str, Any], loaded: weights.Checkpoint, state: Mapping[str, Tensor]) -> nn.Module:
    import timm
    from timm.models.convnext import checkpoint_filter_fn

    name = config.get("architecture") or published_name(loaded.variant.name)
    arguments = {"num_classes": loaded.weights.num_classes, "in_chans": loaded.variant.architecture.in_chans}
    arguments |= {"global_pool": config["global_pool"]} if "global_pool" in config else {}
    model: nn.Module = timm.create_model(name, pretrained=False, **{**arguments, **config.get("model_args", {})})
    model.load_state_dict(checkpoint_filter_fn(dict(state), model))
    return model


def _torchvision(loaded: weights.Checkpoint, state: Mapping[str, Tensor]) -> nn.Module:
    from torchvision import models

    build = getattr(models, published_name(loaded.variant.name))
    model: nn.Module = build(num_classes=loaded.weights.num_classes)
    model.load_state_dict(dict(state))
    return model


def _transformers(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    """The class that the config names, with these tensors: `from_pretrained` reads both from a folder."""
    import torch
    import transformers
    from safetensors.torch import save_file

    kind = next(iter(config.get("architectures") or ()), "")
    model_class = getattr(transformers, kind, None) or transformers.AutoModelForImageClassification
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), "utf-8")
        contiguous = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
        save_file(contiguous, Path(folder) / "model.safetensors", {"format": "pt"})
        had_bar = transformers.utils.logging.is_progress_bar_enabled()
        transformers.utils.logging.disable_progress_bar()
        try:
            model, report = model_class.from_pretrained(folder, local_files_only=True, output_loading_info=True)
        finally:
            if had_bar:
                transformers.utils.logging.enable_progress_bar()
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{kind} is no model")
    # Batch norms count their batches in whole numbers, which are no weights.
    if missing := sorted(key for key in report["missing_keys"] if not key.endswith("num_batches_tracked")):
        raise ValueError(f"{len(missing)} weights are missing: {some(missing)}")
    return model


def first_difference(ours: nn.Module, reference: Reference, images: Tensor, limit: float) -> str:
    """The first module, in the order they run, whose output differs from the reference's, and by how much.

    Returns: "" where none differs.

    Args:
        ours: this tool's network in the plain form.
        reference: the model that it is compared with.
        images: (N, C, H, W).
        limit: largest difference that counts as rounding, as a share of the standard deviation of the module's output.
    """
    ordered, mine = _outputs(ours, {name: name for name in reference.names}, images)
    _, theirs = _outputs(reference.module, dict(reference.names), images)
    for name in ordered:
        if name in theirs and (share := _share(mine[name], theirs[name])) > limit:
            return f"{name} ({reference.names[name]} in the reference), by {share:.2g} of its standard deviation"
    return ""


def _outputs(model: nn.Module, names: Mapping[str, str], images: Tensor) -> tuple[list[str], dict[str, Tensor]]:
    """The output of each named module, by our name, and the order in which they ran."""
    import torch

    modules = dict(model.named_modules())
    seen: dict[str, Tensor] = {}

    def record(name: str) -> Any:
        return lambda module, inputs, output: seen.setdefault(name, output)

    handles = [
        modules[theirs].register_forward_hook(record(ours)) for ours, theirs in names.items() if theirs in modules
    ]
    try:
        with torch.inference_mode():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return list(seen), seen


def _share(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference as a share of the standard deviation, channels first or last; 0 for other shapes."""
    placed = [theirs, theirs.movedim(1, -1), theirs.movedim(-1, 1), theirs.flatten(1)]
    shares = [(ours - other).abs().max() / (ours.std() + 1e-12) for other in placed if other.shape == ours.shape]
    return float(min(shares, default=0.0))
