"""Importing this makes timing as brief as can be, for experiments that ask other things than how fast a model is.

The process that timing processes are forked from imports it, so that it holds there too.
"""

from exporter.backends import _peak
from exporter.bench import supervisor, worker
from exporter.build.int8 import speed

speed.SECONDS_EACH, supervisor.PROCESSES, supervisor.REPEATS = 0.3, 2, 0
worker.WARM_UP_S = 0.02, 0.2
_peak.PRODUCTS, _peak.LARGE_PRODUCTS = _peak.PRODUCTS[:1], ()
