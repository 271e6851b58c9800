"""Listening to a model on its own inputs: what each compute mode costs in accuracy, and which channels are outliers."""
