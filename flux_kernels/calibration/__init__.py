"""Measure a model on its own inputs: what each compute mode costs, and which channels are outliers."""
