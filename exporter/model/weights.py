"""Loads weights from a source (SRC) as a checkpoint in the layout of this tool, with labels and preprocessing.

SRC is `hub`, `hf-hub:owner/name`, a file, a folder in Hugging Face's form, or `random[:SEED]`.
"""

from __future__ import annotations

import hashlib
import math
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.artifact import Artifact, sha256_file
from exporter.artifact.outputs import WITH_LABELS
from exporter.artifact.sidecar import OutputSpec, Preprocessing, Task, Weights
from exporter.errors import BadRequest, Unavailable
from exporter.model import checkpoint, hub, sources, written
from exporter.model.config import CONFIG_FILES, from_training, read_config, together
from exporter.model.fit import empty, fit
from exporter.model.labels import read_labels
from exporter.model.layouts import Choices
from exporter.model.preprocessing import VALUES, Stated, known, published, with_keras
from exporter.model.variants import Architecture, Variant, head_layer, resolve
from exporter.progress import note

if TYPE_CHECKING:
    from torch import Tensor

    from exporter.model.convnext import ConvNeXt

_OTHER_OUTPUTS = {"images", "embedding", "tokens", *(f"stage{number}" for number in range(1, 9))}
MOST_LABELS = 256  # classes that a byte tells apart
PERMISSIVE = {"apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc0-1.0", "unlicense"}


