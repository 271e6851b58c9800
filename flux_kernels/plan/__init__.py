"""The command plan: the types of all tensors within a number of bytes, and the report on them."""
