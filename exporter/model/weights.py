"""Loads weights from a source (SRC) as a checkpoint in the layout of this tool, with labels and preprocessing.

SRC is `hub`, `hf-hub:owner/name`, a file, a folder in Hugging Face's form, or `random[:SEED]`.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.artifact import Artifact, sha256_file
from exporter.artifact.disk import user_path
from exporter.artifact.sidecar import Preprocessing, Weights
from exporter.errors import BadRequest, Unavailable, some
from exporter.model import checkpoint, hub
from exporter.model.config import Config, read_config
from exporter.model.layouts import architecture, to_ours
from exporter.model.variants import Architecture, Variant, named, published_license, resolve
from exporter.progress import note

if TYPE_CHECKING:
    from torch import Tensor

    from exporter.model.convnext import ConvNeXt, Features

# torchvision publishes another recipe than the papers with its weights: bilinear, and its own resize.
_TORCHVISION_RESIZE = {"tiny": 236, "small": 230, "base": 232, "large": 232}
PERMISSIVE = {"apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc0-1.0", "unlicense"}
WEIGHT_FILES = (
    *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    *("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.pth", "model.pt"),
    *("model.keras", "model.weights.h5"),
)
# Of training, beside the weights of a folder.
_NO_WEIGHTS = ("optimizer", "scheduler", "training_args", "rng_state", "scaler", "trainer_state", "random_states")


@dataclass(frozen=True)
class Checkpoint:
    """Weights that fit a variant: fp32 tensors in the layout of this tool, with labels and preprocessing if known."""

    state: dict[str, Tensor]
    variant: Variant
    weights: Weights
    preprocessing: Preprocessing
    labels: tuple[str, ...]

    def model(self, task: str = "classify") -> ConvNeXt | Features:
        """The network in eval mode, or for `features` its backbone. It shares memory with `state`."""
        from exporter.model.convnext import Features

        classes = self.weights.num_classes
        if task == "classify" and not classes:
            raise BadRequest(f"{self.weights.source}: a backbone, without the keys head.*; --task features takes it")
        model = _empty(self.variant.architecture, max(classes, 1))
        model.load_state_dict(self.state, assign=True, strict=bool(classes))
        model.eval().requires_grad_(False)
        return Features(model) if task == "features" else model


def load(source: str, variant: str | None = None, labels: Path | None = None) -> Checkpoint:
    """Load weights from any source, and check them for a variant.

    Args:
        source: `hub`, `hf-hub:owner/name`, a file (`FILE#model_ema` takes one part of it), a folder with
            `config.json`, or `random[:SEED]`.
        variant: a name from the table; None detects the variant from the weights, or takes `tiny` where they have none.
        labels: a text file with one label a line, in place of those in `config.json`.

    Raises: BadRequest for weights that cannot be used; Unavailable when the Hub cannot be reached.
    """
    loaded, in_config = _load(source, variant)
    return replace(loaded, labels=_labels(in_config, labels, loaded.weights.num_classes))


def _load(source: str, variant: str | None) -> tuple[Checkpoint, tuple[str, ...]]:
    """The checkpoint without labels, and the labels from its `config.json`."""
    wanted, repository = resolve(variant) if variant else (None, None)
    if source == "random" or source.startswith("random:"):
        return _random(source, wanted or resolve("tiny")[0]), ()
    if source == "hub":
        files = _from_hub(repository or _default_repository(wanted or resolve("tiny")[0]))
    elif source.startswith("hf-hub:"):
        files = _from_hub(source.removeprefix("hf-hub:"))
    else:
        files = _from_disk(source)
    return _fit(files, wanted), files.config.labels


def fingerprint(source: str, variant: str | None = None, labels: Path | None = None) -> str | None:
    """Cache key of weights: a digest of the files that `load` reads; None for weights that are not downloaded yet.

    Raises: BadRequest for files that do not exist.
    """
    if source == "random" or source.startswith("random:"):
        return f"{source} {variant}"
    wanted, repository = resolve(variant) if variant else (None, None)
    if source == "hub":
        repository = repository or _default_repository(wanted or resolve("tiny")[0])
    elif source.startswith("hf-hub:"):
        repository = source.removeprefix("hf-hub:")
    else:
        repository = None
    if repository is not None:
        folder = hub.cached(repository)
        if folder is None:
            return None
        path, part = _weights_in(folder), ""
    else:
        found = _from_disk(source)
        path, part = found.path, found.part
    beside = [path.parent / name for name in ("config.json", "preprocessor_config.json")]
    files = [*checkpoint.files(path), *(file for file in (*beside, labels) if file is not None and file.is_file())]
    license_id = _license(path.parent, read_config(path.parent), repository) if repository else None
    return " ".join([part, *map(_content, files), license_id or ""])


def _content(file: Path) -> str:
    """The sha256 of a file, cached until the file changes."""
    stat = file.stat()
    return _sha256(file, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)
def _sha256(file: Path, size: int, changed: int) -> str:
    del size, changed
    return sha256_file(file)


@dataclass(frozen=True)
class _Found:
    source: str
    path: Path
    part: str
    config: Config
    license: str | None = None


def _default_repository(variant: Variant) -> str:
    if variant.hub is None:
        raise BadRequest(
            f"{variant.name} has no published weights on the Hub; give --weights FILE, hf-hub:owner/name or random:0"
        )
    return variant.hub


def _from_hub(repository: str) -> _Found:
    folder = hub.download(repository)
    config = read_config(folder)
    return _Found(f"hf-hub:{repository}", _weights_in(folder), "", config, _license(folder, config, repository))


def _license(folder: Path, config: Config, repository: str) -> str | None:
    """The license from the model card, from `config.json`, or, for default weights, from the table of variants."""
    return hub.license_in(folder) or config.license or published_license(repository)


def note_license(record: Weights) -> None:
    """Print a note for a license that restricts use."""
    if record.license is not None and record.license not in PERMISSIVE:
        limit = "no commercial use" if "-nc" in record.license else "read it before you pass them on"
        note(f"the weights {record.source.removeprefix('hf-hub:')} have the license {record.license}: {limit}")


def _from_disk(source: str) -> _Found:
    file, _, part = source.rpartition("#") if "#" in source and not user_path(source).exists() else (source, "", "")
    path = user_path(file)
    if not path.exists():
        raise BadRequest(f"{path}: no such file or folder; weights are hub, hf-hub:owner/name, a file or random:SEED")
    path = path.resolve()
    source = str(path) + (f"#{part}" if part else "")
    if path.is_dir():
        return _Found(source, _weights_in(path), part, read_config(path))
    return _Found(source, path, part, read_config(path.parent))


def _weights_in(folder: Path) -> Path:
    """The weights of a folder: a file of a usual name, or the only one of any name.

    Raises: BadRequest.
    """
    if (folder / "adapter_config.json").is_file():
        raise checkpoint.adapter(folder)
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    others = sorted(
        path
        for path in folder.iterdir()
        if path.suffix in checkpoint.SUFFIXES and path.is_file() and not path.name.startswith(_NO_WEIGHTS)
    )
    if len(others) > 1:
        raise BadRequest(
            f"{folder}: {len(others)} files of weights ({some(path.name for path in others)}); give one FILE"
        )
    if others:
        return others[0]
    raise BadRequest(f"{folder}: no weights in it; expected one of {', '.join(WEIGHT_FILES)}")


def _fit(files: _Found, wanted: Variant | None) -> Checkpoint:
    import torch

    content = checkpoint.read(files.path, files.part)
    for text in content.notes:
        note(text)
    try:
        state, layout = to_ours(_without_prefixes(content.tensors))
        arch = architecture(state)
    except BadRequest as error:
        raise BadRequest(f"{files.path}: {error}") from None
    variant = named(arch)
    if wanted and wanted.name != variant.name:
        raise BadRequest(
            f"{files.path}: weights of {variant.name}, asked for {wanted.name}; use --variant {variant.name}"
        )
    state = {key: tensor.to(torch.float32) for key, tensor in state.items()}
    classes = _check_keys(files.path, state, arch)
    if bad := [key for key in sorted(state) if not state[key].isfinite().all()]:
        raise BadRequest(f"{files.path}: NaN or infinity in {len(bad)} tensors ({some(bad)}); give a sound checkpoint")
    record = Weights(
        source=files.source,
        digest=_digest(state),
        layout=layout,
        num_classes=classes,
        file_sha256=sha256_file(files.path),
        license=files.license,
    )
    return Checkpoint(state, variant, record, _preprocessing(files.config, layout, variant), ())


def _without_prefixes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take off what wrappers of a module put in front of its names.

    Raises: BadRequest when two tensors then have the same name.
    """
    state = {re.sub(r"^((module|_orig_mod|model)\.)+", "", key): tensor for key, tensor in tensors.items()}
    if len(state) < len(tensors):
        raise BadRequest(f"{len(tensors) - len(state)} tensors have the name of another one but for 'module.'")
    return state


