"""Imported by the process that others are forked from, so that none of them has to import the libraries: seconds."""

import gc
import importlib
import os
from multiprocessing import forkserver
from pathlib import Path

import pytest

from exporter.bench import supervisor
from tests import once

for name in (
    "exporter.backends.onnxruntime", "exporter.backends.openvino",  # these switch off what would start threads
    "torch", "torch._dynamo", "torch.onnx._internal.exporter._core", "onnxscript.function_libs.torch_lib.ops",
    "onnxsim", "onnxruntime", "openvino", "safetensors.torch", "scipy.stats", "ruptures", "matplotlib.figure",
    "jinja2", "exporter.bench.worker", "exporter.cli",
):  # fmt: skip
    importlib.import_module(name)
if folder := os.environ.get(once.GRAPHS):
    patch = pytest.MonkeyPatch()
    once.keep_the_exporters_functions(patch)
    once.remember_traces(Path(folder), patch)
    once.remember_drawings(Path(folder), patch)
    once.time_in_two_processes(patch)
    once.fork_processes_of(supervisor, patch)
    forkserver._forkserver.ensure_running = lambda: None  # a forked process has others forked by the same one
gc.freeze()  # all of it lasts: a collection in a forked process, as before each timing, need not look at it
