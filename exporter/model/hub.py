"""Weights from the Hugging Face Hub, through its own client, cache and progress bar."""

from __future__ import annotations

import re
from pathlib import Path

from exporter.artifact.disk import NO_SPACE
from exporter.errors import BadRequest, Unavailable
from exporter.progress import step

_WEIGHTS = [
    *("model.safetensors", "model.safetensors.index.json", "model-?????-of-?????.safetensors"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-?????-of-?????.bin"),
    *("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    *("model.pth", "model.pt", "model.keras", "model.weights.h5"),
]
_BESIDE = [
    *("config.json", "preprocessor_config.json", "processor_config.json", "open_clip_config.json"),
    *("adapter_config.json", "README.md"),
]
_FILES = [*_WEIGHTS, *_BESIDE]
MAX_CARD_BYTES = 1 << 20


def download(repository: str) -> Path:
    """The folder in the Hub's cache that holds a repository's weights and configuration.

    Raises: BadRequest for a repository that does not exist or is no model; Unavailable with no network and
        nothing in the cache.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    step(f"{repository} from the Hugging Face Hub")
    try:
        return Path(snapshot_download(repository, allow_patterns=_FILES, etag_timeout=10))
    except HFValidationError as error:
        raise BadRequest(f"hf-hub:{repository}: expected hf-hub:owner/name ({error})") from None
    except RepositoryNotFoundError:
        raise BadRequest(f"hf-hub:{repository}: no such repository on the Hub, or it needs `hf auth login`") from None
    except Exception as error:  # noqa: BLE001  (its HTTP client's errors share no base class with its own)
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            raise Unavailable(f"{repository}: no space left for the Hub's cache; free some or set HF_HOME") from None
        raise Unavailable(
            f"{repository}: the Hub cannot be reached ({type(error).__name__}) and its weights are not in the cache; "
            "connect and try again, or give --weights FILE, --weights hf-hub:owner/name of a cached repository, or "
            "--weights random:0"
        ) from None


def cached(repository: str) -> Path | None:
    """The folder in the Hub's cache, without network access; None when the repository is not in it."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repository, allow_patterns=_FILES, local_files_only=True))
    except (OSError, ValueError):  # not there, or no name that a repository can have
        return None
    return folder if any(path.is_file() for name in _WEIGHTS for path in folder.glob(name)) else None


def license_in(folder: Path) -> str | None:
    """The license that the model card (`README.md`) of a downloaded repository names in its header, in lower case."""
    card = folder / "README.md"
    if not card.is_file() or card.stat().st_size > MAX_CARD_BYTES:
        return None
    opening, _, rest = card.read_text("utf-8", "replace").partition("---")
    header = rest.partition("\n---")[0] if not opening.strip() else ""
    found = re.search(r"^license:[ \t]*[\"']?([A-Za-z0-9][A-Za-z0-9.+-]{0,59})[\"']?[ \t]*$", header, re.M)
    return found[1].lower() if found else None