def _check_keys(path: Path, state: Mapping[str, Tensor], arch: Architecture) -> int:
    """Check every key and shape; return the number of classes (0 for a backbone)."""
    head = state.get("head.weight")
    classes = int(head.shape[0]) if head is not None and head.ndim == 2 else 0
    expected = {key: tensor.shape for key, tensor in _empty(arch, max(classes, 1)).state_dict().items()}
    if head is None:  # a backbone
        expected = {
            key: shape for key, shape in expected.items() if not key.startswith(("head", "norm")) or key in state
        }
    problems = []
    if missing := sorted(expected.keys() - state.keys()):
        problems.append(f"{len(missing)} missing keys ({some(missing)})")
    if unexpected := sorted(state.keys() - expected.keys()):
        problems.append(f"{len(unexpected)} unexpected keys ({some(unexpected)})")
    wrong = [key for key in sorted(expected.keys() & state.keys()) if state[key].shape != expected[key]]
    if wrong:
        shapes = f"{wrong[0]} is {tuple(state[wrong[0]].shape)}, expected {tuple(expected[wrong[0]])}"
        problems.append(f"{len(wrong)} wrong shapes ({shapes})")
    if problems:
        raise BadRequest(f"{path}: not the weights of {named(arch).name}: {'; '.join(problems)}")
    return classes


