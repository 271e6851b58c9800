"""Packed layers: linear, embedding and fused layers, their low-rank branch, and the memory they take."""
