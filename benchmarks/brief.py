"""Import for short timings (0.3 seconds, two processes) in experiments that do not measure speed.

The process that timing processes are forked from imports it too.
"""

from exporter.backends import _peak
from exporter.bench import supervisor, worker
from exporter.build.int8 import speed

speed.SECONDS_EACH, supervisor.PROCESSES, supervisor.REPEATS = 0.3, 2, 0
worker.WARM_UP_S = 0.02, 0.2
_peak.PRODUCTS, _peak.LARGE_PRODUCTS = _peak.PRODUCTS[:1], ()
