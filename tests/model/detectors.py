"""Small detectors with random weights: the backbone is that of transformers, the FPN is written here as mmdet documents
it (`mmdet/models/necks/fpn.py`), and all names are those of mmdet's checkpoints."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from benchmarks import libraries
from tests.model import segmenters

CONFIG = """
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    type='MaskRCNN',
    backbone=dict(type='ConvNeXt', out_indices=[0, 1, 2, 3]),
    neck={neck},
    rpn_head=dict(type='RPNHead', anchor_generator=dict(strides=[4, 8, 16, 32, 64])))
img_norm_cfg = dict(mean=[127.5, 127.5, 51], std=[58.395, 57.12, 57.375], to_rgb={rgb})
"""
USUAL = "dict(type='FPN', in_channels=[8, 16, 24, 32], out_channels=12, num_outs=5)"


class ConvModule(nn.Module):
    def __init__(self, *args, **settings):
        super().__init__()
        self.conv = nn.Conv2d(*args, **settings)


class Neck(nn.Module):
    """FPN with `num_outs` maps of the stages from `start_level` on; `added` as mmdet's add_extra_convs."""

    def __init__(self, dims, width=12, num_outs=5, start_level=0, added=False, relu=False):
        super().__init__()
        self.start, self.num_outs, self.added, self.relu = start_level, num_outs, added, relu
        dims = dims[start_level:]
        self.lateral_convs = nn.ModuleList([ConvModule(dim, width, 1) for dim in dims])
        self.fpn_convs = nn.ModuleList([ConvModule(width, width, 3, padding=1) for _ in dims])
        for index in range(num_outs - len(dims) if added else 0):
            before = dims[-1] if index == 0 and added == "on_input" else width
            self.fpn_convs.append(ConvModule(before, width, 3, stride=2, padding=1))

    def forward(self, maps):
        maps = maps[self.start :]
        laterals = [module.conv(one) for module, one in zip(self.lateral_convs, maps, strict=True)]
        sources = {"on_input": maps[-1], "on_lateral": laterals[-1]}
        for level in range(len(maps) - 1, 0, -1):
            size = laterals[level - 1].shape[2:]
            laterals[level - 1] = laterals[level - 1] + functional.interpolate(laterals[level], size=size)
        outs = [self.fpn_convs[level].conv(laterals[level]) for level in range(len(maps))]
        sources["on_output"] = outs[-1]
        for level in range(len(maps), self.num_outs):
            if not self.added:
                outs.append(outs[-1][:, :, ::2, ::2])
            elif level == len(maps):
                outs.append(self.fpn_convs[level].conv(sources[self.added]))
            else:
                outs.append(self.fpn_convs[level].conv(outs[-1].relu() if self.relu else outs[-1]))
        return outs


class Detector(nn.Module):
    """Backbone, neck, and heads that only have weights."""

    def __init__(self, dims=(8, 16, 24, 32), **neck):
        super().__init__()
        transformers = libraries.library("transformers")
        config = transformers.ConvNextConfig(
            depths=[1] * len(dims), hidden_sizes=list(dims), num_stages=len(dims),
            out_features=[f"stage{number + 1}" for number in range(len(dims))],
        )  # fmt: skip
        self.backbone = transformers.ConvNextBackbone(config)
        self.neck = Neck(dims, **neck)
        self.rpn_head = nn.ModuleDict({"rpn_conv": nn.Conv2d(4, 4, 3)})
        self.roi_head = nn.ModuleDict({"bbox_head": nn.ModuleDict({"fc_cls": nn.Linear(dims[-1], 81)})})

    def forward(self, images):
        return self.neck(self.backbone(images).feature_maps)


def detector(seed=3, **settings):
    return libraries.randomize(Detector(**settings), seed)


def maps(model, images):
    with torch.inference_mode():
        return [one.numpy() for one in model(images)]


def save(path, model, library="mmdet", neck=USUAL, rgb=True, meta=None):
    """A checkpoint as mmdet and facebookresearch write it; without a configuration where `neck` is None."""
    state = segmenters.state_of(model, "mmsegmentation" if library == "mmdet" else library)
    meta = {"CLASSES": ("person", "bicycle"), **(meta or {})}
    if neck is not None:
        meta["config"] = CONFIG.format(neck=neck, rgb=rgb)
    torch.save({"meta": meta, "state_dict": state}, path)
    return path
