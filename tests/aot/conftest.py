"""tests/aot/compiled needs kernels that can be compiled: test_compiled.py runs it in processes of its own."""

from flux_kernels._triton import interpreting

collect_ignore = ["compiled"] if interpreting() else []
