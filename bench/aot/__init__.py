"""Compile-time report: what Triton made of each kernel, read from the machine code, without a GPU.

`python -m bench.aot --help`. launches.py lists what the library launches, compile.py builds it for a card, sass.py reads the machine
code, report.py makes a row of it, recorder.py keeps the record, cards.py holds limits and rates, invariants.py decides what CI
refuses, model.py predicts from the rows.
"""
