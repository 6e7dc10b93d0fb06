"""xformerlib beside other libraries on the same work: ``python -m benchmarks --help``."""

import os

os.environ.setdefault(
    "KINETO_LOG_LEVEL", "5"
)  # read when torch is loaded: its profiler otherwise reports each start and stop
