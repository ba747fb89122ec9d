"""Pictures for networks that take any size, and the outputs of their artifacts."""

import numpy as np

from exporter import backends
from exporter.artifact.sidecar import Preprocessing
from exporter.data import images, synthetic


def pictures(size, count=1):
    """Drawn pictures as these networks take them, (count, 3, height, width)."""
    pixels = [synthetic.dead_leaves(size, seed, 3) for seed in range(count)]
    return np.stack([images.normalise(one, Preprocessing()) for one in pixels])


def outputs(artifact, batch):
    """The outputs of an artifact for a batch."""
    runtime = backends.runtime(artifact.sidecar.backend)
    with runtime.open(artifact, runtime.options()) as session:
        return session(batch)
