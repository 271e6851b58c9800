"""The command quantize: a model's tensors, their types, and the file they become."""