def _preprocessing(config: Config, layout: str, variant: Variant) -> Preprocessing:
    if config.preprocessing is not None:
        return config.preprocessing
    if layout == "torchvision" and variant.name in _TORCHVISION_RESIZE:
        return Preprocessing(resize=_TORCHVISION_RESIZE[variant.name], interpolation="bilinear")
    return variant.preprocessing


def _labels(labels: tuple[str, ...], file: Path | None, classes: int) -> tuple[str, ...]:
    origin = "config.json"
    if file is not None:
        origin = str(file)
        try:
            labels = tuple(line.strip() for line in file.read_text("utf-8-sig").splitlines() if line.strip())
        except (OSError, UnicodeDecodeError) as error:
            raise BadRequest(f"{file}: labels cannot be read ({error}); expected one label a line") from None
        if not labels:
            raise BadRequest(f"{file}: no labels in it; expected one a line")
    if labels and classes and len(labels) != classes:
        raise BadRequest(
            f"{origin}: {len(labels)} labels, but the head has {classes} classes; give --labels FILE that fits"
        )
    return labels


def _random(source: str, variant: Variant) -> Checkpoint:
    seed = source.removeprefix("random").removeprefix(":") or "0"
    if not seed.isdecimal() or len(seed) > 9:
        raise BadRequest(f"--weights {source}: the seed must be a whole number below 10⁹, as in random:0")
    state = _random_state(variant.architecture, int(seed))
    record = Weights(source=f"random:{int(seed)}", digest=_digest(state), layout="random", num_classes=1000)
    return Checkpoint(state, variant, record, variant.preprocessing, ())


def _random_state(arch: Architecture, seed: int) -> dict[str, Tensor]:
    """Weights in which every layer matters: unit gain, layer scale near ½ (at its published start of 1e-6 no
    block would reach the output, and no error in one would be seen)."""
    import torch

    state = {}
    for key, empty in _empty(arch, 1000).state_dict().items():
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()) ^ seed)
        tensor = torch.empty(empty.shape).normal_(generator=generator)
        last = key.rpartition(".")[2]
        if ".grn." in key:
            tensor.mul_(0.3)
        elif last == "gamma":
            tensor.mul_(0.1).add_(0.5)
        elif tensor.ndim > 1:
            tensor.div_(math.sqrt(tensor[0].numel()))
        elif last == "bias":
            tensor.mul_(0.05)
        else:
            tensor.mul_(0.1).add_(1)
        state[key] = tensor
    return state


def _empty(arch: Architecture, classes: int) -> ConvNeXt:
    """The network with parameters on the meta device, without memory."""
    import torch

    from exporter.model.convnext import ConvNeXt

    with torch.device("meta"):
        return ConvNeXt(arch, classes)


def _digest(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(state):
        tensor = state[key].contiguous()
        digest.update(f"{key} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


def reload(artifact: Artifact, source: str | None = None) -> Checkpoint:
    """Load the weights that an artifact was built from.

    Raises: BadRequest when their digest differs; Unavailable when they do not exist.
    """
    expected, variant = artifact.sidecar.weights, artifact.sidecar.variant
    where = source or absolute(expected.source, artifact.path.parent)
    if not source and not _exists(where):
        raise Unavailable(f"{where}: the weights are no longer there; say where with --weights")
    loaded, _ = _load(where, None if variant.endswith("custom") else variant)
    if loaded.weights.digest != expected.digest:
        raise BadRequest(
            f"{where}: other weights than the artifact was made from (digest "
            f"{loaded.weights.digest[:12]}…, expected {expected.digest[:12]}…); give those with --weights"
        )
    return loaded


def _is_path(source: str) -> bool:
    return not source.startswith(("random:", "hf-hub:"))


def _exists(source: str) -> bool:
    """Whether a source exists, checked without network access."""
    return not _is_path(source) or Path(source).exists() or Path(source.rpartition("#")[0]).is_file()


def relative(source: str, folder: Path) -> str:
    """The path of a source as stored in an artifact in `folder`.

    It is relative to the artifact if both are below the working folder, so that a project can be moved; otherwise it
    is unchanged.
    """
    here = Path.cwd()
    inside = _is_path(source) and Path(source).is_relative_to(here) and folder.resolve().is_relative_to(here)
    return os.path.relpath(source, folder.resolve()) if inside else source


def absolute(source: str, folder: Path) -> str:
    """The path of a source from the one stored in an artifact in `folder`: the inverse of `relative`."""
    return os.path.normpath(folder.resolve() / source) if _is_path(source) else source
