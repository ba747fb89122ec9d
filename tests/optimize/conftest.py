"""Searches on a tiny network, timed by fakes whose names say how long a run takes."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from exporter.optimize import OptimizeOptions, Request
from exporter.recipe import Export, Model, Quantization


@pytest.fixture(scope="module")
def request_of(tiny):
    """A search of the tiny network among a few candidates."""

    def make(**options) -> Request:
        quantization = {name: options.pop(name) for name in ("data", "max_drop", "calib") if name in options}
        weights, form = options.pop("weights", tiny), options.pop("form", "linear")
        options = {"backend": ("onnxruntime",), "precision": ("fp32", "int8"), **options}
        return Request(
            model=Model(weights=str(weights)),
            export=Export(form=form),
            quantization=replace(Quantization(calib_size=8), **quantization),
            options=OptimizeOptions(duration=0.5, **options),
        )

    return make


@pytest.fixture(autouse=True, scope="module")
def two_cores():
    """However many this machine has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("exporter.machine.default_threads", lambda: 2)
        yield
