"""Compile-time report: what Triton made of each kernel, read from the machine code, without a GPU.

`python -m bench.aot --help`. compile.py builds a kernel for a card, sass.py reads the machine code, rates.py holds the named
throughputs, invariants.py decides what CI refuses.
"""
