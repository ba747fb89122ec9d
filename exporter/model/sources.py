"""Finds the file that a source of weights names: on the Hub, in a folder, or itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from exporter.artifact.disk import user_path
from exporter.errors import BadRequest, some
from exporter.model import checkpoint, hub
from exporter.model.config import Config, read_config
from exporter.model.variants import Variant, published_license

WEIGHT_FILES = (
    *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"),
    *("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.pth", "model.pt"),
    *("model.keras", "model.weights.h5"),
)
# Of training, beside the weights of a folder.
_NO_WEIGHTS = ("optimizer", "scheduler", "training_args", "rng_state", "scaler", "trainer_state", "random_states")


@dataclass(frozen=True)
class Found:
    """A file of weights, the part of it to take, and what the files beside it state."""

    source: str
    path: Path
    part: str
    config: Config
    license: str | None = None


def default_repository(variant: Variant) -> str:
    """The repository of a variant's default weights.

    Raises: BadRequest for a variant without.
    """
    if variant.hub is None:
        raise BadRequest(
            f"{variant.name} has no published weights on the Hub; give --weights FILE, hf-hub:owner/name or random:0"
        )
    return variant.hub


def from_hub(repository: str) -> Found:
    """The weights of a repository on the Hugging Face Hub, downloaded.

    Raises: BadRequest for a repository without weights; Unavailable when the Hub cannot be reached.
    """
    folder = hub.download(repository)
    path = weights_in(folder)
    config = read_config(folder, path)
    return Found(f"hf-hub:{repository}", path, "", config, license(folder, config, repository))


def from_disk(source: str) -> Found:
    """The weights that a path names: a file, a part of it, or a folder.

    Raises: BadRequest for a path that does not exist, or a folder without weights.
    """
    file, _, part = source.rpartition("#") if "#" in source and not user_path(source).exists() else (source, "", "")
    path = user_path(file)
    if not path.exists():
        raise BadRequest(f"{path}: no such file or folder; weights are hub, hf-hub:owner/name, a file or random:SEED")
    path = path.resolve()
    source = str(path) + (f"#{part}" if part else "")
    if path.is_dir():
        path = weights_in(path)
    return Found(source, path, part, read_config(path.parent, path))


def weights_in(folder: Path) -> Path:
    """The weights of a folder: a file of a usual name, or the only one of any name.

    Raises: BadRequest.
    """
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    if (folder / "adapter_config.json").is_file():
        raise checkpoint.adapter(folder)
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
    inside = sorted(
        entry.name
        for entry in folder.iterdir()
        if entry.is_dir() and any((entry / name).is_file() for name in WEIGHT_FILES)
    )
    if inside:  # checkpoints of transformers' Trainer
        raise BadRequest(f"{folder}: no weights in it, but in its folders {some(inside)}; give one of them")
    raise BadRequest(f"{folder}: no weights in it; expected one of {', '.join(WEIGHT_FILES)}")


def license(folder: Path, config: Config, repository: str) -> str | None:
    """The license from the model card, from `config.json`, or, for default weights, from the table of variants."""
    return hub.license_in(folder) or config.license or published_license(repository)


def file_of(source: str) -> tuple[Path, str]:
    """The file of weights that a source names, and the part of it.

    Raises: BadRequest for random weights, or a source that does not exist; Unavailable when the Hub cannot be reached.
    """
    if is_random(source):
        raise BadRequest(f"{source}: no library has these; give a checkpoint or --reference module:callable")
    files = from_hub(source.removeprefix("hf-hub:")) if source.startswith("hf-hub:") else from_disk(source)
    return files.path, files.part


def is_random(source: str) -> bool:
    """Whether a source is random weights, `random` or `random:SEED`, and not a file of that name."""
    return source == "random" or source.startswith("random:")