@dataclass(frozen=True)
class Checkpoint:
    """Weights that fit a variant: fp32 tensors in the layout of this tool, with labels and preprocessing if known.

    `origins` says where values of architecture and preprocessing come from, by the name of the field; `other_head` is
    the segmenter whose head was left out.
    """

    state: dict[str, Tensor]
    variant: Variant
    weights: Weights
    stated: Stated
    labels: tuple[str, ...]
    origins: dict[str, str] = field(default_factory=dict)
    other_head: str = ""

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing without options.

        Raises: BadRequest for a step that only an option can replace.
        """
        return self.stated.resolve()[0]

    @property
    def task(self) -> Task:
        """The outputs that these weights are for: `segment` with the head of UPerNet, `pyramid` with an FPN,
        `classify`, `embed` without a classifier, `features` without a last norm either."""
        arch = self.variant.architecture
        if arch.decoder:
            return "segment"
        if arch.pyramid:
            return "pyramid"
        if arch.pool == "none":
            return "features"
        if self.weights.num_classes:
            return "classify"
        return "embed" if self._has_vector else "features"

    @property
    def _has_vector(self) -> bool:
        """Whether a norm or projection behind the last stage gives a feature vector."""
        return self.variant.architecture.head_norm or self.variant.architecture.projection

    def model(self, spec: OutputSpec | None = None) -> ConvNeXt:
        """The network in eval mode, with these outputs. It shares memory with `state`.

        Raises: BadRequest when these weights have no classifier, or no last norm for an embedding.
        """
        spec = spec or OutputSpec(tasks=(self.task,))
        self.check(spec)
        head = self.state.get("head.weight")
        model = empty(self.variant.architecture, 1 if head is None else head.shape[0])
        arch = self.variant.architecture
        whole = head is not None or arch.heads != () or arch.decoder is not None or arch.pyramid is not None
        model.load_state_dict(self.state, assign=True, strict=whole)
        return model.eval().requires_grad_(False).select(spec)

    def check(self, spec: OutputSpec) -> None:
        """Refuse outputs that these weights are not for.

        Raises: BadRequest.
        """
        for task in spec.tasks:
            self._check_task(task)
        if problem := spec.contradiction():
            raise BadRequest(f"{self.weights.source}: {problem}")
        if spec.answer in WITH_LABELS and self.weights.num_classes > MOST_LABELS:
            raise BadRequest(
                f"--output {spec.answer}: {self.weights.num_classes} classes, and labels are bytes; "
                "give --output logits"
            )
        if spec.answer in WITH_LABELS and self.weights.num_classes == 1:
            raise BadRequest(
                f"--output {spec.answer}: the network has one class, which every pixel would get; give --output logits "
                "and apply a threshold"
            )
        heads = dict(map(head_layer, self.variant.architecture.heads))
        if spec.answer in ("softmax", "top5") and 1 in (self.weights.num_classes, *heads.values()):
            raise BadRequest(f"--output {spec.answer}: a head has one output, and a choice needs two; leave it out")
        if same := heads.keys() & _OTHER_OUTPUTS:
            raise BadRequest(f"{self.weights.source}: a head has the name of another output: {', '.join(sorted(same))}")

    def _check_task(self, task: str) -> None:
        decoder = self.variant.architecture.decoder
        if task == "pyramid":
            if self.variant.architecture.pyramid is None:
                raise BadRequest(
                    f"{self.weights.source}: no FPN (neck.lateral_convs, neck.fpn_convs) in these weights; --task "
                    "features takes the maps of the backbone"
                )
            return
        if task == "segment":
            if decoder is None:
                head = (
                    f"the head of these weights is {self.other_head}" if self.other_head else "no head of UPerNet here"
                )
                raise BadRequest(
                    f"{self.weights.source}: {head}, and --task segment takes UPerNet; --task features takes the "
                    "backbone"
                )
            return
        if task != "features" and self.variant.architecture.pool == "none":
            raise BadRequest(
                f"{self.weights.source}: global_pool is none, so the model returns a map; --task features takes it, "
                f"and --task {task} needs avg, max, avgmax or catavgmax in config.json"
            )
        if task == "classify" and (not self.weights.num_classes or decoder is not None):
            raise BadRequest(f"{self.weights.source}: no classifier in these weights; --task {self.task} takes them")
        if task == "tokens" and self.variant.architecture.pool == "catavgmax":
            raise BadRequest(
                f"--task tokens: {self.weights.source} pools with catavgmax, so its vector is wider than a token; "
                "--task embed,features takes both apart"
            )
        if task in ("embed", "tokens") and not self._has_vector:
            raise BadRequest(f"{self.weights.source}: no norm behind the last stage; --task features takes them")


def load(
    source: str,
    variant: str | None = None,
    labels: Path | None = None,
    choices: Choices = Choices(),  # noqa: B008
) -> Checkpoint:
    """Load weights from any source, and check them for a variant.

    Args:
        source: `hub`, `hf-hub:owner/name`, a file (`FILE#model_ema` takes one part of it), a folder with
            `config.json`, or `random[:SEED]`.
        variant: a name from the table; None detects the variant from the weights, or takes `tiny` where they have none.
        labels: a file with the labels (`labels.read_labels`), in place of those in `config.json`.
        choices: what weights cannot say.

    Raises: BadRequest for weights that cannot be used; Unavailable when the Hub cannot be reached.
    """
    loaded = _load(source, variant, choices)
    names, origins = loaded.labels, dict(loaded.origins)
    if labels is not None:
        names, origins["labels"] = read_labels(labels), "--labels"
    classes = loaded.weights.num_classes
    if names and classes and len(names) != classes:
        raise BadRequest(
            f"{labels or origins['labels']}: {len(names)} labels, but the head has {classes} classes; "
            "give --labels FILE that fits"
        )
    return replace(loaded, labels=names, origins=origins)


def _load(source: str, variant: str | None, choices: Choices) -> Checkpoint:
    """The checkpoint with the labels that it comes with."""
    wanted, repository = resolve(variant) if variant else (None, None)
    if sources.is_random(source):
        return _random(source, wanted or resolve("tiny")[0])
    if source == "hub":
        files = sources.from_hub(repository or sources.default_repository(wanted or resolve("tiny")[0]))
    elif source.startswith("hf-hub:"):
        files = sources.from_hub(source.removeprefix("hf-hub:"))
    else:
        files = sources.from_disk(source)
    return _checkpoint(files, wanted, choices)


def fingerprint(source: str, variant: str | None = None, labels: Path | None = None) -> str | None:
    """Cache key of weights: a digest of the files that `load` reads; None for weights that are not downloaded yet.

    Raises: BadRequest for files that do not exist.
    """
    if sources.is_random(source):
        of_labels = _content(labels) if labels is not None and labels.is_file() else ""
        return f"{source} {variant} {of_labels}".rstrip()
    wanted, repository = resolve(variant) if variant else (None, None)
    if source == "hub":
        repository = repository or sources.default_repository(wanted or resolve("tiny")[0])
    elif source.startswith("hf-hub:"):
        repository = source.removeprefix("hf-hub:")
    else:
        repository = None
    if repository is not None:
        folder = hub.cached(repository)
        if folder is None:
            return None
        path, part = sources.weights_in(folder), ""
    else:
        found = sources.from_disk(source)
        path, part = found.path, found.part
    beside = [path.parent / name for name in CONFIG_FILES]
    files = [*checkpoint.files(path), *(file for file in (*beside, labels) if file is not None and file.is_file())]
    license_id = sources.license(path.parent, read_config(path.parent), repository) if repository else None
    return " ".join([part, *map(_content, files), license_id or ""])


def _content(file: Path) -> str:
    """The sha256 of a file, cached until the file changes."""
    stat = file.stat()
    return _sha256(file, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)
def _sha256(file: Path, size: int, changed: int) -> str:
    del size, changed
    return sha256_file(file)


def note_license(record: Weights) -> None:
    """Print a note for a license that restricts use."""
    if record.license is not None and record.license not in PERMISSIVE:
        limit = "no commercial use" if "-nc" in record.license else "read it before you pass them on"
        note(f"the weights {record.source.removeprefix('hf-hub:')} have the license {record.license}: {limit}")


def _checkpoint(files: sources.Found, wanted: Variant | None, choices: Choices) -> Checkpoint:
    content = checkpoint.read(files.path, files.part)
    config = together(files.config, from_training(content.beside))
    for sentence in (*content.notes, *config.notes):
        note(sentence)
    try:
        own = written.read(files.path)
        ordered = not any(file.suffix == ".safetensors" for file in checkpoint.files(files.path))
        fitted = fit(content.tensors, config.network, choices, own.architecture if own else None, ordered)
    except BadRequest as error:
        raise BadRequest(f"{files.path}: {error}") from None
    for sentence in fitted.notes:
        note(f"{files.path.name}: {sentence}")
    variant = fitted.variant
    if wanted and wanted.name != variant.name:
        advice = "leave --variant out" if variant.name.endswith("custom") else f"use --variant {variant.name}"
        raise BadRequest(f"{files.path}: weights of {variant.name}, asked for {wanted.name}; {advice}")
    record = Weights(
        source=files.source,
        digest=digest(fitted.state),
        layout=fitted.layout,
        num_classes=fitted.num_classes,
        file_sha256=sha256_file(files.path),
        license=files.license,
    )
    if own and own.preprocessing:
        origins = config.origins | dict.fromkeys(VALUES, "preprocessing argument of export")
        config = replace(config, preprocessing=own.preprocessing, origins=origins, unclear=(), share_below_384=None)
    classes = fitted.num_classes
    if config.labels and not files.config.labels and len(config.labels) != classes:
        if classes:
            note(f"{files.path.name}: {len(config.labels)} labels of the training set do not fit {classes} classes")
        config = replace(config, labels=())
    stated = known(config, own.layout if own else fitted.layout, variant, str(files.path))
    if files.path.suffix in (".h5", ".keras") and "keras" in content.beside and config.preprocessing is None:
        stated = with_keras(stated, content.beside["keras"])
    if fitted.other_head not in ("", "unknown"):
        note(f"{files.path.name}: the head of {fitted.other_head} is left out; the feature maps are what remains")
    return Checkpoint(fitted.state, variant, record, stated, config.labels, config.origins, fitted.other_head)


def _random(source: str, variant: Variant) -> Checkpoint:
    seed = source.removeprefix("random").removeprefix(":") or "0"
    if not seed.isdecimal() or len(seed) > 9:
        raise BadRequest(f"--weights {source}: the seed must be a whole number below 10⁹, as in random:0")
    state = _random_state(variant.architecture, int(seed))
    record = Weights(source=f"random:{int(seed)}", digest=digest(state), layout="random", num_classes=1000)
    return Checkpoint(state, variant, record, published(variant), ())


def _random_state(arch: Architecture, seed: int) -> dict[str, Tensor]:
    """Weights in which every layer matters: unit gain, layer scale near ½ (at its published start of 1e-6 no
    block would reach the output, and no error in one would be seen)."""
    import torch

    state = {}
    for key, parameter in empty(arch, 1000).state_dict().items():
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()) ^ seed)
        tensor = torch.empty(parameter.shape).normal_(generator=generator)
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


def digest(state: Mapping[str, Tensor]) -> str:
    """The sha256 of tensors by name, of any memory layout."""
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
    loaded = _load(where, None if variant.endswith("custom") else variant, choices_of(artifact.sidecar.recipe["model"]))
    if loaded.weights.digest != expected.digest:
        raise BadRequest(
            f"{where}: other weights than the artifact was made from (digest "
            f"{loaded.weights.digest[:12]}…, expected {expected.digest[:12]}…); give those with --weights"
        )
    return loaded


def choices_of(model: Mapping[str, Any]) -> Choices:
    """The choices in the fields of a recipe's model."""
    return Choices(**{name: model.get(name) or "" for name in ("prefix", "head", "head_act", "norm")})


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
