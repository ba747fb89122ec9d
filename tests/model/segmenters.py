"""Small UPerNets of transformers with random weights, and the names that other libraries give to the same weights."""

from __future__ import annotations

import json
import re

import torch

from benchmarks import libraries

LABELS = ("wall", "sky", "tree", "road", "grass", "person", "sea")


def transformers_model(
    dims=(8, 16, 24, 32), width=16, scales=(1, 2, 3, 6), labels=LABELS, kind="ConvNext", levels=None
):
    """An `UperNetForSemanticSegmentation` whose every layer and statistic matters; its head takes the maps of all
    stages or of these `levels`."""
    transformers = libraries.library("transformers")
    stages = [f"stage{number + 1}" for number in levels or range(len(dims))]
    backbone = getattr(transformers, f"{kind}Config")(
        depths=[1] * len(dims), hidden_sizes=list(dims), num_stages=len(dims), out_features=stages
    )
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=width, pool_scales=list(scales), id2label=dict(enumerate(labels)),
        use_auxiliary_head=len(dims) > 2, auxiliary_in_channels=dims[2] if len(dims) > 2 else None,
        auxiliary_channels=12,
    )  # fmt: skip
    model = libraries.randomize(transformers.UperNetForSemanticSegmentation(config))
    generator = torch.Generator().manual_seed(5)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2, generator=generator)
        elif name.endswith("running_mean"):
            buffer.normal_(0, 0.3, generator=generator)
    return model.eval()


def save(folder, model, processor=None):
    """The folder of a model with its config and, if one is there, its preprocessing."""
    config = json.loads(model.config.to_json_string()) | {"architectures": [type(model).__name__]}
    libraries.save(folder, model, config)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def logits(model, images):
    """The logits (N, classes, H, W) of transformers' own forward."""
    with torch.inference_mode():
        return model(images).logits


MMSEGMENTATION = (
    (r"^backbone\.embeddings\.patch_embeddings\.", "backbone.downsample_layers.0.0."),
    (r"^backbone\.embeddings\.layernorm\.", "backbone.downsample_layers.0.1."),
    (r"^backbone\.encoder\.stages\.(\d)\.layers\.(\d)\.layer_scale_parameter$", r"backbone.stages.\1.\2.gamma"),
    (r"^backbone\.encoder\.stages\.(\d)\.layers\.(\d)\.dwconv\.", r"backbone.stages.\1.\2.depthwise_conv."),
    (r"^backbone\.encoder\.stages\.(\d)\.layers\.(\d)\.layernorm\.", r"backbone.stages.\1.\2.norm."),
    (r"^backbone\.encoder\.stages\.(\d)\.layers\.(\d)\.pwconv", r"backbone.stages.\1.\2.pointwise_conv"),
    (r"^backbone\.encoder\.stages\.(\d)\.downsampling_layer\.", r"backbone.downsample_layers.\1."),
    (r"^(decode_head|auxiliary_head)\.(.*)batch_norm", r"\1.\2bn"),
    (r"^(decode_head|auxiliary_head)\.classifier", r"\1.conv_seg"),
)
FACEBOOK = ((r"depthwise_conv", "dwconv"), (r"pointwise_conv", "pwconv"))


def state_of(model, library="mmsegmentation"):
    """The state dict of a model under the names of mmsegmentation or facebookresearch."""
    rules = MMSEGMENTATION if library == "mmsegmentation" else (*MMSEGMENTATION, *FACEBOOK)
    state = {}
    for key, tensor in model.state_dict().items():
        for pattern, name in rules:
            key = re.sub(pattern, name, key)
        key = re.sub(r"^backbone\.hidden_states_norms\.stage(\d)", lambda m: f"backbone.norm{int(m[1]) - 1}", key)
        state[key] = tensor
    return state
