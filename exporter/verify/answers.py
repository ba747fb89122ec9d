"""PyTorch's answers, cached per user: a network computes the same images once for all its artifacts.

A file has the outputs of one batch. Its cache key is `EagerSession.identity`, which is everything that determines the
outputs of a network, and a digest of the pixels that the network takes: changed images, preprocessing or weights never
meet an old answer. A batch is stored whole, because the last bits of an output depend on the images in its batch.

Only scores of classes and feature vectors are stored. Tokens, feature maps and outputs of pixels take up to tens of MB
an image, and PyTorch computes them each time; sliding windows are for such outputs only. The user's own module has no
version, so its answers are not stored either.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import msgspec
import numpy as np

from exporter.artifact import Artifact, sealed
from exporter.artifact.disk import cache_folder
from exporter.backends import Array, Bound, Outputs, Session, as_network_takes, eager
from exporter.progress import note

SMALL = {"classify", "embed"}
LIMIT_BYTES = 2**30
"""Of all files together; those that were not used for longest are removed."""


@contextmanager
def open_reference(artifact: Artifact, options: eager.EagerOptions) -> Iterator[Session]:
    """The PyTorch model that an artifact was built from, behind the cache where its outputs are small.

    Its weights are read in any case, so that missing or other weights are refused.

    Raises: BadRequest when the weights have changed; Unavailable when they are missing.
    """
    with eager.session(artifact, options) as session:
        identity = session.identity() if SMALL.issuperset(artifact.sidecar.spec.tasks) else None
        if identity is None:
            yield session
            return
        cached = CachedSession(session, msgspec.json.encode(identity, order="deterministic"))
        try:
            yield cached
        finally:
            cached.close()


class CachedSession:
    """A session of PyTorch that reads the outputs of batches from the cache, and stores those that it computes."""

    def __init__(self, session: eager.EagerSession, identity: bytes) -> None:
        self.session, self.facts, self.streams = session, session.facts, session.streams
        self.identity, self.folder = identity, cache_folder() / "answers"
        self.images = self.cached = self.unpruned_bytes = 0

    def __call__(self, images: Array) -> Outputs:
        """Outputs (N, …) for images (N, C, H, W), or a picture that Pillow resizes, with the same bits as computed."""
        pixels = np.ascontiguousarray(as_network_takes(images, self.session.recipe))
        key = hashlib.sha256(self.identity + f" {pixels.dtype.str} {pixels.shape} ".encode())
        key.update(pixels.data)
        path = self.folder / f"{key.hexdigest()[:32]}.sealed"
        self.images += len(images)
        if arrays := sealed.read(path, key.digest(), "PyTorch computes these images again"):
            self.cached += len(images)
            with suppress(OSError):
                os.utime(path)
            return tuple(arrays.values())
        outputs = self.session(images)
        named = {f"output{number}": output for number, output in enumerate(outputs)}
        self.unpruned_bytes += sealed.write(path, key.digest(), named)
        if self.unpruned_bytes > LIMIT_BYTES // 8:
            self._prune()
        return outputs

    def bind(self, batches: Sequence[Array]) -> Bound:
        """As the session does, without the cache."""
        return self.session.bind(batches)

    def close(self) -> None:
        """Note how many answers were cached, and prune the cache."""
        if self.cached:
            note(
                f"PyTorch's outputs for {self.cached} of {self.images} images were read from the cache ({self.folder})"
            )
        if self.unpruned_bytes:
            self._prune()

    def _prune(self) -> None:
        """Remove the files that were not used for longest, as far as all together exceed the limit."""
        self.unpruned_bytes = 0
        files = []
        for path in self.folder.glob("*"):
            with suppress(OSError):
                stat = path.stat()
                files.append((stat.st_mtime_ns, stat.st_size, path))
        excess = sum(size for _, size, _ in files) - LIMIT_BYTES
        for _, size, path in sorted(files):
            if excess <= 0:
                break
            with suppress(OSError):
                path.unlink(missing_ok=True)
                excess -= size
