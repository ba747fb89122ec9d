"""Timing processes that are started as the product starts them, for the tests of this."""

import multiprocessing

import pytest

from exporter.bench import supervisor


@pytest.fixture
def spawned(monkeypatch: pytest.MonkeyPatch):
    """Timing processes are new interpreters, which import the libraries."""
    monkeypatch.setattr(supervisor, "multiprocessing", multiprocessing)
