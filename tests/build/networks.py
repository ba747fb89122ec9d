"""A network that loses accuracy in int8, and images to measure it on."""

import numpy as np
from safetensors.torch import load_file, save_file

from tests.conftest import PX, write_tiny

FRAGILE = ("stages.2.1", "stages.0.0")


def write_fragile(folder):
    """A hidden channel of two blocks has a huge bias and no effect on the outputs, so int8 loses all other channels."""
    write_tiny(folder)
    state = load_file(folder / "model.safetensors")
    for block in FRAGILE:
        state[f"{block}.pwconv1.bias"][5] += 3000
        state[f"{block}.pwconv2.weight"][:, 5] = 0
    save_file(state, folder / "model.safetensors")
    return folder


def write_labelled(path):
    """Twenty labelled images: not of anything, but they are the user's."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    np.savez(path, images=small.repeat(PX // 8, 1).repeat(PX // 8, 2), labels=rng.integers(0, 10, 20))
    return path
