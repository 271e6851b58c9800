"""Leave out tests/aot/compiled, whose kernels are compiled in processes of test_compiled.py."""

from flux_kernels._triton import interpreting

collect_ignore = ["compiled"] if interpreting() else []
