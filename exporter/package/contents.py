"""Content of a package: artifact, outputs, sample picture and expected outputs."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exporter import artifact as artifacts
from exporter import backends
from exporter.artifact import Artifact
from exporter.artifact.sidecar import COLORS, Preprocessing, Tensor
from exporter.backends import Outputs, Serving
from exporter.data import images, synthetic
from exporter.data.masks import MOST_COLORS
from exporter.errors import BadRequest, Unavailable, printable
from exporter.predict.answers import Output
from exporter.recipe import Checks
from exporter.verify import open_runnable, run_batch
from exporter.verify.outputs import PIXELS, decision

SAMPLE_SIZE = 240, 320  # height and width, in pixels, of the picture that is drawn
SAMPLE_SEED = 7
LARGEST_ERROR = {"fp32": 1e-3}  # as a share of the largest output; of the same file on two CPUs
LARGEST_ERROR_NARROW = 0.05


@dataclass(frozen=True)
class Sample:
    """A picture: its file's name in a package, and the content of the file."""

    name: str
    content: bytes


@dataclass(frozen=True)
class Contents:
    """Content of a package.

    artifact: the one that is packaged.
    serving: how its runtime is installed and run.
    outputs: what they hold; their labels are those of `labels`.
    labels: of the classes; () where they are not known.
    top: how many classes an answer has.
    checks: with the probability at or above which an image has a label of a multi-label head.
    sample: the picture of the self-test.
    expected: the artifact's outputs for it, or None where it cannot run here.
    unexpected: why it cannot, or how the outputs were computed where the artifact itself did not run.
    exact: whether the arithmetic of a server is always that of the artifact.
    """

    artifact: Artifact
    serving: Serving
    outputs: tuple[Output, ...]
    labels: tuple[str, ...]
    top: int
    checks: Checks
    sample: Sample
    expected: Outputs | None
    unexpected: str = ""
    exact: bool = True

    @property
    def name(self) -> str:
        """The name of the model: that of the artifact's file without its suffix, in letters that a URL can have."""
        return re.sub(r"[^\w.-]", "_", self.artifact.path.stem, flags=re.ASCII)

    @property
    def preprocessing(self) -> Preprocessing:
        """How an image becomes the input."""
        return self.artifact.sidecar.preprocessing

    @property
    def input(self) -> Tensor:
        """The input of the artifact."""
        return self.artifact.sidecar.inputs[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The outputs of the artifact."""
        return self.artifact.sidecar.outputs

    @property
    def pairs(self) -> list[tuple[Output, Tensor]]:
        """Each output with its tensor."""
        return list(zip(self.outputs, self.tensors, strict=True))

    @property
    def cut(self) -> float:
        """The output at or above which an image has a label of a multi-label head."""
        return decision(self.checks, self.outputs[0].holds)

    @property
    def batch(self) -> int | None:
        """The size of a fixed batch, None where any number of images is taken."""
        return self.artifact.sidecar.batch

    @property
    def has_masks(self) -> bool:
        """Whether the output is of each pixel."""
        return self.outputs[0].kind in PIXELS

    @property
    def mask_type(self) -> str:
        """The type of numbers of classes of pixels."""
        return "uint8" if self.classes <= MOST_COLORS else "uint16"

    @property
    def classes(self) -> int:
        """How many classes the network tells apart."""
        return self.artifact.sidecar.weights.num_classes

    @property
    def sides(self) -> tuple[int, int, int]:
        """The axes of one input, as the artifact has them: channels first or last."""
        channels, height, width = self.preprocessing.shape
        return (channels, height, width) if self.preprocessing.layout == "NCHW" else (height, width, channels)

    @property
    def limit(self) -> float:
        """The largest difference that the self-test lets pass, as a share of the largest output."""
        precision = self.artifact.sidecar.precision if self.exact else ""
        return LARGEST_ERROR.get(precision, LARGEST_ERROR_NARROW)

    @property
    def files(self) -> list[Path]:
        """Every file of the artifact, with its sidecar."""
        return [*self.artifact.files, artifacts.sidecar_path(self.artifact.path)]


def serving_of(artifact: Artifact) -> Serving:
    """How the runtime of an artifact is installed and run.

    Raises: BadRequest for a runtime that no package is written for.
    """
    serving = backends.runtime_of(artifact).serving
    if serving is None:
        known = [name for name in backends.targets() if backends.runtime(name).serving is not None]
        raise BadRequest(
            f"{artifact.path}: built for {artifact.sidecar.backend}, and packages are written for {', '.join(known)}; "
            "build it for one of them"
        )
    return serving


def sample_of(file: Path | None, preprocessing: Preprocessing) -> Sample:
    """The picture of a file, or one that is drawn: the same each time.

    Raises: BadRequest for a file that is no image.
    """
    if file is None:
        return _drawn(preprocessing)
    try:
        content = file.read_bytes()
        images.read(io.BytesIO(content), preprocessing)
    except OSError as error:
        raise BadRequest(f"--sample {file}: {error.strerror}; give the file of an image") from None
    except images.Unreadable as error:
        raise BadRequest(f"--sample {file}: {printable(str(error))}; give an image that can be read") from None
    if file.suffix.lower() not in images.SUFFIXES:
        raise BadRequest(f"--sample {file}: expected a file that ends in {', '.join(sorted(images.SUFFIXES))}")
    return Sample(f"sample{file.suffix.lower()}", content)


def _drawn(preprocessing: Preprocessing) -> Sample:
    from PIL import Image

    channels = preprocessing.channels
    pixels = synthetic.dead_leaves(SAMPLE_SIZE, SAMPLE_SEED, channels)
    file = io.BytesIO()
    if channels in COLORS:
        mode = COLORS[channels]
        Image.fromarray(pixels[..., 0] if channels == 1 else np.ascontiguousarray(pixels), mode).save(file, "PNG")
        return Sample("sample.png", file.getvalue())
    first, *others = [Image.fromarray(np.ascontiguousarray(pixels[..., band])) for band in range(channels)]
    first.save(file, "TIFF", save_all=True, append_images=others)
    return Sample("sample.tiff", file.getvalue())


def expected_of(artifact: Artifact, sample: Sample) -> tuple[Outputs | None, str]:
    """The artifact's outputs for a picture, and how they were computed where it is not the artifact that ran; None and
    the reason where it cannot run here."""
    pixels = images.read(io.BytesIO(sample.content), artifact.sidecar.preprocessing)[None]
    try:
        with open_runnable(artifact, backends.runtime_of(artifact)) as runnable:
            opened, runtime = runnable.artifact, runnable.runtime
            options = runtime.options(device=backends.device_of(opened))
            with runtime.open(opened, options) as session:
                outputs = run_batch(session, pixels, opened.sidecar.batch)
            how = runnable.findings[0].detail if runnable.is_simulated else ""
    except Unavailable as error:
        return None, str(error)
    if not all(np.isfinite(output).all() for output in outputs):
        raise BadRequest(f"{artifact.path}: its outputs for {sample.name} are not finite; give another --sample")
    return outputs, how
