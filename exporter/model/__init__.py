"""ConvNeXt in PyTorch: the network, the table of variants, weights, and the forms of a network."""

from __future__ import annotations

from typing import get_args

from exporter.recipe import Form

FORMS: tuple[str, ...] = get_args(Form)  # described in `forms`, which imports torch
