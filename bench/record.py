"""Hold where results stand, and how they are read and written, for bench/ and tools/.

The code for rows and their origin is part of the package.
"""

from flux_kernels.benchmark.record import CHECKOUT as ROOT
from flux_kernels.benchmark.record import append_csv, origin, read_csv, write_csv

__all__ = ["AOT", "RESULTS", "ROOT", "append_csv", "origin", "read_csv", "write_csv"]

RESULTS = ROOT / "bench" / "results"
AOT = RESULTS / "aot.csv"  # the compile-time report's rows
