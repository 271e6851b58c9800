"""Origin columns and CSV files, for everything under bench/ and tools/ (the code is part of the package)."""

from flux_kernels.benchmark.record import append_csv, origin, write_csv

__all__ = ["append_csv", "origin", "write_csv"]
