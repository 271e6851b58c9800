"""Hold where results stand, and the package's ways to read and write them, for bench/ and tools/."""

from flux_kernels.benchmark.record import CHECKOUT as ROOT
from flux_kernels.benchmark.record import append_csv, origin, read_csv, write_csv

__all__ = ["AOT", "RESULTS", "ROOT", "append_csv", "origin", "read_csv", "write_csv"]

RESULTS = ROOT / "bench" / "results"
AOT = RESULTS / "aot.csv"  # the compile-time report's rows
