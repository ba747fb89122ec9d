"""Run by a peer's own Python: our weights as the checkpoint folder that optimum-cli takes.

`python huggingface.py model.safetensors FOLDER`
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

BLOCK = {"norm.": "layernorm.", "gamma": "layer_scale_parameter", "grn.gamma": "grn.weight", "grn.beta": "grn.bias"}


def huggingface_key(key: str) -> str:
    """A key of ours as transformers names it, without the model's own prefix."""
    if block := re.fullmatch(r"stages\.(\d+)\.(\d+)\.(.+)", key):
        rest = next((new + block[3][len(old) :] for old, new in BLOCK.items() if block[3].startswith(old)), block[3])
        return f"encoder.stages.{block[1]}.layers.{block[2]}.{rest}"
    for pattern, new in (
        (r"downsample_layers\.0\.0\.", "embeddings.patch_embeddings."),
        (r"downsample_layers\.0\.1\.", "embeddings.layernorm."),
        (r"downsample_layers\.(\d)\.", r"encoder.stages.\1.downsampling_layer."),
        (r"norm\.", "layernorm."),
    ):
        if re.match(pattern, key):
            return re.sub(f"^{pattern}", new, key)
    return key.replace("head.", "classifier.")


def convert(weights: Path, folder: Path) -> None:
    """Write `config.json` and the weights; every key must match."""
    import transformers

    state = load_file(weights)
    v2 = "stages.0.0.grn.gamma" in state
    prefix = "convnextv2" if v2 else "convnext"
    stages = range(4)
    settings: dict[str, Any] = {
        "depths": [len({k.split(".")[2] for k in state if k.startswith(f"stages.{stage}.")}) for stage in stages],
        "hidden_sizes": [state[f"stages.{stage}.0.dwconv.weight"].shape[0] for stage in stages],
        "num_labels": state["head.weight"].shape[0],
    }
    kind = "ConvNextV2" if v2 else "ConvNext"
    model = getattr(transformers, f"{kind}ForImageClassification")(getattr(transformers, f"{kind}Config")(**settings))
    renamed: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():
        name = huggingface_key(key)
        name = name if name.startswith("classifier.") else f"{prefix}.{name}"
        renamed[name] = tensor[None, None, None] if ".grn." in key else tensor
    model.load_state_dict(renamed, strict=True)
    model.eval().save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
