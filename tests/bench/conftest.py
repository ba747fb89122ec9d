"""Tests of timing processes start them as the product does."""

import multiprocessing

import pytest

from exporter.bench import supervisor


@pytest.fixture(autouse=True, scope="package")
def timing_processes_are_spawned():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervisor, "multiprocessing", multiprocessing)
        yield
