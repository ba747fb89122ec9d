"""The libraries that people train with, to compare with; tests that need one are skipped where it is not installed."""

import sys
import types

import pytest


def library(name):
    """A library, or a skip. The compiled part of torchvision does not load beside every torch, and is not needed."""
    if "torchvision" not in sys.modules:
        sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
    return pytest.importorskip(name, reason=f"{name} is the reference, and it is not installed")
